"""Few-shot episodes: supports, images to generate from them, and real images to compare."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.fewshot.sets import SetDataset
from data.images.dataset import ImageDataset

_SEED = 3
_MAX_EPISODES = 20
# By default, supports take one image in this many of a class, or one support if the class is small;
# the other images are the reals that scores compare with.
_SUPPORT_SHARE = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes:
    """S supports of k images each; no image is in two supports."""

    supports: torch.Tensor  # uint8 [S, k, C, H, W].
    classes: np.ndarray  # int64 [S], class of each support in its dataset.
    class_names: tuple[str, ...]  # Of all classes of that dataset.
    labels: torch.Tensor  # int64 [S], label in a class-conditional model; num_classes: none.
    indices: np.ndarray  # int64 [S, k], of the images in their dataset; -1 for a user's images.
    # Relative number of images to generate for each episode: the number of real images of its class
    # that are in no support, divided evenly among the episodes of the class.
    counts: tuple[int, ...]
    reals: np.ndarray  # int64 [R], indices of those real images in their dataset, by class.
    source: str  # Description of the supports for score rows.

    def __len__(self) -> int:
        return len(self.supports)

    def __getitem__(self, rows: Sequence[int]) -> "Episodes":
        names = ("supports", "classes", "labels", "indices")
        chosen = {name: getattr(self, name)[list(rows)] for name in names}
        return dataclasses.replace(self, counts=tuple(self.counts[i] for i in rows), **chosen)

    def protocol(self) -> dict[str, Any]:
        """Return what a score row records about the episodes."""
        digest = hashlib.sha256(self.supports.numpy().tobytes()).hexdigest()[:16]
        size = dict(num_episodes=len(self), support_size=self.supports.shape[1])
        return dict(episodes=self.source, **size, supports_hash=digest)


def draw_episodes(
    images: ImageDataset,
    pools: dict[int, np.ndarray],
    *,
    support_size: int,
    source: str,
    num_per_class: int | None = None,
    known_labels: dict[int, int] | None = None,
    null_label: int = 0,
    seed: int = 0,
) -> Episodes:
    """Return episodes of the classes in ``pools``, with randomly chosen disjoint supports.

    Args:
        images: The dataset of the images.
        pools: Indices of the images that may be used, int64 [M], by class. Classes without any
            have no episodes.
        support_size: Number of images in a support, k.
        source: Description of the pools, for messages and score rows.
        num_per_class: Episodes of each class; by default as many, from 1 to 20, as use a fifth of
            its pool.
        known_labels: Labels of the classes that a class-conditional model knows; all others get
            ``null_label``.
        seed: Seed of the choice.

    Raises ValueError if a class has too few images, or if there are no images at all.
    """
    chosen, classes, labels, counts, reals = [], [], [], [], []
    for index, pool in pools.items():
        if not len(pool):
            continue
        num = num_per_class
        if num is None:
            num = min(max(len(pool) // (_SUPPORT_SHARE * support_size), 1), _MAX_EPISODES)
        if num * support_size > len(pool):
            held = f"Class {images.class_names[index]!r} has {len(pool)} {source} images"
            problem = f"too few for {num} support(s) of {support_size}"
            raise ValueError(f"{held}, {problem}; ask for fewer or smaller ones.")
        order = np.random.default_rng([seed % 2**64, _SEED, index]).permutation(pool)
        used, left = order[: num * support_size], np.sort(order[num * support_size :])
        chosen.append(used.reshape(num, support_size))
        classes += [index] * num
        labels += [(known_labels or {}).get(index, null_label)] * num
        counts += [len(part) for part in np.array_split(left, num)]
        reals.append(left)
    if not chosen:
        raise ValueError(f"There are no {source} classes to draw supports from.")
    indices = np.concatenate(chosen)
    pixels, _ = images.__getitems__(indices.flatten().tolist())
    return Episodes(
        supports=pixels.unflatten(0, indices.shape),
        classes=np.array(classes),
        class_names=tuple(images.class_names),
        labels=torch.tensor(labels),
        indices=indices,
        counts=tuple(counts),
        reals=np.concatenate(reals),
        source=source,
    )


def episodes_of_run(dataset: SetDataset, protocol: str, **settings: Any) -> Episodes:
    """Return episodes of a run's data; ``settings`` are arguments of :func:`draw_episodes`.

    The protocol ``seen`` uses the held-out images of the classes trained on, ``unseen`` the test
    classes, and ``val`` the validation classes. Raises ValueError if the run has none of those.
    """
    images, split = dataset.images, {"unseen": "test", "val": "val"}.get(protocol)
    if split is None:
        pools = dataset.held_out
        if not any(map(len, pools.values())):
            raise ValueError("The run held out no images of its classes (--held-out=0).")
    else:
        pools = _images_by_class(images, getattr(dataset.split, split))
        if not pools:
            remedy = f"name some with --{split}-classes, or choose other --split-fractions"
            raise ValueError(f"The run has no {protocol} classes; {remedy}.")
    labels = dict(known_labels=dataset.known_labels, null_label=dataset.num_classes)
    return draw_episodes(images, pools, source=protocol, **labels, **settings)


def episodes_of_dataset(images: ImageDataset, **settings: Any) -> Episodes:
    """Return episodes of a dataset that no run owns: of its test classes, or else of all classes.

    ``settings`` are arguments of :func:`draw_episodes`.
    """
    classes = images.class_splits.get("test")
    source = f"{images.name}, {'test' if classes else 'all'} classes"
    pools = _images_by_class(images, classes or range(images.num_classes))
    return draw_episodes(images, pools, source=source, **settings)


def _images_by_class(images: ImageDataset, classes: Sequence[int]) -> dict[int, np.ndarray]:
    return {index: np.flatnonzero(images.labels == index) for index in classes}
