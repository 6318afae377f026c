"""Measuring: clocks, memory, device facts, synthetic data, tables."""

import ctypes
import io
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from data.convert.convert import convert
from data.convert.source import Source
from data.latents.record import LABELS_FILE, RECORD_FILE, LatentRecord, shard_name
from dnnlib.files import sha256_of_file, write_json
from dnnlib.parallel import num_usable_cores
from models import ScaledLatentConfig

Value = TypeVar("Value")


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_fields().get("model name") or platform.processor() or platform.machine()


def describe_device(device: torch.device) -> str:
    """Return the hardware and the PyTorch version in one line."""
    if device.type == "cuda":
        return f"{device_name(device)}; torch {torch.__version__}, CUDA {torch.version.cuda}"
    flags = _cpu_fields().get("flags", "").split()
    has = [f"{name}: {'yes' if flag in flags else 'no'}" for name, flag in _BF16_FLAGS.items()]
    return (
        f"{device_name(device)}, {num_usable_cores()} cores ({', '.join(has)}); torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads"
    )


_BF16_FLAGS = {"AVX512-BF16": "avx512_bf16", "AMX": "amx_bf16"}


def _cpu_fields() -> dict[str, str]:
    # Of the first core; empty where there is no such file.
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8").partition("\n\n")[0] if path.is_file() else ""
    pairs = [line.partition(":") for line in text.splitlines()]
    return {key.strip(): value.strip() for key, _, value in pairs}


class Clock:
    """Splits time into parts that follow each other: ``start()``, then ``mark(part)`` at each end.

    On a GPU the marks are events in its queue, so that the host runs ahead as it does in training.
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
        """End a part that began with the mark before."""
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Return the time of each part since :meth:`start`, in order; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        result: dict[str, float] = {}
        for (_, before), (part, now) in zip(self._marks, self._marks[1:], strict=False):
            passed = before.elapsed_time(now) / 1000 if self._cuda else now - before
            result[part] = result.get(part, 0.0) + passed
        return result


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes until the device has finished it."""
    clock = Clock(device)
    clock.start()
    function()
    clock.mark("call")
    return clock.seconds()["call"]


def interleave(turns: dict[str, Callable[[], Value]], num_rounds: int) -> dict[str, list[Value]]:
    """Return the results of calling each function ``num_rounds`` times, in turn.

    Every other round goes backwards, so that drift and noise of the machine affect all alike.
    """
    results: dict[str, list[Value]] = {name: [] for name in turns}
    for round_idx in range(num_rounds):
        for name in list(turns)[:: -1 if round_idx % 2 else 1]:
            results[name].append(turns[name]())
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a container of containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def peak_growth(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return how many bytes a call needs at most beyond those in use before it.

    On a GPU it is what PyTorch's allocator hands out, on a CPU resident memory; None where the
    system does not tell (other than Linux).
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
        trim(0)  # What was freed before would otherwise be used again, unseen.
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Forget the last peak.
        before = _process_status("VmRSS")
        function()
        return max(_process_status("VmHWM") - before, 0)
    except OSError:
        return None


def _process_status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


def make_archive(
    path: Path, *, num_images: int, resolution: int, channels: int, num_classes: int
) -> None:
    """Write a zip of synthetic pictures, about as large as photographs of that size are as PNG."""

    def picture(index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        coarse = rng.normal(0, 50, [channels, resolution // 8 + 2, resolution // 8 + 2])
        size = (resolution, resolution)
        smooth = [
            Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
            for plane in coarse
        ]
        pixels = np.stack([np.asarray(plane) for plane in smooth], axis=2) + 128
        pixels = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        return pixels[:, :, 0] if channels == 1 else pixels

    source = Source(
        name="synthetic pictures",
        num_images=num_images,
        item=picture,
        image_name=str,
        labels=[index % num_classes for index in range(num_images)] if num_classes else None,
        class_names=[f"class {index}" for index in range(num_classes)] if num_classes else None,
    )
    convert(source, path, num_workers=1)


def make_latents(path: Path, *, num_images: int, model: ScaledLatentConfig) -> None:
    """Write an archive of random latents, labelled, of the shape that a model expects."""
    shape = (num_images, 1, 2 * model.latent_channels, *model.input_shape[1:])
    moments = np.random.default_rng(0).standard_normal(shape, np.float32) / (
        model.latent_scale or 1
    )
    moments[:, :, model.latent_channels :] = 0.1
    path.mkdir()
    np.save(path / shard_name(0), moments.astype(np.float16))
    labels = np.arange(num_images, dtype=np.int64) % model.num_classes
    np.save(path / LABELS_FILE, labels)
    record = LatentRecord(
        num_images=num_images,
        resolution=model.resolution,
        img_channels=model.img_channels,
        latent_shape=list(model.input_shape),
        kind="mean-std",
        mirrored=False,
        scale=model.latent_scale or 1.0,
        shift=model.latent_shift,
        vae="none",
        vae_hash="none",
        source="random numbers",
        source_hash="none",
        class_names=[f"class {index}" for index in range(model.num_classes)],
        labels_sha256=sha256_of_file(path / LABELS_FILE),
        input_transform="none",
        precision="fp32",
        shard_size=num_images,
        shards=[
            dict(
                file=shard_name(0),
                num_images=num_images,
                sha256=sha256_of_file(path / shard_name(0)),
            )
        ],
        packages={},
    )
    write_json(path / RECORD_FILE, record.to_dict())


def bare_decode(files: Iterable[bytes]) -> None:
    """Decode image files that are in memory with Pillow and nothing else."""
    for data in files:
        np.asarray(Image.open(io.BytesIO(data)))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as aligned columns, the first to the left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)
