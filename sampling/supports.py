"""Images generated from support sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from data.fewshot.episodes import Episodes
from diffusion.denoiser import autocast
from models.context import Context
from models.network import Network
from sampling.images import ImageGenerator
from sampling.outputs import stacked
from torch_utils.pictures import support_picture

if TYPE_CHECKING:
    from PIL.Image import Image

_ENCODED_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupportGenerator(ImageGenerator):
    """Generates images from supports: a label is the index of an episode, not a class.

    Supports are encoded once, when first needed; the weights must not change after that.
    """

    episodes: Episodes
    encoded: dict[Any, Context] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, generator: ImageGenerator, episodes: Episodes) -> SupportGenerator:
        """Return a copy of ``generator`` that generates from the supports of ``episodes``."""
        fields = dataclasses.fields(ImageGenerator)
        return cls(**{f.name: getattr(generator, f.name) for f in fields}, episodes=episodes)

    @property
    def num_classes(self) -> int:
        return len(self.episodes)

    def _context(
        self, network: Network, chosen: torch.Tensor | None, num: int, *, dropped: bool = False
    ) -> Context:
        key = (network, dropped)
        if key not in self.encoded:
            starts = range(0, len(self.episodes), _ENCODED_AT_ONCE)
            first, *others = (self._encode(network, start, dropped) for start in starts)
            self.encoded[key] = first.concat(*others)
        return self.encoded[key].index(chosen)

    def _encode(self, network: Network, start: int, dropped: bool) -> Context:
        rows = slice(start, start + _ENCODED_AT_ONCE)
        supports = self.episodes.supports[rows].to(self.device)
        cond = {"support": supports.to(torch.float32) / 127.5 - 1}
        if self.model.num_classes:
            cond["label"] = self.episodes.labels[rows].to(self.device)
        drop = torch.full([len(supports)], dropped, device=self.device)
        with autocast(self.device, self.autocast_dtype):
            return network.context(cond, drop)

    def protocol(self) -> dict[str, Any]:
        return dict(super().protocol(), **self.episodes.protocol())


@dataclasses.dataclass(frozen=True)
class SupportRequests:
    """Supports to generate from; see :class:`training.family.Requests`."""

    episodes: Episodes
    has_folders: bool
    facts: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(classes=()))

    @property
    def num_parts(self) -> int:
        return len(self.episodes)

    def label(self, part: int, seed: int) -> int:
        return part

    def bind(self, generator: ImageGenerator, device: torch.device) -> SupportGenerator:
        return SupportGenerator.of(generator, self.episodes)

    def picture(
        self, images: Sequence[torch.Tensor], labels: Sequence[int], columns: int, heading: str
    ) -> Image:
        episodes = self.episodes[list(dict.fromkeys(labels))]
        samples = stacked(images).unflatten(0, (len(episodes), -1))
        return episodes_picture(episodes, samples, columns, heading)


def episodes_picture(
    episodes: Episodes, samples: torch.Tensor, columns: int = 5, heading: str = ""
) -> Image:
    """Return a picture of each support above its samples, with ``columns`` supports abreast.

    ``samples`` is [S, m, C, H, W], uint8, for S supports.
    """
    names = [episodes.class_names[index] for index in episodes.classes]
    return support_picture(episodes.supports, samples, columns, names=names, heading=heading)
