"""Parameter and FLOP counts, peak rates of GPUs, TF32, and the memory of the C library."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense peak rates in TFLOP/s: float32 without tensor cores, TF32, bfloat16 with float32 sums.
# Sources: NVIDIA's data sheets of A100, H100, H200, L4 and L40S, halved where they assume sparsity,
# and its white papers on GA102 (RTX 3090) and Ada (RTX 4090). The first pattern found in the
# device's name applies.
PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"A100", dict(fp32=19.5, tf32=156.0, bf16=312.0)),
    (r"H100 PCIe", dict(fp32=51.0, tf32=378.0, bf16=756.0)),
    (r"H[12]00 NVL", dict(fp32=60.0, tf32=417.5, bf16=835.5)),
    (r"H100|H200", dict(fp32=67.0, tf32=494.5, bf16=989.0)),
    (r"L40S", dict(fp32=91.6, tf32=183.0, bf16=362.0)),
    (r"L4\b", dict(fp32=30.3, tf32=60.0, bf16=121.0)),
    (r"RTX 4090\b(?! D)", dict(fp32=82.6, tf32=82.6, bf16=165.2)),
    (r"RTX 3090\b(?! Ti)", dict(fp32=35.6, tf32=35.6, bf16=71.2)),
)


# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def peak_flops(device_name: str, arithmetic: str) -> float | None:
    """Return a GPU's peak rate in FLOP/s for ``fp32``, ``tf32`` or ``bf16``; None if unknown."""
    for pattern, peaks in PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return peaks[arithmetic] * 1e12
    return None


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in matrix products and convolutions of float32 on NVIDIA GPUs."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def keep_freed_memory(keeps: bool = True) -> None:
    """Make the C library keep freed memory instead of returning it to the system at once.

    A training step on a CPU frees and allocates the same hundreds of megabytes again. If they were
    returned, the system would map and zero every page anew, which takes 5 to 10% of the step. With
    ``keeps=False`` freed memory is returned where possible. Does nothing unless the C library is
    glibc.
    """
    global _keeps_freed_memory
    _keeps_freed_memory = keeps
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30 if keeps else 1 << 20)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1 if keeps else 1 << 20)


_keeps_freed_memory = False


@contextlib.contextmanager
def returning_freed_memory() -> Iterator[None]:
    """A context in which the C library returns memory: what is free on entry, and what is freed.

    Tensors of other sizes than a step's do not fit into the gaps that steps leave, and would need
    as much memory again. Does nothing unless freed memory is kept.
    """
    if not _keeps_freed_memory:
        yield
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
    trim(0)
    keep_freed_memory(False)
    try:
        yield
    finally:
        keep_freed_memory()
        trim(0)


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of parameter elements of a module, on any device including meta."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(function: Callable[[], Any]) -> int:
    """Return the floating-point operations of all matrix products and convolutions in a call.

    A multiply-add counts as two. On the meta device nothing is computed. Gradients are disabled.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()
