"""The configuration with which a snapshot is sampled, and checks that its network allows it."""

import dataclasses
import math

import torch

from diffusion.precond import make_precond
from diffusion.samplers import sampling_sigmas
from dnnlib.errors import refusal
from families.distillation import check_student
from torch_utils import cpu_matmul
from training.asked import GeneratorOptions
from training.checkpoint import Snapshot
from training.config import RunConfig


def check_levels(run: RunConfig) -> None:
    """Raise ValueError if the network cannot be sampled at the noise levels of ``run``.

    Raises it, too, if the sampler visits no noise level in the range of guidance or churn.
    """
    levels = sampling_sigmas(run.sampling, make_precond(run.precond))[:-1]
    sampling, limits = run.sampling, []
    if run.guidance.cfg_interval is not None:
        low, high = run.guidance.cfg_interval
        limits.append(("--cfg-interval", low, high, any(low < level <= high for level in levels)))
    if sampling.s_churn > 0:
        low, high = sampling.s_min, math.inf if sampling.s_max is None else sampling.s_max
        visited = any(low <= level <= high for level in levels)
        limits.append(("--s-min and --s-max", low, high, visited))
    for option, low, high, is_visited in limits:
        if not is_visited:
            but = (
                f"the sampler visits no noise level there, only {levels[-1]:.4g} to {levels[0]:.4g}"
            )
            raise refusal(option, f"{low:g} to {high:g}", but=but, remedy="choose others")


def run_to_sample(snapshot: Snapshot, options: GeneratorOptions, device: torch.device) -> RunConfig:
    """Return :func:`sampled_run`, after choosing the library for float32 matrices. Collective.

    That is the one of training, unless ``options`` or the run's ``auto`` leave it open.
    """
    run, stored = snapshot.config, None
    if options.cpu_matmul is None and run.training.cpu_matmul != "auto":
        stored = run.training.cpu_matmul
    cpu_matmul.agree(options.cpu_matmul or "auto", stored, device)
    return sampled_run(snapshot, options)


def sampled_run(snapshot: Snapshot, options: GeneratorOptions) -> RunConfig:
    """Return a snapshot's run with the sampling, guidance and precision that ``options`` set.

    Raises ValueError for a student that would be sampled in a way it was not trained for.
    """
    run = snapshot.config
    sampling, guidance = options.sampling or run.sampling, options.guidance or run.guidance
    if run.distillation.is_on:
        check_student(run, sampling, guidance, str(snapshot.path))
    run = dataclasses.replace(run, sampling=sampling, guidance=guidance)
    return run.changed("training", precision=options.precision or run.training.precision)
