"""Which library multiplies float32 matrices on a CPU: MKL, or oneDNN where that is faster.

MKL uses AVX-512 only on Intel CPUs. On AMD CPUs oneDNN is twice as fast at full 24-bit precision:
torch passes float32 products to oneDNN only if oneDNN may round them to bfloat16, but a CPU without
AMX has no instruction for that. On a CPU with AMX, oneDNN does not round either if AMX is disabled
before its first use.
"""

import functools
import os
import re
from pathlib import Path

import torch

from dnnlib.errors import refusal
from torch_utils import distributed

BACKENDS = ("mkl", "onednn")
_CPUINFO = Path("/proc/cpuinfo")
_DEFAULT_VARIABLE = "SETDIFFIT_CPU_MATMUL"
_ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
# Bound on the largest error of a product of two 256x256 matrices, relative to its largest value:
# about 1e-6 in float32, whatever the order of summation, and 2e-3 with factors in bfloat16.
_MAX_ERROR = 1e-5
_in_use = "mkl"


def in_use() -> str:
    """Return which of :data:`BACKENDS` multiplies float32 matrices in this process."""
    return _in_use


def is_by_onednn(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of type ``dtype`` on this CPU."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and _has_bfloat16()
    return dtype == torch.float32 and _in_use == "onednn"


@functools.cache
def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def best() -> str:
    """Return the faster of :data:`BACKENDS` for this model of CPU, which is what ``auto`` means.

    The choice follows fixed rules, not measurements, so that it is the same in every run: oneDNN on
    AMD CPUs with AVX-512 and without AMX, MKL on all others. The environment variable
    SETDIFFIT_CPU_MATMUL overrides it with the backend that it names.
    """
    wanted = os.environ.get(_DEFAULT_VARIABLE)
    if wanted in BACKENDS:
        return wanted
    vendor, flags = _cpu()
    is_faster = vendor == "AuthenticAMD" and "avx512f" in flags and "amx_tile" not in flags
    return "onednn" if is_faster and torch.backends.mkldnn.is_available() else "mkl"


def use(backend: str) -> None:
    """Make one of :data:`BACKENDS` multiply float32 matrices from now on.

    Raises ValueError if it is not available, or would round the factors to bfloat16.
    """
    problem = _switch(backend)
    if problem is not None:
        raise refusal("--cpu-matmul", backend, but=f"it {problem}", remedy="use mkl")


def agree(asked: str, stored: str | None, device: torch.device) -> str:
    """Make all ranks multiply float32 matrices with the same backend, and return it. Collective.

    Args:
        asked: One of :data:`BACKENDS`, or ``auto``: the stored one, or else what :func:`best`
            returns on rank 0.
        stored: Backend of the run or snapshot that this run continues, if any. If the backend to
            use is not available then, MKL is used and rank 0 says so.
        device: Where the network computes; on a GPU nothing changes.

    Raises ValueError if a backend is asked for that is not available, and none is stored.
    """
    if device.type != "cpu":
        return "mkl"
    chosen = distributed.on_main(lambda: (stored or best()) if asked == "auto" else asked)
    if stored is None and asked != "auto":
        with distributed.together():
            use(chosen)
        return chosen
    problems = [problem for problem in distributed.gather_objects(_switch(chosen)) if problem]
    if problems:
        use("mkl")
        distributed.print0(
            f"Float32 matrices were multiplied by {chosen}, which {problems[0]}: MKL does it now, "
            "and results are not the same bit for bit."
        )
    return _in_use


def _switch(backend: str) -> str | None:
    """Switch to a backend; return why it cannot be used, in which case MKL is, or None."""
    global _in_use
    if backend == _in_use:
        return None
    _in_use = "mkl"
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is not None:
        settings.fp32_precision = "none"
    if backend == "mkl":
        return None
    if settings is None or not torch.backends.mkldnn.is_available():
        return "is not part of this build of torch"
    if "amx_tile" in _cpu()[1]:
        os.environ.setdefault(_ISA_VARIABLE, "AVX512_CORE_BF16")  # Read on its first use.
    settings.fp32_precision = "bf16"
    if _relative_error() > _MAX_ERROR:
        settings.fp32_precision = "none"
        return f"rounds to bfloat16 on this CPU (unless {_ISA_VARIABLE}=AVX512_CORE_BF16 is set)"
    _in_use = backend
    return None


def _relative_error() -> float:
    """Return the largest error of a 256x256 product, relative to the product's largest value."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.abs().max())


@functools.cache
def _cpu() -> tuple[str, frozenset[str]]:
    """Return the vendor and the feature flags of the CPU; both empty if they are unknown."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return "", frozenset()
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)", text, re.MULTILINE)
    return vendor[1] if vendor else "", frozenset(flags[1].split() if flags else ())
