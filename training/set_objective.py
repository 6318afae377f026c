"""The loss of sets of images, each image conditioned on its set, and diagnostics of the context."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from data.fewshot.config import SetConfig
from data.fewshot.sets import SetDataset
from data.images.dataset import Cond
from data.samplers import rank_passes
from diffusion.denoiser import autocast
from models.set_conditioner import SetContext
from torch_utils import distributed, rng
from torch_utils.stats import StatsCollector
from training.config import RunConfig
from training.division import accumulation_rounds
from training.objective import Draws, Objective, gradient_norms, rows_dropped


@dataclasses.dataclass(frozen=True)
class SetDraws(Draws):
    """The random numbers of one optimizer step on sets, with one row per set."""

    context_drop: Tensor | None = None  # [b] bool, true where the set is dropped
    context_noise: Tensor | None = None  # [b, n, D], standard normal, of a drawn context
    kl_weight: Tensor | None = None  # [b], weight of the KL divergence of a drawn context
    pretrains: Tensor | None = None  # [b] bool, true while the encoder is trained alone


class SetObjective(Objective):
    """The denoising loss of every image of a set, under the context that its set gives it.

    A row of a batch is a set: images are [b, n, C, H, W], and every draw has one row per set. All
    images of a set have the same noise level (arXiv 2205.15463, section 3). Absent images have no
    loss, and all sets have the same weight, however many images they have.

    Args:
        config: How the context is trained. The other arguments are those of :class:`Objective`.
    """

    def __init__(self, *args: Any, config: SetConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = config
        self._model = model = self.network.config
        # Factor of the KL divergence in nats, which the warm-up reduces at first.
        if config.kl_scale == "dimensions":
            scale = model.encoder_dim * model.sample_size
        else:
            # Bits per dimension of the images, divided by the timesteps that the bound sums over.
            steps = getattr(self._precond, "num_timesteps", 1)
            scale = model.sample_size * math.prod(model.input_shape) * steps
        self._kl_factor = config.kl_weight / (math.log(2) * scale)

    def example(self, batch: int, device: torch.device) -> tuple[Tensor, Cond]:
        images, cond = super().example(batch, device)
        return images[:, None].expand(-1, self._model.sample_size, -1, -1, -1).clone(), cond

    def phase(self, cur_nimg: int) -> int:
        return int(cur_nimg >= self._config.pretrain_encoder * 1000)

    def draw(self, step: rng.Step) -> SetDraws:
        num, batch, device = self._model.sample_size, step.batch, step.device
        draws = super().draw(dataclasses.replace(step, shape=self.row_shape(step.shape)))
        generator = step.generator(rng.STREAM_CONTEXT)
        changes = {}
        if self._config.context_drop > 0:
            uniform = torch.rand(batch, generator=generator, device=device)
            changes["context_drop"] = uniform < self._config.context_drop
        if self.network.conditioner.is_variational:
            shape = (batch, num, self._model.encoder_dim)
            changes["context_noise"] = torch.randn(*shape, generator=generator, device=device)
            length = self._config.kl_rampup * 1000
            warm_up = min(step.cur_nimg / length, 1.0) if length > 0 else 1.0
            changes["kl_weight"] = torch.full([batch], self._kl_factor * warm_up, device=device)
        if self._model.reconstructs:
            is_first = self.phase(step.cur_nimg) == 0
            changes["pretrains"] = torch.full([batch], is_first, device=device)
        return SetDraws(**vars(draws), **changes)

    def row_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._model.sample_size, *shape

    def fixed_draws(self, sigma: Tensor, noise: Tensor, cur_nimg: int) -> SetDraws:
        # A variational context is its mean, and its divergence is not part of the error.
        return SetDraws(**vars(super().fixed_draws(sigma, noise, cur_nimg)))

    def reduced(self, draws: SetDraws) -> dict[str, SetDraws]:
        found = super().reduced(draws)
        if self._config.context_drop:
            drop = torch.ones_like(draws.sigma, dtype=torch.bool)
            found["without_set"] = dataclasses.replace(draws, context_drop=drop)
        return found

    def dropped(self, draws: SetDraws) -> dict[str, tuple[Tensor, float]]:
        found = super().dropped(draws)
        if self._config.context_drop:
            rows = rows_dropped(draws.context_drop, draws)
            found["set"] = rows, self._config.context_drop
        return found

    def _parts(self, context: SetContext, cond: Cond) -> dict[str, Tensor]:
        given = context.tokens if context.vector is None else context.vector
        parts = dict(set=given)
        parts["class"] = context.label
        return {name: part for name, part in parts.items() if part is not None}

    def context(self, images: Tensor, cond: Cond, draws: SetDraws) -> SetContext:
        """Return the contexts of all b n images of sets [b, n, C, H, W]."""
        cond = {"set": images, **cond}
        if "label" in cond and draws.drop is not None:
            cond["label"] = torch.where(draws.drop, self._model.num_classes, cond["label"])
        if draws.context_noise is not None:
            cond["context_noise"] = draws.context_noise
        # With a student, the context waits for its noise level: the teacher needs it at two.
        if self._model.encoder_time and draws.step is None:
            cond["c_noise"] = self._precond.scalings(draws.sigma)[3]
        with autocast(images.device, self._denoise.autocast_dtype):
            return self.network.context(cond, draws.context_drop)

    def forward(self, images: Tensor, cond: Cond, draws: SetDraws) -> Tensor:
        """Return the loss of every element [b n, C, H, W] of sets [b, n, C, H, W]."""
        images = _present(images, cond)
        context = self.context(images, cond, draws)
        loss = self._loss_of_sets(images, draws, context)
        if context.kl is not None and draws.kl_weight is not None:
            weight = draws.kl_weight.repeat_interleave(images.shape[1])
            loss = loss + (weight * context.kl)[:, None, None, None]
        if draws.pretrains is not None and context.prediction is not None:
            # Both losses are in the graph of every step, so that every parameter has a gradient.
            error = (context.prediction - images.flatten(0, 1)).square()
            pretrains = draws.pretrains.repeat_interleave(images.shape[1])
            loss = torch.where(pretrains[:, None, None, None], error, loss)
        return _weighted(loss, cond)

    def loss_under(
        self, images: Tensor, cond: Cond, draws: SetDraws, context: SetContext
    ) -> Tensor:
        return _weighted(self._loss_of_sets(_present(images, cond), draws, context), cond)

    @property
    def is_conditional(self) -> bool:
        return True

    def _loss_of_sets(self, images: Tensor, draws: SetDraws, context: SetContext) -> Tensor:
        sigma, noise = draws.sigma.repeat_interleave(images.shape[1]), draws.noise.flatten(0, 1)
        return self._loss(images.flatten(0, 1), sigma, noise, context, draws.target)

    def of_student(self, draws: SetDraws) -> SetDraws:
        """Return draws without pre-training, under which a variational context is its mean."""
        draws = dataclasses.replace(draws, context_noise=None, kl_weight=None)
        if draws.pretrains is None:
            return draws
        return dataclasses.replace(draws, pretrains=torch.zeros_like(draws.pretrains))

    def branches(self, guidance: Any, draws: SetDraws) -> list[SetDraws]:
        if guidance.cfg_scale == 1:
            return [draws]
        dropped = torch.ones_like(draws.step, dtype=torch.bool)
        return [draws, dataclasses.replace(draws, context_drop=dropped)]

    @torch.no_grad()
    def diagnose(
        self, images: Tensor, cond: Cond, draws: SetDraws, loss_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return statistics of a batch's contexts and of the gradients, under ``debug/`` names.

        ``context_norm``, ``context_mean`` and ``context_max`` describe each context vector: its L2
        norm, and the mean and maximum of its absolute values. ``context_std`` is the standard
        deviation of all elements, ``context_batch_std`` that of an element over sets (0 if all sets
        have the same context), ``context_gap`` the rise of the loss when every set gets the context
        of another. The last two need several sets. Contexts are computed without dropout and noise,
        and absent images do not count. Gradient norms are those of the encoder, the DiT and each
        block of it, before clipping.
        """
        if not self._config.diagnostics:
            return {}
        network = self.network
        modules = dict(encoder=network.conditioner.encoder, dit=network.backbone)
        modules.update({f"dit_layer_{i}": block for i, block in enumerate(network.backbone.blocks)})
        norms = gradient_norms(modules, loss_scale)
        found = {f"{name}_grad_norm": norm for name, norm in norms.items()}
        draws = dataclasses.replace(draws, context_drop=None, context_noise=None)
        # Statistics are over the images that are present.
        mask = cond.get("mask")
        if mask is None:
            mask = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
        was_training = self.network.training
        self.network.eval()
        with self.gathered():
            context = self.context(images, cond, draws)
            tokens = context.tokens if context.vector is None else context.vector[:, None]
            tokens = tokens.to(torch.float32)  #                        [b n, M, d]
            num, rows = images.shape[1], mask.flatten()
            found.update(
                context_norm=tokens[rows].norm(dim=-1),
                context_mean=tokens[rows].abs().mean(-1),
                context_max=tokens[rows].abs().amax(-1),
                context_std=tokens[rows].std(),
            )
            if len(images) > 1:
                vectors = tokens.mean(1).unflatten(0, (-1, num))  #     [b, n, d]
                weight = mask[..., None] / mask.sum(1)[:, None, None]
                found["context_batch_std"] = (vectors * weight).sum(1).std(0).mean()
                order = torch.arange(len(tokens), device=tokens.device).roll(num)
                own = self._loss_of_sets(images, draws, context)[rows].mean()
                other = self._loss_of_sets(images, draws, context.index(order))[rows].mean()
                found["context_gap"] = other - own
        self.network.train(was_training)
        return {f"debug/{name}": value for name, value in found.items()}


