"""Base classes of the models' configurations, and checks that they share."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from dnnlib.config import Config, option
from dnnlib.errors import refusal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.conditioners import Conditioner
    from models.context import Context

# Modules of the architectures, by the names that snapshots store. A module is imported when its
# architecture is needed.
ARCHITECTURES: dict[str, str] = {
    "diffit": "models.architectures.diffit",
    "latent-diffit": "models.architectures.latent_diffit",
    "set-dit": "models.architectures.set_dit",
    "feature-dit": "models.architectures.feature_dit",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Input, output and conditions of a network; a subclass adds its architecture.

    A subclass sets ``family``, the name that snapshots store, and implements
    :meth:`make_backbone` and :meth:`make_conditioner`. If its module is listed in
    :data:`ARCHITECTURES`, snapshots load without importing it first.
    """

    family_modules: ClassVar[dict[str, str]] = ARCHITECTURES
    title: ClassVar[str] = "Model options"
    has_attention_bias: ClassVar[bool] = True  # A learned bias by position, added to the scores.

    resolution: int = option(
        32, min=1, max=16_384, help="Height and width of the images in pixels."
    )
    img_channels: int = option(3, min=1, max=1_024, help="Channels of the images.", exposed=False)
    num_classes: int = option(
        0, min=0, max=1_000_000, help="Classes of the labels; 0 is unconditional.", exposed=False
    )
    augment_dim: int = option(
        0, min=0, max=1_024, help="Augmentation labels that the network is given.", exposed=False
    )
    learned_variance: bool = option(
        False, help="The output has a second half, the variance of a step.", exposed=False
    )
    attention: str = option(
        "auto",
        choices=("auto", "sdpa", "flex", "explicit"),
        help="Attention kernels; auto chooses by device.",
        affects="speed",
    )
    qk_norm: bool = option(
        False,
        help="Normalise the queries and keys of each head, with learned scales, so that attention "
        "scores cannot grow until training diverges.",
    )
    checkpointing: bool = option(
        False,
        help="Recompute activations in the backward pass: less memory, more time.",
        affects="speed",
    )

    def make_backbone(self) -> "nn.Module":
        """Return the backbone F(x, c_noise, context), with ``context_dim``, its context's width."""
        raise NotImplementedError

    def make_conditioner(self, dim: int) -> "Conditioner":
        """Return the conditioner that makes contexts of width ``dim`` for the backbone."""
        raise NotImplementedError

    def compiled_parts(self, backbone: "nn.Module") -> Iterable["nn.Module"]:
        """Return the modules to compile separately: equal blocks, or the whole backbone."""
        return (backbone,)

    def sharded_parts(self, backbone: "nn.Module") -> Iterable["nn.Module"]:
        """Return the modules whose weights a sharded network gathers separately: its blocks."""
        return self.compiled_parts(backbone)

    def prepared(self, backbone: "nn.Module", context: "Context") -> "Context":
        """Return the context with all that the backbone computes from it alone, for many passes."""
        return context

    def example_cond(self, size: tuple[int, int] | None = None) -> "dict[str, torch.Tensor]":
        """Return the conditions of one image, each [1, ...], on torch's default device.

        ``size`` is one of :attr:`image_sizes`, by default a square of the resolution.
        """
        import torch

        return {"label": torch.zeros(1, dtype=torch.int64)} if self.num_classes else {}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input: pixels or latents."""
        return self.img_channels, self.resolution, self.resolution

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height in pixels of each size of image that the model generates."""
        return ((self.resolution, self.resolution),)

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return channels, height and width of the network's input for images of ``size``.

        ``size`` is width and height in pixels.
        """
        return self.input_shape

    @property
    def encoder_hashes(self) -> dict[str, str | None]:
        """Hashes of the frozen encoders whose outputs the model sees; None where unknown."""
        return {}

    @property
    def images_per_row(self) -> int:
        """Number of images in one row of a training batch: several if a row is a set."""
        return 1

    @property
    def out_channels(self) -> int:
        """Channels of the raw network output F."""
        return self.input_shape[0] * (2 if self.learned_variance else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentModelConfig(ModelConfig):
    """A network on the latents of an autoencoder."""

    vae: str | None = option(
        None,
        help="Autoencoder, a Hugging Face id or folder; none: the autoencoder of the latents in "
        "--data. If --data holds images, they are encoded while training.",
        affects="speed",
    )
    latent_channels: int = option(4, min=1, max=1_024, help="Channels of the latents.")
    latent_downsampling: int = option(
        8, min=1, max=1_024, help="Ratio of the edge of an image to that of its latents."
    )
    vae_hash: str | None = option(
        None, help="Identity of the autoencoder's weights and settings.", exposed=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % self.latent_downsampling:
            but = f"it is not a multiple of --latent-downsampling {self.latent_downsampling}"
            raise refusal("--resolution", self.resolution, but=but, remedy="choose one that is")

    @property
    def encoder_hashes(self) -> dict[str, str | None]:
        return {"vae": self.vae_hash}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        size = self.resolution // self.latent_downsampling
        return self.latent_channels, size, size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledLatentConfig(LatentModelConfig):
    """A network on latents that a single scale and shift normalise: z = (encoded - shift) scale."""

    latent_scale: float | None = option(
        None,
        min=1e-8,
        help="Scale of the autoencoder's latents; none: as the autoencoder says.",
        exposed=False,
    )
    latent_shift: float = option(
        0.0, help="Shift of the autoencoder's latents before scaling.", exposed=False
    )


def check_divides(config: ModelConfig, name: str, size: str | int, what: str = "") -> None:
    """Raise ValueError unless the field ``name`` divides ``size``.

    ``size`` is the name of another field, or a number that ``what`` describes in the message.
    """
    if isinstance(size, str):
        size, what = getattr(config, size), f"--{size.replace('_', '-')} {getattr(config, size)}"
    divisor = getattr(config, name)
    if size % divisor:
        got = f"{divisor}, which does not divide {what}"
        raise refusal(f"--{name.replace('_', '-')}", got, remedy="use a divisor")


def check_sinusoid_width(hidden_dim: int) -> None:
    """Raise ValueError unless a width is a multiple of 4: sines and cosines of two axes."""
    if hidden_dim % 4:
        accepted = "a multiple of 4, for the sines and cosines of two axes"
        raise refusal("--hidden-dim", hidden_dim, accepted=accepted)
