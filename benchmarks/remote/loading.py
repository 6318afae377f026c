"""benchmark.py data --delay: loading from a slow web server, against local loading."""

import contextlib
import dataclasses
import operator
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import click
import psutil
import torch

import families
from benchmarks.kinds import make_latents, make_pictures
from benchmarks.measure import (
    Spent,
    describe_device,
    interleave,
    median_ratio,
    median_wall,
    spent_by,
    walls,
)
from benchmarks.options import LoadingOptions, measured_preset
from benchmarks.remote import bare_transfer, web_server
from benchmarks.remote.feature_data import make_features
from configs.presets import PRESETS
from data.features.buckets import Bucket
from data.loader import make_loader
from dnnlib.files import CACHE_VARIABLE
from dnnlib.parallel import num_usable_cores
from dnnlib.remote.blocks import close_blocks
from training.config import RunConfig
from training.family import Part

GOAL = 0.8
_CPU = torch.device("cpu")
_FEATURE_BUCKET = Bucket(1024, 1024)
# Items per epoch: images of the preset's size, images of 256x256, latents and features.
_NUM_IMAGES = (16384, 2048, 32768, 96)


@dataclasses.dataclass(frozen=True)
class _Data:
    """One kind of data, and how it is loaded."""

    name: str
    run: RunConfig
    num_images: int
    batch: int
    make: Callable[[Path], Path]  # Writes the data into a folder, and returns their path.


