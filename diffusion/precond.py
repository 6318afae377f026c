"""Preconditioners: they turn a raw network F into a denoiser D(x; sigma) and weight its loss.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) with x = x0 + sigma n (EDM, arXiv 2206.00364,
Eq. 7). There is one class for each column of EDM's Table 1, and one for each parametrization that
the table lacks.
"""

import abc
import bisect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.config import PrecondConfig
from diffusion.schedules import cosine_sigmas, linear_sigmas

Scalings = tuple[Tensor, Tensor, Tensor, Tensor]
_NUM_DRAWS = 20_000


class Precond(abc.ABC):
    """The scalings of a denoiser, the noise levels it is trained at, and the range it accepts.

    Attributes:
        sigma_min, sigma_max: Range of noise levels at which the network may be evaluated.
        noise_range: Noise levels between which :meth:`noise_fraction` goes from 0 to 1.
        sigma_data: Standard deviation of the data that the scalings assume; None if they assume
            none.
        learned_variance: Whether the network's output has a second half of channels, which gives
            the variance of an ancestral step.
    """

    sigma_min: float
    sigma_max: float
    noise_range: tuple[float, float]
    sigma_data: float | None = None
    learned_variance = False

    @abc.abstractmethod
    def scalings(self, sigma: Tensor) -> Scalings:
        """Return ``(c_skip, c_out, c_in, c_noise)``, each with the shape of ``sigma``."""

    def draw_sigma(
        self, num: int, generator: torch.Generator, device: torch.device | str
    ) -> Tensor:
        """Return training noise levels [num], float32: drawn where the generator is, then moved."""
        drawn = self._draw(num, generator=generator, device=generator.device)
        return drawn.to(device, non_blocking=True)

    @abc.abstractmethod
    def _draw(self, num: int, **source: Any) -> Tensor:
        """Return training noise levels [num]; ``source`` is the generator and the device."""

    def weight(self, sigma: Tensor) -> Tensor:
        """Return the weight of the squared error of D in the loss, with the shape of ``sigma``."""
        return 1 / sigma**2

    def round_sigma(self, sigma: float) -> float:
        """Return the nearest noise level that the network was trained at."""
        return sigma

    def training_levels(self, shares: Sequence[float]) -> list[float]:
        """Return the quantiles of the training noise levels at ``shares``, each in [0, 1].

        They are estimated from 20,000 draws with a fixed seed, and rounded by :meth:`round_sigma`.
        """
        drawn = self.draw_sigma(_NUM_DRAWS, torch.Generator().manual_seed(0), "cpu")
        levels = torch.quantile(drawn.double(), torch.tensor(shares, dtype=torch.float64))
        return [self.round_sigma(level) for level in levels.tolist()]

    def noise_fraction(self, sigma: float) -> float:
        """Return the position of ``sigma`` among the noise levels: 0 for the lowest, 1 at the top.

        By default it is the position of ln(sigma) within ``noise_range``.
        """
        low, high = self.noise_range
        return min(math.log(max(sigma, low) / low) / math.log(high / low), 1.0)


