"""Counting what a module holds and computes, and what a device could compute."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense peaks in TFLOP/s: float32 outside tensor cores, TF32, bfloat16 with float32 sums. Published
# by NVIDIA in the data sheets of A100, H100, H200, L4 and L40S, which give twice as much where they
# assume sparsity, and in the white papers of GA102 (RTX 3090) and Ada (RTX 4090). The first pattern
# found in the device's name counts.
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
    """Return the peak of a GPU in FLOP/s for ``fp32``, ``tf32`` or ``bf16``; None if unknown."""
    for pattern, peaks in PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return peaks[arithmetic] * 1e12
    return None


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 products and convolutions of float32 on NVIDIA GPUs."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def keep_freed_memory(keeps: bool = True) -> None:
    """Have the C library keep what is freed, in place of giving it back to the system at once.

    A step on a CPU frees and asks for the same hundreds of megabytes again; each time the system
    would hand out pages one by one and fill them with zeros, for 5 to 10% of the step. Without
    ``keeps`` it gives back what it can. Does nothing where the C library is not glibc.
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
    """Within it, have the C library give back what is freed, and before it what is free.

    Tensors of other sizes than those of a step would not fit between what steps left, and would
    take as much memory once more. Does nothing unless freed memory is kept.
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
    """Return the number of parameter values of a module, on any device including meta."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(function: Callable[[], Any]) -> int:
    """Return the floating-point operations of matrix products and convolutions in a call.

    A multiply-add counts as two. Works on the meta device, without computing anything.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()
