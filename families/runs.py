"""The run configuration of each kind of model: its sections and their default values.

They are apart from the families, because options and presets must be known before a family is
loaded.
"""

import dataclasses
from typing import ClassVar, Self

from data.features.config import FeatureConfig
from data.fewshot.config import SetConfig
from diffusion.config import DualGuidanceConfig, GuidanceConfig
from evaluation.validation.config import ValidationConfig
from training.config import RunConfig
from training.distillation.config import ClassDistillationConfig, DualDistillationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRun(RunConfig):
    """A run of a class-conditional or unconditional model of images."""

    family: ClassVar[str] = "image"

    guidance: GuidanceConfig = GuidanceConfig()
    distillation: ClassDistillationConfig = ClassDistillationConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRun(ImageRun):
    """A run on latents, read from a folder or encoded from images while training."""

    family: ClassVar[str] = "latent"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetRun(ImageRun):
    """A run on sets of images, which generates each image from a context of its set."""

    family: ClassVar[str] = "sets"

    sets: SetConfig = SetConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureRun(RunConfig):
    """A run on stored latents and features of captioned images."""

    family: ClassVar[str] = "features"

    guidance: DualGuidanceConfig = DualGuidanceConfig()
    distillation: DualDistillationConfig = DualDistillationConfig()
    features: FeatureConfig = FeatureConfig()
    validation: ValidationConfig = ValidationConfig()
    # Sum the loss over a latent's elements, as in runs that began before it was averaged.
    summed_loss: bool = False

    def as_begun(self, before: Self) -> Self:
        return dataclasses.replace(self, summed_loss=before.summed_loss)

    def cond_after(self, cur_nimg: int, input_shape: tuple[int, ...]) -> dict[str, float]:
        from training.feature_objective import patch_bias

        bias = patch_bias(self.features, self.model, cur_nimg, input_shape)
        return {} if bias is None else {"patch_bias": bias}
