"""The flow-matching loss of feature-conditioned models, whose conditions are dropped at random."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data.features.buckets import Bucket, parse_buckets
from data.features.config import FeatureConfig
from data.images.dataset import Cond
from diffusion.config import SamplingConfig
from diffusion.distillation import distillation_loss
from diffusion.flow import Velocity, flow_times
from diffusion.guidance import BRANCHES, branch_weights
from diffusion.losses import velocity_loss
from diffusion.precond import FlowPrecond
from dnnlib.progress import progress
from models.context import Context
from torch_utils import distributed, rng
from torch_utils.stats import StatsCollector
from training.objective import Draws, Objective, gradient_norms

_NUM_TIME_BINS = 4
_TIME_NAMES = [
    f"loss_t{i / _NUM_TIME_BINS:.2f}-{(i + 1) / _NUM_TIME_BINS:.2f}" for i in range(_NUM_TIME_BINS)
]


@dataclasses.dataclass(frozen=True)
class FeatureDraws(Draws):
    """The random numbers of one optimizer step of a feature-conditioned model.

    ``drop`` is [N, 3]: text, CLS token, patches.
    """

    patch_bias: Tensor | None = None  # [N], added to the attention scores of patches


class FeatureObjective(Objective):
    """The squared error of the velocity, for batches of latents of one image size.

    With ``is_summed`` the loss to minimise is summed over the elements of latents, not averaged.
    """

    def __init__(
        self, *args: Any, config: FeatureConfig, is_summed: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self._precond, FlowPrecond)
        self._config, self._is_summed = config, is_summed
        self._velocity = Velocity(self.network, self._denoise.autocast_dtype)
        self._last_rms: Tensor | None = None
        self.level_names = _TIME_NAMES

    @property
    def num_shapes(self) -> int:
        return len(self._shapes())

    def _shapes(self) -> list[tuple[Bucket, int]]:
        """Return every bucket with every padded length of texts: all input shapes that occur."""
        buckets = parse_buckets(",".join(self.network.config.buckets))
        return list(itertools.product(buckets, self._text_lengths()))

    def _text_lengths(self) -> list[int]:
        model, lengths = self.network.config, self._config.text_lengths
        longest = next((n for n in lengths if n >= model.max_text_tokens), lengths[-1])
        return [length for length in lengths if length <= longest]

    def warm_up(self, run: Callable[..., Tensor], batch: int, device: torch.device) -> None:
        shapes, is_main = self._shapes(), distributed.is_main()
        look = dict(label="Compiling", unit="graph", disable=not is_main, transient=True)
        with progress(total=len(shapes), **look) as bar:
            for bucket, length in shapes:
                images, cond = self._example(bucket.size, length, batch, device)
                draws = self.draw(rng.Step(0, 0, batch, tuple(images.shape[1:]), device))
                run(images, cond, draws).sum().backward()
                bar.update()

    def example(self, batch: int, device: torch.device) -> tuple[Tensor, Cond]:
        largest = max(self.network.config.image_sizes, key=math.prod)
        images, cond = self._example(largest, max(self._text_lengths()), batch, device)
        return images, dict(cond, size=largest)

    def _example(
        self, size: tuple[int, int], length: int, batch: int, device: torch.device
    ) -> tuple[Tensor, Cond]:
        model = self.network.config
        rows, columns = model.patch_grid(*size)
        cond = dict(
            text=torch.zeros(batch, length, model.text_dim, device=device),
            text_mask=torch.ones(batch, length, dtype=torch.bool, device=device),
            cls=torch.zeros(batch, model.visual_dim, device=device),
            patches=torch.zeros(batch, rows * columns, model.visual_dim, device=device),
            size=torch.tensor(size),
        )
        return torch.zeros(batch, *model.latent_shape(*size), device=device), cond

    def draw(self, step: rng.Step) -> FeatureDraws:
        draws = super().draw(step)
        generator = step.generator(rng.STREAM_CONDITION)
        uniform = torch.rand(step.batch, generator=generator, device=step.device)
        drop = drop_of_uniform(self._config, uniform)
        return self._with_bias(dataclasses.replace(draws, drop=drop), step.cur_nimg)

    def fixed_draws(self, sigma: Tensor, noise: Tensor, cur_nimg: int) -> FeatureDraws:
        return self._with_bias(super().fixed_draws(sigma, noise, cur_nimg), cur_nimg)

    def _with_bias(self, draws: Draws, cur_nimg: int) -> FeatureDraws:
        noise = draws.noise
        bias = patch_bias(self._config, self.network.config, cur_nimg, tuple(noise.shape[1:]))
        if bias is not None:
            bias = torch.full([len(noise)], bias, device=noise.device)
        return FeatureDraws(**vars(draws), patch_bias=bias)

    def reduced(self, draws: FeatureDraws) -> dict[str, FeatureDraws]:
        config, found = self._config, {}
        for name, share, left_out in (
            ("without_both", config.drop_all, (True, True, True)),
            ("without_image", config.text_only, (False, True, True)),
            ("without_text", config.visual_only, (True, False, False)),
        ):
            if share:
                drop = torch.tensor(left_out, device=draws.sigma.device).expand(len(draws.sigma), 3)
                found[name] = dataclasses.replace(draws, drop=drop)
        return found

    def prepare(
        self, images: Tensor, cond: Cond, draws: FeatureDraws, device: torch.device
    ) -> tuple[Tensor, Cond]:
        """Return normalised latents and features on ``device``; the size stays on the CPU."""
        rest = {name: value for name, value in cond.items() if name != "size"}
        images, rest = super().prepare(images, rest, draws, device)
        return images, {**rest, "size": cond["size"]}

    def forward(self, images: Tensor, cond: Cond, draws: FeatureDraws) -> Tensor:
        """Return the loss of every element of latents ``images``, both [N, c, h, w]."""
        return self.loss_under(images, cond, draws, self.context(images, cond, draws))

    def total(self, loss: Tensor) -> Tensor:
        """Return the sum over rows of each one's mean loss, or of its total if ``is_summed``.

        ``loss`` is [N, c, h, w]. With means, images of all sizes count alike, and gradients are
        clipped by the norm of NanoDiT's loss.
        """
        return loss.sum() if self._is_summed else loss.mean(dim=(1, 2, 3)).sum()

    def loss_under(
        self, images: Tensor, cond: Cond, draws: FeatureDraws, context: Context
    ) -> Tensor:
        t = self._precond.time(draws.sigma)
        if draws.target is None:
            loss, velocity = velocity_loss(self._velocity, images, t, draws.noise, context)
        else:
            t = t.reshape(-1, 1, 1, 1)
            z = self.noisy(images, t, draws.noise)
            velocity = self._velocity(z, t.flatten(), context)
            loss = distillation_loss(z - t * velocity, draws.target, self.snr(t))
        self._last_rms = velocity.detach().square().mean(dim=(1, 2, 3)).sqrt()
        return loss

    @property
    def is_conditional(self) -> bool:
        return True

    def context(self, images: Tensor, cond: Cond, draws: FeatureDraws) -> Context:
        if draws.patch_bias is not None:
            cond = {**cond, "patch_bias": draws.patch_bias}
        return self.network.context(cond, draws.drop, num=len(images))

    def dropped(self, draws: FeatureDraws) -> dict[str, tuple[Tensor, float]]:
        config = self._config
        no_text, no_visual = (
            config.drop_all + config.visual_only,
            config.drop_all + config.text_only,
        )
        drop = draws.drop
        if drop is None:
            drop = torch.zeros(len(draws.sigma), 3, dtype=torch.bool, device=draws.sigma.device)
        return {
            "text": (drop[:, 0], no_text),
            "CLS token": (drop[:, 1], no_visual),
            "patches": (drop[:, 2], no_visual),
        }

    def _parts(self, context: Context, cond: Cond) -> dict[str, Tensor]:
        num_text = cond["text"].shape[1]
        text, cls, patches = context.tokens.tensor_split([num_text, num_text + 1], dim=1)
        parts = {"text": text, "CLS token": cls, "patches": patches}
        return {name: part for name, part in parts.items() if part.shape[1]}

    def levels(self, sampling: SamplingConfig) -> list[float]:
        return flow_times(sampling.steps, sampling.time_shift)

    def sigma_of(self, level: Tensor) -> Tensor:
        return level / (1 - level)

    def noisy(self, images: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        return torch.lerp(images, noise, level)

    def snr(self, level: Tensor) -> Tensor:
        return (1 / level - 1).square()

    def estimate(self, x: Tensor, level: Tensor, context: Context) -> Tensor:
        return x - level * self._velocity(x, level.flatten(), context)

    def branches(self, guidance: Any, draws: FeatureDraws) -> list[FeatureDraws]:
        found = []
        for name in branch_weights(guidance):
            with_text, with_visual = BRANCHES[name]
            lost = (not with_text, not with_visual, not with_visual)
            drop = [
                own | all_rows for own, all_rows in zip(draws.drop.unbind(1), lost, strict=True)
            ]
            found.append(dataclasses.replace(draws, drop=torch.stack(drop, dim=1)))
        return found

    def branch_table(self, guidance: Any, levels: Sequence[float]) -> Tensor:
        """Return weights [4, K, 1] of the branches, for rows with neither, image, text, or both.

        If a row lacks a condition, branches with and without that condition are the same for it,
        and the first of them has the weight.
        """
        names = list(branch_weights(guidance))
        table = torch.zeros(4, len(names), 1)
        for row, (has_text, has_visual) in enumerate(itertools.product((False, True), repeat=2)):
            seen = [(BRANCHES[n][0] and has_text, BRANCHES[n][1] and has_visual) for n in names]
            for name, weight in branch_weights(
                guidance, has_text=has_text, has_visual=has_visual
            ).items():
                table[row, seen.index(BRANCHES[name])] = weight
        return table

    def branch_rows(self, draws: FeatureDraws, index: Tensor) -> Tensor:
        has_text, has_visual = ~draws.drop[:, 0], ~draws.drop[:, 1]
        return 2 * has_text.to(torch.int64) + has_visual

    def report(self, stats: StatsCollector, loss: Tensor, draws: FeatureDraws) -> None:
        """Add the loss of a pass, also by category and time, and the RMS of predicted velocities.

        For the best predictor of data of unit variance, the mean square of the velocity and the
        loss add up to 2 at any time.
        """
        stats.report("Loss/loss", loss)
        losses = loss.detach().mean(dim=(1, 2, 3))
        stats.report("Flow/velocity_rms", self._last_rms)
        for name, rows in rows_of_categories(draws.drop).items():
            stats.report(f"Flow/loss_{name}", losses, rows)
            stats.report(f"Flow/share_{name}", rows)
        names = [f"Flow/{name}" for name in self.level_names]
        stats.report_groups(names, losses, self.level_of(draws.sigma))

    def level_of(self, sigma: Tensor) -> Tensor:
        bins = (self._precond.time(sigma) * _NUM_TIME_BINS).to(torch.int64)
        return bins.clamp(max=_NUM_TIME_BINS - 1)

    @torch.no_grad()
    def diagnose(
        self, images: Tensor, cond: Cond, draws: FeatureDraws, loss_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the gradient norms of the feature projections, before clipping."""
        norms = gradient_norms(dict(self.network.conditioner.named_children()), loss_scale)
        return {f"Flow/grad_norm_{name}": norm for name, norm in norms.items()}


