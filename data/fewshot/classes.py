"""Which classes a run is trained on, validated on and tested on, and what is made of them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from data.images.dataset import ImageDataset
from data.images.labels import CLASS_SPLITS
from dnnlib.config import Config, option
from dnnlib.errors import refusal
from dnnlib.text import parse_ranges

_SPLIT_SEED = 1
NUM_TRANSFORMS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetConfig(Config):
    """Which classes and images sets are made of, and how their context is trained."""

    title: ClassVar[str] = "Sets and their context"

    train_classes: tuple[str, ...] = option(
        (), help="Classes to train on, by name or index (0-7); none: see --split-fractions."
    )
    val_classes: tuple[str, ...] = option((), help="Classes kept for validation.")
    test_classes: tuple[str, ...] = option((), help="Unseen classes, on which a run is scored.")
    rules_for: tuple[str, ...] = option(
        (),
        exposed=False,
        affects="speed",
        help="Names of the only classes that a preset's lists of classes are meant for; none: any.",
    )
    split_fractions: tuple[float, float, float] | None = option(
        None,
        min=0,
        max=1,
        help="Shares of classes for training, validation and test, chosen by --split-seed; none: "
        "the data's own split, or 0.6,0.2,0.2 without one.",
    )
    split_seed: int = option(
        0, min=-(2**63), max=2**63 - 1, help="Seed of the choice of classes and of held-out images."
    )
    held_out: int = option(
        100,
        min=0,
        max=1_000_000_000,
        help="Images of each class trained on that are kept for scores.",
    )
    class_transforms: str = option(
        "none",
        choices=("none", "rotations", "dihedral"),
        help="Make each turn (rotations), or turn and mirror image (dihedral), of a class another "
        "class to train on.",
    )
    skip_transforms: tuple[str, ...] = option(
        (),
        unless={"class_transforms": ("none",)},
        help="Transformed classes to leave out, such as 6:2 for class 6 turned twice; 4 to 7 are "
        "the mirror images.",
    )
    hybrids: float = option(
        0.0,
        min=0,
        max=1,
        help="Share of sets of hybrid classes: half of each image is of one class and half of "
        "another, the same two throughout the set.",
    )
    min_sample_size: int | None = option(
        None,
        min=1,
        max=1_000,
        help="Draw sets of this many to --sample-size images; none: full sets.",
    )
    context_drop: float = option(
        0.0, min=0, max=1, help="Probability of training without the set, for guidance."
    )
    num_eval_batches: int = option(
        0,
        min=0,
        max=1_000_000,
        help="Batches of sets of validation classes whose loss is measured with every snapshot.",
        affects="speed",
    )
    compute_fid: bool = option(
        False, help="Compute fewshot_fid, as --metrics=fewshot_fid does.", affects="speed"
    )
    fid_num_samples: int = option(
        10_000,
        min=2,
        max=10_000_000,
        help="Images that the fewshot metrics generate, at most.",
        affects="speed",
    )
    diagnostics: bool = option(
        True,
        help="Log statistics of the context and gradients every tick, under debug/.",
        affects="speed",
    )
    kl_weight: float = option(1.0, min=0, help="Weight of a variational context's divergence.")
    kl_rampup: float = option(
        1920.0,
        min=0,
        max=1e9,
        help="Linear warm-up of that weight, in kimg (10,000 steps of 32 sets).",
    )
    kl_scale: str = option(
        "dimensions",
        choices=("dimensions", "elbo"),
        help="Divergence per dimension of the context, or its weight in a bound in bits per "
        "dimension of the image (the other part stays the training loss).",
    )


@dataclasses.dataclass(frozen=True)
class ClassSplit:
    """Disjoint class indices, by what they are for."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


