"""benchmark.py states: how long writing a training state pauses training."""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

import families
from benchmarks.kinds import dataset_of
from benchmarks.measure import describe_device, table
from benchmarks.options import StateOptions, measured_run
from benchmarks.steps import TrainingSteps
from dnnlib.files import check_target
from models import ModelConfig, build_network
from torch_utils import distributed
from torch_utils.saver import Saver
from training.checkpoint import DataSummary
from training.config import RunConfig, fit_to_device
from training.saving.writer import Writer

_DATA = DataSummary(name="none", resolution=1, img_channels=1, num_images=1, content_hash="")


def measure(config: ModelConfig, options: StateOptions) -> None:
    """Print the table of ``benchmark.py states``."""
    if options.outdir is not None:
        check_target("--outdir", options.outdir, is_folder=True)
        options.outdir.mkdir(parents=True, exist_ok=True)
    device = distributed.init()
    click.echo(describe_device(device))
    run = measured_run(options.preset, config)
    run = run.changed("training", batch=1, batch_gpu=1, compile=False)
    run = fit_to_device(run.changed("logging", workers=0), device.type)
    with dataset_of(run, None, 32) as dataset:
        steps = TrainingSteps(families.of(run).fit(run, dataset), dataset, device)
        steps.time(1)
    state = steps.state()
    rows = [["", "seconds", "s/GB", "until it is on disk, s"]]
    with tempfile.TemporaryDirectory(dir=options.outdir) as folder:
        plain = [_save_plainly(state, Path(folder)) for _ in range(options.rounds)]
        ways = [("this code", None), (f"this code, {options.rate:g} MB/s", options.rate)]
        found = {name: time_states(run, state, Path(folder), options, r) for name, r in ways}
    gigabytes = found["this code"]["gigabytes"]

    def row(name: str, seconds: float, whole: float) -> list[str]:
        return [name, f"{seconds:.3f}", f"{seconds / gigabytes:.3f}", f"{whole:.2f}"]

    rows.append(row("torch.save, and fsync", *[statistics.median(plain)] * 2))
    for name, times in found.items():
        rows.append(row(f"{name}, the first", times["first"], times["first_whole"]))
        rows.append(row(name, times["stall"], times["whole"]))
    click.echo(f"A state of {options.preset}: {gigabytes:.2f} GB. Training pauses for:")
    click.echo(table(rows))
    ratio = statistics.median(plain) / found["this code"]["stall"]
    click.echo(f"torch.save over this code: {ratio:.1f}")


def time_states(
    run: RunConfig, state: dict[str, Any], folder: Path, options: StateOptions, rate: float | None
) -> dict[str, float]:
    """Return the seconds for which writing a state pauses training.

    ``first`` is the pause of the first state, and ``stall`` the median of the others.
    ``first_whole`` and ``whole`` are the seconds until the state is on disk. ``gigabytes`` is its
    size. ``rate`` limits writing to so many MB/s.
    """
    device = state["optimizer"]["counters"].device
    with Saver(rate) as saver:
        writer = Writer(saver, folder, run, _DATA, keep_states=1, is_sharded=False)
        writer.reserve(state, build_network(run.model), device)
        time.sleep(options.warm_up)  # Stands for the training before the first state.
        turns = []
        for number in range(options.rounds + 1):
            began = time.perf_counter()
            writer.write(state, (), 1000 * number, is_urgent=lambda: False)
            stall = time.perf_counter() - began
            writer.finish()
            turns.append((stall, time.perf_counter() - began))
        (path,) = folder.glob("training-state-*")
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        shutil.rmtree(path)
    (first, first_whole), *rest = turns
    stall, whole = map(statistics.median, zip(*rest, strict=True))
    times = dict(first=first, first_whole=first_whole, stall=stall, whole=whole)
    return dict(times, gigabytes=num_bytes / 1e9)


def _save_plainly(state: dict[str, Any], folder: Path) -> float:
    began = time.perf_counter()
    with open(folder / "plain.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began
