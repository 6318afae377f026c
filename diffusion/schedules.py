"""Noise levels that a sampler visits: descending grids of sigma, in float64.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM,
arXiv 2206.00364), Table 1.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from torch import Tensor

Level = TypeVar("Level", float, Tensor)


def sigma_grid(
    name: str, num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> list[float]:
    """Return the num_steps + 1 noise levels of a grid, descending to 0.

    All grids but ``iddpm`` begin at ``sigma_max`` and reach ``sigma_min`` just before 0; a grid of
    one step is ``[sigma_max, 0]``. ``iddpm`` takes entries of its own table that lie in the range.

    Args:
        name: One of :data:`GRIDS`.
        num_steps: Number of steps, at least 1.
        sigma_min, sigma_max: Range, 0 < sigma_min < sigma_max.
        rho: Exponent of ``karras``; a larger one shortens the steps near ``sigma_min``.

    Raises ValueError if ``iddpm`` has no level in the range.
    """
    assert num_steps >= 1
    assert 0 < sigma_min < sigma_max < math.inf
    sigmas = GRIDS[name](num_steps, sigma_min, sigma_max, rho)
    return [*(float(sigma) for sigma in sigmas), 0.0]


def _karras(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    # EDM Eq. 5.
    ramp = np.linspace(0, 1, num_steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def _vp(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    # Equal steps in the time of the VP process from 1 to eps_s, whose beta_d and beta_min are
    # fitted so that sigma(eps_s) = sigma_min and sigma(1) = sigma_max.
    eps_s = 1e-3
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / eps_s - high) / (eps_s - 1)
    beta_min = high - 0.5 * beta_d
    t = np.linspace(1, eps_s, num_steps)
    return np.sqrt(np.expm1(0.5 * beta_d * t**2 + beta_min * t))


def _iddpm(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    # The grid begins at the first entry not above sigma_max: EDM's j0, which is 8 for 81.
    table = cosine_sigmas()
    inside = np.flatnonzero((table >= sigma_min) & (table <= sigma_max))
    if inside.size == 0:
        raise ValueError(
            f"--sigma-grid=iddpm has no noise level from {sigma_min:g} to {sigma_max:g}; its "
            f"levels lie from {table[-2]:.4g} to {table[0]:.4g}: widen --sigma-min and --sigma-max."
        )
    positions = np.linspace(inside[0], inside[-1], num_steps)
    return table[np.floor(positions + 0.5).astype(int)]


GRIDS: dict[str, Callable[[int, float, float, float], np.ndarray]] = dict(
    karras=_karras,
    linear=lambda num_steps, low, high, rho: np.linspace(high, low, num_steps),
    vp=_vp,
    ve=lambda num_steps, low, high, rho: np.geomspace(high, low, num_steps),
    iddpm=_iddpm,
)


def linear_sigmas(num_levels: int = 1000) -> np.ndarray:
    """Return the noise levels sigma_{T-1} > ... > sigma_0 of DDPM's linear schedule and 0, [T + 1].

    sigma_t = sqrt((1 - abar_t) / abar_t), where abar_t is the product of 1 - beta up to t and beta
    rises from 0.1 / T to 20 / T: at T = 1000, DDPM's 1e-4 to 0.02 (Ho et al., arXiv 2006.11239,
    section 4).
    """
    betas = np.linspace(0.1 / num_levels, 20 / num_levels, num_levels, dtype=np.float64)
    abar = np.cumprod(1 - betas)
    return np.append(np.sqrt((1 - abar) / abar)[::-1], 0.0)


def cosine_sigmas(num_levels: int = 1000, c1: float = 0.001, c2: float = 0.008) -> np.ndarray:
    """Return the noise levels u_0 > ... > u_M = 0 of iDDPM's cosine schedule [num_levels + 1].

    EDM Table 1: u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1) with abar_j =
    sin^2(pi j / (2 M (C_2 + 1))).
    """
    abar = np.sin(0.5 * np.pi * np.arange(num_levels + 1) / (num_levels * (c2 + 1))) ** 2
    u = np.zeros(num_levels + 1)
    for j in range(num_levels, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(abar[j - 1] / abar[j], c1) - 1)
    return u


def posterior_variances(sigma: Level, sigma_next: Level) -> tuple[Level, Level]:
    """Return the smaller and the larger variance of x_next given x, for x = x0 + sigma n.

    The smaller one is exact if the data are a single point, the larger one if they are normal with
    unit variance. They are beta-tilde and beta of DDPM (arXiv 2006.11239, section 3.2) times
    1 + sigma_next^2, because DDPM scales x_next by sqrt(abar) = 1 / sqrt(1 + sigma_next^2).
    """
    difference = sigma**2 - sigma_next**2
    smaller = sigma_next**2 * difference / sigma**2
    return smaller, difference * (1 + sigma_next**2) / (1 + sigma**2)
