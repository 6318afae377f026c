"""Sets of images of one class, drawn as a function of (seed, position), and splits of classes."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.images.dataset import Cond, ImageDataset
from data.images.labels import CLASS_SPLITS
from dnnlib.config import Config, option
from dnnlib.ranges import parse_ranges
from torch_utils.rng import STREAM_DATA

_SPLIT_SEED, _HELD_OUT_SEED = 1, 2
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
    split_fractions: tuple[float, float, float] | None = option(
        None,
        min=0,
        max=1,
        help="Shares of classes for training, validation and test, chosen by --split-seed; none: "
        "the data's own split, or 0.6,0.2,0.2 without one.",
    )
    split_seed: int = option(0, help="Seed of the choice of classes and of held-out images.")
    held_out: int = option(
        100, min=0, help="Images of each class trained on that are kept for scores."
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
        None, min=1, help="Draw sets of this many to --sample-size images; none: full sets."
    )
    context_drop: float = option(
        0.0, min=0, max=1, help="Probability of training without the set, for guidance."
    )
    num_eval_batches: int = option(
        0,
        min=0,
        help="Batches of sets of validation classes whose loss is measured with every snapshot.",
        affects="speed",
    )
    compute_fid: bool = option(
        False, help="Compute fewshot_fid, as --metrics=fewshot_fid does.", affects="speed"
    )
    fid_num_samples: int = option(
        10_000, min=2, help="Images that the fewshot metrics generate, at most.", affects="speed"
    )
    diagnostics: bool = option(
        True,
        help="Tell every tick what context and gradients do, under debug/ names.",
        affects="speed",
    )
    kl_weight: float = option(1.0, min=0, help="Weight of a variational context's divergence.")
    kl_rampup: float = option(
        1920.0, min=0, help="Linear warm-up of that weight, in kimg (10,000 steps of 32 sets)."
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

    def classes(self, name: str) -> tuple[int, ...]:
        """Return the classes of ``train``, ``val`` or ``test``."""
        return getattr(self, name)


def split_classes(config: SetConfig, dataset: ImageDataset) -> ClassSplit:
    """Return which classes are trained on, validated on and unseen.

    By explicit lists; else by fractions; else as the dataset says; else by fractions of 0.6, 0.2
    and 0.2. Classes without images belong to none. Raises ValueError for a class that does not
    exist or is in two lists, or if none is left to train on.
    """
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
    lists = [getattr(config, f"{name}_classes") for name in CLASS_SPLITS]
    if any(lists):
        if config.split_fractions is not None:
            raise ValueError(
                "--split-fractions has no effect with lists of classes; leave it out, or give "
                "--train-classes=none --val-classes=none --test-classes=none."
            )
        parts = [
            tuple(dict.fromkeys(parse_ranges(f"--{name}-classes", names, dataset.class_names)))
            for name, names in zip(CLASS_SPLITS, lists, strict=True)
        ]
    elif config.split_fractions is None and dataset.class_splits:
        parts = [dataset.class_splits.get(name, ()) for name in CLASS_SPLITS]
    else:
        parts = _split_by_fractions(config, np.flatnonzero(counts))
    parts = [tuple(index for index in part if counts[index] > 0) for part in parts]
    seen: dict[int, str] = {}
    for name, part in zip(CLASS_SPLITS, parts, strict=True):
        for index in part:
            if index in seen:
                raise ValueError(
                    f"--{name}-classes: class {dataset.class_names[index]!r} is in "
                    f"--{seen[index]}-classes too; a class belongs to one of them."
                )
            seen[index] = name
    if not parts[0]:
        raise ValueError(
            f"{dataset.path}: no class is left to train on; give --train-classes, or larger "
            "--split-fractions."
        )
    return ClassSplit(*parts)


def _split_by_fractions(config: SetConfig, classes: np.ndarray) -> list[tuple[int, ...]]:
    fractions = config.split_fractions or (0.6, 0.2, 0.2)
    if sum(fractions) > 1 + 1e-6:
        raise ValueError(
            f"--split-fractions: got {','.join(f'{f:g}' for f in fractions)}, which sum to "
            f"{sum(fractions):g}; accepted: three shares of at most 1 together."
        )
    order = np.random.default_rng([config.split_seed % 2**64, _SPLIT_SEED]).permutation(classes)
    ends = np.round(np.cumsum([0.0, *fractions]) * len(classes)).astype(int)
    return [tuple(sorted(order[start:end].tolist())) for start, end in itertools.pairwise(ends)]


def transform_images(images: torch.Tensor, transform: int) -> torch.Tensor:
    """Return images [..., H, W] turned by ``transform`` % 4 quarters, mirrored first from 4 on."""
    if transform >= 4:
        images = images.flip(-1)
    return torch.rot90(images, transform % 4, (-2, -1))


class DrawnSet(NamedTuple):
    """What a set is made of: one class, or two halves of each image."""

    labels: list[int]  # One or two classes, among those trained on
    rows: np.ndarray  # [1 or 2, m], indices of images
    mirrored: np.ndarray  # [1 or 2, m], whether each is mirrored
    half: Callable[[int], tuple] | None  # Index of the second class's half of images of a size


_HALVES: tuple[Callable[[int], tuple], ...] = (
    lambda size: (..., slice(None, size // 2), slice(None)),
    lambda size: (..., slice(size // 2, None), slice(None)),
    lambda size: (..., slice(None), slice(None, size // 2)),
    lambda size: (..., slice(None), slice(size // 2, None)),
)


class SetDataset(Dataset):
    """Sets of one class: item p is ``(uint8 [n, C, H, W], {"label", "mask"})`` of set p of a run.

    The class is uniform, and its n images are drawn without replacement in random order, as a
    function of (seed, p) alone. A class with fewer images gives a smaller set, and so does
    ``min_sample_size``: ``mask`` [n] is then false for the places left empty, which are black, and
    is delivered only where that can happen. ``label`` is the index of the class among those trained
    on; of a hybrid, their number.

    Args:
        images: A labelled dataset.
        config: Which of its classes and images are trained on.
        sample_size: n.
        seed: Seed of the run.
        use_labels: Whether the model is conditioned on the class too.
        hflip: Mirror each drawn image with probability one half.
        classes: Draw sets of all images of these classes instead, as they are.

    Attributes:
        split: Which classes of ``images`` are for what.
        set_classes: Names of the classes trained on, transformed ones included.
        class_names, num_classes: The same with ``use_labels``; none without.
        held_out: Indices of the images of each class trained on that are kept for scores.
        num_images: Number of images trained on, each counted once for every transform.

    Raises ValueError if the data have no labels, or if a class keeps no image to train on.
    """

    def __init__(
        self,
        images: ImageDataset,
        config: SetConfig,
        *,
        sample_size: int,
        seed: int,
        use_labels: bool = False,
        hflip: bool = False,
        classes: Sequence[int] | None = None,
    ) -> None:
        self.images, self.config, self.sample_size = images, config, sample_size
        self._seed, self._hflip = seed, hflip
        self._hybrids = config.hybrids if classes is None else 0.0
        if images.labels is None:
            raise ValueError(
                f"{images.path}: has no class labels, which sets are made by; convert it with "
                "dataset_tool.py convert, which takes them from folder names."
            )
        if config.min_sample_size is not None and config.min_sample_size > sample_size:
            raise ValueError(
                f"--min-sample-size: got {config.min_sample_size}; accepted: at most "
                f"--sample-size, which is {sample_size}."
            )
        self.split = split_classes(config, images)
        if classes is None:
            self._check_transforms(hflip)
        self._pools: list[np.ndarray] = []
        self._transforms: list[int] = []
        self.set_classes: list[str] = []
        self.held_out: dict[int, np.ndarray] = {}
        num_held_out = config.held_out if classes is None else 0
        for index in self.split.train if classes is None else classes:
            order = self._shuffled(index)
            self.held_out[index] = np.sort(order[:num_held_out])
            pool = np.sort(order[num_held_out:])
            if len(pool) < 2:
                kept = f", of which {num_held_out} are kept for scores" if num_held_out else ""
                raise ValueError(
                    f"--held-out: class {images.class_names[index]!r} has {len(order)} images"
                    f"{kept}; {len(pool)} are left, too few for a set."
                )
            for transform in [0] if classes is not None else self.transforms_of(index):
                self._pools.append(pool)
                self._transforms.append(transform)
                suffix = f":{transform}" if transform else ""
                self.set_classes.append(images.class_names[index] + suffix)
        self.class_names = self.set_classes if use_labels else []

    def _check_transforms(self, hflip: bool) -> None:
        """Raise ValueError for transforms left out that are none, or that mirror images undo."""
        config = self.config
        every = transforms_of(config.class_transforms)
        if config.class_transforms != "none":
            for index, number in parse_transforms(config.skip_transforms, self.images.class_names):
                if index not in self.split.train or number not in every:
                    name = self.images.class_names[index]
                    raise ValueError(
                        f"--skip-transforms: got {name}:{number}, which is no class of this run; "
                        "leave it out."
                    )
        if hflip and len(every) > 4:
            raise ValueError(
                "--hflip puts mirror images into classes whose mirror images are classes of their "
                "own (--class-transforms=dihedral); give one of the two."
            )

    def of_classes(self, classes: Sequence[int]) -> "SetDataset":
        """Return sets of other classes of the same images."""
        return SetDataset(
            self.images,
            self.config,
            sample_size=self.sample_size,
            seed=self._seed,
            classes=classes,
        )

    def _shuffled(self, index: int) -> np.ndarray:
        rows = np.flatnonzero(self.images.labels == index)
        rng = np.random.default_rng([self.config.split_seed % 2**64, _HELD_OUT_SEED, index])
        return rng.permutation(rows)

    def __getattr__(self, name: str) -> Any:
        if name == "images":  # Not there yet while a copy is being made.
            raise AttributeError(name)
        return getattr(self.images, name)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def known_labels(self) -> dict[int, int]:
        """Label, for a class-conditional model, of each class of ``images`` that it knows."""
        names = {name: label for label, name in enumerate(self.class_names)}
        return {
            index: names[self.images.class_names[index]]
            for index in self.split.train
            if self.images.class_names[index] in names
        }

    @property
    def num_images(self) -> int:
        return sum(map(len, self._pools))

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Number of images of each class trained on."""
        return tuple(map(len, self._pools))

    def transforms_of(self, index: int) -> list[int]:
        """Return the transforms of a class of ``images`` that are classes trained on.

        A class that is not trained on is itself alone, transform 0.
        """
        if index not in self.split.train or self.config.class_transforms == "none":
            return [0]
        skipped = parse_transforms(self.config.skip_transforms, self.images.class_names)
        every = transforms_of(self.config.class_transforms)
        return [transform for transform in every if (index, transform) not in skipped]

    def summary(self) -> None:
        """Return nothing: what a snapshot keeps of sets is in the configuration of its run."""

    def preview(self, num: int) -> list[list[torch.Tensor]]:
        """Return the first sets of a run, a row each, until they have ``num`` images."""
        batch, _ = self.__getitems__(range(-(-num // self.sample_size)))
        return [list(images) for images in batch]

    @property
    def is_ragged(self) -> bool:
        """Whether sets may hold fewer than n images."""
        smallest = min(map(len, self._pools))
        return self.config.min_sample_size is not None or smallest < self.sample_size

    def draw(self, position: int) -> DrawnSet:
        """Return what the set at a position is made of."""
        rng = np.random.default_rng([self._seed % 2**64, STREAM_DATA, position])
        labels = [int(rng.integers(len(self._pools)))]
        half = None
        if rng.random() < self._hybrids and len(self._pools) > 1:
            other = int(rng.integers(len(self._pools) - 1))
            labels.append(other + (other >= labels[0]))
            half = _HALVES[rng.integers(len(_HALVES))]
        size = self.sample_size
        if self.config.min_sample_size is not None:
            size = int(rng.integers(self.config.min_sample_size, size + 1))
        pools = [self._pools[label] for label in labels]
        size = min(size, *map(len, pools))
        rows = np.stack([rng.choice(pool, size, replace=False) for pool in pools])
        mirrored = rng.random(rows.shape) < 0.5 if self._hflip else np.zeros(rows.shape, bool)
        return DrawnSet(labels, rows, mirrored, half)

    def __getitems__(self, positions: Sequence[int]) -> tuple[torch.Tensor, Cond]:
        """Return a batch ``(uint8 [b, n, C, H, W], {"label": int64 [b], "mask": bool [b, n]})``."""
        drawn = [self.draw(position) for position in positions]
        pixels, _ = self.images.__getitems__(np.concatenate([d.rows.flatten() for d in drawn]))
        sets = pixels.new_zeros(len(drawn), self.sample_size, *pixels.shape[1:])
        mask = torch.zeros(len(drawn), self.sample_size, dtype=torch.bool)
        parts = iter(pixels.split([d.rows.shape[1] for d in drawn for _ in d.labels]))
        for row, it in enumerate(drawn):
            size = it.rows.shape[1]
            for label, mirrored in zip(it.labels, it.mirrored, strict=True):
                own = next(parts)
                flips = torch.from_numpy(mirrored)[:, None, None, None]
                own = transform_images(
                    torch.where(flips, own.flip(-1), own), self._transforms[label]
                )
                # The second class of a hybrid covers half of the first.
                area = ... if label == it.labels[0] else it.half(self.images.resolution)
                sets[row, :size][area] = own[area]
            mask[row, :size] = True
        labels = [d.labels[0] if d.half is None else len(self._pools) for d in drawn]
        cond = {"label": torch.tensor(labels)}
        return sets, {**cond, "mask": mask} if self.is_ragged else cond


def transforms_of(name: str) -> range:
    """Return the numbers of ``--class-transforms``: quarters of a turn, from 4 on after a flip."""
    return range({"none": 1, "rotations": 4, "dihedral": NUM_TRANSFORMS}[name])


def parse_transforms(texts: Sequence[str], names: Sequence[str]) -> set[tuple[int, int]]:
    """Return (class, transform) of each text such as ``6:2``; raises ValueError for others."""
    found = set()
    for text in texts:
        name, colon, transform = text.rpartition(":")
        if not colon or transform not in map(str, range(1, NUM_TRANSFORMS)):
            raise ValueError(
                f"--skip-transforms: got {text!r}; accepted: class:transform with a transform "
                f"from 1 to {NUM_TRANSFORMS - 1}, such as 6:2."
            )
        for index in parse_ranges("--skip-transforms", [name], names):
            found.add((index, int(transform)))
    return found
