"""Set-conditioned DiT as it is written first: the sets of a batch are encoded one after another."""

import torch
from torch import Tensor, nn

from models.context import Context
from models.layers import CrossAttention, SelfAttention, merge_heads, split_heads
from models.set_conditioner import SetConditioner
from models.set_dit import SetDiT, SetDiTConfig
from models.set_encoder import EncoderAttention


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return merge_heads(scores.softmax(-1) @ v)


class PlainSelfAttention(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.head_dim).chunk(3, dim=1)
        return self.proj(_attend(q, k, v, self.head_dim**-0.5))


class PlainCrossAttention(CrossAttention):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.head_dim)
        k, v = split_heads(self.kv(context), self.head_dim).chunk(2, dim=1)
        return self.proj(_attend(q, k, v, self.head_dim**-0.5))


class PlainEncoderAttention(EncoderAttention):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.dim_head).chunk(3, dim=1)
        scale = self.dim_head**-0.5
        if self.log_temperature is not None:
            q, scale = q * self.log_temperature.exp(), 1.0
        return self.proj(_attend(q, k, v, scale, mask))


_PLAIN = {
    SelfAttention: PlainSelfAttention,
    CrossAttention: PlainCrossAttention,
    EncoderAttention: PlainEncoderAttention,
}


def _make_plain(module: nn.Module) -> None:
    for part in module.modules():
        if type(part) in _PLAIN:
            part.__class__ = _PLAIN[type(part)]


class PlainSetDiT(SetDiT):
    """The same backbone with attention as batched matrix products."""

    def __init__(self, config: SetDiTConfig) -> None:
        super().__init__(config)
        _make_plain(self)


class LoopConditioner(SetConditioner):
    """The same context, made by one call of the encoder for each place in a set."""

    def __init__(self, config: SetDiTConfig, dim: int) -> None:
        super().__init__(config, dim)
        _make_plain(self)

    def forward(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> Context:
        if "set" not in cond or not self.config.leave_one_out:
            return super().forward(cond, drop, num)
        images, rest = cond["set"], {k: v for k, v in cond.items() if k in ("label", "c_noise")}
        noise = cond.get("context_noise")
        contexts = []
        for place in range(images.shape[1]):
            others = [index for index in range(images.shape[1]) if index != place]
            own = dict(rest, support=images[:, others])
            if "mask" in cond:
                own["mask"] = cond["mask"][:, others]
            if noise is not None:
                own["context_noise"] = noise[:, place]
            contexts.append(super().forward(own, drop))
        order = torch.arange(len(images) * images.shape[1], device=images.device)
        order = order.view(images.shape[1], len(images)).t().flatten()  # b-major
        return contexts[0].concat(*contexts[1:]).index(order)
