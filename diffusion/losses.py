"""Training objectives: one function each, returning the weighted error of every element."""

from collections.abc import Callable
from typing import Any

import torch


def denoising_loss(
    denoise: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor],
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    context: Any,
    weight: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return weight(sigma) (D(y + sigma n; sigma) - y)^2 per element [N, C, H, W] (EDM, Eq. 2).

    Args:
        denoise: ``(x, sigma [N, 1, 1, 1], context) -> x0 estimate``.
        images: Clean images y [N, C, H, W], floating point.
        sigma: Noise levels [N].
        noise: Standard normal n [N, C, H, W].
        context: Conditioning of the denoiser.
        weight: Loss weight as a function of sigma.
    """
    sigma = sigma.reshape(-1, 1, 1, 1)
    denoised = denoise(images + sigma * noise, sigma, context)
    return weight(sigma) * (denoised - images).square()
