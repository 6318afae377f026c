"""The course of a run: one stage, or those of a distillation, whose students become teachers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from torch_utils.parameters import Parameters
from training.config import RunConfig
from training.distillation.objective import DistillationObjective, Teacher
from training.distillation.stages import as_sampled, stage_index, stages_of
from training.ema import EMA, WeightCopy
from training.objective import Objective
from training.optimizer import GuardedAdam


class Course:
    """The course of a run in one stage.

    Attributes:
        objective: What is trained.
        stage: The current stage; learning rate and weight average count images from its start.
        sampled: The run with the sampling for which the network is trained now.
    """

    def __init__(self, config: RunConfig, objective: Any) -> None:
        self.objective = objective
        self.sampled, (self.stage,) = config, stages_of(config)

    def begin(self, cur_nimg: int, ema: EMA, optimizer: GuardedAdam) -> str | None:
        """Enter the stage of the step after ``cur_nimg`` images; return a message if it is new.

        Collective where weights are sharded.
        """
        return None

    def compile_parts(self, num_graphs: int) -> None:
        """Compile the networks that the objective evaluates besides the one that is trained."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state keeps of the course."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ``state`` is the whole training state."""


class Distillation(Course):
    """A course in which each student learns from the one before, and the first from a teacher.

    Each stage is like a run of its own. Its student begins with the weights of its teacher, with
    new optimizer moments, learning-rate schedule and weight average. Its averaged weights at the
    end are the teacher of the next stage. Training states keep the teacher's weights.

    Args:
        config: The run, fitted to its data.
        student: The family's objective of the trained network, which still has the weights of the
            first teacher.
        parameters: Parameters of that network.
        make_objective: Returns the family's objective of another network of the same kind.
    """

    def __init__(
        self,
        config: RunConfig,
        student: Objective,
        parameters: Parameters,
        make_objective: Callable[[nn.Module], Objective],
    ) -> None:
        self._config, self._parameters = config, parameters
        self._weights = WeightCopy(parameters)
        teacher = Teacher(
            objective=make_objective(self._weights.network),
            filled=self._weights.filled,
            guidance=config.distillation.guidance,
        )
        self.objective = DistillationObjective(student, teacher)
        self._enter(0)

    def _enter(self, index: int) -> None:
        self._index, self.stage = index, stages_of(self._config)[index]
        self.sampled = as_sampled(self._config, index)
        self.objective.aim(self.sampled.sampling, self._parameters.own[0].device)

    def begin(self, cur_nimg: int, ema: EMA, optimizer: GuardedAdam) -> str | None:
        index = stage_index(self._config, cur_nimg)
        if index != self._index:
            with torch.no_grad():
                torch._foreach_copy_(self._weights.own, ema.own)
                torch._foreach_copy_(list(self._parameters.own), ema.own)
            optimizer.forget()
            self._enter(index)
        elif cur_nimg != self.stage.start_nimg:
            return None
        number, steps = f"{index + 1} of {len(stages_of(self._config))}", self.stage.steps
        return f"Stage {number}: {steps} sampling steps, from {2 * steps} of the teacher."

    def compile_parts(self, num_graphs: int) -> None:
        self._weights.network.compile_parts(num_graphs)

    def state_dict(self) -> dict[str, Any]:
        return dict(distillation=dict(stage=self._index, teacher=self._weights.state_dict()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Collective where weights are sharded."""
        own = state["distillation"]
        self._weights.load_state_dict(own["teacher"])
        self._enter(own["stage"])


def course_of(
    config: RunConfig,
    objective: Objective,
    parameters: Parameters,
    make_objective: Callable[[nn.Module], Objective],
) -> Course:
    """Return the course of a run; the arguments are those of :class:`Distillation`."""
    if not config.distillation.is_on:
        return Course(config, objective)
    return Distillation(config, objective, parameters, make_objective)
