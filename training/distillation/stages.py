"""The stages of a run: a single one, or one for each student of a distillation."""

import dataclasses
import itertools

from training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run, from ``start_nimg`` training images to ``end_nimg``.

    ``steps`` is the student's number of sampling steps; None in a run that does not distil.
    """

    start_nimg: int
    end_nimg: int
    steps: int | None = None

    @property
    def num_images(self) -> int:
        """Number of training images of the stage."""
        return self.end_nimg - self.start_nimg


def stages_of(config: RunConfig) -> list[Stage]:
    """Return the stages of a run, in order.

    Those of a distillation have equally many optimizer steps. If these do not divide evenly, the
    last stages have one more: the fewer sampling steps a student has, the harder it is to train.
    """
    students = config.distillation.distill_steps
    if not students:
        return [Stage(0, config.total_nimg)]
    length, longer = divmod(num_optimizer_steps(config), len(students))
    lengths = [length + (index >= len(students) - longer) for index in range(len(students))]
    bounds = [step * config.step_nimg for step in itertools.accumulate(lengths, initial=0)]
    return [Stage(*own) for own in zip(bounds[:-1], bounds[1:], students, strict=True)]


def stage_index(config: RunConfig, cur_nimg: int) -> int:
    """Return the index of the stage that the step after ``cur_nimg`` training images is in.

    At the end of a run it is that of the last stage.
    """
    stages = stages_of(config)
    return sum(stage.end_nimg <= cur_nimg for stage in stages[:-1])


def num_optimizer_steps(config: RunConfig) -> int:
    """Return the number of optimizer steps of a whole run."""
    return -(-config.total_nimg // config.step_nimg)


def as_sampled(config: RunConfig, index: int) -> RunConfig:
    """Return the run with the sampling steps for which its network is trained in a stage."""
    steps = stages_of(config)[index].steps
    return config if steps is None else config.changed("sampling", steps=steps)
