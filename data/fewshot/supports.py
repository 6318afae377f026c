"""Supports of a user: images from files, folders and zips, to generate from."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data.fewshot.episodes import Episodes
from data.images.archive import open_archive
from data.images.decode import decode_image
from data.images.transforms import apply_transform
from dnnlib.errors import refusal
from dnnlib.files import check_source
from models.architectures.set_dit import SetDiTConfig


def read_support(locations: Sequence[str], model: SetDiTConfig) -> Episodes:
    """Return one episode whose support is all images in ``locations``: files, folders or zips.

    Images of another size are centre-cropped to a square and resized, and all become grayscale or
    RGB as the model needs. Raises ValueError if there are no images, if one cannot be read, or if
    there are more than the model's encoder can take.
    """
    images = [image for location in locations for image in _read(Path(location), model)]
    if not images:
        raise ValueError(f"--support: {', '.join(locations)} holds no images.")
    if model.stacks_images and len(images) > model.num_places:
        problem = f"this model's encoder stacks at most {model.num_places}"
        raise refusal("--support", f"{len(images)} images", but=problem, remedy="give fewer")
    one_class = dict(classes=np.zeros(1, np.int64), class_names=("support",), counts=(1,))
    return Episodes(
        supports=torch.stack(images)[None],
        labels=torch.tensor([model.num_classes]),
        indices=np.full((1, len(images)), -1),
        reals=np.empty(0, np.int64),
        source="given images",
        **one_class,
    )


def _read(path: Path, model: SetDiTConfig) -> Iterator[torch.Tensor]:
    """Yield the images of a file, folder or zip, uint8 [C, H, W]."""
    check_source(path, where="--support")
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
