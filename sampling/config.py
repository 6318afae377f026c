"""The sampling protocol as options of generate.py and fid.py."""

import dataclasses
from typing import Self

from diffusion.config import GuidanceConfig, SamplingConfig
from dnnlib.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """A sampling protocol; ``guidance`` has the type that the snapshot's family uses."""

    sampling: SamplingConfig = SamplingConfig()
    guidance: Config = GuidanceConfig()

    @classmethod
    def of_snapshot(cls, path: str | None) -> Self:
        """Return the protocol stored in the snapshot at ``path``, or the defaults for None."""
        if path is None:
            return cls()
        from sampling.images import cached_snapshot

        config = cached_snapshot(path).config
        return cls(sampling=config.sampling, guidance=config.guidance)
