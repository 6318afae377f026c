"""Where the numbers of a run go: console, log.txt, stats.jsonl, report.html, boards."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import torch

from dnnlib.config import Config
from dnnlib.files import atomic_write
from dnnlib.text import format_kimg, format_time, join_names
from dnnlib.typed import parse_json
from torch_utils.misc import peak_flops
from training.boards import Board, open_board, problem_with
from training.config import LoggingConfig, TrainingConfig
from training.run_report.files import STATS_FILE, WATCH_FILE
from training.run_report.notices import line_of
from training.run_report.write import RunReport
from training.watching.finding import Finding

Stats = dict[str, dict[str, float]]


class Telemetry:
    """Writes the outputs of one run from ``cur_nimg`` images on; only rank 0 makes one."""

    def __init__(self, run_dir: Path, logging: LoggingConfig, config: Config, cur_nimg: int):
        self._run_dir = run_dir
        trim_rows(run_dir, cur_nimg)
        self._log = open(run_dir / "log.txt", "a", encoding="utf-8")
        self._stats = open(run_dir / "stats.jsonl", "a", encoding="utf-8")
        self._report: RunReport | None = None
        self._report_failed = False
        self._boards: list[Board] = []
        for name in logging.boards:
            try:
                self._boards.append(open_board(name, run_dir, logging, config, cur_nimg))
            except Exception as error:  # Whatever it is, a board never ends a run.
                self.message(problem_with(name, error))

    def message(self, text: str) -> None:
        """Print a line and append it to log.txt."""
        print(text, flush=True)
        _append(self._log, text)

    def tell(self, finding: Finding, cur_nimg: int) -> None:
        """Print a finding and append it to log.txt and watch.jsonl."""
        row = dict(kimg=cur_nimg / 1000, **dataclasses.asdict(finding))
        with open(self._run_dir / WATCH_FILE, "a", encoding="utf-8") as file:
            _append(file, json.dumps(row))
        self.message(line_of(row))

    def record(self, stats: Stats, cur_nimg: int) -> None:
        """Append the statistics of one tick to ``stats.jsonl``, and show them on the boards."""
        # JSON has no NaN.
        row: dict[str, Any] = {
            name: {key: value if math.isfinite(value) else None for key, value in stat.items()}
            for name, stat in stats.items()
        }
        row["timestamp"] = time.time()
        _append(self._stats, json.dumps(row))
        self._scalars({name: value["mean"] for name, value in stats.items()}, cur_nimg)

    def record_metric(self, row: dict[str, Any], cur_nimg: int) -> None:
        """Append one score row to ``metric-<name>.jsonl``, and show it on the boards."""
        with open(self._run_dir / f"metric-{row['metric']}.jsonl", "a", encoding="utf-8") as file:
            _append(file, json.dumps(row))
        name, values = row["metric"], row["values"]
        several = {f"Metrics/{name}/{key}": value for key, value in values.items()}
        found = several if len(values) > 1 else {f"Metrics/{name}": row["value"]}
        # Values that could not be measured have no point on a curve.
        self._scalars({key: v for key, v in found.items() if v is not None}, cur_nimg)

    def write_report(self) -> None:
        """Write ``report.html``, which shows the run so far; a failure is only reported."""
        try:
            self._report = self._report or RunReport(self._run_dir)
            self._report.write()
        except Exception as error:  # Whatever it is, a report never ends a run.
            if not self._report_failed:
                self.message(
                    f"Warning: the report cannot be written ({error}); training continues: find "
                    f"the reason with `python fid.py report {self._run_dir}`."
                )
            self._report_failed = True

    def _scalars(self, values: dict[str, float], cur_nimg: int) -> None:
        self._on_boards(lambda board: board.scalars(values, cur_nimg))

    def pictures(self, paths: Iterable[Path], cur_nimg: int) -> None:
        """Show pictures of the run folder, such as ``fakes-000154.png``, on the boards."""
        for path in sorted(paths):
            name = f"Pictures/{path.stem.rpartition('-')[0] or path.stem}"
            self._on_boards(lambda board, name=name, path=path: board.picture(name, path, cur_nimg))

    def _on_boards(self, show: Callable[[Board], None]) -> None:
        for board in list(self._boards):
            try:
                show(board)
            except Exception as error:  # Whatever it is, a board never ends a run.
                self._boards.remove(board)
                self.message(problem_with(board.name, error))

    def close(self) -> None:
        """Flush and close every sink."""
        self._log.close()
        self._stats.close()
        for board in self._boards:
            with contextlib.suppress(Exception):
                board.close()


def scalar(value: float) -> dict[str, float]:
    """Return one number in the form of a statistic."""
    return dict(num=1, mean=float(value), std=0.0)


def _append(file: TextIO, line: str) -> None:
    """Write and flush a line; an OSError names the file, also where the disk is full."""
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        error.filename = error.filename or file.name
        raise


def tick_line(fields: dict[str, dict[str, float]], total_nimg: int, num_skipped: int) -> str:
    """Return the console line of one tick."""
    mean = {name: value["mean"] for name, value in fields.items()}
    left_kimg = max(total_nimg / 1000 - mean["Progress/kimg"], 0)
    parts = [
        f"tick {mean['Progress/tick']:<5.0f}",
        f"kimg {format_kimg(mean['Progress/kimg']):<9}",
        f"loss {mean['Loss/loss']:<9.5f}",
        f"sec/kimg {mean['Timing/sec_per_kimg']:<8.2f}",
        f"time {format_time(mean['Timing/total_sec']):<8}",
        f"left {format_time(left_kimg * mean['Timing/sec_per_kimg']):<8}",
        f"maintenance {mean['Timing/maintenance_sec']:<6.1f}",
        f"cpumem {mean['Resources/cpu_mem_gb']:<6.2f}",
    ]
    if "Resources/peak_gpu_mem_gb" in mean:
        parts.append(f"gpumem {mean['Resources/peak_gpu_mem_gb']:<6.2f}")
    if "Timing/mfu" in mean:
        parts.append(f"mfu {mean['Timing/mfu']:.1%} ({mean['Timing/tflops_per_sec']:.0f} TFLOP/s)")
    if num_skipped:
        parts.append(f"skipped {num_skipped} non-finite")
    return " ".join(parts).rstrip()


def trim_rows(run_dir: Path, cur_nimg: int) -> None:
    """Drop the rows that a killed run wrote after its last state; they will be written again.

    A run that starts over drops all rows, including those of kimg 0. Damaged rows are dropped too;
    a message names them, except for the last row, which a kill may have cut off.
    """
    limit = cur_nimg / 1000 + 1e-9 if cur_nimg else -1.0
    named = [run_dir / name for name in (STATS_FILE, WATCH_FILE)]
    for path in [*named, *run_dir.glob("metric-*.jsonl")]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        damaged = [n for n, line in enumerate(lines[:-1], 1) if math.isinf(_row_kimg(line))]
        if damaged:
            print(f"{path}: line {join_names(map(str, damaged))} cannot be read and is left out.")
        kept = "".join(line + "\n" for line in lines if _row_kimg(line) <= limit)
        if kept != text:
            with atomic_write(path, "w", encoding="utf-8") as file:
                file.write(kept)


def metric_is_recorded(run_dir: Path, metric: str, cur_nimg: int) -> bool:
    """Return whether the score of this metric after ``cur_nimg`` images is already in its file."""
    path = run_dir / f"metric-{metric}.jsonl"
    if not path.is_file():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(abs(_row_kimg(line) - cur_nimg / 1000) < 1e-9 for line in lines)


def _row_kimg(line: str) -> float:
    """Return a row's kimg; infinity for a line that cannot be read."""
    try:
        row = parse_json(line)
        return float(row["Progress/kimg"]["mean"] if "Progress/kimg" in row else row["kimg"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def utilisation_stats(
    flops_per_sec: float, device: torch.device, training: TrainingConfig
) -> Stats:
    """Return the arithmetic rate of one device in TFLOP/s, and its share of a known GPU's peak.

    ``flops_per_sec`` counts the model's arithmetic, without recomputation that saves memory, so the
    share is the model FLOPs utilisation (MFU) of PaLM (arXiv 2204.02311, Appendix B).
    """
    stats = {"Timing/tflops_per_sec": scalar(flops_per_sec / 1e12)}
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device), training.arithmetic)
        if peak is not None:
            stats["Timing/mfu"] = scalar(flops_per_sec / peak)
    return stats


def memory_stats(device: torch.device) -> Stats:
    """Return this process's resident memory and peak GPU memory since the last call, in GiB."""
    import psutil

    stats = {"Resources/cpu_mem_gb": scalar(psutil.Process().memory_info().rss / 2**30)}
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        stats["Resources/peak_gpu_mem_gb"] = scalar(peak(device) / 2**30)
        stats["Resources/peak_gpu_mem_reserved_gb"] = scalar(reserved(device) / 2**30)
        torch.cuda.reset_peak_memory_stats(device)
    return stats
