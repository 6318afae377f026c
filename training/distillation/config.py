"""Settings of a distillation: the students' sampling steps and the teacher's guidance."""

import dataclasses
import itertools
from typing import ClassVar, Self

from diffusion.config import DualGuidanceConfig, GuidanceConfig
from dnnlib.config import Config, inherited, option
from dnnlib.errors import refusal

DEFAULT_STEPS = (16, 8, 4, 2, 1)
_PREFIX = "distill_"  # Of options whose fields in the guidance have the same name without it.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig(Config):
    """Stages of progressive distillation (Salimans & Ho, arXiv 2202.00512); none by default."""

    title: ClassVar[str] = "Distillation"
    guidance_type: ClassVar[type[Config]] = Config

    distill_steps: tuple[int, ...] = option(
        (),
        min=1,
        max=50_000,
        help="With --distill: sampling steps of the students, one stage each, such as 16,8,4,2,1; "
        "each student takes one step where its teacher takes two; none: "
        f"{','.join(map(str, DEFAULT_STEPS))}, or the rest of that list if the "
        "teacher is itself a student.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(before != 2 * after for before, after in itertools.pairwise(self.distill_steps)):
            got = ",".join(map(str, self.distill_steps))
            raise refusal("--distill-steps", got, accepted="numbers, each half of the previous one")

    @property
    def is_on(self) -> bool:
        """Whether a run distils, so that its snapshots are students."""
        return bool(self.distill_steps)

    @property
    def guidance(self) -> Config:
        """Guidance of the teacher, a ``guidance_type``."""
        values = {field.name: getattr(self, field.name) for field in self._of_guidance()}
        return self.guidance_type(**{name.removeprefix(_PREFIX): v for name, v in values.items()})

    def settled(self, distill_steps: tuple[int, ...], guidance: Config) -> Self:
        """Return the settings with these steps and ``guidance``; scales that were typed stay."""
        values = {
            field.name: getattr(guidance, field.name.removeprefix(_PREFIX))
            for field in self._of_guidance()
            if not (field.metadata["exposed"] and getattr(self, field.name) is not None)
        }
        return dataclasses.replace(self, distill_steps=distill_steps, **values)

    @classmethod
    def _of_guidance(cls) -> list[dataclasses.Field]:
        return [field for field in dataclasses.fields(cls) if field.name != "distill_steps"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassDistillationConfig(DistillationConfig):
    """Distillation of models with one condition; only the scale of its guidance is an option."""

    guidance_type: ClassVar[type[Config]] = GuidanceConfig

    distill_cfg_scale: float | None = option(
        None,
        min=0,
        help="With --distill: guidance scale of the teacher, whose students need no guidance; "
        "none: the scale in its snapshot.",
    )
    cfg_schedule: str = inherited(GuidanceConfig, "cfg_schedule", exposed=False)
    cfg_power: float = inherited(GuidanceConfig, "cfg_power", exposed=False)
    cfg_channels: int | None = inherited(GuidanceConfig, "cfg_channels", exposed=False)
    cfg_interval: tuple[float, float] | None = inherited(
        GuidanceConfig, "cfg_interval", exposed=False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualDistillationConfig(DistillationConfig):
    """Distillation of models with two conditions; only the scales of its guidance are options."""

    guidance_type: ClassVar[type[Config]] = DualGuidanceConfig

    distill_text_scale: float | None = option(
        None,
        min=0,
        help="With --distill: text guidance scale of the teacher, whose students need no "
        "guidance; none: the scale in its snapshot.",
    )
    distill_visual_scale: float | None = option(
        None,
        min=0,
        help="With --distill: reference guidance scale of the teacher; none: the scale in its "
        "snapshot.",
    )
    guidance_form: str = inherited(DualGuidanceConfig, "guidance_form", exposed=False)
    joint_scale: float = inherited(DualGuidanceConfig, "joint_scale", exposed=False)
