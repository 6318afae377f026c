"""Plain networks to compare with, which compute the same function of the same weights.

Attention is two batched matrix products with a softmax between them. In DiffiT, images are
contiguous [N, C, H, W], each block cuts its windows once, bias tables are gathered row by row, and
upsampling and its convolution are separate operations. The leave-one-out contexts of a set are
encoded one after another.
"""

import torch
from torch import Tensor
from torch.nn import functional

from models import ModelConfig, build_network
from models.context import Context
from models.diffit import ResBlock
from models.layers import (
    TMSA,
    CrossAttention,
    SelfAttention,
    UpsampleConv,
    merge_heads,
    split_heads,
)
from models.network import Network
from models.set_conditioner import SetConditioner
from models.set_encoder import EncoderAttention


def build_plain_network(config: ModelConfig) -> Network:
    """Return the network of ``config`` with its usual initial weights, but plain parts."""
    network = build_network(config)
    for part in network.modules():
        part.__class__ = _PLAIN.get(type(part), type(part))
    return network


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + bias) v for q, k, v [N, heads, L, d], bias [heads, L, L]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.to(q.dtype)
    return scores.softmax(dim=-1) @ v


class PlainTMSA(TMSA):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return tokens shaped like x [B windows, ..., C], one window per row; t is [B, T]."""
        qkv = self.qkv(x.flatten(1, -2))  #                             [N windows, L, 3 C]
        qkv = qkv + self.qkv_temb(t).repeat_interleave(len(x) // len(t), dim=0)[:, None]
        qkv = qkv.unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  #               [N windows, heads, L, d]
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        y = plain_attention(self.q_norm(q), self.k_norm(k), v, bias)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class PlainResBlock(ResBlock):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.contiguous()  # The input of the first block is channels last in memory.
        y = self.conv(self.dropout(functional.silu(self.norm(x))))
        num, dim, height, width = y.shape
        w = self.block.attn.window
        rows, columns = height // w, width // w
        y = y.reshape(num, dim, rows, w, columns, w).permute(0, 2, 4, 3, 5, 1)
        y = self.block(y.reshape(-1, w * w, dim), t)  #                 [N windows, L, C]
        y = y.reshape(num, rows, columns, w, w, dim).permute(0, 5, 1, 3, 2, 4)
        return self.shortcut(x) + y.reshape(num, dim, height, width)


class PlainUpsampleConv(UpsampleConv):
    def forward(self, x: Tensor) -> Tensor:
        x = functional.interpolate(x, scale_factor=2, mode="nearest")
        return functional.conv2d(x, self.weight, self.bias, padding=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return merge_heads(scores.softmax(-1) @ v)


class PlainSelfAttention(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.head_dim).chunk(3, dim=1)
        return self.proj(_attend(self.q_norm(q), self.k_norm(k), v, self.head_dim**-0.5))


class PlainCrossAttention(CrossAttention):
    def forward(
        self, x: Tensor, context: Tensor, mask: None = None, keys_values: Tensor | None = None
    ) -> Tensor:
        q = self.queries(x)
        if keys_values is None:
            keys_values = self.keys_values(context)
        k, v = keys_values.chunk(2, dim=1)
        return self.proj(_attend(q, k, v, self.head_dim**-0.5))


class PlainEncoderAttention(EncoderAttention):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.dim_head).chunk(3, dim=1)
        q, k, scale = self.q_norm(q), self.k_norm(k), self.dim_head**-0.5
        if self.log_temperature is not None:
            q, scale = q * self.log_temperature.exp(), 1.0
        return self.proj(_attend(q, k, v, scale, mask))


class LoopConditioner(SetConditioner):
    """A set conditioner that calls the encoder once for each left-out image of a set."""

    def forward(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> Context:
        if "set" not in cond or not self.config.leave_one_out:
            return super().forward(cond, drop, num)
        images, shared = cond["set"], {k: v for k, v in cond.items() if k in ("label", "c_noise")}
        contexts = []
        for place in range(images.shape[1]):
            others = [index for index in range(images.shape[1]) if index != place]
            own = dict(shared, support=images[:, others])
            if "mask" in cond:
                own["mask"] = cond["mask"][:, others]
            if "context_noise" in cond:
                own["context_noise"] = cond["context_noise"][:, place]
            contexts.append(super().forward(own, drop))
        order = torch.arange(len(images) * images.shape[1], device=images.device)
        order = order.view(images.shape[1], len(images)).t().flatten()  # b-major
        return contexts[0].concat(*contexts[1:]).index(order)


_PLAIN = {
    TMSA: PlainTMSA,
    ResBlock: PlainResBlock,
    UpsampleConv: PlainUpsampleConv,
    SelfAttention: PlainSelfAttention,
    CrossAttention: PlainCrossAttention,
    EncoderAttention: PlainEncoderAttention,
    SetConditioner: LoopConditioner,
}
