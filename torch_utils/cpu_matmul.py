"""Which library multiplies float32 matrices on a CPU: MKL, or oneDNN where that is faster.

MKL uses AVX-512 on Intel's CPUs alone. On AMD's, oneDNN reaches twice its speed, with all 24 bits:
torch hands float32 products to oneDNN once it allows it to round them to bfloat16, and a CPU
without AMX has no instruction by which oneDNN would. On one with AMX it does not round if AMX is
ruled out before its first use.
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
# The largest error of a product of two 256x256 matrices, relative to its largest value: 1e-6 in
# float32 by any order of the sums, 2e-3 where factors are rounded to bfloat16.
_MAX_ERROR = 1e-5
_in_use = "mkl"


def in_use() -> str:
    """Return which of :data:`BACKENDS` multiplies float32 matrices in this process."""
    return _in_use


def is_by_onednn(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of a type on this CPU."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and _has_bfloat16()
    return dtype == torch.float32 and _in_use == "onednn"


@functools.cache
def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def best() -> str:
    """Return the faster of :data:`BACKENDS` for this model of CPU: what ``auto`` means.

    By a table, never by a measurement, so that it is the same in every run: oneDNN on CPUs of AMD
    that have AVX-512 and no AMX, MKL on all others. The environment variable SETDIFFIT_CPU_MATMUL
    names one of them where another is wanted by default.
    """
    wanted = os.environ.get(_DEFAULT_VARIABLE)
    if wanted in BACKENDS:
        return wanted
    vendor, flags = _cpu()
    is_faster = vendor == "AuthenticAMD" and "avx512f" in flags and "amx_tile" not in flags
    return "onednn" if is_faster and torch.backends.mkldnn.is_available() else "mkl"


def use(backend: str) -> None:
    """Multiply float32 matrices by one of :data:`BACKENDS` from now on.

    Raises ValueError if it is not there, or would round what it multiplies.
    """
    problem = _switch(backend)
    if problem is not None:
        raise refusal("--cpu-matmul", backend, but=f"it {problem}", remedy="use mkl")


def agree(asked: str, stored: str | None, device: torch.device) -> str:
    """Have all ranks multiply float32 matrices by the same backend, and return it. Collective.

    Args:
        asked: One of :data:`BACKENDS`, or ``auto``: what rank 0 finds best, or what is stored.
        stored: That of the run or snapshot that this continues, if any. Where it cannot be used,
            MKL is, and rank 0 says so.
        device: Where the network computes; on a GPU nothing changes.

    Raises ValueError if what is asked, and not stored, cannot be used.
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
    """Return why a backend cannot be used; then, that is MKL."""
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
        os.environ.setdefault(_ISA_VARIABLE, "AVX512_CORE_BF16")  # Read at its first use.
    settings.fp32_precision = "bf16"
    if _relative_error() > _MAX_ERROR:
        settings.fp32_precision = "none"
        return f"rounds to bfloat16 on this CPU (unless {_ISA_VARIABLE}=AVX512_CORE_BF16 is set)"
    _in_use = backend
    return None


def _relative_error() -> float:
    """Return the error of a product, relative to its largest value."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.abs().max())


@functools.cache
def _cpu() -> tuple[str, frozenset[str]]:
    """Return the vendor of the CPU and what it is capable of; empty where nobody says."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return "", frozenset()
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)", text, re.MULTILINE)
    return vendor[1] if vendor else "", frozenset(flags[1].split() if flags else ())
