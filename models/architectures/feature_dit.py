"""Settings of NanoDiT, the latent DiT conditioned on text and visual features."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from dnnlib.config import inherited, option
from models.config import LatentModelConfig, check_divides, check_sinusoid_width

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.conditioners import Conditioner
    from models.context import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureDiTConfig(LatentModelConfig):
    """Architecture of :class:`FeatureDiT`, and the properties of its conditions in the data."""

    family: ClassVar[str] = "feature-dit"
    title: ClassVar[str] = "Model options (feature-conditioned DiT)"
    has_attention_bias: ClassVar[bool] = False

    resolution: int = option(
        1024, min=1, max=16_384, help="Square root of the usual number of pixels.", exposed=False
    )
    attention: str = inherited(
        LatentModelConfig, "attention", "sdpa", choices=("sdpa",), exposed=False
    )
    # These follow from how the data were prepared.
    vae: str | None = inherited(LatentModelConfig, "vae", exposed=False)
    latent_channels: int = inherited(LatentModelConfig, "latent_channels", 16, exposed=False)
    latent_downsampling: int = inherited(LatentModelConfig, "latent_downsampling", exposed=False)
    hidden_dim: int = option(
        384, min=4, max=65_536, aliases=("hidden-size",), help="Width of the tokens."
    )
    num_blocks: int = option(12, min=1, max=1_000, aliases=("depth",), help="Blocks of the DiT.")
    num_heads: int = option(6, min=1, max=1_024, help="Attention heads; divides the width.")
    patch_size: int = option(
        2, min=1, max=1_024, help="Edge in latents of the square that forms one token."
    )
    mlp_ratio: float = option(4.0, min=0.01, max=100, help="Hidden width of an MLP over its width.")
    use_dino_patches: bool = option(
        True, help="Attend to the patch features; off: attend to text and CLS token alone."
    )
    patch_pos: bool = option(
        True,
        requires={"use_dino_patches": (True,)},
        help="Add positional embeddings to the patch features.",
    )
    gates: bool = option(False, help="Gate every branch of a block, starting at zero (adaLN-Zero).")
    cls_token_time: bool = option(False, help="Add the time to the CLS token of the context.")
    text_dim: int = option(
        4096, min=1, max=65_536, help="Width of the text features.", exposed=False
    )
    visual_dim: int = option(
        1024, min=1, max=65_536, help="Width of the visual features.", exposed=False
    )
    visual_patch_size: int = option(
        16, min=1, max=1_024, help="Edge in pixels of a visual patch.", exposed=False
    )
    buckets: tuple[str, ...] = option(
        (), help="Sizes of the images, as WIDTHxHEIGHT.", exposed=False
    )
    max_text_tokens: int = option(
        512, min=1, max=65_536, help="Tokens of the longest text.", exposed=False
    )
    visual: str | None = option(None, help="Visual encoder.", exposed=False, affects="speed")
    visual_hash: str | None = option(None, help="Identity of the visual encoder.", exposed=False)
    text: str | None = option(None, help="Text encoder.", exposed=False, affects="speed")
    text_hash: str | None = option(None, help="Identity of the text encoder.", exposed=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sinusoid_width(self.hidden_dim)
        check_divides(self, "num_heads", "hidden_dim")
        latents = f"the latents of {self.resolution}x{self.resolution} images"
        check_divides(self, "patch_size", self.input_shape[1], latents)

    @property
    def encoder_hashes(self) -> dict[str, str | None]:
        return {"vae": self.vae_hash, "visual": self.visual_hash, "text": self.text_hash}

    def example_cond(self, size: tuple[int, int] | None = None) -> "dict[str, Tensor]":
        import torch

        size = size or (self.resolution, self.resolution)
        rows, columns = self.patch_grid(*size)
        return dict(
            text=torch.empty(1, self.max_text_tokens, self.text_dim),
            cls=torch.empty(1, self.visual_dim),
            patches=torch.empty(1, rows * columns, self.visual_dim),
            size=torch.tensor(size, device="cpu"),
        )

    def make_backbone(self) -> "nn.Module":
        from models.feature_dit import FeatureDiT

        return FeatureDiT(self)

    def compiled_parts(self, backbone: "nn.Module") -> Iterable["nn.Module"]:
        return backbone.blocks

    def prepared(self, backbone: "nn.Module", context: "Context") -> "Context":
        return backbone.prepare(context)

    def make_conditioner(self, dim: int) -> "Conditioner":
        from models.feature_conditioner import FeatureConditioner

        return FeatureConditioner(self, dim)

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        sizes = tuple(tuple(map(int, name.split("x"))) for name in self.buckets)
        return sizes or super().image_sizes

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.latent_shape(*size)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a square image."""
        return self.latent_shape(self.resolution, self.resolution)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of an image, whose size is in pixels."""
        factor = self.latent_downsampling
        return self.latent_channels, height // factor, width // factor

    def patch_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return rows and columns of the visual patches of an image, whose size is in pixels.

        The encoder resizes each side to the nearest multiple of its patch size, rounding half up.
        """
        edge = self.visual_patch_size
        return (2 * height + edge) // (2 * edge), (2 * width + edge) // (2 * edge)
