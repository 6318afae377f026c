"""Measurements of a network on a few rows of a batch: activations, attention, use of its context.

A probe runs at the end of a tick, without gradients, dropout or random numbers.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data.images.dataset import Cond
from models.attention import observing_attention
from models.config import ModelConfig
from torch_utils.stats import StatsCollector
from training.ema import EMA

_NUM_IMAGES = 32  # Images of a probe on each rank, about.
# Limits per attention layer, as its scores are computed a second time.
_MAX_QUERIES, _MAX_SCORES = 64, 2**20


def named_blocks(config: ModelConfig, backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a backbone by their module names, in order."""
    names = {module: name for name, module in backbone.named_modules()}
    blocks = {names[block]: block for block in config.sharded_parts(backbone)}
    return {name: block for name, block in blocks.items() if name}


class Blocks:
    """Statistics of the blocks of a network in a forward pass.

    Attributes:
        values: Scalars, float32, by ``STATISTIC/BLOCK``: ``activation`` (root mean square of the
            output), ``gain`` (its ratio to that of the input) and ``logit`` (largest absolute
            attention score).
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self._blocks = blocks
        self._inside: str | None = None
        self.values: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def observed(self) -> Iterator[None]:
        """Fill :attr:`values` from the forward passes that run in this context."""
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(observing_attention(self._attends))
            for name, block in self._blocks.items():
                hooks.callback(block.register_forward_pre_hook(self._enter(name)).remove)
                hooks.callback(block.register_forward_hook(self._leave(name)).remove)
            yield

    def _enter(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple) -> None:
            self._inside = name

        return look

    def _leave(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple, output: Any) -> None:
            self._inside = None
            size = _rms(output)
            self.values[f"activation/{name}"] = size
            self.values[f"gain/{name}"] = size / _rms(args[0])

        return look

    def _attends(self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> None:
        if self._inside is None:
            return
        name = f"logit/{self._inside}"
        largest = _largest_score(q, k, bias, scale)
        before = self.values.get(name)
        self.values[name] = largest if before is None else torch.maximum(before, largest)


class Probe:
    """Evaluates a network and its weight average on a few rows of a batch.

    Args:
        objective: The family's objective of the network, a
            :class:`training.objective.Objective`.
        averaged: The same objective of the averaged network.
        ema: The weight average.
        blocks: Modules of the network whose outputs are measured, by name.
    """

    def __init__(
        self, objective: Any, averaged: Any, ema: EMA, blocks: Mapping[str, nn.Module]
    ) -> None:
        self._objective, self._averaged, self._ema = objective, averaged, ema
        self._blocks = blocks
        self._kept: tuple[tuple[Tensor, Cond, Any], Tensor] | None = None

    @torch.no_grad()
    def begin(self, batch: tuple[Tensor, Cond, Any], cur_nimg: int) -> None:
        """Keep a few rows of a prepared batch with their draws, and their loss before the step.

        ``batch`` is (images, conditions, draws); ``cur_nimg`` counts the images before the step.
        Collective.
        """
        images, cond, draws = _some_rows(batch, self._objective.network.config.images_per_row)
        draws = self._objective.fixed_draws(draws.sigma, draws.noise, cur_nimg)
        with self._evaluated():
            context = self._objective.context(images, cond, draws)
            before = _by_image(self._objective.loss_under(images, cond, draws, context))
        self._kept = (images, cond, draws), before

    @torch.no_grad()
    def look(self, stats: StatsCollector) -> None:
        """Report statistics of the kept rows under ``Watch/``, after the step. Collective.

        ``loss`` is the loss of each image with nothing dropped, ``step_effect`` its change by the
        step, ``context_gap`` its increase when images get the contexts of other images, and
        ``average_gap`` its increase with the averaged weights.
        """
        assert self._kept is not None, "a step was looked at whose begin was not"
        ((images, cond, draws), before), self._kept = self._kept, None
        objective, blocks = self._objective, Blocks(self._blocks)
        with self._evaluated():
            context = objective.context(images, cond, draws)
            with blocks.observed():
                own = _by_image(objective.loss_under(images, cond, draws, context))
            stats.report("Watch/loss", own)
            stats.report("Watch/step_effect", own - before)
            if objective.is_conditional:
                num = objective.network.config.images_per_row
                others = context.index(torch.arange(len(own), device=own.device).roll(num))
                lost = _by_image(objective.loss_under(images, cond, draws, others))
                # A mask, as every rank has to report the same names, however many rows it has.
                differs = torch.full_like(own, len(images) > 1, dtype=torch.bool)
                if num == 1:  # Sets always differ, but neighbouring images may share a class.
                    differs = _differs_from_last(cond, differs)
                stats.report("Watch/context_gap", lost - own, differs)
        for name, value in blocks.values.items():
            stats.report(f"Watch/{name}", value)  # A pass without rows gives NaN, which is ignored.
        with self._ema.filled(), _uncompiled(self._ema.network):
            averaged = _by_image(self._averaged(images, cond, draws))
        stats.report("Watch/average_gap", averaged - own)

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Keep the network unsharded, uncompiled and without dropout in this context."""
        network = self._objective.network
        was_training = network.training
        network.eval()
        try:
            with _uncompiled(network), self._objective.gathered():
                yield
        finally:
            network.train(was_training)


