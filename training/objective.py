"""The denoising loss of a batch: the module that DDP wraps."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor

from data.images.dataset import Cond
from diffusion.config import SamplingConfig
from diffusion.denoiser import Denoiser
from diffusion.distillation import distillation_loss, guidance_table
from diffusion.losses import denoising_loss, hybrid_loss
from diffusion.precond import Precond
from diffusion.samplers import sampling_sigmas
from models.context import Context
from models.network import Network
from torch_utils import rng
from torch_utils.parameters import norm_of_grads
from torch_utils.stats import StatsCollector
from training.family import Codec

_NUM_LEVELS = 5  # Ranges of noise levels that are equally frequent in training.


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one optimizer step, for some rows of its global batch."""

    sigma: Tensor  # [N], noise level
    noise: Tensor  # [N, C, H, W], standard normal
    drop: Tensor | None  # [N] or [N, K] bool, true where the condition (of K) is dropped
    codec: Any  # [N, ...], what the codec encodes with; None where nothing is random
    # For a student: its sampling step, [N] int64, and the x0 to estimate for every image.
    step: Tensor | None = None
    target: Tensor | None = None

    def rows(self, start: int, stop: int) -> Self:
        """Return the draws of rows ``start`` to ``stop``."""
        values = {k: None if v is None else v[start:stop] for k, v in vars(self).items()}
        return type(self)(**values)


