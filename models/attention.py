"""Attention with a bias that is learned, by the kernels that are fastest on a device."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from dnnlib.errors import refusal

# What "auto" means, by device type; SDPA where nothing is listed. On CPUs SDPA has no fused kernel
# for a bias that needs a gradient, and computes bf16 in fp32: explicitly takes 0.9 to 1 of its time
# in fp32 and 0.3 to 1 in bf16, and 0.3 to 0.75 without gradients (`benchmark.py attention`; windows
# of 16 to 1,024 tokens). Flex attention has no backward pass there. On GPUs the ways are not
# compared yet.
AUTO_ATTENTION: dict[str, str] = {"cpu": "explicit", "cuda": "sdpa"}
ATTENTION = ("auto", "sdpa", "flex", "explicit")


def choose_attention(attention: str, device: torch.device, needs_grad: bool) -> str:
    """Return which of :data:`ATTENTION` a device gets where ``auto`` or one of them is asked.

    Raises ValueError for flex attention with gradients on a CPU.
    """
    if attention == "auto":
        return AUTO_ATTENTION.get(device.type, "sdpa")
    if attention == "flex" and device.type == "cpu" and needs_grad:
        got = "flex, which cannot be trained on a CPU"
        raise refusal("--attention", got, remedy="use --attention=explicit, or a GPU")
    return attention


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, attention: str = "auto") -> Tensor:
    """Return softmax(q k^T / sqrt(d) + bias) v (DiffiT, arXiv 2312.02139, Eq. 6).

    Args:
        q, k, v: [N, heads, L, d].
        bias: [heads, L, L], added after the scaling; the same for all N.
        attention: One of :data:`ATTENTION`; see :func:`choose_attention`.

    Returns [N, heads, L, d].
    """
    backend = choose_attention(attention, q.device, q.requires_grad)
    if backend == "explicit" and not torch.compiler.is_compiling():
        return _Explicit.apply(q, k, v, bias)
    bias = bias.to(q.dtype)
    if backend != "flex":
        # Four dimensions: the fused CPU kernel takes no others.
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])

    def add_bias(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    fused = q.device.type != "cpu" and not torch.compiler.is_compiling()
    return (_compiled_flex_attention() if fused else flex_attention)(q, k, v, score_mod=add_bias)


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


class _Explicit(torch.autograd.Function):
    """:func:`attend` as two batched products and a softmax, which keeps the weights alone.

    With P = softmax(S) and dP = dO V^T, dS = P (dP - sum_j P dP), from which dQ = dS K / sqrt(d),
    dK = dS^T Q / sqrt(d), dV = P^T dO, and the gradient of the bias is the sum of dS over N.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        ctx.scale, ctx.bias_dtype = q.shape[-1] ** -0.5, bias.dtype
        # Copied once: every product of parts of a larger tensor would copy them again.
        q, k, v = q * ctx.scale, k.contiguous(), v.contiguous()
        with torch.autocast(q.device.type, enabled=False):
            scores = (q @ k.transpose(-1, -2)).add_(bias.to(q.dtype))
            weights = scores.softmax(dim=-1)
            ctx.save_for_backward(q, k, v, weights)
            return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors  # q / sqrt(d), as the scores are of.
        grad = grad.contiguous()
        of_v = weights.transpose(-1, -2) @ grad
        of_weights = grad @ v.transpose(-1, -2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_q = (of_scores @ k).mul_(ctx.scale)
        of_k = of_scores.transpose(-1, -2) @ q
        return of_q, of_k, of_v, of_scores.sum(dim=0, dtype=ctx.bias_dtype)