def split_classes(config: SetConfig, dataset: ImageDataset) -> ClassSplit:
    """Return which classes are trained on, validated on and unseen.

    By explicit lists; else by fractions; else as the dataset says; else by fractions of 0.6, 0.2
    and 0.2. Classes without images belong to none. Raises ValueError for a class that does not
    exist or is in two lists, if none is left to train on, or if a preset's lists are for others.
    """
    if config.rules_for and config.rules_for != tuple(dataset.class_names):
        but = f"the preset has rules for the classes {', '.join(config.rules_for)}, which"
        remedy = "state yours with --train-classes, --test-classes and --skip-transforms (or none)"
        raise refusal("--data", but=f"{but} {dataset.path} has not", remedy=remedy)
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
    lists = [getattr(config, f"{name}_classes") for name in CLASS_SPLITS]
    if any(lists):
        if config.split_fractions is not None:
            remedy = "or give --train-classes=none --val-classes=none --test-classes=none"
            problem = "--split-fractions has no effect with lists of classes; leave it out"
            raise ValueError(f"{problem}, {remedy}.")
        parts = [
            tuple(dict.fromkeys(parse_ranges(f"--{name}-classes", names, dataset.class_names)))
            for name, names in zip(CLASS_SPLITS, lists, strict=True)
        ]
    elif config.split_fractions is None and dataset.class_splits:
        parts = [dataset.class_splits.get(name, ()) for name in CLASS_SPLITS]
    else:
        parts = _split_by_fractions(config, np.flatnonzero(counts))
    parts = [tuple(index for index in part if counts[index] > 0) for part in parts]
    for (i, name), (j, other) in itertools.combinations(enumerate(CLASS_SPLITS), 2):
        for index in sorted({*parts[i]} & {*parts[j]}):
            problem = f"class {dataset.class_names[index]!r} is in --{name}-classes too"
            remedy = "a class belongs to one of them"
            raise refusal(f"--{other}-classes", but=problem, remedy=remedy)
    if not parts[0]:
        remedy = "give --train-classes, or larger --split-fractions"
        raise refusal(dataset.path, but="no class is left to train on", remedy=remedy)
    return ClassSplit(*parts)


def _split_by_fractions(config: SetConfig, classes: np.ndarray) -> list[tuple[int, ...]]:
    fractions = config.split_fractions or (0.6, 0.2, 0.2)
    if sum(fractions) > 1 + 1e-6:
        got = f"{','.join(f'{f:g}' for f in fractions)}, which sum to {sum(fractions):g}"
        raise refusal("--split-fractions", got, accepted="three shares of at most 1 together")
    order = np.random.default_rng([config.split_seed % 2**64, _SPLIT_SEED]).permutation(classes)
    ends = np.round(np.cumsum([0.0, *fractions]) * len(classes)).astype(int)
    return [tuple(sorted(order[start:end].tolist())) for start, end in itertools.pairwise(ends)]


def transform_images(images: torch.Tensor, transform: int) -> torch.Tensor:
    """Return images [..., H, W] turned by ``transform`` % 4 quarters, mirrored first from 4 on."""
    if transform >= 4:
        images = images.flip(-1)
    return torch.rot90(images, transform % 4, (-2, -1))


def transforms_of(name: str) -> range:
    """Return the numbers of ``--class-transforms``: quarters of a turn, from 4 on after a flip."""
    return range({"none": 1, "rotations": 4, "dihedral": NUM_TRANSFORMS}[name])


def parse_transforms(texts: Sequence[str], names: Sequence[str]) -> set[tuple[int, int]]:
    """Return (class, transform) of each text such as ``6:2``; raises ValueError for others."""
    found = set()
    for text in texts:
        name, colon, transform = text.rpartition(":")
        if not colon or transform not in map(str, range(1, NUM_TRANSFORMS)):
            accepted = f"class:transform with a transform from 1 to {NUM_TRANSFORMS - 1}"
            raise refusal("--skip-transforms", repr(text), accepted=f"{accepted}, such as 6:2")
        classes = parse_ranges("--skip-transforms", [name], names)
        found |= {(index, int(transform)) for index in classes}
    return found
