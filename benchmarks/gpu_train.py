"""Part of benchmark.py gpu: the training step of every preset, in each arithmetic."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

import families
from benchmarks.gpu_session import Session, free_memory
from benchmarks.kinds import dataset_of
from benchmarks.measure import Clock
from benchmarks.options import MEASURED
from benchmarks.steps import PARTS, PlainTrainingSteps, TrainingSteps
from configs.presets import PRESETS, get_preset
from torch_utils.misc import allow_tf32
from training.config import RunConfig, fit_to_device
from training.family import TrainingData

# The most important ones, in this order; all their variants come before the other presets.
FIRST = ("imagenet256", "cifar10")
_TINY = ("digits-latent", "digits")
_SMALL = {
    "digits": dict(num_stages=1, num_blocks=(1,), base_dim=16, num_heads=2, time_dim=16),
    "digits-latent": dict(num_blocks=1, hidden_dim=16, num_heads=2),
}
_ARITHMETIC = {
    "bf16": dict(precision="bf16", tf32=False),
    "tf32": dict(precision="fp32", tf32=True),
    "fp32": dict(precision="fp32", tf32=False),
}
# Arithmetic and whether compiled, the likeliest to be the fastest first.
_VARIANTS = [
    *(("bf16", True), ("bf16", False), ("tf32", True), ("tf32", False)),
    *(("fp32", True), ("fp32", False)),
]
_OTHER_VARIANTS = _VARIANTS[:2]
_VARIANT_SEC = 120  # Of which the compilation takes most.
_MAX_BATCH = 1024


def gpu_run(name: str, session: Session) -> RunConfig:
    """Return the run of a preset for a dataset like its own, tiny in a dry run."""
    preset = get_preset(name)
    run = families.of(preset.run).example_run(preset.run, preset.num_classes)
    if session.tiny:
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, **_SMALL[name]))
        run = run.changed("logging", workers=0)
    return run


def defaults_of_presets() -> dict[str, dict[str, Any]]:
    """Return arithmetic and compilation of every measured preset on a GPU."""
    found = {}
    for name in MEASURED:
        training = fit_to_device(get_preset(name).run, "cuda").training
        found[name] = dict(arithmetic=training.arithmetic, compiled=training.compile)
    return found


def measure_train(session: Session) -> dict[str, Any]:
    """Return what a step of each preset costs, the most important presets and variants first."""
    rows, others = [], [name for name in MEASURED if name not in FIRST]
    for name in session.pick(FIRST, _TINY):
        rows += _measure_preset(session, name, _VARIANTS, with_plain=True)
    for name in session.pick(others, []):
        rows += _measure_preset(session, name, _OTHER_VARIANTS, with_plain=False)
    for name in session.pick([name for name in PRESETS if name not in MEASURED], []):
        session.left_out.append(f"{name}: there are no made-up data of features")
    return dict(rows=rows)


def _measure_preset(
    session: Session, name: str, variants: list[tuple[str, bool]], *, with_plain: bool
) -> list[dict[str, Any]]:
    rows = []
    opened = contextlib.ExitStack()
    with opened:
        run = gpu_run(name, session)
        dataset = session.attempt(
            f"{name}, data", lambda: opened.enter_context(dataset_of(run, None, _images(session)))
        )
        if dataset is None:
            return rows
        run = families.of(run).fit(run, dataset)
        batch = session.attempt(f"{name}, batch", lambda: find_batch(session, run, dataset), 60)
        if batch is None:
            return rows
        chosen = [("own", arithmetic, compiled) for arithmetic, compiled in variants]
        if with_plain:
            chosen.insert(2, ("plain", "fp32", False))
        for side, arithmetic, compiled in chosen:
            row = _measure_variant(session, (run, dataset), (side, arithmetic, compiled), batch)
            rows += [row] if row else []
    return rows


def _images(session: Session) -> int:
    return session.pick(2048, 32)


def find_batch(session: Session, run: RunConfig, dataset: TrainingData) -> int | None:
    """Return the largest power of two of images that a step in bf16 has memory for.

    No more than the preset's batch, which is that of all GPUs, and than 1,024.
    """
    cap = session.pick(min(run.training.batch, _MAX_BATCH), 2)
    run = run.changed("logging", workers=0)
    batch, fits = 1, None
    with _steps(session, run, dataset, ("own", "bf16", False)) as steps:
        while batch <= cap:
            try:
                steps.resize(batch)
                steps.time(1)
            except torch.OutOfMemoryError:
                break
            fits, batch = batch, 2 * batch
    return fits


@contextlib.contextmanager
def _steps(
    session: Session, run: RunConfig, dataset: TrainingData, variant: tuple[str, str, bool]
) -> Iterator[TrainingSteps]:
    """Make the steps of a variant, and forget them and their settings afterwards."""
    side, arithmetic, compiled = variant
    run = run.changed("training", compile=compiled, **_ARITHMETIC[arithmetic])
    torch.backends.cudnn.benchmark = run.training.cudnn_benchmark
    allow_tf32(run.training.tf32)
    kind = PlainTrainingSteps if side == "plain" else TrainingSteps
    if session.tiny:
        kind = type(kind.__name__, (kind,), dict(compile_backend=session.compile_backend))
    try:
        yield kind(run, dataset, session.device)
    finally:
        allow_tf32(False)
        free_memory()


def _measure_variant(
    session: Session,
    measured: tuple[RunConfig, TrainingData],
    variant: tuple[str, str, bool],
    batch: int,
) -> dict[str, Any] | None:
    """Return a row; a batch that there is no memory for is halved until there is."""
    run, dataset = measured
    side, arithmetic, compiled = variant
    how = "compiled" if compiled else "eager"
    label = f"{run.preset}, {side} {arithmetic}, {how}"
    while batch:
        noted = len(session.left_out)
        size = run.changed("training", batch=batch, batch_gpu=batch)
        row = session.attempt(
            f"{label}, batch {batch}",
            lambda s=size: _time(session, s, dataset, variant),
            _VARIANT_SEC,
        )
        if row is not None:
            same = dict(preset=run.preset, side=side, arithmetic=arithmetic, compiled=compiled)
            return {**same, "batch": batch, **row}
        if not any("out of memory" in note for note in session.left_out[noted:]):
            return None
        batch //= 2
    return None


def _time(
    session: Session, run: RunConfig, dataset: TrainingData, variant: tuple[str, str, bool]
) -> dict[str, Any]:
    on_gpu = session.device.type == "cuda"
    with _steps(session, run, dataset, variant) as steps:
        clock = Clock(session.device)
        for _ in range(session.pick(3, 1)):
            steps.step(clock)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(session.device)
        once = steps.time(1).spent.wall
        num = session.pick(max(2, min(50, round(1 / once))), 1)
        turns = [steps.time(num) for _ in range(session.pick(3, 1))]
        turn = sorted(turns, key=lambda turn: turn.spent.wall)[len(turns) // 2]
        step_sec, num_images = turn.spent.wall, steps.config.step_nimg
        tflops = 3 * steps.forward_flops() * num_images / step_sec / 1e12
        peak = session.peak(variant[1])
        return dict(
            step_ms=1000 * step_sec,
            parts_ms={part: 1000 * turn.parts[part] for part in PARTS},
            images_per_sec=num_images / step_sec,
            tflops=tflops,
            mfu=None if peak is None else tflops / peak,
            memory_gib=torch.cuda.max_memory_allocated(session.device) / 2**30 if on_gpu else None,
        )
