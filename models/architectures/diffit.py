"""Settings of DiffiT in image space."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from dnnlib.config import option
from dnnlib.errors import refusal
from models.config import ModelConfig, check_divides

if TYPE_CHECKING:
    from torch import nn

    from models.conditioners import Conditioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffiTConfig(ModelConfig):
    """Architecture of :class:`DiffiT`. Stages start at full resolution; each halves the last."""

    family: ClassVar[str] = "diffit"
    title: ClassVar[str] = "Model options (DiffiT)"

    num_stages: int = option(
        3, min=1, max=16, help="Resolutions of the U-Net, each half of the previous one."
    )
    num_blocks: tuple[int, ...] = option(
        (2,),
        min=1,
        max=1_000,
        help="Residual blocks per stage: one number for all stages, or one for each.",
    )
    patch_size: int = option(
        1,
        min=1,
        max=1_024,
        help="Edge in pixels of the square that forms one token of the first stage.",
    )
    base_dim: int = option(128, min=1, max=65_536, help="Width of the first stage.")
    hidden_dim: int = option(256, min=1, max=65_536, help="Width of the other stages.")
    num_heads: int = option(4, min=1, max=1_024, help="Attention heads; divides the widths.")
    window: int = option(
        4, min=1, max=1_024, help="Edge of an attention window, limited to the stage's grid."
    )
    time_dim: int = option(512, min=1, max=65_536, help="Width of the time token.")
    mlp_ratio: float = option(4.0, min=0.01, max=100, help="Hidden width of an MLP over its width.")
    dropout: float = option(0.0, min=0, max=0.99, help="Dropout before each block's convolution.")
    skip: str = option(
        "stage",
        choices=("stage", "block"),
        help="Encoder outputs that the decoder receives: the last of each stage, or one from "
        "every block.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.num_blocks) not in (1, self.num_stages):
            given = ",".join(map(str, self.num_blocks))
            remedy = f"give one number for all of them, or {self.num_stages}"
            raise refusal(
                "--num-blocks", given, but=f"there are {self.num_stages} stages", remedy=remedy
            )
        images = f"images of {self.resolution}x{self.resolution}"
        check_divides(self, "patch_size", self.resolution, images)
        if self.resolution % self.reduction:
            times = f"{self.num_stages} stages cannot halve {self.num_stages - 1} times"
            if self.patch_size > 1:
                times += f" in patches of {self.patch_size}x{self.patch_size}"
            remedy = f"use a multiple of {self.reduction}, or another --num-stages"
            raise refusal("--resolution", f"{self.resolution}, which {times}", remedy=remedy)
        for grid, window in zip(self.grids, self.windows, strict=True):
            if grid % window:
                got = f"{self.window}, which does not divide the {grid}x{grid} grid of a stage"
                grids = f"every stage's grid ({', '.join(map(str, self.grids))})"
                remedy = f"use a number that divides {grids} or is at least as large"
                raise refusal("--window", got, remedy=remedy)
        check_divides(self, "num_heads", "base_dim")
        if self.num_stages > 1:
            check_divides(self, "num_heads", "hidden_dim")

    def make_backbone(self) -> "nn.Module":
        from models.diffit import DiffiT

        return DiffiT(self)

    def make_conditioner(self, dim: int) -> "Conditioner":
        from models.conditioners import ClassConditioner

        return ClassConditioner(self.num_classes, self.augment_dim, dim)

    def sharded_parts(self, backbone: "nn.Module") -> Iterable["nn.Module"]:
        stages = (*backbone.encoder, *backbone.decoder)
        return [block for blocks in stages for block in blocks]

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return (self.base_dim,) + (self.hidden_dim,) * (self.num_stages - 1)

    @property
    def reduction(self) -> int:
        """Edge in pixels of the square that forms one token of the last stage."""
        return self.patch_size << (self.num_stages - 1)

    @property
    def grids(self) -> tuple[int, ...]:
        """Height and width of each stage's grid of tokens."""
        edge = self.resolution // self.patch_size
        return tuple(edge >> stage for stage in range(self.num_stages))

    @property
    def windows(self) -> tuple[int, ...]:
        """Edge of each stage's attention windows; one as large as the grid makes it global."""
        return tuple(min(self.window, grid) for grid in self.grids)

    @property
    def blocks_per_stage(self) -> tuple[int, ...]:
        """Number of residual blocks of each stage, the same in encoder and decoder."""
        return self.num_blocks * (self.num_stages // len(self.num_blocks))
