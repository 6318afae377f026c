"""From a batch and its random draws to the loss: the module that DDP wraps."""

import dataclasses

import torch

from diffusion.losses import denoising_loss
from diffusion.precond import Denoiser, Precond
from models import Network
from torch_utils import rng
from training.augment import AugmentParams, AugmentPipe


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one optimizer step, for the rows of one rank."""

    sigma: torch.Tensor  # [N], noise level
    noise: torch.Tensor  # [N, C, H, W], standard normal
    drop: torch.Tensor | None  # [N] bool, true where the condition is dropped
    augment: AugmentParams | None

    def rows(self, start: int, stop: int) -> "Draws":
        """Return the draws of rows ``start`` to ``stop``."""
        return Draws(
            sigma=self.sigma[start:stop],
            noise=self.noise[start:stop],
            drop=None if self.drop is None else self.drop[start:stop],
            augment=None if self.augment is None else self.augment[start:stop],
        )


def draw_step(
    precond: Precond,
    augment_pipe: AugmentPipe | None,
    *,
    seed: int,
    cur_nimg: int,
    batch: int,
    image_shape: tuple[int, ...],
    label_drop: float,
    device: torch.device,
) -> Draws:
    """Return the draws of the global batch [N = batch] that starts at image ``cur_nimg``.

    They are a function of (seed, cur_nimg) alone: every rank draws the whole batch and keeps its
    rows, so that the number of ranks and the accumulation change nothing.
    """
    noise_generator = rng.step_generator(seed, cur_nimg, rng.STREAM_NOISE, device)
    sigma = precond.draw_sigma(batch, noise_generator, device)
    noise = torch.randn(batch, *image_shape, generator=noise_generator, device=device)
    drop = augment = None
    if label_drop > 0:
        generator = rng.step_generator(seed, cur_nimg, rng.STREAM_CONDITION, device)
        drop = torch.rand(batch, generator=generator, device=device) < label_drop
    if augment_pipe is not None:
        generator = rng.step_generator(seed, cur_nimg, rng.STREAM_AUGMENT, device)
        augment = augment_pipe.draw(batch, generator, device)
    return Draws(sigma=sigma, noise=noise, drop=drop, augment=augment)


class Objective(torch.nn.Module):
    """The denoising loss of a network under a preconditioner, as one differentiable module."""

    def __init__(
        self, network: Network, precond: Precond, autocast_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self._precond = precond
        self._denoise = Denoiser(network, precond, autocast_dtype)

    def forward(
        self,
        images: torch.Tensor,
        cond: dict[str, torch.Tensor],
        sigma: torch.Tensor,
        noise: torch.Tensor,
        drop: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the weighted squared error [N, C, H, W] of images [N, C, H, W] in [-1, 1]."""
        context = self.network.context(cond, drop, num=len(images))
        return denoising_loss(self._denoise, images, sigma, noise, context, self._precond.weight)
