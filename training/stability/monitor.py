"""Watches the losses and gradients of every step, and reports at a tick what went wrong and where.

Steps only add to what lies on the device; everything is read at the end of a tick.
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

_SEVERAL = 5  # Gradients in a row that are not finite.
_FOLLOW = 0.02  # Weight of a step in the usual norm of a gradient.
_SMALLEST = 1e-3  # Of the largest usual norm: those below count as that large.


class Monitor:
    """The losses of a run, step by step, and where its gradients grow.

    Args:
        config: The run.
        parameters: Of its network.
        num_rollbacks: How often it went back so far.
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
        # Images before the first step of a spike that nobody was told of, and the layer.
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
        self._norms: Tensor | None = None  # Of the gradients of the last step, and usual ones.
        self._usual: Tensor | None = None
        # Of each step since the last tick: its loss, and which gradient has grown most. On the
        # host, the latter of the last steps before, and where a phase begins.
        self._losses: list[Tensor] = []
        self._begins: list[int] = []
        self._grown: list[Tensor] = []
        self._grown_before: list[int] = []

    def add(self, loss: Tensor) -> None:
        """Add the loss of one pass of the step, a scalar."""
        self._loss = self._loss + loss.detach()

    def end_step(self, norms: Tensor, phase: tuple[int, ...]) -> None:
        """Close a step whose gradients have ``norms`` [P], one for each that there is.

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
        """Take in the steps since the last call, which end at ``cur_nimg`` images.

        Collective; synchronises.
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
        # A stop within a tick may have come after its first spike.
        if place is None or self._spike_nimg is not None:
            return
        self._spike_nimg = cur_nimg - (len(losses) - place) * self._step_nimg
        # After a resume, the gradients of the steps before are not known.
        if num_before + place >= 0:
            self._spike_layer = self._layer(grown[num_before + place])

    def _first_spike(self, losses: list[float]) -> int | None:
        """Return where in the losses since the last tick a spike begins, None without one."""
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
        """Tell what is new of what goes wrong, at the end of a tick. Collective.

        ``find`` names where values of the forward pass are not finite, if they are not. Raises
        RollbackRequested on every rank, with ``telemetry`` closed, if rank 0 says that the run goes
        back.
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
        """Return the last gradient in the network that is not finite: the first computed."""
        wrong = (~self._norms.isfinite()).nonzero().flatten().tolist()
        last = max(distributed.gather_objects(max(wrong, default=-1)))
        return None if last < 0 else f"the gradient of {self._layer(last)}"

    def _layer(self, index: int) -> str:
        """Return the layer that has one of the parameters with a gradient."""
        pairs = zip(self._parameters.names, self._parameters.own, strict=True)
        names = [name for name, own in pairs if own.grad is not None]
        return names[index].rpartition(".")[0]

    def _name(self, nimg: int) -> str:
        """Return the name of the step that begins at ``nimg`` images."""
        return f"step {nimg // self._step_nimg + 1} (kimg {format_kimg(nimg / 1000)})"

    def state_dict(self) -> dict[str, Any]:
        """Return what decides later verdicts, as plain values; nothing without --rollback."""
        if not self._training.rollback:
            return {}
        spike = dict(spike_nimg=self._spike_nimg, spike_layer=self._spike_layer)
        phase = list(self._phase or ())
        return dict(losses=dict(self._detector.state_dict(), **spike, phase=phase))
