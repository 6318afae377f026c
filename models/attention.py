"""Attention with the fastest kernels for a device, a type and a number of tokens."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from dnnlib.errors import refusal
from torch_utils import cpu_matmul

# What "auto" means for a learned bias, by device type; SDPA where nothing is listed. On GPUs the
# ways are not compared yet.
AUTO_ATTENTION: dict[str, str] = {"cpu": "explicit", "cuda": "sdpa"}
ATTENTION = ("auto", "sdpa", "flex", "explicit")
# Beyond, the scores of one image and head outgrow the caches of a CPU, and SDPA, which never holds
# them all, is faster.
_MAX_EXPLICIT_TOKENS = 512
# What looks at queries, keys, bias and scale of every attention; None outside of
# :func:`observing_attention`.
_look: Callable[[Tensor, Tensor, Tensor | None, float], None] | None = None


class HeadNorm(nn.Module):
    """RMS norm of the queries or keys of each head, with a learned scale for each of its numbers.

    Scores then stay bounded however large the weights before them grow (ViT-22B, arXiv 2302.05442,
    section 2, which normalises with the mean subtracted). Computed in float32 at least.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised x [N, heads, L, d], of the same type."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = self.scale.to(wide.dtype)
        return functional.rms_norm(wide, x.shape[-1:], scale, eps=1e-6).to(x.dtype)


def head_norms(head_dim: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """Return what normalises queries and what normalises keys: nothing without ``qk_norm``."""
    if not qk_norm:
        return nn.Identity(), nn.Identity()
    return HeadNorm(head_dim), HeadNorm(head_dim)


def choose_attention(attention: str, device: torch.device, needs_grad: bool) -> str:
    """Return which of :data:`ATTENTION` a learned bias gets where ``auto`` or one is asked.

    Raises ValueError for flex attention with gradients on a CPU.
    """
    if attention == "auto":
        return AUTO_ATTENTION.get(device.type, "sdpa")
    if attention == "flex" and device.type == "cpu" and needs_grad:
        got = "flex, which cannot be trained on a CPU"
        raise refusal("--attention", got, remedy="use --attention=explicit, or a GPU")
    return attention


@contextlib.contextmanager
def observing_attention(
    look: Callable[[Tensor, Tensor, Tensor | None, float], None],
) -> Iterator[None]:
    """Within it, call ``look(q, k, bias, scale)`` with what every :func:`attend` gets."""
    global _look
    before, _look = _look, look
    try:
        yield
    finally:
        _look = before


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    attention: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale q k^T + bias) v (DiffiT, arXiv 2312.02139, Eq. 6).

    Args:
        q: [N, heads, L, d].
        k, v: [N, heads, M, d].
        bias: Added after the scaling, or bool, true where a key may be seen; it broadcasts to
            [N, heads, L, M]. Flex attention takes [heads, L, M].
        attention: One of :data:`ATTENTION`; see :func:`choose_attention`.
        scale: d^-0.5 by default.

    Returns [N, heads, L, d].
    """
    if _look is not None:
        _look(q, k, bias, q.shape[-1] ** -0.5 if scale is None else scale)
    if attention == "auto":
        backend = _auto(q, k, bias)
    else:
        backend = choose_attention(attention, q.device, q.requires_grad)
    if backend == "explicit" and not torch.compiler.is_exporting():  # A program has no autograd.
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf)
        return _Explicit.apply(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    if backend == "flex":
        return _flex(q, k, v, bias, scale)
    if bias is not None and bias.ndim < 4:
        bias = bias[None]  # Four dimensions: the fused CPU kernel takes no others.
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _auto(q: Tensor, k: Tensor, bias: Tensor | None) -> str:
    """Return the fastest way for these tensors, as `benchmark.py attention` measures it.

    On CPUs SDPA has no fused kernel for a bias that needs a gradient and computes it in fp32: of
    its time the explicit form takes 0.9 to 1 in fp32, 0.3 to 1 in bf16, and 0.3 to 0.75 without
    gradients (16 to 1,024 tokens). Without a bias SDPA is faster, but for two cases up to 512
    tokens: gradients in bf16 (0.1 to 0.5 of its time), and fp32 products by oneDNN (0.1 to 0.4),
    which SDPA would prepare anew for each of its small blocks.
    """
    if q.device.type != "cpu" or (bias is not None and bias.dtype != torch.bool):
        return choose_attention("auto", q.device, q.requires_grad)
    if max(q.shape[-2], k.shape[-2]) > _MAX_EXPLICIT_TOKENS:
        return "sdpa"
    if q.dtype == torch.float32:
        return "explicit" if cpu_matmul.in_use() == "onednn" else "sdpa"
    return "explicit" if q.requires_grad and q.dtype != torch.float64 else "sdpa"


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    def add_bias(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    fused = q.device.type != "cpu" and not torch.compiler.is_compiling()
    function = _compiled_flex_attention() if fused else flex_attention
    return function(q, k, v, score_mod=add_bias, scale=scale)


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


class _Explicit(torch.autograd.Function):
    """:func:`attend` as two batched products and a softmax, which keeps the weights alone.

    With P = softmax(S) and dP = dO V^T, dS = P (dP - sum_j P dP), from which dQ = scale dS K,
    dK = scale dS^T Q, dV = P^T dO, and the gradient of the bias is dS, summed where it broadcasts.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        ctx.scale = scale
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        # Copied once: every product of parts of a larger tensor would copy them again.
        q, k, v = q * scale, k.contiguous(), v.contiguous()
        with _in_own_type(q):
            scores = q @ k.transpose(-1, -2)
            if bias is not None:
                scores.add_(bias.to(q.dtype))
            weights = torch._softmax(scores, -1, False)  # Which autocast leaves alone.
            ctx.save_for_backward(q, k, v, weights)
            return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors  # scale q, as the scores are of.
        grad = grad.contiguous()
        of_v = weights.transpose(-1, -2) @ grad
        of_weights = grad @ v.transpose(-1, -2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_q = (of_scores @ k).mul_(ctx.scale)
        of_k = of_scores.transpose(-1, -2) @ q
        of_bias = None
        if ctx.needs_input_grad[3]:
            shape, dtype = ctx.bias_like
            of_bias = _sum_to(of_scores, shape, dtype)
        return of_q, of_k, of_v, of_bias, None


def _in_own_type(q: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which products are made in the type of ``q``, whatever autocast says."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == q.dtype:
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _sum_to(value: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return ``value`` summed, in ``dtype``, over the dimensions in which ``shape`` broadcasts."""
    aligned = (1,) * (value.ndim - len(shape)) + tuple(shape)
    dims = [i for i, (own, size) in enumerate(zip(aligned, value.shape, strict=True)) if own < size]
    value = value.sum(dim=dims, keepdim=True, dtype=dtype) if dims else value.to(dtype)
    return value.reshape(shape)
