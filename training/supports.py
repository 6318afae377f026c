"""Supports to generate from: images that a user gives, or those of a run's classes."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from models.set_dit import SetDiTConfig
from training.archive import open_archive
from training.checkpoint import Snapshot
from training.episodes import Episodes, episodes_of_run
from training.images import decode_image
from training.inputs import open_training_data
from training.sets import SetDataset
from training.transforms import apply_transform


def read_support(locations: Sequence[str], model: SetDiTConfig) -> Episodes:
    """Return one episode of the images that ``locations`` name: files, folders or zips, in order.

    Images of another size are cropped to a square in the middle and resized, and become grayscale
    or RGB as the model needs. Raises ValueError if there is none, if one cannot be read, or if the
    model's encoder cannot take so many.
    """
    images = [image for location in locations for image in _read(Path(location), model)]
    if not images:
        raise ValueError(f"--support: {', '.join(locations)} holds no images.")
    if model.stacks_images and len(images) > model.context_size:
        raise ValueError(
            f"--support: got {len(images)} images, but this model's encoder stacks at most "
            f"{model.context_size}; give fewer."
        )
    return Episodes(
        supports=torch.stack(images)[None],
        classes=np.zeros(1, np.int64),
        class_names=("support",),
        labels=torch.tensor([model.num_classes]),
        indices=np.full((1, len(images)), -1),
        counts=(1,),
        reals=np.empty(0, np.int64),
        source="given images",
    )


def _read(path: Path, model: SetDiTConfig) -> Iterator[torch.Tensor]:
    """Yield the images of a file, folder or zip, uint8 [C, H, W]."""
    if not path.exists():
        raise ValueError(
            f"--support: {path} does not exist; give images, or folders or zips of them."
        )
    if path.is_dir() or path.suffix.lower() == ".zip":
        archive = open_archive(path)
        files = [(archive.label(i), archive.member(i).read) for i in range(len(archive))]
    else:
        files = [(str(path), path.read_bytes)]
    size = (model.resolution, model.resolution)
    for name, read in files:
        try:
            image = decode_image(read())
        except (OSError, ValueError) as error:
            raise ValueError(f"--support: {name}: not a readable image ({error}).") from None
        if image.size != size:
            image = apply_transform(image, size, "center-crop")
        image = image.convert("L" if model.img_channels == 1 else "RGB")
        array = np.array(image).reshape(*size, -1)
        yield torch.from_numpy(array).permute(2, 0, 1)


def episodes_of_snapshot(
    snapshot: Snapshot, split: str, num: int, *, data: str | None = None, seed: int = 0
) -> Episodes:
    """Return ``num`` episodes of a split of the data of a snapshot, of one class after another.

    Args:
        snapshot: Of a model of sets.
        split: ``seen`` (by held-out images), ``unseen`` or ``val``.
        num: Number of episodes.
        data: Where the data are now, if not where they were.
        seed: Seed of the choice.

    Raises ValueError if the data are not there, or have no such classes or too few images.
    """
    dataset = open_data_of(snapshot, data)
    size = snapshot.config.model.context_size
    once = episodes_of_run(dataset, split, support_size=size, num_per_class=1, seed=seed)
    num_classes = len(once)
    found = episodes_of_run(
        dataset, split, support_size=size, num_per_class=-(-num // num_classes), seed=seed
    )
    # Episodes of a class lie together; take the first of each class, then the second.
    order = np.arange(len(found)).reshape(num_classes, -1).T.flatten()[:num]
    return found[order.tolist()]


def open_data_of(snapshot: Snapshot, data: str | None = None) -> SetDataset:
    """Return the sets that a snapshot was trained on; ``data`` says where they are now.

    Raises ValueError if they are not there, or are other data.
    """
    config = snapshot.config
    location = data or config.data.data
    if location is None or not Path(location).exists():
        raise ValueError(
            f"--data: {location} does not exist; say where the data are that {snapshot.path} was "
            "trained on."
        )
    changed = dataclasses.replace(config.data, data=location, cache=False)
    dataset = open_training_data(dataclasses.replace(config, data=changed))
    if dataset.content_hash != snapshot.data.content_hash:
        raise ValueError(
            f"--data: {location} holds other data than {snapshot.path} was trained on (or a folder "
            "whose files were copied or touched), so that its split of classes is not known."
        )
    return dataset
