"""Latent DiffiT written plainly, as the network that benchmarks compare with.

Attention as two batched matrix products with a softmax between them, the bias gathered row by row,
patches cut by a reshape. The parameters have the names and shapes of
:class:`models.latent_diffit.LatentDiffiT`, so that either loads the other's state and computes the
same function.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.plain_diffit import PlainAttention, PlainMLP
from models import Context
from models.latent_diffit import LatentDiffiTConfig
from models.layers import position_embedding


class PlainBlock(nn.Module):
    """Attention over all tokens, then an MLP."""

    def __init__(self, dim: int, num_heads: int, grid: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = PlainAttention(dim, dim, num_heads, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = PlainMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), t)
        return x + self.mlp(self.norm2(x))


class PlainLatentDiffiT(nn.Module):
    """The network, with the interface of :class:`models.latent_diffit.LatentDiffiT`."""

    def __init__(self, config: LatentDiffiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_dim, config.patch_size
        self.context_dim = dim
        self.patch_embedding = nn.Conv2d(config.input_shape[0], dim, patch, stride=patch)
        positions = position_embedding(dim, config.grid).flatten(0, 1)
        self.register_buffer("position_embedding", positions, persistent=False)
        self.time_token = nn.Sequential(
            nn.Linear(2 * config.base_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.blocks = nn.ModuleList(
            PlainBlock(dim, config.num_heads, config.grid, config.mlp_ratio)
            for _ in range(config.num_blocks)
        )
        self.head_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, patch**2 * config.out_channels)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, out_channels, H, W] of x [N, C, H, W] and c_noise [N]."""
        num, channels, height, width = x.shape
        patch, grid, half = self.config.patch_size, self.config.grid, self.config.base_dim
        exponents = torch.arange(half, device=x.device) / half
        angles = c_noise[:, None] * 10_000.0**-exponents
        t = self.time_token(torch.cat([angles.cos(), angles.sin()], dim=1))
        if context.vector is not None:
            t = t + context.vector
        patches = x.reshape(num, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        kernel = self.patch_embedding.weight.flatten(1)
        x = functional.linear(
            patches.reshape(num, grid**2, -1), kernel, self.patch_embedding.bias
        )  #                                                            [N, L, D]
        x = x + self.position_embedding
        for block in self.blocks:
            x = block(x, t)
        x = self.head(functional.silu(self.head_norm(x)))
        x = x.reshape(num, grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(num, -1, height, width)
