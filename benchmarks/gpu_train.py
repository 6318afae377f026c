"""Part of benchmark.py gpu: the training step of every preset, in each arithmetic."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

import families
from benchmarks.gpu_session import OUT_OF_MEMORY, Session, free_memory, is_out_of_memory
from benchmarks.kinds import dataset_of
from benchmarks.measure import Clock
from benchmarks.options import MEASURED
from benchmarks.steps import PARTS, PlainTrainingSteps, TrainingSteps
from configs.presets import PRESETS, get_preset
from torch_utils.misc import allow_tf32
from training.config import RunConfig, fit_to_device
from training.family import TrainingData

# The most important presets, in this order; all their variants are measured before other presets.
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
_PLAIN = ("plain", "fp32", False)
# (side, arithmetic, compiled), the most important variants first.
_VARIANTS = [
    *(("own", "bf16", True), ("own", "bf16", False), _PLAIN),
    *(("own", "fp32", False), ("own", "tf32", False)),
]
_LATER_VARIANTS = [("own", "tf32", True), ("own", "fp32", True)]
_VARIANT_SEC = 150  # Compilation takes most of it.
_BATCH_SEC = 60
_MAX_BATCH = 1024


def gpu_run(name: str, session: Session) -> RunConfig:
    """Return the run of a preset as for its own dataset; in a dry run, its network is tiny."""
    preset = get_preset(name)
    run = families.of(preset.run).example_run(preset.run, preset.num_classes)
    if session.tiny:
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, **_SMALL[name]))
        run = run.changed("logging", workers=0)
    return run


def defaults_of_presets() -> dict[str, dict[str, Any]]:
    """Return the default ``arithmetic`` and ``compiled`` of every measured preset on a GPU."""
    found = {}
    for name in MEASURED:
        training = fit_to_device(get_preset(name).run, "cuda").training
        found[name] = dict(arithmetic=training.arithmetic, compiled=training.compile)
    return found


def measure_train(session: Session) -> dict[str, Any]:
    """Return the cost of a step of each preset, the most important presets and variants first."""
    first = session.pick(FIRST, _TINY)
    plan = [(name, _VARIANTS) for name in first]
    if not session.tiny:
        plan += [(name, _LATER_VARIANTS) for name in first]
        plan += [(name, _few_variants(name)) for name in MEASURED if name not in FIRST]
        for name in [name for name in PRESETS if name not in MEASURED]:
            session.left_out.append(f"{name}: there are no synthetic features")
    rows, batches = [], {}
    for name, variants in plan:
        rows += _measure_preset(session, name, variants, batches)
    return dict(rows=rows)


def _few_variants(name: str) -> list[tuple[str, str, bool]]:
    """Return bf16, compiled and eager, and the default variant of a preset, without duplicates."""
    default = defaults_of_presets()[name]
    now = ("own", default["arithmetic"], default["compiled"])
    return list(dict.fromkeys([("own", "bf16", True), now, ("own", "bf16", False)]))


def _measure_preset(
    session: Session, name: str, variants: list[tuple[str, str, bool]], batches: dict[str, int]
) -> list[dict[str, Any]]:
    """Return the rows of the variants; ``batches`` keeps the batch size found for each preset."""
    rows = []
    with contextlib.ExitStack() as opened:
        run, num_images = gpu_run(name, session), session.pick(2048, 32)
        dataset = session.attempt(
            f"{name}, data", lambda: opened.enter_context(dataset_of(run, None, num_images))
        )
        if dataset is None:
            return rows
        run = families.of(run).fit(run, dataset)
        if name not in batches:
            find = functools.partial(_find_batch, session, run, dataset, batches)
            session.attempt(f"{name}, batch", find, _BATCH_SEC)
        for variant in variants if name in batches else ():
            row = _measure_variant(session, (run, dataset), variant, batches[name])
            rows += [row] if row else []
    return rows


def _find_batch(
    session: Session, run: RunConfig, dataset: TrainingData, batches: dict[str, int]
) -> None:
    """Store in ``batches`` the largest power of two of images that fits in memory, in eager bf16.

    It is at most 1,024 and at most the preset's batch, which is that of all GPUs. If time runs out,
    the largest batch found so far remains stored.
    """
    cap = session.pick(min(run.training.batch, _MAX_BATCH), 2)
    run, batch = run.changed("logging", workers=0), 1
    with _steps(session, run, dataset, ("own", "bf16", False)) as steps:
        while batch <= cap:
            try:
                steps.resize(batch)
                steps.time(1)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                break
            batches[run.preset], batch = batch, 2 * batch


@contextlib.contextmanager
def _steps(
    session: Session, run: RunConfig, dataset: TrainingData, variant: tuple[str, str, bool]
) -> Iterator[TrainingSteps]:
    """Build the training steps of a variant; free their memory and reset TF32 afterwards."""
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
    """Return the row of a variant, halving the batch until it fits in memory; None if it fails."""
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
        if not any(OUT_OF_MEMORY in note for note in session.left_out[noted:]):
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
