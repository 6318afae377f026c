"""Settings of latent DiffiT."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from dnnlib.config import inherited, option
from models.config import ScaledLatentConfig, check_divides, check_sinusoid_width

if TYPE_CHECKING:
    from torch import nn

    from models.conditioners import Conditioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDiffiTConfig(ScaledLatentConfig):
    """Architecture of :class:`LatentDiffiT`; the defaults give the published 561M model."""

    family: ClassVar[str] = "latent-diffit"
    title: ClassVar[str] = "Model options (latent DiffiT)"

    resolution: int = inherited(ScaledLatentConfig, "resolution", 256)
    num_blocks: int = option(28, min=1, max=1_000, help="Transformer blocks.")
    hidden_dim: int = option(1152, min=4, max=65_536, help="Width of tokens and time token.")
    num_heads: int = option(16, min=1, max=1_024, help="Attention heads; divides the width.")
    patch_size: int = option(
        2, min=1, max=1_024, help="Edge in latents of the square that forms one token."
    )
    base_dim: int = option(
        128,
        min=1,
        max=65_536,
        help="Number of frequencies in the sinusoidal embedding of the noise level.",
    )
    mlp_ratio: float = option(4.0, min=0.01, max=100, help="Hidden width of an MLP over its width.")

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.input_shape[1]
        latents = f"the {size}x{size} latents of {self.resolution}x{self.resolution} images"
        check_divides(self, "patch_size", size, latents)
        check_sinusoid_width(self.hidden_dim)
        check_divides(self, "num_heads", "hidden_dim")

    def make_backbone(self) -> "nn.Module":
        from models.latent_diffit import LatentDiffiT

        return LatentDiffiT(self)

    def compiled_parts(self, backbone: "nn.Module") -> Iterable["nn.Module"]:
        return backbone.blocks

    def make_conditioner(self, dim: int) -> "Conditioner":
        from models.conditioners import ClassTable

        return ClassTable(self.num_classes, dim)

    @property
    def grid(self) -> int:
        """Height and width of the grid of tokens."""
        return self.input_shape[1] // self.patch_size
