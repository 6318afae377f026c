"""Training losses: one function each, which returns the weighted error of every element."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.precond import TablePrecond
from diffusion.schedules import posterior_variances


def denoising_loss(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    images: Tensor,
    sigma: Tensor,
    noise: Tensor,
    context: Any,
    weight: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return weight(sigma) (D(y + sigma n; sigma) - y)^2 per element [N, C, H, W] (EDM, Eq. 2).

    Args:
        denoise: ``(x, sigma [N, 1, 1, 1], context) -> x0 estimate``.
        images: Clean images y [N, C, H, W], floating point.
        sigma: Noise levels [N].
        noise: Standard normal n [N, C, H, W].
        context: Conditioning, passed on to the denoiser.
        weight: Loss weight as a function of sigma.
    """
    sigma = sigma.reshape(-1, 1, 1, 1)
    denoised = denoise(images + sigma * noise, sigma, context)
    return weight(sigma) * (denoised - images).square()


def velocity_loss(
    velocity: Callable[[Tensor, Tensor, Any], Tensor],
    images: Tensor,
    t: Tensor,
    noise: Tensor,
    context: Any,
) -> tuple[Tensor, Tensor]:
    """Return (v - (eps - x0))^2 per element and the estimate v, each [N, C, H, W], float32.

    Flow matching along straight paths z = (1 - t) x0 + t eps (Lipman et al., arXiv 2210.02747,
    Eq. 23 with data at t = 0).

    Args:
        velocity: ``(z, t [N], context) -> v``.
        images: Clean images x0 [N, C, H, W], floating point.
        t: Times [N] in [0, 1].
        noise: Standard normal eps [N, C, H, W].
        context: Conditioning, passed on to ``velocity``.
    """
    z = torch.lerp(images, noise, t.reshape(-1, 1, 1, 1))
    estimate = velocity(z, t, context)
    return (estimate - (noise - images)).square(), estimate


def hybrid_loss(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    images: Tensor,
    sigma: Tensor,
    noise: Tensor,
    context: Any,
    precond: TablePrecond,
) -> Tensor:
    """Return iDDPM's (eps - n)^2 + T / 1000 L_vb per element [N, C, H, W].

    Source: arXiv 2102.09672, Eq. 14-16. L_vb is the term of the variational bound at the drawn
    timestep, in bits. Its mean is detached, so that it trains the variance alone. Averaged over the
    T timesteps it is the whole bound divided by T; the factor T / 1000 thus gives the bound iDDPM's
    weight of 0.001 for any T.

    Args:
        denoise: ``(x, sigma [N, 1, 1, 1], context) -> [N, 2 C, H, W]``, a
            :class:`~diffusion.denoiser.Denoiser` ``with_variance``.
        images: Clean images y [N, C, H, W] in [-1, 1], floating point.
        sigma: Noise levels [N], each in the table of ``precond``.
        noise: Standard normal n [N, C, H, W].
        context: Conditioning, passed on to the denoiser.
        precond: Preconditioner of the denoiser; its table gives the next lower level.
    """
    sigma = sigma.reshape(-1, 1, 1, 1)
    denoised, fraction = denoise(images + sigma * noise, sigma, context).chunk(2, dim=1)
    squared_error = ((denoised - images) / sigma).square()

    # For x = y + sigma n, the mean of q(x_next | x, y) is lerp(y, x, (next / sigma)^2). The model's
    # mean has the estimate in place of y.
    below = precond.level_below(sigma)
    # At the lowest level the smaller variance is 0; that of the level above replaces it.
    first = torch.full_like(sigma, precond.level(0))
    second = torch.full_like(sigma, precond.level(min(1, precond.num_timesteps - 1)))
    is_last = below == 0
    lowest, highest = posterior_variances(sigma, below)
    clipped, _ = posterior_variances(second, first)
    # DDPM clips the variance of its scaled state x_next / sqrt(1 + next^2). In the step to 0, where
    # the replacement is used, next is 0 and both scalings agree.
    clipped = clipped / (1 + first**2)
    lowest = torch.where(is_last, clipped, lowest)
    log_variance = torch.lerp(lowest.log(), highest.log(), fraction)
    difference = (1 - (below / sigma) ** 2) * (denoised.detach() - images)
    divergence = 0.5 * (
        log_variance
        - lowest.log()
        + (lowest.log() - log_variance).exp()
        + difference.square() * (-log_variance).exp()
        - 1
    )
    likelihood = _discretised_likelihood(images, denoised.detach(), (0.5 * log_variance).exp())
    bound = torch.where(is_last, -likelihood, divergence) / math.log(2)
    return squared_error + (precond.num_timesteps / 1000) * bound


def _discretised_likelihood(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log probability, in nats, of 8-bit values in [-1, 1] under N(mean, std^2).

    Each value has a bin of width 2/255; the first and the last bin extend to infinity (DDPM, arXiv
    2006.11239, Eq. 13). Elementwise, with the shape of ``images``.
    """
    centred = images - mean
    above = torch.special.ndtr((centred + 1 / 255) / std)
    below = torch.special.ndtr((centred - 1 / 255) / std)
    probability = torch.where(
        images < -0.999, above, torch.where(images > 0.999, 1 - below, above - below)
    )
    return probability.clamp(min=1e-12).log()
