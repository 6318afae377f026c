"""Options of fid.py on how images are generated and scored."""

import dataclasses

from metrics.config import DetectorConfig
from sampling.config import GenerateConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(GenerateConfig):
    """The sampling protocol of a snapshot's images, and the detectors that score them."""

    detectors: DetectorConfig = DetectorConfig()
