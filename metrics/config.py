"""Settings of the detectors: where their weights come from, and how they are evaluated."""

import dataclasses
from collections.abc import Collection
from typing import ClassVar

from dnnlib.config import Config, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorConfig(Config):
    """Weights, input convention and precision of the networks that metrics see images with."""

    title: ClassVar[str] = "Detectors of the metrics"
    affects: ClassVar[str] = "speed"

    inception: str | None = option(
        None, help="Path or URL of the Inception weights, instead of the published address."
    )
    inception_input: str = option(
        "tensorflow",
        choices=("tensorflow", "pytorch-fid"),
        help="How images are resized and scaled for Inception; EDM, StyleGAN3 and ADM: tensorflow.",
    )
    dinov2: str | None = option(
        None, help="Hugging Face id or folder of DINOv2, instead of facebook/dinov2-large."
    )
    clip: str | None = option(
        None, help="Hugging Face id or folder of CLIP ViT-L/14 at 336, instead of OpenAI's."
    )
    detector_precision: str = option(
        "fp32", choices=("fp32", "bf16"), help="Arithmetic of the detectors."
    )

    def check_used(self, given: Collection[str], detectors: Collection[str], metrics: str) -> None:
        """Raise ValueError for a field in ``given`` that affects none of the named ``detectors``.

        The message quotes ``metrics``, the option that chose the detectors.
        """
        for field in dataclasses.fields(self):
            users = {field.name.removesuffix("_input")}
            if field.name == "detector_precision":
                users = {"inception", "dinov2", "clip"}
            if field.name in given and not users & set(detectors):
                option_name = field.name.replace("_", "-")
                raise ValueError(f"--{option_name} has no effect with {metrics}; leave it out.")

    def arguments(self, detector: str) -> dict[str, str | None]:
        """Return the arguments of :func:`metrics.detectors.get_detector` for one detector."""
        if detector == "pixels":
            return {}
        precision = {"fp32": "float32", "bf16": "bfloat16"}[self.detector_precision]
        convention = dict(convention=self.inception_input) if detector == "inception" else {}
        return dict(location=getattr(self, detector), precision=precision, **convention)
