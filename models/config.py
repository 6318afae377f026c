"""What every model's configuration has in common."""

import dataclasses
from typing import ClassVar

from dnnlib.config import Config, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Input, output and conditions of a network; a family adds its architecture.

    A subclass sets ``family``, the name under which snapshots keep it.
    """

    title: ClassVar[str] = "Model options"

    resolution: int = option(32, min=1, help="Height and width of the images in pixels.")
    img_channels: int = option(3, min=1, help="Channels of the images.", exposed=False)
    num_classes: int = option(
        0, min=0, help="Classes of the labels; 0 is unconditional.", exposed=False
    )
    augment_dim: int = option(
        0, min=0, help="Augmentation labels that the network is given.", exposed=False
    )
    attention: str = option(
        "auto",
        choices=("auto", "sdpa", "flex"),
        help="Attention kernels; auto chooses by device.",
    )
    checkpointing: bool = option(
        False, help="Recompute activations in the backward pass: less memory, more time."
    )

    @property
    def out_channels(self) -> int:
        """Channels of the raw network output F."""
        return self.img_channels
