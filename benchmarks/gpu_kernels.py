"""Parts of benchmark.py gpu: the peak of matrix products, and the attention implementations."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_session import Session
from benchmarks.plain import plain_attention
from models.attention import attend
from torch_utils.misc import allow_tf32

_DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
# (m, n, k): square products, and products of tokens with the weights of an MLP.
_PRODUCTS = (
    *((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 16384, 16384)),
    *((65536, 1152, 4608), (65536, 4608, 1152), (32768, 4096, 4096)),
)
_TINY_PRODUCTS = ((64, 64, 64), (128, 32, 64))
TOKENS = (16, 64, 256, 1024)
_HEADS, _HEAD_DIM = 16, 64
_TOKENS_A_CALL = 65536


def measure_gemm(session: Session) -> dict[str, Any]:
    """Return the rate of each product in each arithmetic, and the best rates, in TFLOP/s."""
    rows, best = [], {}
    for arithmetic in _DTYPES:
        for size in session.pick(_PRODUCTS, _TINY_PRODUCTS):
            name = f"{arithmetic} {'x'.join(map(str, size))}"
            product = functools.partial(_time_product, session, arithmetic, size)
            seconds = session.attempt(name, product)
            if seconds is not None:
                rows.append(
                    dict(arithmetic=arithmetic, size=list(size), tflops=_rate(size, seconds))
                )
                best[arithmetic] = max(best.get(arithmetic, 0.0), rows[-1]["tflops"])
    allow_tf32(False)
    return dict(rows=rows, best=best)


def _rate(size: tuple[int, int, int], seconds: float) -> float:
    m, n, k = size
    return 2 * m * n * k / seconds / 1e12


def _time_product(session: Session, arithmetic: str, size: tuple[int, int, int]) -> float:
    m, n, k = size
    allow_tf32(arithmetic == "tf32")
    make = functools.partial(torch.randn, device=session.device, dtype=_DTYPES[arithmetic])
    a, b = make(m, k), make(n, k)
    output = a @ b.T
    return session.seconds_per_call(lambda: torch.mm(a, b.T, out=output))


def measure_attention(session: Session) -> dict[str, Any]:
    """Return the milliseconds of attention, forward and backward, including the bias gradient.

    ``bias_error`` is the largest error of the bias gradient, against a computation in float64 and
    relative to that gradient's largest value.
    """
    rows = []
    for arithmetic in session.pick(("bf16", "tf32"), ("bf16",)):
        allow_tf32(arithmetic == "tf32")
        for tokens in session.pick(TOKENS, TOKENS[:1]):
            for way, make in _ways(session).items():
                name = f"{way}, {tokens} tokens, {arithmetic}"
                call = functools.partial(_time_attention, session, arithmetic, tokens, make)
                found = session.attempt(name, call, limit_sec=60)
                if found is not None:
                    rows.append(dict(arithmetic=arithmetic, tokens=tokens, way=way, **found))
    allow_tf32(False)
    return dict(rows=rows)


def _ways(session: Session) -> dict[str, Callable[[], Callable[..., torch.Tensor]]]:
    """Return a factory for each implementation, so that compilation happens within its attempt."""
    sdpa, flex, explicit = (
        functools.partial(attend, attention=name) for name in ("sdpa", "flex", "explicit")
    )
    compiled = functools.partial(torch.compile, backend=session.compile_backend, dynamic=False)
    return {
        "sdpa": lambda: sdpa,
        "sdpa, compiled": lambda: compiled(sdpa),
        "flex, compiled": lambda: compiled(flex),
        "explicit": lambda: explicit,
        "explicit, compiled": lambda: compiled(plain_attention),
    }


def _time_attention(
    session: Session, arithmetic: str, tokens: int, make: Callable[[], Callable]
) -> dict[str, float]:
    num = session.pick(_TOKENS_A_CALL, 2 * tokens) // tokens
    heads = session.pick(_HEADS, 2)
    torch.manual_seed(0)
    randn = functools.partial(torch.randn, device=session.device)
    qkv = randn(num, 3 * heads, tokens, _HEAD_DIM, dtype=_DTYPES[arithmetic])
    inputs = [part.requires_grad_() for part in qkv.chunk(3, dim=1)]
    inputs.append(randn(heads, tokens, tokens, requires_grad=True))
    grad = torch.randn_like(inputs[0])
    attention = make()

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attention(*inputs).to(grad.dtype), inputs, grad)

    milliseconds = 1000 * session.seconds_per_call(call)
    return dict(ms=milliseconds, bias_error=_bias_error(call()[3], inputs, grad))


def _bias_error(found: torch.Tensor, inputs: list[torch.Tensor], grad: torch.Tensor) -> float:
    """Return the relative error of a bias gradient; the exact one is summed over small batches."""
    exact, bias = torch.zeros_like(found, dtype=torch.float64), inputs[3].detach().double()
    bias.requires_grad_()
    for *part, grad_part in zip(*(x.detach().split(4) for x in (*inputs[:3], grad)), strict=True):
        output = plain_attention(*(x.double() for x in part), bias)
        exact += torch.autograd.grad(output, bias, grad_part.double())[0]
    return float((found - exact).abs().max() / exact.abs().max())
