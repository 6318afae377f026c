"""How images are scored, as options of fid.py."""

import dataclasses

from metrics.config import DetectorConfig
from sampling.config import GenerateConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(GenerateConfig):
    """How the images of a snapshot are made and seen."""

    detectors: DetectorConfig = DetectorConfig()
