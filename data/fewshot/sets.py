"""Sets of images of one class, each drawn as a function of (seed, position)."""

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
    """The m images of a set: all of one class, or each a hybrid with a half from either class."""

    labels: list[int]  # One class, or the two of a hybrid, as indices into those trained on.
    rows: np.ndarray  # int64 [1 or 2, m], indices of the images.
    mirrored: np.ndarray  # bool [1 or 2, m], whether each is mirrored.
    half: Callable[[int], tuple] | None  # Image size -> index of the half of the second class.


_HALVES: tuple[Callable[[int], tuple], ...] = (
    lambda size: (..., slice(None, size // 2), slice(None)),
    lambda size: (..., slice(size // 2, None), slice(None)),
    lambda size: (..., slice(None), slice(None, size // 2)),
    lambda size: (..., slice(None), slice(size // 2, None)),
)


class SetDataset(Dataset):
    """Sets of n images of one class: item p is ``(uint8 [n, C, H, W], {"label", "mask"})``.

    Set p of a run is a function of (seed, p) alone: its class is drawn uniformly, and its images
    without replacement, in random order. Sets are smaller if a class has fewer images, or with
    ``min_sample_size``. Then ``mask``, bool [n], is false for the unused places, whose images are
    black; it is delivered only if some sets can be smaller. ``label`` is the index of the class
    among those trained on, or the number of those classes for a hybrid.

    Args:
        images: A labelled dataset.
        config: Which of its classes and images are trained on.
        sample_size: Number of images in a full set, n.
        seed: Seed of the run.
        use_labels: Whether the model is conditioned on the class too.
        hflip: Mirror each drawn image with probability 1/2.
        classes: Instead of the classes trained on, draw sets from all images of these classes,
            without transforms or hybrids.
        validation_share: Hold out this share of the images, chosen by their contents, instead of
            ``config.held_out`` images of each class.

    Raises ValueError if the data have no labels, or if a class keeps fewer than two images.
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
        self.split = split_classes(config, images)  # What each class of the images is for.
        self._check_transforms(hflip)
        self._pools: list[np.ndarray] = []
        self._transforms: list[int] = []
        self.set_classes: list[str] = []  # Names of the classes trained on, transformed too.
        self.held_out: dict[int, np.ndarray] = {}  # Indices held out for scores, by class.
        by_content = images.held_out_rows(validation_share) if validation_share else None
        for index in self.split.train if classes is None else classes:
            self.held_out[index], pool = self._split_class(index, by_content)
            for transform in self.transforms_of(index):
                self._pools.append(pool)
                self._transforms.append(transform)
                suffix = f":{transform}" if transform else ""
                self.set_classes.append(images.class_names[index] + suffix)
        self.class_names = self.set_classes if use_labels else []

    def _split_class(
        self, index: int, by_content: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the images held out and trained on of a class, both ascending.

        Raises ValueError if fewer than two are left to train on.
        """
        rows = np.flatnonzero(self.images.labels == index)
        name = self.images.class_names[index]
        if len(rows) < 2:
            but = f"class {name!r} has fewer than the two images that a set needs"
            raise refusal(self.images.path, but=but, remedy="leave it out, or add images to it")
        if by_content is None:
            rng = np.random.default_rng([self.config.split_seed % 2**64, _HELD_OUT_SEED, index])
            chosen = np.isin(rows, rng.permutation(rows)[: self.config.held_out])
        else:
            chosen = by_content[rows]
        held_out, kept = rows[chosen], rows[~chosen]
        if len(kept) < 2:
            option = "--held-out" if by_content is None else "--validation-share"
            held = f"class {name!r} has {len(rows)} images, of which {len(held_out)} are"
            remedy = f"{len(kept)} are left, too few for a set, so give a smaller value"
            raise refusal(option, but=f"{held} kept for scores", remedy=remedy)
        return held_out, kept

    def _check_transforms(self, hflip: bool) -> None:
        """Raise ValueError if ``skip_transforms`` names no class or ``hflip`` would mix classes."""
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
        """Return sets of all images of some other classes of the same dataset."""
        settings = dict(sample_size=self.sample_size, seed=self._seed)
        return SetDataset(self.images, self.config, classes=classes, **settings)

    def plain(self, *, held_out: bool, seed: int) -> "SetDataset":
        """Return full sets of the classes trained on, without hybrids and mirror images.

        Their images are those trained on, or those ``held_out``. Set p of both is of the same class
        if they have the same ``seed``. A class without held-out images gives empty sets.
        """
        part = copy.copy(self)
        part.config = dataclasses.replace(self.config, hybrids=0.0, min_sample_size=None)
        part._seed, part._hflip = seed, False
        if held_out:
            pools = ([rows] * len(self.transforms_of(i)) for i, rows in self.held_out.items())
            part._pools = list(itertools.chain.from_iterable(pools))
        return part

    def __getattr__(self, name: str) -> Any:
        if name == "images":  # Not set yet while a copy is made: asking for it would recurse.
            raise AttributeError(name)
        return getattr(self.images, name)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def known_labels(self) -> dict[int, int]:
        """Label of each class that a class-conditional model knows, by its index in ``images``."""
        names, labels = self.images.class_names, self.class_names
        known = [index for index in self.split.train if names[index] in labels]
        return {index: labels.index(names[index]) for index in known}

    @property
    def num_images(self) -> int:
        """Number of images trained on, each counted once per transform of its class."""
        return sum(map(len, self._pools))

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Number of images of each class trained on, transformed classes included."""
        return tuple(map(len, self._pools))

    def transforms_of(self, index: int) -> list[int]:
        """Return the transforms by which a class of ``images`` is trained on as separate classes.

        A class that is not trained on has only transform 0, the identity.
        """
        every = transforms_of(self.config.class_transforms)
        if index not in self.split.train or len(every) == 1:
            return [0]
        skipped = parse_transforms(self.config.skip_transforms, self.images.class_names)
        return [transform for transform in every if (index, transform) not in skipped]

    def summary(self) -> None:
        """Return None: a snapshot describes sets by the configuration of its run."""

    def preview(self, num: int) -> Preview:
        """Return the first sets of a run, one per row: as many as ``num`` images need."""
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
        """Return the classes and images of the set at a position of the run."""
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
        """Average number of bytes to download per set; 0 for local data."""
        return self.images.remote_bytes * self.sample_size

    def prefetch(self, positions: Sequence[int]) -> None:
        """Start fetching the images of some sets in the background, if they are remote."""
        rows = [row for position in positions for row in self.draw(position).rows.flatten()]
        self.images.prefetch(rows)

    def __getitems__(self, positions: Sequence[int]) -> tuple[torch.Tensor, Cond]:
        """Return a batch ``(uint8 [B, n, C, H, W], {"label": int64 [B], "mask": bool [B, n]})``."""
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
