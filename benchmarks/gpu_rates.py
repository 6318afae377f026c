"""Parts of benchmark.py gpu: sampling, Inception, loading, and writing training states."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import families
from benchmarks.gpu_session import Session
from benchmarks.gpu_train import FIRST, gpu_run
from benchmarks.kinds import dataset_of
from benchmarks.measure import Clock
from benchmarks.options import StateOptions
from benchmarks.states import time_states
from benchmarks.steps import TrainingSteps
from data.images.codec import PixelCodec
from data.loader import make_loader
from diffusion.config import GuidanceConfig
from diffusion.denoiser import AUTOCAST_DTYPES, autocast
from dnnlib.parallel import num_usable_cores
from metrics.inception import Inception, InceptionDetector
from metrics.network import arithmetic
from models import build_network
from training.config import RunConfig
from training.family import Part

_CFG_SCALE = 1.5
_DETECTOR = {"bf16": "bfloat16", "fp32": "float32"}
_CHUNK = 64  # Images per evaluation of a detector's network.


def measure_sample(session: Session) -> dict[str, Any]:
    """Return the images/s of guided sampling, and the share of time that the network takes.

    The share is the time of bare evaluations of the network on the same inputs, divided by the
    time of sampling.
    """
    rows = []
    for preset in session.pick(FIRST, ("digits-latent", "digits")):
        for precision in ("bf16", "fp32"):
            batch = session.pick({"imagenet256": 64, "cifar10": 256}.get(preset), 2)
            call = _sampling(session, preset, precision, batch)
            found = session.attempt(f"{preset}, {precision}", call)
            if found is not None:
                rows.append(dict(preset=preset, precision=precision, batch=batch, **found))
    return dict(rows=rows)


def _sampling(
    session: Session, preset: str, precision: str, batch: int
) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        run = gpu_run(preset, session).changed("sampling", steps=session.pick(10, 2))
        run = run.changed("training", precision=precision)
        run = dataclasses.replace(run, guidance=GuidanceConfig(cfg_scale=_CFG_SCALE))
        torch.manual_seed(0)
        network = build_network(run.model).eval().requires_grad_(False).to(session.device)
        family = families.of(run)
        generator = family.unprompted(family.generator(run, network, PixelCodec(), session.device))
        inputs = []
        handle = network.register_forward_pre_hook(lambda _, args: inputs.append(args))
        generator.generate(range(batch))
        handle.remove()

        @torch.inference_mode()
        def bare() -> None:
            with autocast(session.device, AUTOCAST_DTYPES[precision]):
                for args in inputs:
                    network(*args)

        calls = dict(whole=lambda: generator.generate(range(batch)), bare=bare)
        seconds = session.seconds_of_each(calls)
        rate, share = batch / seconds["whole"], seconds["bare"] / seconds["whole"]
        return dict(images_per_sec=rate, evaluations=len(inputs), share=share)

    return measure


def measure_metrics(session: Session) -> dict[str, Any]:
    """Return the images/s of the Inception detector, and of its network alone on ready inputs."""
    rows = []
    for precision in ("bf16", "fp32"):
        found = session.attempt(f"Inception, {precision}", lambda p=precision: _detect(session, p))
        if found is not None:
            rows.append(dict(precision=precision, **found))
    return dict(rows=rows)


def _detect(session: Session, precision: str) -> dict[str, float]:
    torch.manual_seed(0)
    device, name = session.device, _DETECTOR[precision]
    network = Inception()
    detector = InceptionDetector(network, device, precision=name)
    num = session.pick(8 * _CHUNK, 1)
    images = torch.randint(256, (num, 3, 32, 32), dtype=torch.uint8, device=device)
    x = torch.randn(min(num, _CHUNK), 3, 299, 299, device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare() -> None:
        with arithmetic(device, name):
            for _ in range(-(-num // _CHUNK)):
                network(x, ("features",))

    seconds = session.seconds_of_each(dict(whole=lambda: detector(images), bare=bare))
    whole, alone = seconds["whole"], seconds["bare"]
    return dict(images_per_sec=num / whole, bare_per_sec=num / alone, share=alone / whole)


def measure_loading(session: Session) -> dict[str, Any]:
    """Return the images/s of loading into the device's memory, and how long a state stalls."""
    rows = []
    workers = [num for num in (0, 2, 4, 8) if num <= max(num_usable_cores(), 2)]
    for preset in session.pick(FIRST, ("digits-latent", "digits")):
        for num in session.pick(workers, [0]):
            name = f"{preset}, {num} workers"
            rate = session.attempt(name, lambda p=preset, n=num: _load(session, p, n))
            if rate is not None:
                rows.append(dict(preset=preset, workers=num, **rate))
    preset = session.pick("imagenet256", "digits-latent")
    state = session.attempt(f"{preset}, state", lambda: _write_state(session, preset))
    return dict(rows=rows, state=None if state is None else dict(preset=preset, **state))


def _load(session: Session, preset: str, num_workers: int) -> dict[str, float]:
    run = gpu_run(preset, session)
    batch, num = session.pick((256, 40), (8, 2))
    with dataset_of(run, None, session.pick(None, 32)) as dataset:
        run = families.of(run).fit(run, dataset).changed("training", batch=batch)
        part = Part(rank=0, world_size=1, batch_gpu=batch)
        sampler = families.of(run).steps(run, dataset, 0, part).sampler
        device = session.device
        batches = iter(make_loader(dataset, sampler, num_workers=num_workers, device=device))

        def load(num_batches: int) -> int:
            num_bytes = 0
            for _ in range(num_batches):
                images, _ = next(batches)
                images = images.to(device, non_blocking=True)
                num_bytes += images.nbytes
            return num_bytes

        load(1 + 5 * num_workers)  # Discard batches that were prepared before the measurement.
        clock = Clock(device)
        clock.start()
        num_bytes = load(num)
        clock.mark("load")
        seconds = clock.seconds()["load"]
    return dict(images_per_sec=batch * num / seconds, mb_per_sec=num_bytes / seconds / 1e6)


def _write_state(session: Session, preset: str) -> dict[str, float]:
    run = gpu_run(preset, session).changed("training", batch=1, batch_gpu=1, compile=False)
    run: RunConfig = run.changed("training", precision="fp32").changed("logging", workers=0)
    with (
        dataset_of(run, None, 32) as dataset,
        tempfile.TemporaryDirectory(dir=session.folder) as folder,
    ):
        steps = TrainingSteps(families.of(run).fit(run, dataset), dataset, session.device)
        steps.time(1)
        options = StateOptions(rounds=session.pick(3, 1), warm_up=session.pick(5.0, 0.0))
        found = time_states(run, steps.state(), Path(folder), options, None)
    seconds, gigabytes = found["stall"], found["gigabytes"]
    return dict(seconds=seconds, gigabytes=gigabytes, sec_per_gb=seconds / gigabytes)
