"""How images are sampled, as options of generate.py and fid.py."""

import dataclasses
from typing import Self

from diffusion.config import GuidanceConfig, SamplingConfig
from dnnlib.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """A sampling protocol, as the options of generate.py and fid.py.

    ``guidance`` is of the kind that the snapshot's family has.
    """

    sampling: SamplingConfig = SamplingConfig()
    guidance: Config = GuidanceConfig()

    @classmethod
    def of_snapshot(cls, path: str | None) -> Self:
        """Return the protocol that a snapshot brings along; the defaults without one."""
        if path is None:
            return cls()
        from sampling.images import cached_snapshot

        config = cached_snapshot(path).config
        return cls(sampling=config.sampling, guidance=config.guidance)
