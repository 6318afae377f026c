"""Samplers of flow matching, from noise at t = 1 to data at t = 0.

Each is a function ``sampler(velocity, z, times) -> x0``. ``velocity(z, t)`` returns the estimate of
eps - x0 at z = (1 - t) x0 + t eps, where ``t`` is a Python number; ``times`` descends from 1 to 0.
Samplers never form the noise level sigma = t / (1 - t), which is infinite at t = 1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.config import SamplingConfig
from diffusion.denoiser import autocast
from diffusion.samplers import Callback, Levels, Watched, steps_of

VelocityFn = Callable[[Tensor, float], Tensor]


class Velocity:
    """The velocity that a raw network predicts, in float32.

    Args:
        network: ``F(z [N, C, H, W], t [N], context) -> [N, C, H, W]``.
        autocast_dtype: Autocast dtype of the network (bfloat16, float16), or None for its own.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Any], Tensor],
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.network, self.autocast_dtype = network, autocast_dtype

    def __call__(self, z: Tensor, t: float | Tensor, context: Any = None) -> Tensor:
        """Return v [N, C, H, W], float32, without synchronising with the device.

        Args:
            z: (1 - t) x0 + t eps [N, C, H, W], of any floating dtype.
            t: Time in [0, 1]: one number, or a tensor [N].
            context: Conditioning, passed on to the network.
        """
        z = z.to(torch.float32)
        if not isinstance(t, Tensor):
            t = torch.full([z.shape[0]], t, dtype=torch.float32, device=z.device)
        with autocast(z.device, self.autocast_dtype):
            return self.network(z, t.to(torch.float32), context).to(torch.float32)


def flow_times(num_steps: int, shift: float = 1.0) -> list[float]:
    """Return the num_steps + 1 times s t / (1 + (s - 1) t) for evenly spaced t from 1 to 0.

    The shift s is that of Esser et al. (arXiv 2403.03206, Eq. 23); 1 leaves the times even.
    """
    even = [1 - step / num_steps for step in range(num_steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def flow_euler(
    velocity: VelocityFn, z: Tensor, times: Levels, *, callback: Callback = None
) -> Tensor:
    """Return x0 by Euler steps of dz/dt = v(z, t)."""
    for t, t_next in steps_of(times, callback):
        z = z + (t_next - t) * velocity(z, t)
    return z


def flow_heun(
    velocity: VelocityFn, z: Tensor, times: Levels, *, callback: Callback = None
) -> Tensor:
    """Return x0 by Heun's method in (z, t); the last step, to 0, is an Euler step.

    It differs from :func:`diffusion.samplers.heun`, which is Heun's method in (x, sigma).
    """
    for t, t_next in steps_of(times, callback):
        v = velocity(z, t)
        predicted = z + (t_next - t) * v
        if t_next > 0:
            predicted = z + (t_next - t) * (v + velocity(predicted, t_next)) / 2
        z = predicted
    return z


def flow_dpmpp_2m(
    velocity: VelocityFn, z: Tensor, times: Levels, *, callback: Callback = None
) -> Tensor:
    """Return x0 by DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Algorithm 2).

    Here alpha = 1 - t and sigma = t. Three steps are first-order: the one from t = 1; the one after
    it, because the step before is infinitely long in ln(alpha / sigma); and the last, to 0.
    """
    previous = h_previous = None
    for t, t_next in steps_of(times, callback):
        denoised = z - t * velocity(z, t)
        target = denoised
        if t_next > 0:
            h = math.inf if t >= 1 else math.log(t * (1 - t_next) / (t_next * (1 - t)))
            if previous is not None and math.isfinite(h_previous):
                target = denoised + (denoised - previous) * (h / (2 * h_previous))
            previous, h_previous = denoised, h
        # (t' / t) z + (alpha' - alpha t' / t) x0, in which the second factor equals 1 - t' / t.
        z = torch.lerp(target, z, t_next / t)
    return z


FLOW_SAMPLERS: dict[str, Callable[..., Tensor]] = dict(
    euler=flow_euler, heun=flow_heun, dpmpp_2m=flow_dpmpp_2m
)


@torch.no_grad()
def sample_flow(
    velocity: VelocityFn, noise: Tensor, config: SamplingConfig, callback: Callback = None
) -> Tensor:
    """Return samples x0 [N, C, H, W], float64.

    Args:
        velocity: ``(z, t) -> v``, closed over context and guidance.
        noise: Standard normal [N, C, H, W], which is z at t = 1.
        config: Sampler, steps and shift; its grid must be ``time``.
        callback: Called without arguments after every step.

    Raises NotFiniteError, which names the step, if velocities or samples are not finite.
    """
    assert config.grid == "time"
    times = flow_times(config.steps, config.time_shift)
    sampler = FLOW_SAMPLERS[config.sampler]
    watched = Watched(velocity, callback)
    return watched.check(
        sampler(watched, noise.to(torch.float64), times, callback=watched.end_step)
    )
