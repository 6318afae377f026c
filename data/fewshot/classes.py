"""Which classes a run trains, validates and tests on, and classes made by transforming them."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from data.fewshot.config import SetConfig
from data.images.dataset import ImageDataset
from data.images.labels import CLASS_SPLITS
from dnnlib.errors import refusal
from dnnlib.text import parse_ranges

_SPLIT_SEED = 1
NUM_TRANSFORMS = 8


@dataclasses.dataclass(frozen=True)
class ClassSplit:
    """Disjoint class indices to train on, to validate on and to test on."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


def split_classes(config: SetConfig, dataset: ImageDataset) -> ClassSplit:
    """Return which classes are for training, for validation and for testing.

    The configuration's lists of classes decide, or else its fractions, or else the dataset's own
    split, or else fractions of 0.6, 0.2 and 0.2. Classes without images are left out. Raises
    ValueError if a class does not exist or is in two lists, if none is left to train on, or if a
    preset's lists are meant for other classes.
    """
    if config.rules_for and config.rules_for != tuple(dataset.class_names):
        but = f"the preset has rules for the classes {', '.join(config.rules_for)}, which"
        remedy = "give yours with --train-classes, --test-classes and --skip-transforms (or none)"
        raise refusal("--data", but=f"{but} {dataset.path} does not have", remedy=remedy)
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
    """Return images [..., H, W] under one of the eight symmetries of a square.

    Transforms 0 to 3 are that many counter-clockwise quarter turns; 4 to 7 flip left to right, then
    make ``transform`` - 4 quarter turns.
    """
    if transform >= 4:
        images = images.flip(-1)
    return torch.rot90(images, transform % 4, (-2, -1))


def transforms_of(name: str) -> range:
    """Return the transforms of ``--class-transforms``, as :func:`transform_images` takes them."""
    return range({"none": 1, "rotations": 4, "dihedral": NUM_TRANSFORMS}[name])


def parse_transforms(texts: Sequence[str], names: Sequence[str]) -> set[tuple[int, int]]:
    """Return the (class, transform) pairs of texts such as ``6:2``; ValueError for other texts."""
    found = set()
    for text in texts:
        name, colon, transform = text.rpartition(":")
        if not colon or transform not in map(str, range(1, NUM_TRANSFORMS)):
            accepted = f"class:transform with a transform from 1 to {NUM_TRANSFORMS - 1}"
            raise refusal("--skip-transforms", repr(text), accepted=f"{accepted}, such as 6:2")
        classes = parse_ranges("--skip-transforms", [name], names)
        found |= {(index, int(transform)) for index in classes}
    return found
