"""Progressive distillation: one step of the student matches two steps of its teacher.

Salimans & Ho (arXiv 2202.00512), Algorithm 2. A level is the noise level sigma of x = x0 + sigma n
or the time t of a flow, z = (1 - t) x0 + t eps. In both, a deterministic step follows the slope
(x - x0) / level.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.config import GuidanceConfig
from diffusion.guidance import guidance_scale
from diffusion.precond import Precond
from diffusion.samplers import euler

Denoise = Callable[[Tensor, Tensor], Tensor]


def two_step_target(
    teacher: tuple[Denoise, Denoise], x: Tensor, levels: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Return the x0 estimate with which one step lands where the teacher's two steps do.

    Steps are those of :func:`diffusion.samplers.euler`, which equal deterministic DDIM. The result
    is float32 [N, C, H, W], computed in float64 like the states of a sampler.

    Args:
        teacher: The denoisers of its first and second step, each ``(x, level [N, 1, 1, 1]) -> x0
            estimate``, closed over its context.
        x: Noisy images [N, C, H, W] at the first level.
        levels: Where the steps begin, meet and end, each [N, 1, 1, 1], descending; the last may be
            0.
    """
    x = x.to(torch.float64)
    level, middle, below = (own.to(torch.float64) for own in levels)
    end = euler(teacher[1], euler(teacher[0], x, (level, middle)), (middle, below))
    return (x - level * (end - x) / (below - level)).to(torch.float32)


def distillation_loss(estimate: Tensor, target: Tensor, snr: Tensor) -> Tensor:
    """Return max(SNR, 1) (x0 - target)^2 per element (arXiv 2202.00512, section 4: truncated SNR).

    Args:
        estimate: The student's x0 estimate [N, C, H, W].
        target: The x0 estimate from :func:`two_step_target` [N, C, H, W].
        snr: Signal-to-noise ratio (alpha / sigma)^2 of the noisy images [N, 1, 1, 1].
    """
    return snr.clamp(min=1) * (estimate - target).square()


def guidance_table(
    config: GuidanceConfig, levels: Sequence[float], precond: Precond, channels: int
) -> Tensor:
    """Return the weights of the conditional and the null estimate at each level, [L, 2, C].

    The sum with these weights is the estimate of :func:`diffusion.guidance.classifier_free`. With
    a scale of 1 there is only the conditional estimate, [L, 1, C].
    """
    if config.cfg_scale == 1:
        return torch.ones(len(levels), 1, channels)
    scales = torch.tensor([guidance_scale(config, level, precond) for level in levels])
    guided = torch.arange(channels) < (config.cfg_channels or channels)
    conditional = torch.where(guided, scales[:, None], 1.0)
    return torch.stack([conditional, 1 - conditional], dim=1)


def repeating_level(
    estimate: Callable[[Tensor, Tensor, Any], Tensor],
) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """Return ``estimate`` for K copies of a batch, x [K N, C, H, W], given one copy's levels.

    The levels [N, 1, 1, 1] are repeated for every copy.
    """

    def repeated(x: Tensor, level: Tensor, context: Any) -> Tensor:
        return estimate(x, level.repeat(len(x) // len(level), 1, 1, 1), context)

    return repeated
