"""The objective of a student: to reach in one sampling step what takes its teacher two."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from data.images.dataset import Cond
from diffusion.config import SamplingConfig
from diffusion.distillation import repeating_level, two_step_target
from diffusion.guidance import weighted_branches
from torch_utils import rng
from torch_utils.stats import StatsCollector
from training.objective import Draws, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """What a student learns from.

    Attributes:
        objective: The family's objective of the teacher's network.
        filled: Returns a context within which that network has its weights.
        guidance: Guidance of the teacher, of the family's kind.
    """

    objective: Objective
    filled: Callable[[], AbstractContextManager]
    guidance: Any


class DistillationObjective(torch.nn.Module):
    """Progressive distillation (Salimans & Ho, arXiv 2202.00512, Algorithm 2).

    It is a :class:`training.family.Objective` for any family: the objectives of student and teacher
    define noisy images, their contexts and the guided estimate. Each row of a batch is at one of
    the student's sampling steps, all of which are equally likely.

    Args:
        student: The family's objective of the network that is trained.
        teacher: What it learns from; not a submodule, so that it is neither trained nor sharded.
    """

    def __init__(self, student: Objective, teacher: Teacher) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self._clips = False
        self._levels = self._table = torch.empty(0)

    def aim(self, sampling: SamplingConfig, device: torch.device) -> None:
        """Make the steps of ``sampling`` those to learn; the teacher takes two for each.

        Raises ValueError if the network has too few noise levels for the teacher's steps.
        """
        levels = teacher_levels(self.student, sampling)
        (teacher,) = self._teacher
        self._clips = sampling.clip_denoised
        self._levels = torch.tensor(levels, dtype=torch.float32, device=device)
        table = teacher.objective.branch_table(teacher.guidance, levels[:-1])
        self._table = table[..., None, None].to(device)

    # What the loop calls: see training.family.Objective.

    def phase(self, cur_nimg: int) -> int:
        return self.student.phase(cur_nimg)

    @property
    def num_shapes(self) -> int:
        return self.student.num_shapes

    def warm_up(self, run: Callable[..., Tensor], batch: int, device: torch.device) -> None:
        def at_first(images: Tensor, cond: Cond, draws: Draws) -> Tensor:
            return run(images, cond, self._at(draws, torch.zeros_like(draws.sigma).long()))

        self.student.warm_up(at_first, batch, device)

    def example(self, batch: int, device: torch.device) -> tuple[Tensor, Cond]:
        return self.student.example(batch, device)

    def draw(self, step: rng.Step) -> Draws:
        """Return the draws of a step's global batch [N], a random sampling step for each row."""
        generator, num = step.generator(rng.STREAM_LEVEL), len(self._levels) // 2
        drawn = torch.randint(num, [step.batch], generator=generator, device=generator.device)
        return self._at(self.student.draw(step), drawn.to(step.device))

    def _at(self, draws: Draws, step: Tensor) -> Draws:
        sigma = self.student.sigma_of(self._levels[2 * step])
        return dataclasses.replace(self.student.of_student(draws), step=step, sigma=sigma)

    def prepare(
        self, images: Tensor, cond: Cond, draws: Draws, device: torch.device
    ) -> tuple[Tensor, Cond]:
        return self.student.prepare(images, cond, draws, device)

    def forward(self, images: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """Return the student's loss of every element of prepared images and conditions."""
        draws = dataclasses.replace(draws, target=self.target(images, cond, draws))
        return self.student(images, cond, draws)

    def total(self, loss: Tensor) -> Tensor:
        """Return what the student minimises of a loss [N, C, H, W], a scalar."""
        return self.student.total(loss)

    @torch.no_grad()
    def target(self, images: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """Return the x0 with which one step lands where two of the teacher's do, [M, C, H, W].

        M counts the images of all rows; a row of a set-conditioned model is a set of several.
        """
        (teacher,) = self._teacher
        objective, num = teacher.objective, teacher.objective.network.config.images_per_row
        with teacher.filled():
            branches = objective.branches(teacher.guidance, draws)
            contexts = [objective.context(images, cond, own) for own in branches]
            first = 2 * draws.step
            level, middle, below = (
                self._levels[first + ahead].repeat_interleave(num).reshape(-1, 1, 1, 1)
                for ahead in range(3)
            )
            shape = images.shape[-3:]
            x = objective.noisy(images.reshape(-1, *shape), level, draws.noise.reshape(-1, *shape))
            steps = [
                self._guided(contexts, objective.branch_rows(draws, first + ahead), num)
                for ahead in range(2)
            ]
            return two_step_target(tuple(steps), x, (level, middle, below))

    def _guided(
        self, contexts: list[Any], rows: Tensor, num: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the teacher's guided estimate of x0 as a function of images and their levels.

        ``rows`` [N] of the table have the branch weights of each row's ``num`` images.
        """
        (teacher,) = self._teacher
        weights = self._table[rows].repeat_interleave(num, dim=0).unbind(1)
        estimate = repeating_level(teacher.objective.estimate)
        guided = weighted_branches(estimate, contexts, weights)
        if not self._clips:
            return guided
        return lambda x, level: guided(x, level).clamp(-1, 1)

    def dropped(self, draws: Draws) -> dict[str, tuple[Tensor, float]]:
        return self.student.dropped(draws)

    def contexts(self, images: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        return self.student.contexts(images, cond, draws)

    def report(self, stats: StatsCollector, loss: Tensor, draws: Draws) -> None:
        self.student.report(stats, loss, draws)

    def diagnose(
        self, images: Tensor, cond: Cond, draws: Draws, loss_scale: Tensor | None
    ) -> dict[str, Tensor]:
        return self.student.diagnose(images, cond, draws, loss_scale)


def teacher_levels(objective: Objective, sampling: SamplingConfig) -> list[float]:
    """Return the 2 N + 1 levels, 0 included, that a teacher visits for N steps of ``sampling``.

    Raises ValueError if some of them coincide because the network has few noise levels.
    """
    num_steps = 2 * sampling.steps
    levels = objective.levels(dataclasses.replace(sampling, steps=num_steps))
    if len(levels) <= num_steps:
        raise ValueError(
            f"--distill-steps: {num_steps} steps of a teacher visit only {len(levels) - 1} noise "
            "levels of this network; begin with fewer steps."
        )
    return levels
