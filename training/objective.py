"""From a batch to the loss: the module that DDP wraps."""

import dataclasses
from collections.abc import Callable

import torch

from data.codecs import LatentInputs, PixelInputs
from data.images.augment import AugmentParams
from data.images.dataset import Cond
from diffusion.denoiser import Denoiser
from diffusion.losses import denoising_loss, hybrid_loss
from diffusion.precond import Precond
from models import Context, Network
from torch_utils import rng
from torch_utils.stats import StatsCollector


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one optimizer step, for the rows of one rank."""

    sigma: torch.Tensor  # [N], noise level
    noise: torch.Tensor  # [N, C, H, W], standard normal
    drop: torch.Tensor | None  # [N] or [N, K] bool, true where the condition (of K) is dropped
    inputs: AugmentParams | torch.Tensor | None  # [N, ...], what the inputs are made with
    context_drop: torch.Tensor | None = None  # [N] bool, true where the set is dropped
    context_noise: torch.Tensor | None = None  # [N, ...], standard normal, of a drawn context
    kl_weight: torch.Tensor | None = None  # [N], of the divergence of a drawn context
    patch_bias: torch.Tensor | None = None  # [N], added to the scores of attention to patches

    def rows(self, start: int, stop: int) -> "Draws":
        """Return the draws of rows ``start`` to ``stop``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Draws(**{k: None if v is None else v[start:stop] for k, v in values.items()})


class Objective(torch.nn.Module):
    """The denoising loss of a network under a preconditioner.

    The loop knows an objective by six calls: :meth:`warm_up` before it begins, :meth:`draw` the
    randomness of a step, :meth:`prepare` a batch on the device, the differentiable loss,
    :meth:`report` it, and :meth:`diagnose` what the last step of a tick did. Another kind of
    training (other noise, other draws, other data) is another class with these.

    Args:
        network: What is trained.
        precond: Its parametrization, noise density and loss weight.
        inputs: How a loader's batch becomes the network's input; by default images as they are.
        label_drop: Probability of training without the condition.
        autocast_dtype: Arithmetic of the network; None is float32.
    """

    def __init__(
        self,
        network: Network,
        precond: Precond,
        *,
        inputs: PixelInputs | LatentInputs | None = None,
        label_drop: float = 0.0,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._precond = precond
        self._inputs = inputs or PixelInputs()
        self._label_drop = label_drop
        self._denoise = Denoiser(
            network, precond, autocast_dtype, with_variance=precond.learned_variance
        )

    def draw(
        self,
        *,
        seed: int,
        cur_nimg: int,
        batch: int,
        input_shape: tuple[int, ...],
        device: torch.device,
    ) -> Draws:
        """Return the draws of the global batch [N = batch] that starts at image ``cur_nimg``.

        They are a function of (seed, cur_nimg) alone: every rank draws the whole batch and keeps
        its rows, so that the number of ranks and the accumulation change nothing.
        """
        generator = rng.step_generator(seed, cur_nimg, rng.STREAM_NOISE, device)
        sigma = self._precond.draw_sigma(batch, generator, device)
        noise = torch.randn(batch, *input_shape, generator=generator, device=device)
        drop = None
        if self._label_drop > 0:
            generator = rng.step_generator(seed, cur_nimg, rng.STREAM_CONDITION, device)
            drop = torch.rand(batch, generator=generator, device=device) < self._label_drop
        inputs = self._inputs.draw(
            seed=seed, cur_nimg=cur_nimg, batch=batch, shape=input_shape, device=device
        )
        return Draws(sigma=sigma, noise=noise, drop=drop, inputs=inputs)

    def prepare(
        self, images: torch.Tensor, cond: Cond, draws: Draws, device: torch.device
    ) -> tuple[torch.Tensor, Cond]:
        """Return what :meth:`forward` takes, on ``device``, of a loader's batch."""
        images = images.to(device, non_blocking=True)
        cond = {name: value.to(device, non_blocking=True) for name, value in cond.items()}
        return self._inputs.prepare(images, cond, draws.inputs)

    def forward(self, images: torch.Tensor, cond: Cond, draws: Draws) -> torch.Tensor:
        """Return the loss of every element [N, C, H, W] of prepared images and conditions."""
        context = self.network.context(cond, draws.drop, num=len(images))
        return self._loss(images, draws.sigma, draws.noise, context)

    @property
    def num_shapes(self) -> int:
        """Number of shapes of inputs, for each of which a compiled network has a graph."""
        return 1

    def warm_up(self, run: Callable[..., torch.Tensor], batch: int, device: torch.device) -> None:
        """Have every graph of a compiled network made before training, by one pass each.

        ``run`` is :meth:`forward`, as wrapped for training; ``batch`` is that of a pass. What it
        leaves in the gradients counts for nothing. With a single shape, the first step does.
        """

    def report(self, stats: StatsCollector, loss: torch.Tensor, draws: Draws) -> None:
        """Add the ``loss`` that :meth:`forward` just returned to the statistics of the tick."""
        stats.report("Loss/loss", loss)

    def diagnose(
        self,
        images: torch.Tensor,
        cond: Cond,
        draws: Draws,
        loss_scale: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return what is worth telling of a batch, and of the gradients that are there now.

        Args:
            images, cond, draws: As in :meth:`forward`.
            loss_scale: What the gradients were multiplied by.
        """
        return {}

    def _loss(
        self, images: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor, context: Context
    ) -> torch.Tensor:
        batch = (self._denoise, images, sigma, noise, context)
        if self._precond.learned_variance:
            return hybrid_loss(*batch, self._precond)
        return denoising_loss(*batch, self._precond.weight)
