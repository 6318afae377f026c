"""Guidance: combines several estimates into one ``denoise(x, sigma)`` for a sampler."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.config import DualGuidanceConfig, GuidanceConfig
from diffusion.precond import Precond

Denoise = Callable[[Tensor, float], Tensor]


# The conditions that each branch of dual guidance sees: (text, image).
BRANCHES: dict[str, tuple[bool, bool]] = dict(
    none=(False, False), text=(True, False), visual=(False, True), both=(True, True)
)


def branch_weights(
    config: DualGuidanceConfig, *, has_text: bool = True, has_visual: bool = True
) -> dict[str, float]:
    """Return the nonzero weights of the branches, by their names in :data:`BRANCHES`.

    They add up to 1. With the estimates u (none), T (text), D (visual) and F (both), the guided
    estimate is

        ``nested``: u + s_d (D - u) + s_t (F - D) (as Eq. 3 of InstructPix2Pix, arXiv 2211.09800);
        ``seed``: u + s_t (T - u) + s_d (D - u), which never evaluates F;
        ``joint``: that of ``seed`` + s_j (F - T - D + u).

    With one condition, each of them is u + s_t (T - u) or u + s_d (D - u); with none it is u.
    """
    text, visual = config.text_scale, config.visual_scale
    if not (has_text and has_visual):
        name, scale = ("text", text) if has_text else ("visual", visual * has_visual)
        weights = {"none": 1 - scale, name: scale}
    elif config.guidance_form == "nested":
        weights = dict(none=1 - visual, visual=visual - text, both=text)
    elif config.guidance_form == "seed":
        weights = dict(none=1 - text - visual, text=text, visual=visual)
    else:
        joint = config.joint_scale
        weights = dict(
            none=1 - text - visual + joint, text=text - joint, visual=visual - joint, both=joint
        )
    return {name: weight for name, weight in weights.items() if weight != 0}


def weighted_branches(
    estimate: Callable[[Tensor, float, Any], Tensor],
    contexts: Sequence[Any],
    weights: Sequence[float | Tensor],
) -> Denoise:
    """Return the function (x, level) -> sum over k of weight_k estimate(x, level, context_k).

    All branches are evaluated as one batch. If that runs out of memory, they are evaluated one by
    one from then on.

    Args:
        estimate: ``(x, level, context) -> estimate``, of x0 or of a velocity.
        contexts: One per branch, for the same images; ``concat`` joins them along the batch.
        weights: One per branch, adding up to 1: numbers, or tensors that broadcast with x.
    """
    num_branches = len(contexts)
    joined = contexts[0].concat(*contexts[1:]) if num_branches > 1 else contexts[0]
    at_once = True

    def guided(x: Tensor, level: float) -> Tensor:
        nonlocal at_once
        parts = None
        if at_once:
            try:
                repeated = x.repeat(num_branches, 1, 1, 1)
                parts = estimate(repeated, level, joined).chunk(num_branches)
            except torch.OutOfMemoryError:
                if num_branches == 1:
                    raise
                at_once = False
        if parts is None:
            starts = range(0, num_branches * len(x), len(x))
            rows = [slice(start, start + len(x)) for start in starts]
            parts = [estimate(x, level, joined.index(own)) for own in rows]
        return sum(weight * part for weight, part in zip(weights, parts, strict=True))

    return guided


def guidance_scale(config: GuidanceConfig, sigma: float, precond: Precond) -> float:
    """Return the guidance scale at a noise level: 1 where guidance is off.

    Outside ``config.cfg_interval`` it is off (Kynkäänniemi et al., arXiv 2404.07724). The schedule
    ``power-cosine`` is that of DiffiT's latent model (Hatamizadeh et al., arXiv 2312.02139):
    1 + (scale - 1) (1 - cos(pi (1 - f)^power)) / 2 with f = ``precond.noise_fraction(sigma)``.
    """
    if config.cfg_interval is not None:
        low, high = config.cfg_interval
        if not low < sigma <= high:
            return 1.0
    if config.cfg_schedule == "constant":
        return config.cfg_scale
    progress = (1 - precond.noise_fraction(sigma)) ** config.cfg_power
    return 1 + (config.cfg_scale - 1) * 0.5 * (1 - math.cos(math.pi * progress))


def classifier_free(
    denoise: Callable[[Tensor, float, Any], Tensor],
    context: Any,
    null_context: Any,
    config: GuidanceConfig,
    precond: Precond,
) -> Denoise:
    """Return the denoiser null + scale (conditional - null) (Ho & Salimans, arXiv 2207.12598).

    Both estimates come from one evaluation of a doubled batch. Where the scale is 1, only the
    conditional one is evaluated. Channels that are not guided and a learned variance keep their
    conditional values.

    Args:
        denoise: ``(x, sigma, context) -> x0 estimate``.
        context, null_context: With the condition and without it, for the same images;
            ``context.concat(null_context)`` joins them along the batch.
        config: Scale, schedule, interval and number of guided channels.
        precond: Preconditioner of ``denoise``, whose noise levels the schedule follows.
    """
    both = context if config.cfg_scale == 1 else context.concat(null_context)

    def guided(x: Tensor, sigma: float) -> Tensor:
        scale = guidance_scale(config, sigma, precond)
        if scale == 1:
            return denoise(x, sigma, both.index(slice(0, len(x))))
        conditional, null = denoise(torch.cat([x, x]), sigma, both).chunk(2)
        return _extrapolate(null, conditional, scale, config.cfg_channels or x.shape[1])

    return guided


def autoguidance(
    main: Denoise, guide: Denoise, config: GuidanceConfig, precond: Precond | None = None
) -> Denoise:
    """Return the denoiser guide + scale (main - guide) (Karras et al., arXiv 2406.02507).

    Args:
        main: Denoiser of the network whose samples are wanted, closed over its context.
        guide: Denoiser of a smaller or less trained network, with the same condition. It is not
            evaluated where the scale is 1.
        config: Scale, schedule, interval and number of guided channels, as for
            :func:`classifier_free`.
        precond: Preconditioner of ``main``; only the power-cosine schedule needs it.

    Raises ValueError for a power-cosine schedule without ``precond``.
    """
    if config.cfg_schedule == "power-cosine" and precond is None:
        raise ValueError("The power-cosine schedule of autoguidance needs the preconditioner.")

    def guided(x: Tensor, sigma: float) -> Tensor:
        scale = guidance_scale(config, sigma, precond)
        if scale == 1:
            return main(x, sigma)
        channels = config.cfg_channels or x.shape[1]
        return _extrapolate(guide(x, sigma), main(x, sigma), scale, channels)

    return guided


def _extrapolate(base: Tensor, target: Tensor, scale: float, channels: int) -> Tensor:
    """Return base + scale (target - base) in the first ``channels``; the others are the target's.

    A learned variance, if the denoiser returns one, is among the others.
    """
    guided = base[:, :channels] + scale * (target[:, :channels] - base[:, :channels])
    return torch.cat([guided, target[:, channels:]], dim=1)
