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
    learned_variance: bool = option(
        False, help="The output has a second half, the variance of a step.", exposed=False
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
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network denoises."""
        return self.img_channels, self.resolution, self.resolution

    @property
    def images_per_row(self) -> int:
        """Images in a row of a training batch: several where a row is a set."""
        return 1

    @property
    def out_channels(self) -> int:
        """Channels of the raw network output F."""
        return self.input_shape[0] * (2 if self.learned_variance else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentModelConfig(ModelConfig):
    """A network on the latents of an autoencoder, z = (encoded - shift) scale."""

    vae: str | None = option(
        None,
        help="Autoencoder, a Hugging Face id or folder; none: that of the latents in --data. With "
        "images in --data: encode them while training.",
    )
    latent_channels: int = option(4, min=1, help="Channels of the latents.")
    latent_downsampling: int = option(8, min=1, help="Edge of an image over that of its latents.")
    latent_scale: float | None = option(
        None,
        min=1e-8,
        help="Scale of the autoencoder's latents; none: as the autoencoder says.",
        exposed=False,
    )
    latent_shift: float = option(
        0.0, help="Shift of the autoencoder's latents before scaling.", exposed=False
    )
    vae_hash: str | None = option(
        None, help="Identity of the autoencoder's weights and settings.", exposed=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % self.latent_downsampling:
            raise ValueError(
                f"--resolution: got {self.resolution}, which is no multiple of "
                f"--latent-downsampling {self.latent_downsampling}; choose one that is."
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        size = self.resolution // self.latent_downsampling
        return self.latent_channels, size, size
