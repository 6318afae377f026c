"""Distillation runs: what students inherit from their teacher, and how they may be sampled."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from diffusion.config import SamplingConfig
from dnnlib.config import Config, option_name
from dnnlib.errors import refusal
from training.config import RunConfig
from training.distillation.config import DEFAULT_STEPS
from training.distillation.stages import num_optimizer_steps

# Model settings that a student may change: they have no weights, or only locate a file.
_FREE = ("attention", "checkpointing", "dropout", "vae")
# Sampling settings in which a student may differ from its teacher.
_GRID = ("grid", "sigma_min", "sigma_max", "rho", "time_shift", "clip_denoised")


def as_student(run: RunConfig, source: RunConfig, given: Collection[str]) -> RunConfig:
    """Return ``run`` as a run that distils the network of the run ``source``.

    ``given`` names the fields that were typed. Raises ValueError for settings that a student cannot
    have.
    """
    for section in ("model", "precond"):
        for name, value, there in _changes(getattr(run, section), getattr(source, section)):
            if name in given and name not in _FREE:
                but = f"a student has the network of its teacher, with {there}"
                raise refusal(_option(run, section, name), value, but=but, remedy="leave it out")
    run = dataclasses.replace(run, precond=source.precond)
    steps = _student_steps(run, source, given)
    typed = {name: getattr(run.distillation, name) for name in given if _has(run, name)}
    distillation = type(run.distillation)(**dict(typed, distill_steps=steps))
    run = dataclasses.replace(
        run,
        distillation=distillation.settled(steps, source.guidance),
        sampling=_student_sampling(run, source, steps, given),
        guidance=_no_guidance(run, source, given),
    )
    if run.training.ema_stds:
        but = "profiles of a run would mix its students"
        raise refusal("--ema-stds", but=but, remedy="leave it out; every stage has an average")
    total = num_optimizer_steps(run)
    if total < len(steps):
        but = f"the run has {total} optimizer steps"
        raise refusal("--distill-steps", f"{len(steps)} stages", but=but, remedy="train for longer")
    return run


def _student_steps(run: RunConfig, source: RunConfig, given: Collection[str]) -> tuple[int, ...]:
    """Return the number of sampling steps of each stage's student."""
    typed = run.distillation.distill_steps if "distill_steps" in given else ()
    if not source.distillation.is_on:
        return typed or DEFAULT_STEPS
    trained = source.sampling.steps
    usual, left = [], trained
    while left > 1 and left % 2 == 0:
        left //= 2
        usual.append(left)
    if not usual:
        but = f"the snapshot is a student of {trained} sampling steps, which cannot be halved"
        raise refusal("--distill", but=but, remedy="give its teacher")
    if typed and typed[0] != usual[0]:
        but = f"the snapshot is a student of {trained} sampling steps"
        raise refusal("--distill-steps", typed[0], but=but, remedy=f"begin with {usual[0]}")
    return typed or tuple(usual)


def _student_sampling(
    run: RunConfig, source: RunConfig, steps: tuple[int, ...], given: Collection[str]
) -> SamplingConfig:
    """Return the sampling settings of the first student, on its teacher's or typed noise levels."""
    is_student, changes = source.distillation.is_on, {}
    for field in dataclasses.fields(run.sampling):
        name, value = field.name, getattr(run.sampling, field.name)
        if name not in given:
            continue
        but, there = "students are sampled by Euler's method in --distill-steps", source.sampling
        if name in _GRID[:-1] and is_student and getattr(there, name) != value:
            but = "the teacher is itself a student, with other noise levels"
        elif name in _GRID:
            changes[name] = value
            continue
        raise refusal(f"--{option_name(field)}", value, but=but, remedy="leave it out")
    grid_steps = source.sampling.grid_steps if is_student else 2 * steps[0]
    if changes.get("grid", source.sampling.grid) == "time":
        grid_steps = None  # N flow-matching steps visit every second time of 2 N steps anyway.
    # Euler's method is DDIM without noise, and the only first-order sampler of flow matching.
    changes |= dict(sampler="euler", steps=steps[0], grid_steps=grid_steps, respacing=None)
    changes |= dict(s_churn=0.0, eta=0.0)
    return dataclasses.replace(source.sampling, **changes)


def _no_guidance(run: RunConfig, source: RunConfig, given: Collection[str]) -> Any:
    for field in dataclasses.fields(run.guidance):
        if field.name in given:
            name, remedy = option_name(field), "leave it out"
            if _has(run, f"distill_{field.name}"):
                remedy = f"give --distill-{name}, the teacher's"
            raise refusal(f"--{name}", but="students are not guided", remedy=remedy)
    return source.guidance.switched_off()


def check_student(source: RunConfig, sampling: SamplingConfig, guidance: Config, name: str) -> None:
    """Raise ValueError if a student would be sampled in a way that it was not trained for.

    Clipping may change, and so may the guidance of a student whose teacher was not guided.

    Args:
        source: Run of the student.
        sampling, guidance: Protocol that is asked for.
        name: The student's snapshot, for messages.
    """
    trained = source.sampling.steps
    for field, value, there in _changes(sampling, source.sampling):
        if field != "clip_denoised":
            but = f"{name} is a student of {trained} sampling steps, with {there}"
            raise refusal(_option(source, "sampling", field), value, but=but, remedy="leave it out")
    was_guided = source.distillation.guidance != source.distillation.guidance.switched_off()
    for field, value, _ in _changes(guidance, source.guidance):
        if was_guided:
            but = f"{name} is a student of a guided teacher, and needs no guidance"
            raise refusal(_option(source, "guidance", field), value, but=but, remedy="leave it out")


def _changes(own: Config, there: Config) -> Iterator[tuple[str, Any, str]]:
    """Yield each option in which ``own`` differs: its name, its value, and ``there``'s as typed."""
    for field in dataclasses.fields(there):
        value, other = getattr(own, field.name, None), getattr(there, field.name)
        if value != other and field.metadata["exposed"]:
            yield field.name, value, f"--{option_name(field)}={other}"


def _option(run: RunConfig, section: str, name: str) -> str:
    fields = {field.name: field for field in dataclasses.fields(getattr(run, section))}
    return f"--{option_name(fields[name])}"


def _has(run: RunConfig, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(run.distillation)}
