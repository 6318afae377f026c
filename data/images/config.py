"""Which images a run trains on, and how they are augmented, as settings of the run."""

import dataclasses
from typing import ClassVar

from dnnlib.config import Config, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig(Config):
    """Which images a run trains on."""

    title: ClassVar[str] = "Data"

    data: str | None = option(
        None, help="Zip or folder from dataset_tool.py, or its URL (https, s3, ...)."
    )
    cond: bool = option(False, help="Condition the model on the class labels of the data.")
    max_size: int | None = option(
        None, min=1, max=1_000_000_000, help="Train on a random subset of this many images."
    )
    validation_share: float = option(
        0.0,
        min=0,
        max=0.9,
        help="Share of the images to hold out of training, chosen by their contents, for the "
        "validation loss and for scores; 0: only the images that the data or the model hold out "
        "anyway.",
    )
    hflip: bool = option(
        False,
        help="Train on every image and on its mirror image; in a set, each drawn image is mirrored "
        "with probability 1/2.",
    )
    cache: bool = option(
        False, help="Keep decoded images in memory, shared by a rank's workers.", affects="speed"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """How often training images are augmented."""

    title: ClassVar[str] = "Augmentation"

    augment: float = option(
        0.12,
        min=0,
        max=1,
        help="Probability of each augmentation; horizontal flips are always on. 0: no "
        "augmentation and no flips.",
    )
