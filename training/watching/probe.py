"""What a network does with a few rows of a batch: activations, attention, and use of its context.

A probe is made at the end of a tick, without gradients, dropout and random numbers.
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

_NUM_IMAGES = 32  # That a probe looks at on each rank, about.
_MAX_QUERIES, _MAX_SCORES = 64, 2**20  # Of an attention, whose scores are computed once more.


def named_blocks(config: ModelConfig, backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a backbone by their names in it, in order."""
    names = {module: name for name, module in backbone.named_modules()}
    blocks = {names[block]: block for block in config.sharded_parts(backbone)}
    return {name: block for name, block in blocks.items() if name}


class Blocks:
    """What the blocks of a network do in a forward pass.

    Attributes:
        values: Scalars by statistic and block: ``activation`` (root mean square of the output),
            ``gain`` (that over the input's), ``logit`` (largest absolute score of attention).
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self._blocks = blocks
        self._inside: str | None = None
        self.values: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def observed(self) -> Iterator[None]:
        """Fill :attr:`values` by the pass within the block."""
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
    """Looks at what a network and its average make of a batch.

    Args:
        objective: The family's objective of the network, a
            :class:`training.objective.Objective`.
        averaged: The same of the averaged network.
        ema: The average.
        blocks: Modules of the network whose outputs are looked at, by name.
    """

    def __init__(
        self, objective: Any, averaged: Any, ema: EMA, blocks: Mapping[str, nn.Module]
    ) -> None:
        self._objective, self._averaged, self._ema = objective, averaged, ema
        self._blocks = blocks
        self._kept: tuple[tuple[Tensor, Cond, Any], Tensor] | None = None

    @torch.no_grad()
    def begin(self, batch: tuple[Tensor, Cond, Any], cur_nimg: int) -> None:
        """Keep a few rows of a prepared batch with its draws, and their loss before the step.

        ``cur_nimg`` counts the images before that step. Collective.
        """
        images, cond, draws = _some_rows(batch, self._objective.network.config.images_per_row)
        draws = self._objective.fixed_draws(draws.sigma, draws.noise, cur_nimg)
        with self._evaluated():
            context = self._objective.context(images, cond, draws)
            before = _by_image(self._objective.loss_under(images, cond, draws, context))
        self._kept = (images, cond, draws), before

    @torch.no_grad()
    def look(self, stats: StatsCollector) -> None:
        """Report under ``Watch/`` what is made of the rows kept, after the step. Collective.

        ``loss`` is that of each image without anything dropped; ``step_effect`` by how much the
        step changed it. ``context_gap`` is by how much it rises when images get the contexts of
        others, and ``average_gap`` by how much that of the averaged weights is larger.
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
                # Ranks whose passes differ in their rows report the same statistics.
                differs = torch.full_like(own, len(images) > 1, dtype=torch.bool)
                if num == 1:  # Sets are always others; images may be of one class.
                    differs = _differs_from_last(cond, differs)
                stats.report("Watch/context_gap", lost - own, differs)
        for name, value in blocks.values.items():
            stats.report(f"Watch/{name}", value)  # Nothing of a pass without rows, which is NaN.
        with self._ema.filled(), _uncompiled(self._ema.network):
            averaged = _by_image(self._averaged(images, cond, draws))
        stats.report("Watch/average_gap", averaged - own)

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Within it, the network is whole, not compiled, and without dropout."""
        network = self._objective.network
        was_training = network.training
        network.eval()
        try:
            with _uncompiled(network), self._objective.gathered():
                yield
        finally:
            network.train(was_training)


def _some_rows(batch: tuple[Tensor, Cond, Any], images_per_row: int) -> tuple[Tensor, Cond, Any]:
    """Return the first rows of a batch; what is not one thing a row is the same for all."""
    images, cond, draws = batch
    num = len(images)
    few = min(num, max(_NUM_IMAGES // images_per_row, 2))
    cond = {name: value[:few] if len(value) == num else value for name, value in cond.items()}
    return images[:few], cond, draws.rows(0, few)


def _differs_from_last(cond: Cond, default: Tensor) -> Tensor:
    """Return whether any condition of a row is another than that of the row before, bool [N].

    It is ``default`` [N] without conditions.
    """
    own = [value for value in cond.values() if len(value) == len(default)]
    found = [(value != value.roll(1, dims=0)).flatten(1).any(1) for value in own if value.ndim > 1]
    found += [value != value.roll(1, dims=0) for value in own if value.ndim == 1]
    return torch.stack([part.to(default.device) for part in found]).any(0) if found else default


def _by_image(loss: Tensor) -> Tensor:
    return loss.to(torch.float32).flatten(1).mean(1)


def _uncompiled(network: Any) -> contextlib.AbstractContextManager:
    """Return a context in which modules run as they are.

    Compiled code calls no hooks, and would be compiled anew for so few rows.
    """
    if not network.is_compiled:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _rms(x: Tensor) -> Tensor:
    return x.to(torch.float32).square().mean().sqrt()


def _largest_score(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return the largest absolute score of some queries to all keys they may see."""
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
