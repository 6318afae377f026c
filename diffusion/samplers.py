"""Samplers: they turn noise into images with a denoiser D(x; sigma).

Each is a function ``sampler(denoise, x, sigmas, noise, **options) -> x0``. ``denoise(x, sigma)``
returns the x0 estimate at a noise level, which is a Python number; ``x`` is the state
[N, C, H, W] at ``sigmas[0]`` (float64 from :func:`sample`); ``sigmas`` descends to 0; stochastic
samplers draw from ``noise.randn_like(x)``. ``callback()`` is called after every step.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.config import SAMPLERS, SamplingConfig
from diffusion.precond import Precond, TablePrecond
from diffusion.respacing import respaced
from diffusion.schedules import posterior_variances, sigma_grid
from dnnlib.errors import NotFiniteError, refusal

Denoise = Callable[[Tensor, float], Tensor]
Callback = Callable[[], None] | None
Levels = Sequence[float]


class NoiseSource(Protocol):
    """What a stochastic sampler draws from."""

    def randn_like(self, x: Tensor) -> Tensor:
        """Return standard normal numbers with the shape, dtype and device of ``x``."""


Noise = NoiseSource | None


class Sampler(NamedTuple):
    """A sampler, as :func:`sample` calls it.

    Attributes:
        run: The sampler function.
        options: Returns its keyword arguments, given the configuration and the preconditioner.
        order: Evaluations of the denoiser per step; the last step always takes one.
    """

    run: Callable[..., Tensor]
    options: Callable[["SamplingConfig", Precond], dict[str, Any]] = lambda config, precond: {}
    order: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise that :func:`heun` adds before each step (EDM, Algorithm 2); none by default."""

    amount: float = 0.0  # S_churn, spread over the steps.
    low: float = 0.0  # S_min and S_max, the range of noise levels where noise is added.
    high: float = math.inf
    noise_std: float = 1.0  # S_noise.
    round_sigma: Callable[[float], float] = float  # Rounds a raised level to the network's nearest.


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Levels,
    noise: Noise = None,
    *,
    churn: Churn = Churn(),
    callback: Callback = None,
) -> Tensor:
    """Return x0 by Heun's second-order method with optional churn (EDM, Algorithm 2).

    N steps take 2 N - 1 evaluations of the denoiser.
    """
    gamma = min(churn.amount / (len(sigmas) - 1), math.sqrt(2) - 1)
    for sigma, sigma_next in steps_of(sigmas, callback):
        if gamma > 0 and churn.low <= sigma <= churn.high:
            sigma_hat = max(churn.round_sigma(sigma * (1 + gamma)), sigma)
            added = math.sqrt(sigma_hat**2 - sigma**2)
            x = x + (churn.noise_std * added) * noise.randn_like(x)
            sigma = sigma_hat
        slope = (x - denoise(x, sigma)) / sigma
        predicted = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (predicted - denoise(predicted, sigma_next)) / sigma_next
            predicted = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = predicted
    return x