def _present(images: Tensor, cond: Cond) -> Tensor:
    """Return sets [b, n, C, H, W] with zeros in place of absent images."""
    mask = cond.get("mask")
    return images if mask is None else torch.where(mask[..., None, None, None], images, 0.0)


def _weighted(loss: Tensor, cond: Cond) -> Tensor:
    """Return losses [b n, C, H, W] weighted 0 for absent images, and equally for all sets."""
    mask = cond.get("mask")
    if mask is None:
        return loss
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) * mask.shape[1]
    return loss * weight.flatten()[:, None, None, None]


@torch.no_grad()
def validation_loss(config: RunConfig, sets: SetDataset, objective: SetObjective) -> float:
    """Return the mean loss of the first ``--num-eval-batches`` batches of ``sets``. Collective."""
    device = next(objective.parameters()).device
    batch, shape = config.training.batch, config.model.input_shape
    ranks = distributed.rank(), distributed.world_size()
    passes = rank_passes(batch, accumulation_rounds(config.training, ranks[1])[0], *ranks)
    stats = StatsCollector()
    for index in range(config.sets.num_eval_batches):
        step = rng.Step(config.training.seed, index * config.step_nimg, batch, shape, device)
        # A variational context is its mean, and its divergence is not part of the error.
        draws = dataclasses.replace(
            objective.draw(step), drop=None, context_drop=None, context_noise=None, kl_weight=None
        )
        for part in passes:
            keys = range(index * batch + part.start, index * batch + part.stop)
            rows = draws.rows(part.start, part.stop)
            images, cond = objective.prepare(*sets.__getitems__(keys), rows, device)
            cond.pop("label", None)  # The model does not know these classes.
            stats.report("loss", objective(images, cond, rows))
    return stats.collect()["loss"]["mean"]
