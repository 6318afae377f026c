"""Clocks, memory, device facts and tables of the benchmarks."""

import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch

from dnnlib.parallel import num_usable_cores
from torch_utils import cpu_matmul

Value = TypeVar("Value")

# Columns of the time per turn: median and minimum, of wall time and of processor time.
TIME_COLUMNS = ("wall, s", "at least", "CPU, s", "at least")
_BF16_FLAGS = {"AVX512-BF16": "avx512_bf16", "AMX": "amx_bf16"}


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def describe_device(device: torch.device) -> str:
    """Return one line with hardware, cores, PyTorch version, threads and the system's load."""
    name, software = device_name(device), f"torch {torch.__version__}"
    if device.type == "cuda":
        software += f", CUDA {torch.version.cuda}"
    else:
        flags = _field("/proc/cpuinfo", "flags").split()
        has = [f"{name}: {'yes' if flag in flags else 'no'}" for name, flag in _BF16_FLAGS.items()]
        name += f" ({', '.join(has)})"
    # Mean number of runnable processes over the last minute.
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    threads = f"{torch.get_num_threads()} threads"
    if device.type == "cpu":
        threads += f", float32 matrices by {cpu_matmul.in_use()}"
    return f"{name}; {num_usable_cores()} cores; {software}; {threads}; load {load}"


def _field(path: str, name: str) -> str:
    """Return the first value of ``name`` in a /proc file of ``name: value`` lines, or ''."""
    text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    found = re.search(rf"^{name}\s*:[ \t]*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else ""


class Clock:
    """Divides time into consecutive parts: call ``start()``, then ``mark(part)`` as each part ends.

    On a GPU the marks are CUDA events, so that the host runs ahead as it does in training.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self._marks = []
        if self._cuda:
            torch.cuda.synchronize()
        self.mark("")

    def mark(self, part: str) -> None:
        """End the part that began at the previous mark; several parts of one name are summed."""
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part since :meth:`start`, in order; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        result: dict[str, float] = {}
        for (_, before), (part, now) in zip(self._marks, self._marks[1:], strict=False):
            passed = before.elapsed_time(now) / 1000 if self._cuda else now - before
            result[part] = result.get(part, 0.0) + passed
        return result


class Spent(NamedTuple):
    """The seconds that a call took: elapsed, and of processor time including child processes."""

    wall: float
    cpu: float


class CpuClock:
    """Counts the processor time of this process and its children since it was created."""

    def __init__(self) -> None:
        self._children = _children_seconds()
        self._own = time.process_time()

    def seconds(self) -> float:
        own = time.process_time() - self._own  # First, because querying the children takes time.
        return own + max(_children_seconds() - self._children, 0.0)


def _children_seconds() -> float:
    times = psutil.Process().cpu_times()
    seconds = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


def spent_by(function: Callable[[], Any], device: torch.device) -> Spent:
    """Return the time that a call takes, until the device has finished it."""
    clock, cpu = Clock(device), CpuClock()
    clock.start()
    function()
    clock.mark("call")
    return Spent(clock.seconds()["call"], cpu.seconds())


def interleave(
    turns: dict[str, Callable[[], Value]], num_rounds: int, *, warm_up: bool = False
) -> dict[str, list[Value]]:
    """Return the results of ``num_rounds`` rounds, in each of which every function has one turn.

    Every other round runs in reverse order, so that drift and noise of the machine affect all
    functions alike. ``warm_up`` adds a first round whose results are discarded.
    """
    for turn in turns.values() if warm_up else ():
        turn()
    results: dict[str, list[Value]] = {name: [] for name in turns}
    for round_idx in range(num_rounds):
        for name in list(turns)[:: -1 if round_idx % 2 else 1]:
            results[name].append(turns[name]())
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def walls(turns: Sequence[Spent]) -> list[float]:
    """Return the wall time of each turn in seconds."""
    return [turn.wall for turn in turns]


def median_wall(turns: Sequence[Spent]) -> float:
    return statistics.median(walls(turns))


def time_cells(turns: Sequence[Spent], scale: float = 1.0) -> list[str]:
    """Return the cells of :data:`TIME_COLUMNS`, with times multiplied by ``scale``."""
    cells = []
    for values in (walls(turns), [turn.cpu for turn in turns]):
        cells += [f"{scale * kind(values):.4g}" for kind in (statistics.median, min)]
    return cells


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def peak_growth(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return the peak memory of a call in bytes, beyond the memory in use before it.

    On a GPU this counts the memory that PyTorch's allocator hands out, on a CPU resident memory.
    Returns None where the system does not report the latter (only Linux does).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # Otherwise the call could reuse freed memory, which would not be counted.
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Resets the peak, VmHWM.
        before = _resident("VmRSS")
        function()
        return max(_resident("VmHWM") - before, 0)
    except OSError:
        return None


def _resident(name: str) -> int:
    return int(_field("/proc/self/status", name).removesuffix("kB")) * 1024


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as aligned text, the first column to the left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)
