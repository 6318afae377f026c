"""DiffiT written plainly, as the network that benchmarks compare with.

Contiguous [N, C, H, W] images, windows cut once per block, attention as two batched matrix products
with a softmax between them, an upsampling followed by its convolution. The parameters have the
names and shapes of :class:`models.diffit.DiffiT`, so that either loads the other's state and
computes the same function.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import Context
from models.diffit import EMBEDDING_DIM, DiffiTConfig


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + bias) v of q, k, v [N, heads, L, d], bias [heads, L, L]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return scores.softmax(dim=-1) @ v


class PlainAttention(nn.Module):
    """Time-dependent attention within windows that are cut already."""

    def __init__(self, dim: int, time_dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_temb = nn.Linear(time_dim, 3 * dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, num_heads)
        )
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
        self.register_buffer("index", dy * (2 * window - 1) + dx, persistent=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return tokens [N windows, L, C] of tokens x [N windows, L, C], time tokens t [N, T]."""
        num, length, dim = x.shape
        time = self.qkv_temb(t).repeat_interleave(num // len(t), dim=0)
        qkv = self.qkv(x) + time[:, None]  #                            [N windows, L, 3 C]
        qkv = qkv.reshape(num, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  #               [N windows, heads, L, d]
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        y = plain_attention(q, k, v, bias)
        return self.proj(y.transpose(1, 2).reshape(num, length, dim))


class PlainMLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class PlainTransformerBlock(nn.Module):
    def __init__(
        self, dim: int, time_dim: int, num_heads: int, window: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = PlainAttention(dim, time_dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = PlainMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return images [N, C, H, W] of images x [N, C, H, W] and time tokens t [N, T]."""
        num, dim, height, width = x.shape
        w, rows, columns = self.window, height // self.window, width // self.window
        x = x.reshape(num, dim, rows, w, columns, w).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(-1, w * w, dim)  #                                [N windows, L, C]
        x = x + self.attn(self.norm1(x), t)
        x = x + self.mlp(self.norm2(x))
        x = x.reshape(num, rows, columns, w, w, dim).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(num, dim, height, width)


class PlainResBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, dropout: float, block: PlainTransformerBlock
    ) -> None:
        super().__init__()
        self.norm = _group_norm(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.block = block
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv(self.dropout(functional.silu(self.norm(x))))
        return self.shortcut(x) + self.block(y, t)


class PlainDiffiT(nn.Module):
    """The U-Net, with the interface of :class:`models.diffit.DiffiT`; no checkpointing."""

    context_dim = EMBEDDING_DIM

    def __init__(self, config: DiffiTConfig) -> None:
        super().__init__()
        self.config = config
        widths, depths = config.widths, config.blocks_per_stage

        def make_block(stage: int, in_channels: int) -> PlainResBlock:
            block = PlainTransformerBlock(
                widths[stage],
                config.time_dim,
                config.num_heads,
                config.windows[stage],
                config.mlp_ratio,
            )
            return PlainResBlock(in_channels, widths[stage], config.dropout, block)

        self.time_token = nn.Sequential(
            nn.Linear(EMBEDDING_DIM, config.time_dim),
            nn.SiLU(),
            nn.Linear(config.time_dim, config.time_dim),
            nn.SiLU(),
        )
        self.tokenizer = nn.Conv2d(config.img_channels, widths[0], kernel_size=3, padding=1)
        self.encoder, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for stage, width in enumerate(widths):
            before = widths[max(stage - 1, 0)]
            if stage > 0:
                conv = nn.Conv2d(before, before, kernel_size=3, stride=2, padding=1)
                self.downsamplers.append(conv)
            blocks = [make_block(stage, before if i == 0 else width) for i in range(depths[stage])]
            self.encoder.append(nn.ModuleList(blocks))
        self.decoder, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(config.num_stages - 1)):
            below, width = widths[stage + 1], widths[stage]
            self.upsamplers.append(nn.Conv2d(below, below, kernel_size=3, padding=1))
            blocks = []
            for i in range(depths[stage]):
                skipped = width if i == 0 or config.skip == "block" else 0
                blocks.append(make_block(stage, (below if i == 0 else width) + skipped))
            self.decoder.append(nn.ModuleList(blocks))
        self.head_norm = _group_norm(widths[0])
        self.head = nn.Conv2d(widths[0], config.out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, out_channels, H, W] of x [N, img_channels, H, W] and c_noise [N]."""
        half = EMBEDDING_DIM // 2
        exponents = torch.arange(half, device=x.device, dtype=torch.float32) / (half - 1)
        angles = c_noise[:, None] * torch.exp(-math.log(10_000) * exponents)
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        if context.vector is not None:
            embedding = embedding + context.vector
        t = self.time_token(embedding)

        x = self.tokenizer(x)
        skips = []
        for stage, blocks in enumerate(self.encoder):
            if stage > 0:
                x = self.downsamplers[stage - 1](x)
            outputs = []
            for block in blocks:
                x = block(x, t)
                outputs.append(x)
            skips.append(outputs if self.config.skip == "block" else outputs[-1:])
        skips.pop()
        for upsampler, blocks in zip(self.upsamplers, self.decoder, strict=True):
            x = upsampler(functional.interpolate(x, scale_factor=2, mode="nearest"))
            outputs = skips.pop()
            for block in blocks:
                if outputs:
                    x = torch.cat([x, outputs.pop()], dim=1)
                x = block(x, t)
        return self.head(functional.silu(self.head_norm(x)))


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)