def _some_rows(batch: tuple[Tensor, Cond, Any], images_per_row: int) -> tuple[Tensor, Cond, Any]:
    """Return the first rows of a batch, with the conditions that have one entry per row cut too."""
    images, cond, draws = batch
    num = len(images)
    few = min(num, max(_NUM_IMAGES // images_per_row, 2))
    cond = {name: value[:few] if len(value) == num else value for name, value in cond.items()}
    return images[:few], cond, draws.rows(0, few)


def _differs_from_last(cond: Cond, default: Tensor) -> Tensor:
    """Return whether any condition of a row differs from that of the row before, bool [N].

    Without conditions, return ``default`` [N].
    """
    own = [value for value in cond.values() if len(value) == len(default)]
    found = [(value != value.roll(1, dims=0)).flatten(1).any(1) for value in own if value.ndim > 1]
    found += [value != value.roll(1, dims=0) for value in own if value.ndim == 1]
    return torch.stack([part.to(default.device) for part in found]).any(0) if found else default


def _by_image(loss: Tensor) -> Tensor:
    return loss.to(torch.float32).flatten(1).mean(1)


def _uncompiled(network: Any) -> contextlib.AbstractContextManager:
    """Return a context in which modules run eagerly.

    Compiled code calls no hooks, and would be recompiled for so few rows.
    """
    if not network.is_compiled:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _rms(x: Tensor) -> Tensor:
    return x.to(torch.float32).square().mean().sqrt()


def _largest_score(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return the largest absolute attention score of a sample of queries over unmasked keys.

    ``q`` and ``k`` are [N, heads, L, d]; a bool ``bias`` is true where a key is attended to, a
    float one is added to the scores. The result is NaN for a batch without rows.
    """
    _, heads, length, _ = q.shape
    if not len(q):
        return q.new_full((), torch.nan, dtype=torch.float32)
    step = -(-length // _MAX_QUERIES)
    rows = max(_MAX_SCORES // (heads * -(-length // step) * k.shape[2]), 1)
    scores = scale * (q[:rows, :, ::step].float() @ k[:rows].float().transpose(2, 3))
    if bias is not None:
        own = bias[:rows] if bias.ndim == 4 and len(bias) == len(q) else bias
        own = own[..., ::step, :] if own.shape[-2] == length else own
        if own.dtype == torch.bool:
            scores = scores.masked_fill(~own, 0.0)
        else:
            scores = torch.where(own.isneginf(), 0.0, scores + own)
    return scores.abs().amax()
