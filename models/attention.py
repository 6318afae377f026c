"""Attention with the fastest kernels for a device, a dtype and a number of tokens."""

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

# What "auto" means with a learned bias, by device type; SDPA for any other. On GPUs the
# implementations have not been compared yet.
AUTO_ATTENTION: dict[str, str] = {"cpu": "explicit", "cuda": "sdpa"}
ATTENTION = ("auto", "sdpa", "flex", "explicit")
# With more tokens, the scores of one image and head outgrow a CPU's caches, and SDPA, which never
# holds all of them, is faster.
_MAX_EXPLICIT_TOKENS = 512
# The observer that :func:`observing_attention` has set, if any.
_look: Callable[[Tensor, Tensor, Tensor | None, float], None] | None = None


class HeadNorm(nn.Module):
    """RMS norm of the queries or keys of each head, with a learned scale for each channel.

    It bounds the scores however large the preceding weights grow. Its source, ViT-22B (arXiv
    2302.05442, section 2), also subtracts the mean. Computed in float32 or wider.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [N, heads, L, d], normalised, in its own dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = self.scale.to(wide.dtype)
        return functional.rms_norm(wide, x.shape[-1:], scale, eps=1e-6).to(x.dtype)


def head_norms(head_dim: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """Return the norms of queries and of keys: identities without ``qk_norm``."""
    if not qk_norm:
        return nn.Identity(), nn.Identity()
    return HeadNorm(head_dim), HeadNorm(head_dim)


def choose_attention(attention: str, device: torch.device, needs_grad: bool) -> str:
    """Return the implementation to use with a learned bias, resolving ``auto`` by device.

    ``attention`` is one of :data:`ATTENTION`. Raises ValueError for flex attention with gradients
    on a CPU.
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
    """Within the block, call ``look(q, k, bias, scale)`` in every :func:`attend`."""
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
        q: Queries [N, heads, L, d].
        k, v: Keys and values [N, heads, M, d].
        bias: Float, added to the scaled scores, or bool, true where a key may be attended to;
            broadcasts to [N, heads, L, M]. Flex attention needs a float [heads, L, M].
        attention: One of :data:`ATTENTION`; see :func:`choose_attention`.
        scale: Factor of the scores; d^-0.5 by default.

    Returns [N, heads, L, d].
    """
    if _look is not None:
        _look(q, k, bias, q.shape[-1] ** -0.5 if scale is None else scale)
    if attention == "auto":
        backend = _auto(q, k, bias)
    else:
        backend = choose_attention(attention, q.device, q.requires_grad)
    # An exported program cannot hold an autograd function.
    if backend == "explicit" and not torch.compiler.is_exporting():
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf)
        return _Explicit.apply(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    if backend == "flex":
        return _flex(q, k, v, bias, scale)
    if bias is not None and bias.ndim < 4:
        bias = bias[None]  # The fused CPU kernel takes four dimensions only.
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _auto(q: Tensor, k: Tensor, bias: Tensor | None) -> str:
    """Return the fastest implementation for these tensors, as `benchmark.py attention` measures it.

    On CPUs, SDPA has no fused kernel for a bias that needs a gradient, and computes it in fp32. The
    explicit form takes 0.9 to 1 of its time in fp32, 0.3 to 1 in bf16, and 0.3 to 0.75 without
    gradients (16 to 1,024 tokens). Without a bias, SDPA is faster except in two cases of up to 512
    tokens: with gradients in bf16 the explicit form takes 0.1 to 0.5 of its time, and 0.1 to 0.4 if
    oneDNN computes fp32 products, which SDPA would set up anew for each of its small blocks.
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
    """:func:`attend` as two batched products and a softmax; of [L, M] tensors it keeps P alone.

    With P = softmax(S) and dP = dO V^T, the gradients are dS = P (dP - sum_j P dP),
    dQ = scale dS K, dK = scale dS^T Q and dV = P^T dO. That of the bias is dS, summed over the
    dimensions in which the bias broadcasts.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        ctx.scale = scale
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        # Copy once: products would otherwise copy these slices of a larger tensor every time.
        q, k, v = q * scale, k.contiguous(), v.contiguous()
        with _in_own_type(q):
            scores = q @ k.transpose(-1, -2)
            if bias is not None:
                scores.add_(bias.to(q.dtype))
            weights = torch._softmax(scores, -1, False)  # Autocast does not change this operator.
            ctx.save_for_backward(q, k, v, weights)
            return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors  # This q includes the scale.
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
    """Return a context manager in which products use the dtype of ``q``, whatever autocast says."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == q.dtype:
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _sum_to(value: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return ``value`` summed to ``shape``, in ``dtype``, over the dimensions that broadcast."""
    aligned = (1,) * (value.ndim - len(shape)) + tuple(shape)
    dims = [i for i, (own, size) in enumerate(zip(aligned, value.shape, strict=True)) if own < size]
    value = value.sum(dim=dims, keepdim=True, dtype=dtype) if dims else value.to(dtype)
    return value.reshape(shape)