def euler(
    denoise: Denoise, x: Tensor, sigmas: Levels, noise: Noise = None, *, callback: Callback = None
) -> Tensor:
    """Return x0 by Euler steps of dx/dsigma = (x - D(x; sigma)) / sigma (EDM, Eq. 3)."""
    for sigma, sigma_next in steps_of(sigmas, callback):
        x = x + (sigma_next - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Levels,
    noise: Noise = None,
    *,
    eta: float = 0.0,
    callback: Callback = None,
) -> Tensor:
    """Return x0 by DDIM (Song et al., arXiv 2010.02502, Eq. 12 and 16).

    The paper's equations, rewritten for x / sqrt(abar) and sigma^2 = (1 - abar) / abar. With
    ``eta`` 0 it is deterministic and equals :func:`euler`; with 1 it equals :func:`ddpm` with the
    small variance.
    """
    for sigma, sigma_next in steps_of(sigmas, callback):
        denoised = denoise(x, sigma)
        added = eta * math.sqrt(posterior_variances(sigma, sigma_next)[0])
        kept = math.sqrt(sigma_next**2 - added**2)
        x = denoised + kept / sigma * (x - denoised)
        if added > 0:
            x = x + added * noise.randn_like(x)
    return x


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Levels,
    noise: Noise = None,
    *,
    variance: str = "small",
    callback: Callback = None,
) -> Tensor:
    """Return x0 by ancestral sampling (Ho et al., arXiv 2006.11239, Eq. 6-7).

    Each step draws from a normal distribution with the mean of the forward chain's posterior
    q(x_next | x, x0) at x0 = D(x; sigma). Its variance is the smaller of DDPM's two, which is the
    posterior's own (``variance="small"``), or the larger one (``"large"``). A learned variance
    replaces both, if ``denoise`` returns its fraction as a second half of the channels (iDDPM,
    arXiv 2102.09672, Eq. 15). Both bounds are computed from the levels that are visited, so they
    hold for a subset of levels too. The last step adds no noise.
    """
    channels = x.shape[1]
    for sigma, sigma_next in steps_of(sigmas, callback):
        estimate = denoise(x, sigma).to(x.dtype)
        x = torch.lerp(estimate[:, :channels], x, (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            std = _ancestral_std(sigma, sigma_next, estimate[:, channels:], variance)
            x = x + std * noise.randn_like(x)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Levels, noise: Noise = None, *, callback: Callback = None
) -> Tensor:
    """Return x0 by the multistep DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Algorithm 2).

    The first step and the last one, which goes to 0, are first-order.
    """
    previous = h_previous = None
    for sigma, sigma_next in steps_of(sigmas, callback):
        denoised = denoise(x, sigma).to(x.dtype)
        target = denoised
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            if previous is not None:
                target = denoised + (denoised - previous) * (h / (2 * h_previous))
            previous, h_previous = denoised, h
        x = torch.lerp(target, x, sigma_next / sigma)
    return x


class Watched:
    """A denoiser or velocity that remembers the first step with values that are not finite.

    Its record stays on the device until :meth:`check`, so no step synchronises with the device.

    Args:
        estimate: ``(x, level) -> estimate``.
        callback: Called after every step; give the sampler :meth:`end_step` in its place.
    """

    def __init__(self, estimate: Denoise, callback: Callback = None) -> None:
        self._estimate, self._callback = estimate, callback
        self._step = 1
        self._first: Tensor | int = 0  # First step with a value that is not finite; 0: none yet.

    def __call__(self, x: Tensor, level: float) -> Tensor:
        estimate = self._estimate(x, level)
        is_fine = estimate.isfinite().all() | (self._first != 0)
        self._first = torch.where(is_fine, self._first, self._step)
        return estimate

    def end_step(self) -> None:
        """Count a step, then call the callback."""
        self._step += 1
        if self._callback is not None:
            self._callback()

    def check(self, x: Tensor) -> Tensor:
        """Return samples ``x``; raises NotFiniteError if they or any estimate are not finite."""
        first = int(self._first)
        if not first and x.isfinite().all():
            return x
        num_steps = self._step - 1
        raise NotFiniteError(
            f"Sampling gave values that are not finite, first in step {first or num_steps} of "
            f"{num_steps}; try --precision=fp32, a lower guidance scale or another snapshot."
        )


def steps_of(levels: Levels, callback: Callback) -> Iterator[tuple[float, float]]:
    """Yield each level with the next one, and call ``callback`` after every step."""
    for level, level_next in itertools.pairwise(levels):
        yield level, level_next
        if callback is not None:
            callback()


def _ancestral_std(
    sigma: float, sigma_next: float, fraction: Tensor, variance: str
) -> float | Tensor:
    lowest, highest = posterior_variances(sigma, sigma_next)
    if not fraction.shape[1]:
        return math.sqrt(lowest if variance == "small" else highest)
    return (0.5 * (math.log(lowest) + fraction * math.log(highest / lowest))).exp()


def _churn(config: SamplingConfig, precond: Precond) -> dict[str, Any]:
    churn = Churn(
        amount=config.s_churn,
        low=config.s_min,
        high=math.inf if config.s_max is None else config.s_max,
        noise_std=config.s_noise,
        round_sigma=precond.round_sigma,
    )
    return dict(churn=churn)


SAMPLERS.update(
    heun=Sampler(heun, _churn, order=2),
    euler=Sampler(euler),
    ddim=Sampler(ddim, lambda config, precond: dict(eta=config.eta)),
    dpmpp_2m=Sampler(dpmpp_2m),
    ddpm=Sampler(ddpm, lambda config, precond: dict(variance=config.variance)),
)


def sampling_sigmas(config: SamplingConfig, precond: Precond) -> list[float]:
    """Return the noise levels that :func:`sample` visits, descending to 0.

    The configured range is cut to the network's, and levels are rounded to those it was trained
    at. Levels that rounding makes equal are visited once, so there can be fewer than
    ``config.steps`` + 1; with churn all are visited, as in EDM, because each visit adds noise and
    removes it again. With ``config.grid_steps``, every k-th level of that finer grid is taken,
    from the highest to 0.

    The grid ``timesteps`` takes levels of the network's own table: at N timesteps spread evenly
    from the first to the last (see :func:`diffusion.respacing.respaced`), or at those that
    ``config.respacing`` names.

    Raises ValueError if the configured range misses the network's, if the grid is ``timesteps``
    and the network has no table or too small a one, if the timesteps named do not exist, and for
    the grid ``time``, which belongs to :mod:`diffusion.flow`.
    """
    if config.grid == "timesteps":
        return _timestep_sigmas(config, precond)
    if config.grid == "time":
        got = "time, which is for feature-conditioned models"
        raise refusal("--sigma-grid", got, remedy="give --sigma-grid=karras")
    sigma_min = max(config.sigma_min, precond.sigma_min)
    sigma_max = min(config.sigma_max, precond.sigma_max)
    if sigma_min >= sigma_max:
        raise ValueError(
            f"--sigma-min {config.sigma_min:g} and --sigma-max {config.sigma_max:g} miss the "
            f"noise levels of this network, {precond.sigma_min:.4g} to {precond.sigma_max:.4g}; "
            "choose a range that overlaps."
        )
    num_steps = config.grid_steps or config.steps
    sigmas = sigma_grid(config.grid, num_steps, sigma_min, sigma_max, config.rho)
    levels = [precond.round_sigma(sigma) for sigma in sigmas[:: num_steps // config.steps]]
    if config.sampler == "heun" and config.s_churn > 0:
        return levels  # A repeated level adds noise and removes it once more.
    return [level for level, _ in itertools.groupby(levels)]


def _timestep_sigmas(config: SamplingConfig, precond: Precond) -> list[float]:
    if not isinstance(precond, TablePrecond):
        but = "this network was trained at all noise levels of a range"
        remedy = "give --sigma-grid=karras, or train with --precond=ddpm or iddpm"
        raise refusal("--sigma-grid", "timesteps", but=but, remedy=remedy)
    last, num_steps = precond.num_timesteps - 1, config.grid_steps or config.steps
    if num_steps > precond.num_timesteps:
        but = f"this network knows {precond.num_timesteps} timesteps"
        named = "--steps" if config.grid_steps is None else "--grid-steps"
        option, got = ("--respacing", config.respacing) if config.respacing else (named, num_steps)
        raise refusal(option, got, but=but, remedy="take at most as many")
    timesteps = [last]
    if config.respacing is not None:
        timesteps = respaced(config.respacing, precond.num_timesteps)
    elif num_steps > 1:
        timesteps = respaced(str(num_steps), precond.num_timesteps)
    levels = [*(precond.level(timestep) for timestep in reversed(timesteps)), 0.0]
    return levels[:: num_steps // config.steps]


def reads_variance(config: SamplingConfig, precond: Precond) -> bool:
    """Return whether the sampler needs a denoiser that also returns the learned variance."""
    return config.sampler == "ddpm" and precond.learned_variance


def num_evaluations(config: SamplingConfig, precond: Precond | None = None) -> int:
    """Return the number of denoiser evaluations per image.

    With ``precond`` the count is also exact for a network with discrete noise levels, where
    rounding can merge steps; without it, all ``config.steps`` are counted.
    """
    steps = config.steps
    if precond is not None and config.grid != "time":
        steps = len(sampling_sigmas(config, precond)) - 1
    return SAMPLERS[config.sampler].order * (steps - 1) + 1


def _clipped(denoise: Denoise, channels: int) -> Denoise:
    """Return the denoiser with its images clipped to [-1, 1]; a learned variance stays as it is."""

    def clipped(x: Tensor, sigma: float) -> Tensor:
        estimate = denoise(x, sigma)
        return torch.cat([estimate[:, :channels].clamp(-1, 1), estimate[:, channels:]], dim=1)

    return clipped


@torch.no_grad()
def sample(
    denoise: Denoise,
    latents: Tensor,
    config: SamplingConfig,
    precond: Precond,
    noise: Noise = None,
    callback: Callback = None,
) -> Tensor:
    """Return samples x0 [N, C, H, W], float64.

    Args:
        denoise: ``(x, sigma) -> x0 estimate``, closed over context and guidance.
        latents: Standard normal [N, C, H, W].
        config: Sampler, noise levels and their options.
        precond: Preconditioner of the network, for its range and rounding of noise levels.
        noise: Source of a stochastic sampler's noise; deterministic samplers do not use it.
        callback: Called without arguments after every step.

    Raises ValueError as :func:`sampling_sigmas` does, and NotFiniteError, which names the step, if
    the denoiser or the samples have values that are not finite.
    """
    sigmas = sampling_sigmas(config, precond)
    if config.clip_denoised:
        denoise = _clipped(denoise, latents.shape[1])
    x = latents.to(torch.float64) * sigmas[0]
    sampler = SAMPLERS[config.sampler]
    options = sampler.options(config, precond)
    watched = Watched(denoise, callback)
    return watched.check(
        sampler.run(watched, x, sigmas, noise, callback=watched.end_step, **options)
    )
