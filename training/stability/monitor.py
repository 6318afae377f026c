"""Watches the loss and gradients of every step, and reports at a tick what went wrong and where.

Steps only collect tensors on the device; the host reads them at the end of a tick.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dnnlib.text import format_kimg
from torch_utils import distributed
from torch_utils.parameters import Parameters
from training.config import RunConfig
from training.stability.rollbacks import RollbackRequested
from training.stability.spikes import FACTOR, NUM_STEPS, SpikeDetector
from training.telemetry import Telemetry

_SEVERAL = 5  # So many steps in a row with non-finite gradients are reported.
_FOLLOW = 0.02  # Weight of a step in the moving average that is a gradient's usual norm.
_SMALLEST = 1e-3  # Lower limit of usual norms, as a share of the largest.


class Monitor:
    """Finds loss spikes and non-finite gradients, and where they begin.

    Args:
        config: The run.
        parameters: Those of its network.
        num_rollbacks: Rollbacks of the run so far.
        resume_state: The training state that it continues from, if any.
    """

    def __init__(
        self,
        config: RunConfig,
        parameters: Parameters,
        num_rollbacks: int,
        resume_state: dict[str, Any] | None,
    ) -> None:
        self._training, self._step_nimg = config.training, config.step_nimg
        self._parameters, self._num_rollbacks = parameters, num_rollbacks
        self._detector = SpikeDetector()
        # Of a spike that is not reported yet: the images before its first step, and its layer.
        self._spike_nimg: int | None = None
        self._spike_layer: str | None = None
        self._phase: tuple[int, ...] | None = None
        if resume_state is not None and "losses" in resume_state:
            known = resume_state["losses"]
            self._detector.load_state_dict(known)
            self._spike_nimg, self._spike_layer = known["spike_nimg"], known["spike_layer"]
            self._phase = tuple(known["phase"])
        self._told_nimg: int | None = None
        self._loss: Tensor | float = 0.0
        # [P] each: norms of the last step's gradients, and their moving averages.
        self._norms: Tensor | None = None
        self._usual: Tensor | None = None
        # For each step since the last read: its loss, and the index of the gradient that grew most.
        # On the host: that index for the last steps before, and the steps at which a phase begins.
        self._losses: list[Tensor] = []
        self._begins: list[int] = []
        self._grown: list[Tensor] = []
        self._grown_before: list[int] = []

    def add(self, loss: Tensor) -> None:
        """Add the loss of one pass, a scalar, to that of the step."""
        self._loss = self._loss + loss.detach()

    def end_step(self, norms: Tensor, phase: tuple[int, ...]) -> None:
        """Close a step; ``norms`` [P] are those of the P gradients that exist.

        Losses of one ``phase`` are not compared with those of another.
        """
        if phase != self._phase:
            self._begins.append(len(self._losses))
            self._phase = phase
        self._losses.append(self._loss)
        self._loss, self._norms = 0.0, norms
        if self._usual is None or self._usual.shape != norms.shape:
            self._usual = torch.zeros_like(norms)
        usual = self._usual.clamp(min=_SMALLEST * self._usual.max())
        self._grown.append((norms / usual).nan_to_num(0.0, 0.0).argmax())
        follow = torch.where(norms.isfinite(), norms, self._usual)
        self._usual = self._usual.lerp(follow, _FOLLOW)

    def read(self, cur_nimg: int) -> None:
        """Look for a spike in the steps since the last call, which end at ``cur_nimg`` images.

        Collective; waits for the device.
        """
        if not self._losses:
            return
        losses = torch.stack(self._losses).to(torch.float64)
        losses = (distributed.all_reduce_sum(losses) / distributed.world_size()).tolist()
        grown = self._grown_before + torch.stack(self._grown).tolist()
        num_before = len(self._grown_before)
        place = self._first_spike(losses)
        self._losses, self._grown, self._grown_before = [], [], grown[-NUM_STEPS:]
        self._begins = []
        # If a stop cut this tick in two, the part before it may have had the first spike.
        if place is None or self._spike_nimg is not None:
            return
        self._spike_nimg = cur_nimg - (len(losses) - place) * self._step_nimg
        # The gradients of steps before a resume are not known.
        if num_before + place >= 0:
            self._spike_layer = self._layer(grown[num_before + place])

    def _first_spike(self, losses: list[float]) -> int | None:
        """Return the index in ``losses`` at which a spike begins, None without one.

        As in :meth:`SpikeDetector.first`, it is negative for a spike that began before them.
        """
        found = None
        for start, end in itertools.pairwise(dict.fromkeys([0, *self._begins, len(losses)])):
            if start in self._begins:
                self._detector.forget()
            place = self._detector.first(losses[start:end])
            found = start + place if found is None and place is not None else found
        return found

    def judge(
        self,
        cur_nimg: int,
        skipped_in_a_row: int,
        find: Callable[[], str | None],
        telemetry: Telemetry | None,
    ) -> None:
        """Report new problems at the end of a tick. Collective.

        ``find`` returns where values of the forward pass first are not finite, or None. Raises
        RollbackRequested on every rank, with ``telemetry`` closed, if rank 0 decides that the run
        goes back.
        """
        spike_nimg, self._spike_nimg = self._spike_nimg, None
        limit = self._training.skip_limit
        if skipped_in_a_row >= min(_SEVERAL, limit):
            first_nimg = cur_nimg - skipped_in_a_row * self._step_nimg
            goes_back = skipped_in_a_row >= limit
            if self._told_nimg == first_nimg and not goes_back:
                return
            text = f"Gradients are not finite for {skipped_in_a_row} steps, from "
            text += f"{self._name(first_nimg)} on"
            where = find() or self._last_gradient()
            text += f": {where} is the first that is not." if where is not None else "."
        elif spike_nimg is not None:
            first_nimg, goes_back = spike_nimg, True
            text = f"The loss is above {FACTOR:g} times the usual one for {NUM_STEPS} steps, from "
            text += f"{self._name(first_nimg)} on"
            layer, self._spike_layer = self._spike_layer, None
            text += f": the gradient of {layer} has grown most." if layer is not None else "."
        else:
            return
        self._told_nimg = first_nimg
        if telemetry is not None:
            telemetry.message(f"Warning: {text}")
        is_left = self._num_rollbacks < self._training.rollback
        if distributed.broadcast_object(goes_back and is_left):
            if telemetry is not None:
                telemetry.close()
            raise RollbackRequested(text, cur_nimg, distributed.broadcast_object(first_nimg))

    def _last_gradient(self) -> str | None:
        """Return the network's last non-finite gradient, which backpropagation computes first."""
        wrong = (~self._norms.isfinite()).nonzero().flatten().tolist()
        last = max(distributed.gather_objects(max(wrong, default=-1)))
        return None if last < 0 else f"the gradient of {self._layer(last)}"

    def _layer(self, index: int) -> str:
        """Return the name of the layer that has the ``index``-th parameter with a gradient."""
        pairs = zip(self._parameters.names, self._parameters.own, strict=True)
        names = [name for name, own in pairs if own.grad is not None]
        return names[index].rpartition(".")[0]

    def _name(self, nimg: int) -> str:
        """Return the name of the step that begins at ``nimg`` images."""
        return f"step {nimg // self._step_nimg + 1} (kimg {format_kimg(nimg / 1000)})"

    def state_dict(self) -> dict[str, Any]:
        """Return what later verdicts depend on, as plain values; nothing without --rollback."""
        if not self._training.rollback:
            return {}
        spike = dict(spike_nimg=self._spike_nimg, spike_layer=self._spike_layer)
        phase = list(self._phase or ())
        return dict(losses=dict(self._detector.state_dict(), **spike, phase=phase))
