"""Measures how attention is divided among the parts of a context, without changing its result."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from models.layers import CrossAttention

_QUERIES_AT_ONCE = 256


class AttentionMass:
    """Shares of attention by layer and segment, averaged over heads, queries and images.

    ``names`` are those of the segments.
    """

    def __init__(self, names: tuple[str, ...], num_layers: int) -> None:
        self.names = names
        self._sums = [torch.zeros(len(names), dtype=torch.float64) for _ in range(num_layers)]
        self._counts = [0] * num_layers

    def add(self, layer: int, shares: Tensor) -> None:
        """Add the shares [N, segments] of N images in a layer."""
        self._sums[layer] += shares.to(torch.float64).sum(0).cpu()
        self._counts[layer] += len(shares)

    def by_layer(self) -> list[dict[str, float]]:
        """Return the mean shares, by segment name, of each layer that was run."""
        return [
            dict(zip(self.names, (total / count).tolist(), strict=True))
            for total, count in zip(self._sums, self._counts, strict=True)
            if count
        ]


@contextlib.contextmanager
def record_attention(network: nn.Module, segments: Mapping[str, int]) -> Iterator[AttentionMass]:
    """Within the block, record how each cross-attention of ``network`` divides over its context.

    Args:
        network: Contains :class:`~models.layers.CrossAttention` modules, in the order of layers.
        segments: Number of tokens of each part of the context, by its name, in order.
    """
    layers = [module for module in network.modules() if isinstance(module, CrossAttention)]
    mass = AttentionMass(tuple(segments), len(layers))

    @torch.no_grad()
    def look(module: CrossAttention, args: tuple, kwargs: dict) -> None:
        shares = attention_shares(module, *args, lengths=list(segments.values()), **kwargs)
        mass.add(layers.index(module), shares)

    with contextlib.ExitStack() as hooks:
        for module in layers:
            hooks.enter_context(module.register_forward_pre_hook(look, with_kwargs=True))
        yield mass


def attention_shares(
    module: CrossAttention,
    x: Tensor,
    context: Tensor,
    mask: Tensor | None = None,
    keys_values: Tensor | None = None,
    *,
    lengths: list[int],
) -> Tensor:
    """Return the share of attention that each part of a context receives, float32 [N, segments].

    Shares are averaged over heads and over the tokens x [N, L, C], and add up to 1.

    Args:
        module: The attention. ``context`` [N, M, c], ``mask`` [N, M] and ``keys_values``
            [N, 2 heads, M, d] are the arguments of its forward pass.
        lengths: Number of tokens of each part; they add up to M.
    """
    assert sum(lengths) == context.shape[1], f"parts of {lengths}, a context of {context.shape[1]}"
    q = module.queries(x).float()
    if keys_values is None:
        keys_values = module.keys_values(context)
    k = keys_values.chunk(2, dim=1)[0].float()
    bias = 0.0
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
        bias = mask[:, None, None, :].float()
    total = torch.zeros(len(x), len(lengths), device=x.device)
    for rows in q.split(_QUERIES_AT_ONCE, dim=2):
        weights = (rows @ k.transpose(2, 3) * module.head_dim**-0.5 + bias).softmax(dim=-1)
        parts = weights.split(lengths, dim=3)
        total += torch.stack([part.sum(dim=(1, 2, 3)) for part in parts], dim=1)
    return total / (q.shape[1] * q.shape[2])
