"""Layers that the networks share: attention, normalisation, embeddings.

In DiffiT's blocks every position of an image is a token, in channels-last order [B, H, W, C].
Elsewhere tokens are a sequence, [B, L, C].
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.attention import attend, head_norms
from models.context import Context
from torch_utils import cpu_matmul, reuse

# Largest size of a context's keys and values that are kept for all steps of a sampler.
_MAX_KEPT_BYTES = 2**30


def window_partition(x: Tensor, window: int) -> Tensor:
    """Return a grid of tokens cut into square windows, with heads before tokens.

    Args:
        x: [B, H, W, heads, d], with H and W divisible by ``window``.
        window: Edge of a window in tokens.

    Returns [B * H/window * W/window, heads, window**2, d]: images in order, then their windows row
    by row, then the tokens of a window row by row. Raises ValueError if windows do not fit exactly.
    """
    B, H, W, heads, d = x.shape
    if H % window or W % window:
        raise ValueError(
            f"A grid of {H}x{W} tokens cannot be cut into windows of {window}x{window}; height and "
            f"width must be multiples of {window}."
        )
    x = x.reshape(B, H // window, window, W // window, window, heads, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, window**2, d)


def window_unpartition(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo :func:`window_partition`: return the grid [B, height, width, heads, d]."""
    heads, d = windows.shape[1], windows.shape[3]
    x = windows.reshape(-1, height // window, width // window, heads, window, window, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, heads, d)


def relative_position_index(window: int) -> Tensor:
    """Return the row of the bias table for each query and key, int64 [window**2, window**2].

    The row is (dy + w - 1) (2w - 1) + (dx + w - 1) with (dy, dx) = query - key and w = ``window``.
    """
    position = torch.arange(window)
    y, x = position.repeat_interleave(window), position.repeat(window)
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


class TMSA(nn.Module):
    """Time-dependent multi-head self-attention inside windows (DiffiT, arXiv 2312.02139, Eq. 3-6).

    Queries, keys and values are linear functions of the token and the time token together. A
    relative position bias, which all windows share, is added to the scores. A window that covers
    the grid makes attention global. Windows are not shifted: the U-Net mixes them.

    Args:
        dim, time_dim: Widths of the tokens and of the time token; ``num_heads`` divides ``dim``.
        window: Edge of a window in tokens.
        attention: See :func:`~models.attention.attend`.
        qk_norm: See :func:`~models.attention.head_norms`.
    """

    def __init__(
        self,
        dim: int,
        time_dim: int,
        num_heads: int,
        window: int,
        attention: str = "auto",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.window, self.attention = window, attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_temb = nn.Linear(time_dim, 3 * dim)
        self.q_norm, self.k_norm = head_norms(self.head_dim, qk_norm)
        table = torch.zeros((2 * window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)
        index = relative_position_index(window)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.proj = nn.Linear(dim, dim)

    def bias(self) -> Tensor:
        """Return the relative position bias [heads, window**2, window**2]."""
        # Gather per head, not per row of the table: the backward pass, which adds by index, is
        # several times faster for large windows.
        index = self.relative_position_index
        bias = self.relative_position_bias_table.t().index_select(1, index.flatten())
        return bias.view(-1, *index.shape)

    def _kept_bias(self, dtype: torch.dtype) -> Tensor:
        """Return :meth:`bias` in ``dtype``; computed once while the weights are fixed."""
        return reuse.once((self, dtype), lambda: self.bias().to(dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return tokens [B, H, W, C] from tokens x [B, H, W, C] and time tokens t [B, T]."""
        _, H, W, _ = x.shape
        # Add the time before the partition: once per image, and to all windows of that image.
        qkv = self.qkv(x) + self.qkv_temb(t)[:, None, None]  #          [B, H, W, 3 C]
        qkv = qkv.unflatten(-1, (-1, self.head_dim))  #                 [B, H, W, 3 heads, d]
        qkv = window_partition(qkv, self.window)  #                     [B windows, 3 heads, w w, d]
        q, k, v = qkv.chunk(3, dim=1)  #                                [B windows, heads, w w, d]
        bias = self.bias() if torch.is_grad_enabled() else self._kept_bias(q.dtype)
        y = attend(self.q_norm(q), self.k_norm(k), v, bias, self.attention)
        y = window_unpartition(y, self.window, H, W)  #                 [B, H, W, heads, d]
        return self.proj(y.flatten(3))  #                               [B, H, W, C]


class SelfAttention(nn.Module):
    """Multi-head self-attention over a sequence of tokens; ``num_heads`` divides ``dim``."""

    def __init__(self, dim: int, num_heads: int, bias: bool = True, qk_norm: bool = False) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm, self.k_norm = head_norms(self.head_dim, qk_norm)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, L, C] from tokens x [B, L, C]."""
        q, k, v = split_heads(self.qkv(x), self.head_dim).chunk(3, dim=1)
        return self.proj(merge_heads(attend(self.q_norm(q), self.k_norm(k), v)))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a context; ``num_heads`` divides ``dim``."""

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, bias: bool = True, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=bias)
        self.q_norm, self.k_norm = head_norms(self.head_dim, qk_norm)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def queries(self, x: Tensor) -> Tensor:
        """Return the queries [B, heads, L, head_dim] of tokens x [B, L, C]."""
        return self.q_norm(split_heads(self.q(x), self.head_dim))

    def keys_values(self, context: Tensor) -> Tensor:
        """Return keys, then values, [B, 2 heads, M, head_dim], of a context [B, M, context_dim]."""
        keys_values = split_heads(self.kv(context), self.head_dim)
        if isinstance(self.k_norm, nn.Identity):
            return keys_values
        k, v = keys_values.chunk(2, dim=1)
        return torch.cat([self.k_norm(k), v], dim=1)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """Return tokens [B, L, C] from tokens x [B, L, C] and a context [B, M, context_dim].

        ``mask`` [B, M] is bool, true where a context token may be attended to, or float, added to
        the scores; without one, faster kernels can be used. ``keys_values`` are those of the
        context, if they have already been computed.
        """
        q = self.queries(x)
        if keys_values is None:
            keys_values = self.keys_values(context)
        k, v = keys_values.chunk(2, dim=1)
        if mask is not None:
            mask = mask[:, None, None, :].expand(-1, -1, q.shape[2], -1)
        return self.proj(merge_heads(attend(q, k, v, mask)))


def with_keys_values(
    context: Context, tokens: Tensor, attentions: Sequence[CrossAttention]
) -> Context:
    """Return the context with the keys and values that ``attentions`` make of tokens [N, M, c].

    If there are no attentions or the result would exceed 1 GiB, returns the context unchanged.
    """
    if not attentions:
        return context
    first, *others = (attention.keys_values for attention in attentions)
    sample = first(tokens)
    if sample.nbytes * len(attentions) > _MAX_KEPT_BYTES:
        return context
    kept = sample.new_empty(len(sample), len(attentions), *sample.shape[1:])
    kept[:, 0] = sample
    for index, keys_values in enumerate(others, start=1):
        kept[:, index] = keys_values(tokens)
    return dataclasses.replace(context, keys_values=kept)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Return x [B, L, heads * head_dim] as [B, heads, L, head_dim]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Undo :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return (1 + scale) x + shift, for x [B, L, C] and a scale and shift [B, C] per image."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear, on the last dimension."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(self.fc1, x))


def linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return the GELU (tanh approximation) of ``linear(x)``.

    On a CPU where oneDNN computes products, and without gradients, a fused call does both: the tanh
    of torch's own kernel takes several times as long as a product in bfloat16.
    """
    kind = x.device.type
    is_plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or linear.bias is None
    if is_plain or kind != "cpu":
        return functional.gelu(linear(x), approximate="tanh")
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if not cpu_matmul.is_by_onednn(dtype):
        return functional.gelu(linear(x), approximate="tanh")
    weight, bias = reuse.once(
        (linear, dtype), lambda: (linear.weight.to(dtype), linear.bias.to(dtype))
    )
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "gelu", [], "tanh")


class TransformerBlock(nn.Module):
    """Pre-norm residual attention and MLP (DiffiT, arXiv 2312.02139, Eq. 7-8)."""

    def __init__(
        self,
        dim: int,
        time_dim: int,
        num_heads: int,
        window: int,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = TMSA(dim, time_dim, num_heads, window, attention, qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return tokens [B, H, W, C] from tokens x [B, H, W, C] and time tokens t [B, T]."""
        x = x + self.attn(self.norm1(x), t)
        return x + self.mlp(self.norm2(x))


def run_block(network: nn.Module, block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Return ``block(*inputs)``, where ``block`` is part of ``network``.

    If the network's configuration asks for activation checkpointing, the backward pass recomputes
    the block's activations (Chen et al., arXiv 1604.06174).
    """
    if network.config.checkpointing and network.training and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


@torch.no_grad()
def draw_layers(network: nn.Module) -> None:
    """Draw weights by Glorot & Bengio (2010) and tables of TMSA from N(0, 0.02²); biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TMSA):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)


def check_input(x: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise ValueError unless x [N, C, H, W] has the shape (C, H, W); ``what`` describes x."""
    if x.shape[1:] != shape:
        expected, found = ("x".join(map(str, size)) for size in (shape, x.shape[1:]))
        raise ValueError(f"This model denoises {what} of {expected}, not {found}.")


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """Return images [N, C, h p, w p] from a grid of patches [N, h, w, p p C], p = ``patch``."""
    x = x.unflatten(-1, (patch, patch, -1))  #                          [N, h, w, p, p, C]
    x = x.permute(0, 5, 1, 3, 2, 4)  #                                  [N, C, h, p, w, p]
    return x.flatten(4, 5).flatten(2, 3)  #                             [N, C, h p, w p]


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm with min(32, channels / 4) groups, or the next lower divisor."""
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


class PositionalEmbedding(nn.Module):
    """Sinusoids of a scalar: [N] becomes [N, dim], float32 even under autocast.

    Args:
        dim: Number of sinusoids; if it is odd, the last value is 0.
        like: Frequencies fall geometrically from 1 towards 1 / 10,000. ``edm`` (Karras et al. 2022,
            arXiv 2206.00364): sines, then cosines; the last frequency is 1 / 10,000. ``dit`` (arXiv
            2212.09748): cosines, then sines; the one after the last would be 1 / 10,000.
    """

    def __init__(self, dim: int, like: Literal["edm", "dit"] = "edm") -> None:
        super().__init__()
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float32) / (half - 1 if like == "edm" else half)
        frequencies = torch.exp(-math.log(10_000) * exponents)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._cosines_first = like == "dit"
        self._padding = dim % 2

    def forward(self, x: Tensor) -> Tensor:
        angles = x.to(torch.float32)[:, None] * self.frequencies
        halves = [angles.sin(), angles.cos()]
        sinusoids = torch.cat(halves[::-1] if self._cosines_first else halves, dim=1)
        return functional.pad(sinusoids, (0, self._padding)) if self._padding else sinusoids


def position_embedding(dim: int, grid: int) -> Tensor:
    """Return sinusoids of the token positions in a square grid, float32 [grid, grid, dim].

    The first half of the width encodes the column, the second the row; each is [sin, cos] of the
    position times 10000^(-i / (dim / 4)), i = 0 ... dim / 4 - 1 (DiT, arXiv 2212.09748). If ``dim``
    is not a multiple of four, the embedding is built for the next multiple and then cut.
    """
    axis = _axis_sinusoids(torch.arange(grid, dtype=torch.float64), -(-dim // 4))
    column = axis[None].expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2)[:, :, :dim].contiguous()


def lattice_embedding(dim: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Return sinusoids of the points of a lattice, float32 [R K, dim], row by row.

    They are those of :func:`position_embedding` for arbitrary positions, with the row's half first.

    Args:
        dim: Width, a multiple of four.
        rows, columns: Positions [R] and [K], in units of tokens.
    """
    down, across = (_axis_sinusoids(positions, dim // 4) for positions in (rows, columns))
    down = down[:, None].expand(-1, len(columns), -1)
    across = across[None].expand(len(rows), -1, -1)
    return torch.cat([down, across], dim=2).flatten(0, 1)


def _axis_sinusoids(positions: Tensor, quarter: int) -> Tensor:
    """Return [sin, cos] of positions [P] at ``quarter`` frequencies, float32 [P, 2 quarter]."""
    exponents = torch.arange(quarter, dtype=torch.float64, device=positions.device) / quarter
    angles = positions.to(torch.float64)[:, None] * 10_000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.float32)


class UpsampleConv(nn.Conv2d):
    """Nearest-neighbour upsampling by two and then a 3x3 convolution, fused into one operation.

    Several taps of the kernel see the same input, so the pair equals a transposed convolution of
    stride 2, whose 4x4 kernel is the 3x3 kernel summed over 2x2 boxes: 4/9 of the arithmetic.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = functional.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))
        kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
        kernel = kernel[:, :, :, 1:] + kernel[:, :, :, :-1]
        return functional.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)
