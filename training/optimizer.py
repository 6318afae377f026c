"""AdamW that leaves everything as it was when a gradient is not finite, without a host sync."""

import math
from typing import Any

import torch
from torch import Tensor

from torch_utils.parameters import Parameters
from training.config import TrainingConfig

_FP16_INITIAL_SCALE = 2.0**16
_FP16_GROWTH_INTERVAL = 2000
_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(
    training: TrainingConfig, cur_nimg: int, step_nimg: int, total_nimg: int
) -> float:
    """Return the learning rate of the step from ``cur_nimg`` images to ``step_nimg`` more.

    In the warm-up, ``constant`` is proportional to the images before the step (EDM, arXiv
    2206.00364, Appendix F), and ``cosine`` to those after it. Then ``cosine`` falls along half a
    cosine to ``lr_final`` at ``total_nimg`` (SGDR, arXiv 1608.03983, Eq. 5, without restarts).
    """
    warm_up = training.lr_rampup * 1000
    if training.lr_schedule == "constant":
        return training.lr * (min(cur_nimg / warm_up, 1.0) if warm_up > 0 else 1.0)
    if cur_nimg + step_nimg <= warm_up:
        return training.lr * (cur_nimg + step_nimg) / warm_up
    progress = min((cur_nimg + step_nimg - warm_up) / max(total_nimg - warm_up, 1), 1.0)
    final = training.lr_final
    return final + (training.lr - final) * (1 + math.cos(math.pi * progress)) / 2


class GuardedAdam:
    """Fused AdamW with a device-side guard against non-finite gradients.

    Betas are (0.9, ``beta2``), eps is 1e-8 (EDM, arXiv 2206.00364, Table 7). Weight decay is
    decoupled (Loshchilov & Hutter, arXiv 1711.05101) and spares vectors, such as biases, and
    parameters with a true attribute ``spares_decay``; without it this is Adam.

    After :meth:`step`, ``skipped`` is 1.0 if the gradient norm was not finite; weights and moments
    are then unchanged. The norm is equal on all ranks, and hence so is the flag. Counters stay on
    the device until :meth:`read_counters`.

    With ``dynamic_scale`` (fp16) the loss must be multiplied by :attr:`loss_scale`, which halves
    after a skipped step and doubles after 2,000 good ones.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        clip_grad: float | None = None,
        dynamic_scale: bool = False,
    ) -> None:
        self._parameters = parameters
        self._clip_grad = clip_grad
        decayed: list[torch.nn.Parameter] = []
        spared: list[torch.nn.Parameter] = []
        for p in parameters.own:
            spares = weight_decay > 0 and (p.ndim <= 1 or getattr(p, "spares_decay", False))
            (spared if spares else decayed).append(p)
        groups: list[dict[str, Any]] = [dict(params=decayed), dict(params=spared, weight_decay=0.0)]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(0.9, beta2),
            eps=1e-8,
            weight_decay=weight_decay,
            fused=True,
        )
        device = parameters.own[0].device
        # Adam numbers parameters group by group.
        names = {id(p): name for name, p in zip(parameters.names, parameters.own, strict=True)}
        self._names = [names[id(p)] for p in (*decayed, *spared)]
        self.skipped = torch.zeros([], device=device)
        self.grad_norms = torch.zeros(0, device=device)  # [P], of each gradient: Parameters.norms.
        # Skipped steps: in total, and in a row.
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)
        self.loss_scale: Tensor | None = None
        if dynamic_scale:
            self.loss_scale = torch.full([], _FP16_INITIAL_SCALE, device=device)
            self._good_steps = torch.zeros([], dtype=torch.int32, device=device)

    @property
    def lr(self) -> float:
        """The learning rate of the last step; 0 before the first."""
        return self._adam.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        self._parameters.zero_grad()

    def momentum(self, param: Tensor) -> Tensor | None:
        """Return Adam's average of a parameter's gradients; None before its first step."""
        return self._adam.state[param].get("exp_avg") if param in self._adam.state else None

    def forget(self) -> None:
        """Reset the moments; counters and the loss scale stay."""
        self._adam.state.clear()

    def step(self, lr: float) -> Tensor:
        """Update the weights and return the gradient norm before clipping, a scalar tensor."""
        grads = self._parameters.take_grads()
        self.grad_norms = self._parameters.norms(grads)
        norm = self._parameters.norm(grads, self.grad_norms)
        self.skipped = (~norm.isfinite()).to(torch.float32)
        if self.loss_scale is not None:
            norm = norm / self.loss_scale
        if self._clip_grad is not None:
            factor = (self._clip_grad / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, factor)
        for group in self._adam.param_groups:
            group["lr"] = lr
        # The fused kernel divides by grad_scale and does nothing where found_inf is 1.
        self._adam.grad_scale = self.loss_scale
        self._adam.found_inf = self.skipped
        self._adam.step()
        bad = self.skipped.to(torch.int64)
        self._counters = torch.stack([self._counters[0] + bad, (self._counters[1] + bad) * bad])
        if self.loss_scale is not None:
            torch._amp_update_scale_(
                self.loss_scale, self._good_steps, self.skipped, 2.0, 0.5, _FP16_GROWTH_INTERVAL
            )
        return norm

    def read_counters(self) -> tuple[int, int]:
        """Return the number of skipped steps, and of the latest in a row. Synchronises."""
        total, in_a_row = self._counters.tolist()
        return total, in_a_row

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers and tensors that :meth:`load_state_dict` restores exactly."""
        adam = self._adam.state_dict()
        adam["state"] = {
            index: {
                key: self._parameters.pack(self._names[index], value) if key in _MOMENTS else value
                for key, value in own.items()
            }
            for index, own in adam["state"].items()
        }
        state: dict[str, Any] = dict(adam=adam, counters=self._counters)
        if self.loss_scale is not None:
            state.update(loss_scale=self.loss_scale, good_steps=self._good_steps)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        adam = state["adam"]
        rest = {
            index: {key: value for key, value in own.items() if key not in _MOMENTS}
            for index, own in adam["state"].items()
        }
        self._adam.load_state_dict(dict(adam, state=rest))
        params = [param for group in self._adam.param_groups for param in group["params"]]
        for index, own in adam["state"].items():
            param, name = params[index], self._names[index]
            for key in _MOMENTS:
                # The fused kernel walks raw memory: moments need the layout of their weights.
                self._adam.state[param][key] = torch.empty_like(param)
                self._parameters.unpack(name, own[key], self._adam.state[param][key])
        self._counters.copy_(state["counters"])
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.copy_(state["loss_scale"])
            self._good_steps.copy_(state["good_steps"])
