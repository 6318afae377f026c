"""The loss of sets of images, each made from a context of its set, and what the context does."""

import dataclasses
import math

import torch

from models import Context
from torch_utils import rng
from training.dataset import Cond
from training.objective import Draws, Objective
from training.sets import SetConfig


class SetObjective(Objective):
    """The denoising loss of every image of a set, under the context that its set gives it.

    A row of a batch is a set: images are [b, n, C, H, W], and every draw has one row a set. All
    images of a set have the same noise level (arXiv 2205.15463, section 3). Absent images cost
    nothing, and a set weighs as much as another, however many images it has.

    Args:
        config: How the context is trained.
        data_dim: Numbers in an image, for the evidence lower bound's scale.
    """

    def __init__(self, *args, config: SetConfig, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._config = config
        self._model = self.network.config
        self._kl_factor = self._divergence_factor()
        self._kl_weight = torch.zeros([])

    def _divergence_factor(self) -> float:
        """Return what a divergence in nats is multiplied by, before its warm-up."""
        model, config = self._model, self._config
        if config.kl_scale == "dimensions":
            scale = model.encoder_dim * model.sample_size
        else:
            # Bits per dimension of the image, of one of the steps whose sum is the bound.
            steps = getattr(self._precond, "num_timesteps", 1)
            scale = model.sample_size * math.prod(model.input_shape) * steps
        return config.kl_weight / (math.log(2) * scale)

    def draw(
        self,
        *,
        seed: int,
        cur_nimg: int,
        batch: int,
        input_shape: tuple[int, ...],
        device: torch.device,
    ) -> Draws:
        """Return the draws of ``batch`` sets, as a function of (seed, cur_nimg) alone."""
        num = self._model.sample_size
        draws = super().draw(
            seed=seed,
            cur_nimg=cur_nimg,
            batch=batch,
            input_shape=(num, *input_shape),
            device=device,
        )
        warm_up = cur_nimg / max(self._config.kl_rampup * 1000, 1e-9)
        self._kl_weight = torch.tensor(self._kl_factor * min(warm_up, 1.0))
        if self.network.conditioner.is_variational:
            generator = rng.step_generator(seed, cur_nimg, rng.STREAM_CONTEXT, device)
            shape = (batch, num, self._model.encoder_dim)
            noise = torch.randn(*shape, generator=generator, device=device)
            draws = dataclasses.replace(draws, context_noise=noise)
        return draws

    def context(self, images: torch.Tensor, cond: Cond, draws: Draws) -> Context:
        """Return the context [b n] of sets of images [b, n, C, H, W]."""
        cond = {"set": images, **cond}
        if draws.context_noise is not None:
            cond["context_noise"] = draws.context_noise
        if self._model.encoder_time:
            cond["c_noise"] = self._precond.scalings(draws.sigma)[3]
        return self.network.context(cond, draws.drop)

    def forward(self, images: torch.Tensor, cond: Cond, draws: Draws) -> torch.Tensor:
        """Return the loss of every element [b n, C, H, W] of sets [b, n, C, H, W]."""
        context = self.context(images, cond, draws)
        loss = self._loss_of_sets(images, draws, context)
        if context.kl is not None:
            loss = loss + (self._kl_weight * context.kl)[:, None, None, None]
        mask = cond.get("mask")
        if mask is not None:
            weight = mask / mask.sum(1, keepdim=True).clamp(min=1) * mask.shape[1]
            loss = loss * weight.flatten()[:, None, None, None]
        return loss

    def _loss_of_sets(self, images: torch.Tensor, draws: Draws, context: Context) -> torch.Tensor:
        sigma = draws.sigma.repeat_interleave(images.shape[1])
        return self._loss(images.flatten(0, 1), sigma, draws.noise.flatten(0, 1), context)

    @torch.no_grad()
    def diagnose(self, images: torch.Tensor, cond: Cond, draws: Draws) -> dict[str, torch.Tensor]:
        """Return statistics of the contexts of a batch, by name; scalars or vectors.

        ``context_norm``, ``context_mean`` and ``context_max`` are of each vector; ``context_std``
        is over all numbers, and ``context_batch_std`` the spread of each number over the sets, so
        that it is zero for a context that is the same for all. ``context_gap`` is by how much the
        loss rises when every set gets the context of another; it is left out with a single set.
        """
        was_training = self.network.training
        self.network.eval()
        try:
            context = self.context(images, cond, draws)
            tokens = context.tokens if context.vector is None else context.vector[:, None]
            tokens = tokens.to(torch.float32)  #                        [b n, M, d]
            num = images.shape[1]
            of_sets = tokens.unflatten(0, (-1, num)).mean((1, 2))  #    [b, d]
            found = dict(
                context_norm=tokens.norm(dim=-1).flatten(),
                context_mean=tokens.abs().mean(-1).flatten(),
                context_max=tokens.abs().amax(-1).flatten(),
                context_std=tokens.std(),
            )
            if len(images) > 1:
                found["context_batch_std"] = of_sets.std(0).mean()
                order = torch.arange(len(tokens), device=tokens.device).roll(num)
                own = self._loss_of_sets(images, draws, context).mean()
                other = self._loss_of_sets(images, draws, context.index(order)).mean()
                found["context_gap"] = other - own
            return found
        finally:
            self.network.train(was_training)