class EDMPrecond(Precond):
    """EDM's own scalings: input and target have unit variance for data of std ``sigma_data``.

    In training, ln(sigma) is normal with mean ``P_mean`` and standard deviation ``P_std``.
    """

    sigma_min, sigma_max = 0.0, math.inf
    noise_range = (0.002, 80.0)

    def __init__(self, sigma_data: float = 0.5, P_mean: float = -1.2, P_std: float = 1.2) -> None:
        self.sigma_data, self.P_mean, self.P_std = sigma_data, P_mean, P_std

    def scalings(self, sigma: Tensor) -> Scalings:
        variance = sigma**2 + self.sigma_data**2
        c_out = sigma * self.sigma_data / variance.sqrt()
        return self.sigma_data**2 / variance, c_out, 1 / variance.sqrt(), sigma.log() / 4

    def _draw(self, num: int, **source: Any) -> Tensor:
        return (torch.randn(num, **source) * self.P_std + self.P_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VPPrecond(Precond):
    """Variance-preserving SDE (Song et al., arXiv 2011.13456); t is uniform in training."""

    beta_d, beta_min = 19.9, 0.1
    num_timesteps = 1000
    t_min = 1e-5

    def __init__(self) -> None:
        bounds = torch.tensor([self.t_min, 1.0], dtype=torch.float64)
        self.sigma_min, self.sigma_max = self.sigma(bounds).tolist()
        self.noise_range = (self.sigma_min, self.sigma_max)

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at time ``t`` in (0, 1]."""
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).expm1().sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """Return the time at which the noise level is ``sigma``."""
        root = (self.beta_min**2 + 2 * self.beta_d * (sigma**2).log1p()).sqrt()
        return (root - self.beta_min) / self.beta_d

    def scalings(self, sigma: Tensor) -> Scalings:
        c_noise = (self.num_timesteps - 1) * self.sigma_inv(sigma)
        return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), c_noise

    def _draw(self, num: int, **source: Any) -> Tensor:
        return self.sigma(self.t_min + torch.rand(num, **source) * (1 - self.t_min))

    def noise_fraction(self, sigma: float) -> float:
        t = float(self.sigma_inv(torch.tensor(sigma, dtype=torch.float64)))
        return min(max(t, 0.0), 1.0)


class VEPrecond(Precond):
    """Variance-exploding SDE (Song et al., arXiv 2011.13456); sigma is log-uniform in training."""

    sigma_min, sigma_max = 0.02, 100.0
    noise_range = (0.02, 100.0)

    def scalings(self, sigma: Tensor) -> Scalings:
        ones = torch.ones_like(sigma)
        return ones, sigma, ones, (sigma / 2).log()

    def _draw(self, num: int, **source: Any) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** torch.rand(num, **source)


class FlowPrecond(Precond):
    """Velocity prediction of flow matching: F is eps - x0 at z = (1 - t) x0 + t eps.

    Rectified flow (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747), written in the
    variables of the other classes: t = sigma / (1 + sigma) and z = x / (1 + sigma). Training times
    are logit-normal, optionally shifted (Esser et al., arXiv 2403.03206, section 3.1 and Eq. 23),
    and clamped to [0.001, 0.999]; sigma is then log-normal, multiplied by the shift.

    Args:
        logit_mean, logit_std: Mean and standard deviation of ln(t / (1 - t)) before the shift.
        shift: s in t' = s t / (1 + (s - 1) t).
    """

    t_min, t_max = 0.001, 0.999
    sigma_min, sigma_max = t_min / (1 - t_min), t_max / (1 - t_max)
    noise_range = (sigma_min, sigma_max)

    def __init__(self, logit_mean: float = 0.0, logit_std: float = 1.0, shift: float = 1.0) -> None:
        self.logit_mean, self.logit_std, self.shift = logit_mean, logit_std, shift

    @staticmethod
    def time(sigma: Tensor) -> Tensor:
        """Return the time t in [0, 1] of a noise level: 1, pure noise, if it is infinite."""
        return torch.where(sigma.isinf(), 1.0, sigma / (1 + sigma))

    def scalings(self, sigma: Tensor) -> Scalings:
        t = self.time(sigma)
        return 1 - t, -t, 1 - t, t

    def _draw(self, num: int, **source: Any) -> Tensor:
        normal = torch.randn(num, **source)
        sigma = (normal * self.logit_std + self.logit_mean).exp() * self.shift
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def weight(self, sigma: Tensor) -> Tensor:
        # D - x0 is -t times the error of the velocity, which is to have weight 1.
        return self.time(sigma) ** -2

    def noise_fraction(self, sigma: float) -> float:
        return sigma / (1 + sigma)


class TablePrecond(Precond):
    """Noise prediction at the levels of a table, indexed by timestep: DDPM and iDDPM.

    In training, sigma = u_j with j uniform over the positive levels (DDPM, arXiv 2006.11239;
    iDDPM, arXiv 2102.09672). Timestep M - 1 - j stands for level u_j; at any other noise level the
    network receives the timestep of the nearest one.

    Args:
        table: Descending noise levels u_0 > ... > u_{M-1} > u_M = 0, [M + 1].
        learned_variance: See :class:`Precond`.
    """

    def __init__(self, table: np.ndarray, learned_variance: bool = False) -> None:
        self.learned_variance = learned_variance
        assert table[-1] == 0
        assert (np.diff(table) < 0).all()
        self._ascending = table[-2::-1].tolist()  # index = timestep
        self._on_device: dict[torch.device, Tensor] = {}
        self.sigma_min, self.sigma_max = self._ascending[0], self._ascending[-1]
        self.noise_range = (self.sigma_min, self.sigma_max)

    def _levels(self, device: torch.device) -> Tensor:
        # Copied to each device once: a copy in every step would synchronise with the device.
        if device in self._on_device:
            return self._on_device[device]
        values = torch.tensor(self._ascending, dtype=torch.float32, device=device)
        if not torch.compiler.is_compiling():  # Tensors made in a trace do not outlive it.
            self._on_device[device] = values
        return values

    def _timestep(self, sigma: float) -> int:
        after = bisect.bisect_left(self._ascending, sigma)
        candidates = range(max(after - 1, 0), min(after + 1, len(self._ascending)))
        return min(candidates, key=lambda index: abs(self._ascending[index] - sigma))

    @property
    def num_timesteps(self) -> int:
        """Number of positive noise levels."""
        return len(self._ascending)

    def level(self, timestep: int) -> float:
        """Return the noise level of a timestep; 0 is the lowest."""
        return self._ascending[timestep]

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timestep of the nearest level, int64 with the shape of ``sigma``."""
        return (self._levels(sigma.device) - sigma.unsqueeze(-1)).abs().argmin(-1)

    def level_below(self, sigma: Tensor) -> Tensor:
        """Return the level one below the nearest to ``sigma``; 0 if that is the lowest."""
        below = self.timestep(sigma) - 1
        return torch.where(below < 0, 0.0, self._levels(sigma.device)[below.clamp(min=0)])

    def scalings(self, sigma: Tensor) -> Scalings:
        c_noise = self.timestep(sigma).to(sigma.dtype)
        return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), c_noise

    def _draw(self, num: int, **source: Any) -> Tensor:
        levels = self._levels(source["device"])
        return levels[torch.randint(len(levels), [num], **source)]

    def round_sigma(self, sigma: float) -> float:
        return self._ascending[self._timestep(sigma)] if sigma > 0 else 0.0

    def noise_fraction(self, sigma: float) -> float:
        # Timestep over M, the progress that DiffiT's guidance schedule takes: it never reaches 1.
        return self._timestep(sigma) / len(self._ascending)


def make_precond(config: PrecondConfig) -> Precond:
    """Return the preconditioner that ``config`` describes."""
    if config.precond == "edm":
        return EDMPrecond(config.sigma_data, config.P_mean, config.P_std)
    if config.precond == "flow":
        return FlowPrecond(config.logit_mean, config.logit_std, config.flow_shift)
    if config.precond == "ddpm":
        return TablePrecond(linear_sigmas(config.diffusion_steps), config.learned_variance)
    if config.precond == "iddpm":
        return TablePrecond(cosine_sigmas(), config.learned_variance)
    return dict(vp=VPPrecond, ve=VEPrecond)[config.precond]()
