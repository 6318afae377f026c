"""The codec of pixel-space models: images as the network sees them, and back."""

from typing import Any

import torch

from data.images.augment import AugmentPipe
from data.images.dataset import Cond
from torch_utils import rng
from torch_utils.pictures import to_uint8


class PixelCodec:
    """Converts images, uint8 [N, C, H, W], to float32 in [-1, 1], and augments them in training.

    It implements ``Codec`` of :mod:`training.family`, which documents the methods.

    Args:
        augment_pipe: Geometric augmentation; its labels, float32 [N, 9], join the conditions as
            ``augment``. None: no augmentation.
    """

    def __init__(self, augment_pipe: AugmentPipe | None = None) -> None:
        self._augment_pipe = augment_pipe

    def draw(self, step: rng.Step) -> torch.Tensor | None:
        if self._augment_pipe is None:
            return None
        generator = step.generator(rng.STREAM_AUGMENT)
        return self._augment_pipe.draw(step.batch, generator, step.device)

    def encode(
        self, images: torch.Tensor, cond: Cond, drawn: torch.Tensor | None
    ) -> tuple[torch.Tensor, Cond]:
        images = images.to(torch.float32) / 127.5 - 1
        if drawn is not None:
            images, labels = self._augment_pipe.apply(images, drawn)
            cond = {**cond, "augment": labels}
        return images, cond

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode(images, {}, None)[0]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return to_uint8(x)

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def facts(self) -> dict[str, Any]:
        return dict(vae_hash=None)