class Objective(torch.nn.Module):
    """The denoising loss of a network under a preconditioner.

    It is a :class:`training.family.Objective`, which describes what the loop calls.

    Args:
        network: What is trained.
        precond: Its parametrization, noise density and loss weight.
        codec: Encodes a loader's batch.
        label_drop: Probability of training without the class label.
        autocast_dtype: Arithmetic of the network; None is float32.
    """

    def __init__(
        self,
        network: Network,
        precond: Precond,
        codec: Codec,
        *,
        label_drop: float = 0.0,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network, self._precond = network, precond
        # Makes the context within which parts of a sharded network can be called by themselves.
        self.gathered: Callable[[], AbstractContextManager] = contextlib.nullcontext
        self._codec, self._label_drop = codec, label_drop
        with_variance = precond.learned_variance
        self._denoise = Denoiser(network, precond, autocast_dtype, with_variance=with_variance)
        # Bounds of the ranges of noise levels whose losses are kept apart. Quantiles may coincide.
        levels = precond.training_levels([i / _NUM_LEVELS for i in range(1, _NUM_LEVELS)])
        self._bounds = sorted(set(levels))
        ends = [f"{bound:.2g}" for bound in (0.0, *self._bounds, math.inf)]
        # Names of the ranges, without the group of statistics that they belong to.
        self.level_names = [f"sigma_{a}-{b}" for a, b in itertools.pairwise(ends)]

    def draw(self, step: rng.Step) -> Draws:
        """Return the draws of a step's global batch [N], a function of (seed, position) alone.

        Each rank keeps its own rows, so the number of ranks and accumulation change nothing.
        """
        batch, device = step.batch, step.device
        generator = step.generator(rng.STREAM_NOISE)
        sigma = self._precond.draw_sigma(batch, generator, device)
        noise = torch.randn(batch, *step.shape, generator=generator, device=device)
        drop = None
        if self._label_drop > 0:
            generator = step.generator(rng.STREAM_CONDITION)
            drop = torch.rand(batch, generator=generator, device=device) < self._label_drop
        return Draws(sigma=sigma, noise=noise, drop=drop, codec=self._codec.draw(step))

    # For the validation loss: see training/validation/losses.py.

    def training_levels(self, shares: Sequence[float]) -> list[float]:
        """Return the quantiles of training's noise levels at probabilities ``shares``."""
        return self._precond.training_levels(shares)

    def row_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the noise of a row whose images have ``shape`` [C, h, w]."""
        return shape

    def fixed_draws(self, sigma: Tensor, noise: Tensor, cur_nimg: int) -> Draws:
        """Return draws of given levels [N] and noise [N, *row_shape], with nothing else random.

        No condition is dropped and nothing is augmented. ``cur_nimg`` counts the training images
        so far.
        """
        return Draws(sigma=sigma, noise=noise, drop=None, codec=None)

    def reduced(self, draws: Draws) -> dict[str, Draws]:
        """Return fixed draws without each condition that training can drop, by ``without_NAME``."""
        if not self._label_drop:
            return {}
        drop = torch.ones_like(draws.sigma, dtype=torch.bool)
        return {"without_class": dataclasses.replace(draws, drop=drop)}

    def prepare(
        self, images: Tensor, cond: Cond, draws: Draws, device: torch.device
    ) -> tuple[Tensor, Cond]:
        """Return a loader's batch on ``device``, encoded as :meth:`forward` takes it."""
        images = images.to(device, non_blocking=True)
        cond = {name: value.to(device, non_blocking=True) for name, value in cond.items()}
        return self._codec.encode(images, cond, draws.codec)

    def forward(self, images: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """Return the loss of every element [N, C, H, W] of prepared images and conditions."""
        return self.loss_under(images, cond, draws, self.context(images, cond, draws))

    def total(self, loss: Tensor) -> Tensor:
        """Return a loss [N, C, H, W] summed over rows and, as in EDM, over elements: a scalar."""
        return loss.sum()

    def loss_under(self, images: Tensor, cond: Cond, draws: Draws, context: Context) -> Tensor:
        """Return the denoising loss under any context of these images, such as that of others."""
        return self._loss(images, draws.sigma, draws.noise, context, draws.target)

    @property
    def is_conditional(self) -> bool:
        """Whether images are made from a condition that differs from image to image."""
        return self.network.config.num_classes > 0

    def context(self, images: Tensor, cond: Cond, draws: Draws) -> Context:
        """Return the context of every image of a prepared batch."""
        return self.network.context(cond, draws.drop, num=len(images))

    # For the watchers: see training/watching/inspection/draws.py.

    def dropped(self, draws: Draws) -> dict[str, tuple[Tensor, float]]:
        """Return for each condition which rows lose it, bool [N], and the probability of that."""
        if not self._label_drop:
            return {}
        return {"class": (rows_dropped(draws.drop, draws), self._label_drop)}

    @torch.no_grad()
    def contexts(self, images: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """Return what the network receives of each condition, [N, ...], if nothing is dropped.

        It is not random and does not depend on the noise level. Collective for a sharded network.
        """
        conditioner, cond = self.network.conditioner, dict(cond)
        cond.pop("augment", None)
        fixed = self.fixed_draws(draws.sigma[:1].expand_as(draws.sigma), draws.noise, 0)
        was_training = conditioner.training
        conditioner.eval()
        with self.gathered():
            found = self._parts(self.context(images, cond, fixed), cond)
        conditioner.train(was_training)
        return found

    def _parts(self, context: Context, cond: Cond) -> dict[str, Tensor]:
        return {"class": context.vector} if "label" in cond else {}

    def phase(self, cur_nimg: int) -> int:
        """Return a number that changes where the definition of the loss does."""
        return 0

    @property
    def num_shapes(self) -> int:
        return 1

    def warm_up(self, run: Callable[..., Tensor], batch: int, device: torch.device) -> None:
        """Do nothing: with a single input shape, the first step makes the graph."""

    def example(self, batch: int, device: torch.device) -> tuple[Tensor, Cond]:
        """Return zeros as images and conditions of ``batch`` rows, of the largest shape there is.

        They have the form that :meth:`prepare` returns and :meth:`forward` takes.
        """
        model = self.network.config
        label = torch.zeros(batch, dtype=torch.int64, device=device)
        images = torch.zeros(batch, *model.input_shape, device=device)
        return images, {"label": label} if model.num_classes else {}

    def report(self, stats: StatsCollector, loss: Tensor, draws: Draws) -> None:
        """Add the ``loss`` that :meth:`forward` just returned to the statistics of the tick."""
        stats.report("Loss/loss", loss)
        self._report_by_noise(stats, loss.detach().mean(dim=(1, 2, 3)), draws.sigma)

    def _report_by_noise(self, stats: StatsCollector, losses: Tensor, sigma: Tensor) -> None:
        """Add losses [M] by the range of their noise levels [N], each of M / N losses in a row."""
        level = self.level_of(sigma.repeat_interleave(len(losses) // len(sigma)))
        stats.report_groups([f"Loss/{name}" for name in self.level_names], losses, level)

    def level_of(self, sigma: Tensor) -> Tensor:
        """Return the index in ``level_names`` of each noise level's range, int64 [N]."""
        return torch.stack([sigma > bound for bound in self._bounds]).sum(dim=0)

    def diagnose(
        self, images: Tensor, cond: Cond, draws: Draws, loss_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return no further statistics of a batch and its gradients; subclasses have some."""
        return {}

    def _loss(
        self,
        images: Tensor,
        sigma: Tensor,
        noise: Tensor,
        context: Context,
        target: Tensor | None = None,
    ) -> Tensor:
        if target is not None:
            level = sigma.reshape(-1, 1, 1, 1)
            estimate = self.estimate(self.noisy(images, level, noise), level, context)
            return distillation_loss(estimate, target, self.snr(level))
        batch = (self._denoise, images, sigma, noise, context)
        if self._precond.learned_variance:
            return hybrid_loss(*batch, self._precond)
        return denoising_loss(*batch, self._precond.weight)

    # For distillation, of student and teacher: see training/distillation/objective.py.

    def levels(self, sampling: SamplingConfig) -> list[float]:
        """Return the levels that a sampler visits, descending to 0: sigmas, or times of a flow."""
        return sampling_sigmas(sampling, self._precond)

    def sigma_of(self, level: Tensor) -> Tensor:
        """Return the noise level sigma of a level; infinity for pure noise."""
        return level

    def noisy(self, images: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Return images [M, C, H, W] with noise at levels [M, 1, 1, 1], as sampling forms them."""
        return images + level * noise

    def snr(self, level: Tensor) -> Tensor:
        """Return the squared signal-to-noise ratio of images of unit variance at a level."""
        return level**-2

    def estimate(self, x: Tensor, level: Tensor, context: Context) -> Tensor:
        """Return the x0 estimate of noisy images ``x``, float32, both [M, C, H, W]."""
        return self._denoise(x, level, context)[:, : x.shape[1]]

    def of_student(self, draws: Draws) -> Draws:
        """Return the draws of a student, whose context is made as in sampling."""
        return draws

    def branches(self, guidance: Any, draws: Draws) -> list[Draws]:
        """Return draws of the same rows for the contexts of the K branches of a guided estimate."""
        if guidance.cfg_scale == 1:
            return [draws]
        dropped = torch.ones_like(draws.step, dtype=torch.bool)
        return [draws, dataclasses.replace(draws, drop=dropped)]

    def branch_table(self, guidance: Any, levels: Sequence[float]) -> Tensor:
        """Return the weights of the K branches, [R, K, C or 1], in rows for :meth:`branch_rows`.

        ``levels`` are those that the teacher visits before 0.
        """
        return guidance_table(guidance, levels, self._precond, self.network.config.input_shape[0])

    def branch_rows(self, draws: Draws, index: Tensor) -> Tensor:
        """Return the table's row for each row of a batch, [N], at the levels of ``index`` [N]."""
        return index


def rows_dropped(drop: Tensor | None, draws: Draws) -> Tensor:
    """Return ``drop``, bool [N]; for None, which drops no row of ``draws``, all False."""
    return torch.zeros_like(draws.sigma, dtype=torch.bool) if drop is None else drop


def gradient_norms(
    modules: Mapping[str, torch.nn.Module], loss_scale: Tensor | None
) -> dict[str, Tensor]:
    """Return the gradient norm of each module with gradients, divided by the loss scale."""
    norms = {}
    for name, module in modules.items():
        grads = [param.grad for param in module.parameters() if param.grad is not None]
        if grads:
            norm = norm_of_grads(grads)
            norms[name] = norm if loss_scale is None else norm / loss_scale
    return norms