def measure(options: LoadingOptions) -> None:
    """Print the speed of loading from a server as a share of local loading."""
    click.echo(describe_device(_CPU))
    told = f"a web server of this machine that answers {options.delay:g} ms late"
    click.echo(f"Epochs from {told}; the first with an empty cache.")
    click.echo("CPU: seconds of all cores in the first epoch, of loading and of the server.")
    click.echo("Bare copy: the share of local speed until a local epoch has ended and another")
    click.echo("process has copied the same bytes from the server, by sockets alone.")
    header = ["", "workers", "local, images/s", "first epoch", "of local", "CPU", "server's CPU"]
    header += ["later", "of local", "bare copy"]
    kinds, counts = _all_data(options), (0, max(num_usable_cores() // 2, 1))
    width = max(len(data.name) for data in kinds)
    click.echo("  ".join([header[0].ljust(width), *header[1:]]))
    for data in kinds:  # Rows are printed as they are measured, because all take minutes.
        with tempfile.TemporaryDirectory() as folder:
            location = str(data.make(Path(folder)))
            with _served(folder, options.delay / 1000) as server:
                for num_workers in counts:
                    cells = _row(data, location, folder, server, num_workers, options.rounds)
                    padded = [c.rjust(len(h)) for c, h in zip(cells, header[1:], strict=True)]
                    click.echo("  ".join([data.name.ljust(width), *padded]))
    click.echo(f"Goal: {GOAL:.0%} of local speed.")


def _all_data(options: LoadingOptions) -> list[_Data]:
    small, latent = measured_preset(options.preset).run, measured_preset("imagenet256").run
    large = dataclasses.replace(small, model=dataclasses.replace(small.model, resolution=256))
    found = []
    *of_images, num_latents, num_features = _NUM_IMAGES
    for run, num_images in zip((small, large), of_images, strict=True):
        name = f"{run.model.resolution}x{run.model.resolution} images"
        make = _maker(make_pictures, run, num_images)
        found.append(_Data(name, run, num_images, options.batch or 64, make))
    make = _maker(make_latents, latent, num_latents)
    found.append(_Data("latents of 256x256", latent, num_latents, options.batch or 64, make))

    def features(folder: Path) -> Path:
        return make_features(folder, num_features, _FEATURE_BUCKET)

    run = PRESETS["nanodit"].run
    name = f"features of {_FEATURE_BUCKET.name}"
    return [*found, _Data(name, run, num_features, options.batch or 8, features)]


def _maker(make: Callable[..., Path], run: RunConfig, num_images: int) -> Callable[[Path], Path]:
    return lambda folder: make(folder, run.model, num_images)


class _Server(NamedTuple):
    """A process that serves a folder at an address."""

    address: str
    process: psutil.Process

    def seconds(self) -> float:
        """Return the seconds of processor time that the server has used so far."""
        times = self.process.cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def _served(folder: str, delay_sec: float) -> Iterator[_Server]:
    """Serve a folder from another process, which delays every answer by ``delay_sec``."""
    command = [sys.executable, web_server.__file__, folder, str(delay_sec)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Server(process.stdout.readline().strip(), psutil.Process(process.pid))
        finally:
            process.kill()


def _row(
    data: _Data, local: str, folder: str, server: _Server, num_workers: int, num_rounds: int
) -> list[str]:
    remote, of_server = server.address + local.removeprefix(folder), []
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict("os.environ") as environment:
        environment[CACHE_VARIABLE] = cache

        def first() -> Spent:
            shutil.rmtree(Path(cache, "blocks"), ignore_errors=True)
            close_blocks()  # Deleted blocks could still be read through open files.
            before = server.seconds()
            spent = _epoch(data, remote, num_workers)
            of_server.append(server.seconds() - before)
            return spent

        def beside_bare_copy() -> Spent:
            with _copier(folder, server, Path(cache, "copy")) as copier:
                return _epoch(data, local, num_workers, copier)

        turns = {
            "local": lambda: _epoch(data, local, num_workers),
            "first": first,
            "later": lambda: _epoch(data, remote, num_workers),
            "bare copy": beside_bare_copy,
        }
        times = interleave(turns, num_rounds, warm_up=True)
    rates = {name: f"{data.num_images / median_wall(spent):.0f}" for name, spent in times.items()}
    share = {
        name: f"{median_ratio(walls(times['local']), walls(spent)):.2f}"
        for name, spent in times.items()
    }
    # ``spent.cpu`` counts all children of this process, so subtract the server. Its first turn was
    # the warm-up.
    of_all, of_server = [spent.cpu for spent in times["first"]], of_server[1:]
    # The system counts in hundredths of a second, so a difference can be slightly negative.
    loading = max(statistics.median(map(operator.sub, of_all, of_server)), 0.0)
    cpu = [f"{seconds:.2f}" for seconds in (loading, statistics.median(of_server))]
    cells = [rates["local"], rates["first"], share["first"], *cpu, rates["later"], share["later"]]
    cells.append(share["bare copy"])
    return [str(num_workers), *cells]


@contextlib.contextmanager
def _copier(folder: str, server: _Server, target: Path) -> Iterator[subprocess.Popen]:
    """Start a process that is ready to copy a folder from its server using only sockets."""
    command = [sys.executable, bare_transfer.__file__, folder, server.address, str(target)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        yield process
    target.unlink()


def _epoch(
    data: _Data, location: str, num_workers: int, copier: subprocess.Popen | None = None
) -> Spent:
    """Return the time to load each item once, in the order of training.

    A ``copier`` is started at the same time, and the time includes waiting for it to finish.
    """
    run = data.run.changed("data", data=location, hflip=False, cache=False)
    run = run.changed("training", batch=data.batch)
    family = families.of(run)
    dataset = family.open_data(run)
    part = Part(rank=0, world_size=1, batch_gpu=data.batch)
    sampler = family.steps(run, dataset, 0, part).sampler
    loader = make_loader(dataset, sampler, num_workers=num_workers, device=_CPU)

    def load() -> None:
        if copier is not None:
            print(file=copier.stdin, flush=True)
        batches = iter(loader)
        for _ in range(data.num_images // data.batch):
            next(batches)
        if copier is not None and copier.wait():
            raise RuntimeError("The bare copy failed.")

    return spent_by(load, _CPU)