def drop_of_uniform(config: FeatureConfig, uniform: Tensor) -> Tensor:
    """Return which conditions each row drops, bool [N, 3], from uniform numbers [N] in [0, 1).

    The first part of the unit interval, of length ``drop_all``, drops text, CLS token and patches;
    the next, ``text_only``, CLS token and patches; the next, ``visual_only``, the text; the rest
    nothing.
    """
    visual_from = config.drop_all + config.text_only
    both_from = visual_from + config.visual_only
    no_visual = uniform < visual_from
    no_text = (uniform < config.drop_all) | ((uniform >= visual_from) & (uniform < both_from))
    return torch.stack([no_text, no_visual, no_visual], dim=1)


def rows_of_categories(drop: Tensor) -> dict[str, Tensor]:
    """Return masks [N] of the rows of ``drop`` [N, 3] that keep nothing, text, image, or both."""
    no_text, no_visual = drop[:, 0], drop[:, 1]
    return dict(
        none=no_text & no_visual,
        text=~no_text & no_visual,
        visual=no_text & ~no_visual,
        both=~no_text & ~no_visual,
    )


def patch_bias(
    config: FeatureConfig, model: Any, cur_nimg: int, input_shape: tuple[int, ...]
) -> float | None:
    """Return what is added to the attention scores of patches after ``cur_nimg`` images.

    It rises linearly from -ln(N) - 4, at which all N patches together weigh next to nothing beside
    a text, to 0 after ``patch_bias_kimg``, and stays there. Returns None if ``patch_bias_kimg`` is
    0 or there are no patches, because attention then needs no bias. ``input_shape`` is [c, h, w].
    """
    length = config.patch_bias_kimg * 1000
    if not model.use_dino_patches or length == 0:
        return None
    width, height = (side * model.latent_downsampling for side in input_shape[:0:-1])
    rows, columns = model.patch_grid(width, height)
    return -(math.log(rows * columns) + 4) * max(1 - cur_nimg / length, 0.0)
