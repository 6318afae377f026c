"""The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, arXiv 2206.00364, Eq. 7)."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.precond import Precond

# Autocast dtype for each value of --precision; None leaves the network in its own.
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Denoiser:
    """The x0 estimate that a raw network gives under a preconditioner.

    Scalings and the result are float32; only the network itself runs in ``autocast_dtype``.

    Args:
        network: ``F(x [N, C, H, W], c_noise [N], context) -> [N, C, H, W]``, or [N, 2 C, H, W] with
            a learned variance.
        precond: Preconditioner of the network.
        autocast_dtype: Autocast dtype of the network (bfloat16, float16), or None for its own.
        with_variance: Also return the learned variance, for the loss that trains it and the
            ``ddpm`` sampler: results are [N, 2 C, H, W]. The second half is the fraction f that
            places the logarithm of a step's variance between its bounds (0: lower, 1: upper;
            Nichol & Dhariwal, arXiv 2102.09672, Eq. 15). Otherwise that half of F is dropped.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Any], Tensor],
        precond: Precond,
        autocast_dtype: torch.dtype | None = None,
        *,
        with_variance: bool = False,
    ) -> None:
        assert precond.learned_variance or not with_variance
        self.network, self.precond, self.autocast_dtype = network, precond, autocast_dtype
        self._with_variance = with_variance

    def __call__(self, x: Tensor, sigma: float | Tensor, context: Any = None) -> Tensor:
        """Return the denoised images [N, C, H, W], float32, without synchronising with the device.

        With ``with_variance`` the result is [N, 2 C, H, W]: the variance fractions follow.

        Args:
            x: Noisy images [N, C, H, W] of any floating dtype.
            sigma: Noise level: one number, or a tensor [N] or [N, 1, 1, 1].
            context: Conditioning, passed on to the network.
        """
        x = x.to(torch.float32)
        if isinstance(sigma, Tensor):
            sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1).expand(x.shape[0], 1, 1, 1)
        else:
            sigma = torch.full([x.shape[0], 1, 1, 1], sigma, dtype=torch.float32, device=x.device)
        c_skip, c_out, c_in, c_noise = self.precond.scalings(sigma)
        with autocast(x.device, self.autocast_dtype):
            raw = self.network(c_in * x, c_noise.flatten(), context)
        channels = x.shape[1] * (2 if self.precond.learned_variance else 1)
        assert raw.shape == (x.shape[0], channels, *x.shape[2:]), (
            f"network returned {tuple(raw.shape)} for {tuple(x.shape)}"
        )
        raw = raw.to(torch.float32)
        denoised = c_skip * x + c_out * raw[:, : x.shape[1]]
        if not self._with_variance:
            return denoised
        return torch.cat([denoised, (raw[:, x.shape[1] :] + 1) / 2], dim=1)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return a context manager that autocasts to ``dtype``; None leaves arithmetic as it is.

    It does nothing if that autocast is already on, so a sampler can enter it once for all steps.
    """
    kind = device.type
    if dtype is None or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == dtype
    ):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
