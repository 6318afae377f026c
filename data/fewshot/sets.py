"""Sets of images of one class, drawn as a function of (seed, position)."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.fewshot.classes import parse_transforms, split_classes, transform_images, transforms_of
from data.fewshot.config import SetConfig
from data.images.dataset import Cond, ImageDataset
from data.preview import Preview
from dnnlib.errors import refusal
from torch_utils.pictures import Titles
from torch_utils.rng import STREAM_DATA

_HELD_OUT_SEED = 2


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
        validation_share: Hold out this share of the images, by their contents, in place of
            ``config.held_out`` of each class.

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
        validation_share: float = 0.0,
    ) -> None:
        if classes is not None:
            plain = dict(hybrids=0.0, held_out=0, class_transforms="none", skip_transforms=())
            config = dataclasses.replace(config, **plain)
        self.images, self.config, self.sample_size = images, config, sample_size
        self._seed, self._hflip = seed, hflip
        if images.labels is None:
            problem = "has no class labels, which sets are formed by"
            remedy = "convert it with dataset_tool.py convert, which takes them from folder names"
            raise refusal(images.path, but=problem, remedy=remedy)
        if config.min_sample_size is not None and config.min_sample_size > sample_size:
            accepted = f"at most --sample-size, which is {sample_size}"
            raise refusal("--min-sample-size", config.min_sample_size, accepted=accepted)
        self.split = split_classes(config, images)  # Which classes of the images are for what.
        self._check_transforms(hflip)
        self._pools: list[np.ndarray] = []
        self._transforms: list[int] = []
        self.set_classes: list[str] = []  # Names of those trained on, with transformed ones.
        self.held_out: dict[int, np.ndarray] = {}  # Indices kept for scores, by class trained on.
        by_content = images.held_out_rows(validation_share) if validation_share else None
        for index in self.split.train if classes is None else classes:
            self.held_out[index], pool = self._split_class(index, by_content)
            if len(pool) < 2:
                num_kept = len(self.held_out[index])
                held = f"class {images.class_names[index]!r} has {num_kept + len(pool)} images"
                held += f", of which {num_kept} are kept for scores" * (num_kept > 0)
                remedy = f"{len(pool)} are left, too few for a set"
                option = "--held-out" if by_content is None else "--validation-share"
                raise refusal(option, but=held, remedy=remedy)
            for transform in self.transforms_of(index):
                self._pools.append(pool)
                self._transforms.append(transform)
                suffix = f":{transform}" if transform else ""
                self.set_classes.append(images.class_names[index] + suffix)
        self.class_names = self.set_classes if use_labels else []

    def _split_class(
        self, index: int, by_content: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which images of a class are held out, and which are trained on, both ascending."""
        rows, config = np.flatnonzero(self.images.labels == index), self.config
        if by_content is not None:
            return rows[by_content[rows]], rows[~by_content[rows]]
        rng = np.random.default_rng([config.split_seed % 2**64, _HELD_OUT_SEED, index])
        order = rng.permutation(rows)
        return np.sort(order[: config.held_out]), np.sort(order[config.held_out :])

    def _check_transforms(self, hflip: bool) -> None:
        """Raise ValueError for transforms left out that are none, or that mirror images undo."""
        every = transforms_of(self.config.class_transforms)
        if len(every) > 1:
            names = self.images.class_names
            for index, number in parse_transforms(self.config.skip_transforms, names):
                if index not in self.split.train or number not in every:
                    got = f"{names[index]}:{number}, which is not a class of this run"
                    raise refusal("--skip-transforms", got, remedy="leave it out")
        if hflip and len(every) > 4:
            problem = "puts mirror images into classes whose mirror images are classes of their own"
            remedy = "(--class-transforms=dihedral); give one of the two"
            raise ValueError(f"--hflip {problem} {remedy}.")

    def of_classes(self, classes: Sequence[int]) -> "SetDataset":
        """Return sets of other classes of the same images."""
        settings = dict(sample_size=self.sample_size, seed=self._seed)
        return SetDataset(self.images, self.config, classes=classes, **settings)

    def plain(self, *, held_out: bool, seed: int) -> "SetDataset":
        """Return full sets of the classes trained on, as they are: no hybrids, no mirror images.

        They are of the images trained on, or of those ``held_out``. Of both, set p is of one class,
        by ``seed``. A class of which nothing is held out gives empty sets.
        """
        part = copy.copy(self)
        part.config = dataclasses.replace(self.config, hybrids=0.0, min_sample_size=None)
        part._seed, part._hflip = seed, False
        if held_out:
            pools = ([rows] * len(self.transforms_of(i)) for i, rows in self.held_out.items())
            part._pools = list(itertools.chain.from_iterable(pools))
        return part

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
        names, labels = self.images.class_names, self.class_names
        known = [index for index in self.split.train if names[index] in labels]
        return {index: labels.index(names[index]) for index in known}

    @property
    def num_images(self) -> int:
        """Number of images trained on, each counted once for every transform."""
        return sum(map(len, self._pools))

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Number of images of each class trained on."""
        return tuple(map(len, self._pools))

    def transforms_of(self, index: int) -> list[int]:
        """Return the transforms of a class of ``images`` that are classes trained on.

        A class that is not trained on is itself alone, transform 0.
        """
        every = transforms_of(self.config.class_transforms)
        if index not in self.split.train or len(every) == 1:
            return [0]
        skipped = parse_transforms(self.config.skip_transforms, self.images.class_names)
        return [transform for transform in every if (index, transform) not in skipped]

    def summary(self) -> None:
        """Return nothing: what a snapshot keeps of sets is in the configuration of its run."""

    def preview(self, num: int) -> Preview:
        """Return the first sets of a run, a row each, until they have ``num`` images."""
        positions = range(-(-num // self.sample_size))
        batch, _ = self.__getitems__(positions)
        drawn = [self.draw(position).labels for position in positions]
        names = [" and ".join(self.set_classes[label] for label in labels) for labels in drawn]
        return Preview([list(images) for images in batch], Titles(rows=names))

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
        if rng.random() < self.config.hybrids and len(self._pools) > 1:
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

    @property
    def remote_bytes(self) -> float:
        """Bytes that a set takes from a server, on average; 0 of local data."""
        return self.images.remote_bytes * self.sample_size

    def prefetch(self, positions: Sequence[int]) -> None:
        """Have the images of sets fetched in the background, if they are at an address."""
        rows = [row for position in positions for row in self.draw(position).rows.flatten()]
        self.images.prefetch(rows)

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
                own, flips = next(parts), torch.from_numpy(mirrored)[:, None, None, None]
                own = torch.where(flips, own.flip(-1), own)
                own = transform_images(own, self._transforms[label])
                # The second class of a hybrid covers half of the first.
                area = ... if label == it.labels[0] else it.half(self.images.resolution)
                sets[row, :size][area] = own[area]
            mask[row, :size] = True
        labels = [d.labels[0] if d.half is None else len(self._pools) for d in drawn]
        cond = {"label": torch.tensor(labels)}
        return sets, {**cond, "mask": mask} if self.is_ragged else cond
