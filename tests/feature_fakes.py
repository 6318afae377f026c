"""Held-out images, generators and networks whose behaviour is known, for tests of validation."""

import dataclasses
from pathlib import Path

import torch

from data.features.buckets import Bucket
from data.features.dataset import pad_texts
from diffusion.config import DualGuidanceConfig

COLOURS = dict(red=(90, 0, 0), blue=(0, 0, 90), green=(0, 90, 0), purple=(60, 0, 60))
BUCKETS = (Bucket(64, 64), Bucket(96, 48), Bucket(48, 96))
CAPTIONS = tuple(f"a {name} thing" for name in COLOURS)
_CELL = 16  # Sides of a patch, and of the pixels of a latent.


class FakeText:
    """A word a token, whose features are its colour."""

    sha256 = "text"

    def encode(self, captions):
        rows = [[COLOURS.get(word, (0, 0, 0)) for word in text.split()] for text in captions]
        length = max(map(len, rows))
        mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
        padded = [row + [(0, 0, 0)] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.float32), mask, 0


class FakeVisual:
    """Mean colours of patches."""

    sha256 = "visual"

    def encode(self, images):
        means = torch.nn.functional.avg_pool2d(images.float(), _CELL)
        return means.mean((2, 3)), means.flatten(2).transpose(1, 2)


class FakeLpips:
    """Mean absolute difference of pixels in 0..1."""

    net, hash = "fake", "lpips"

    def distance(self, a, b):
        assert a.shape == b.shape
        return ((a.float() - b.float()) / 255).abs().mean((1, 2, 3))


class FakeDataset:
    """Images of gray patches under the colour of their captions; items run bucket by bucket."""

    text_lengths = (4, 8)

    def __init__(self, counts=(5, 4, 3), captions=CAPTIONS, buckets=BUCKETS):
        self.path, self.split, self.content_hash = Path("held-out"), "validation", "data"
        self.buckets, self.counts = list(buckets[: len(counts)]), list(counts)
        self.captions = captions
        self.ids = [f"{sum(counts[:b]) + n:04x}" for b, c in enumerate(counts) for n in range(c)]

    def bucket_index(self, index):
        return next(b for b in range(len(self.counts)) if index < sum(self.counts[: b + 1]))

    def caption(self, index):
        return self.captions[index % len(self.captions)]

    def __getitems__(self, indices):
        assert len({self.bucket_index(index) for index in indices}) == 1
        width, height = self.buckets[self.bucket_index(indices[0])].size
        latents, texts = [], []
        for index in indices:
            generator = torch.Generator().manual_seed(index)
            shape = (1, height // _CELL, width // _CELL)
            gray = torch.randint(0, 120, shape, generator=generator)
            hidden, mask, _ = FakeText().encode([self.caption(index)])
            latents.append(gray + hidden[0].sum(0)[:, None, None])
            texts.append(hidden[0, mask[0]].numpy())
        latents = torch.stack(latents).to(torch.float16)
        text, mask = pad_texts(texts, self.text_lengths)
        patches = latents.flatten(2).transpose(1, 2)
        return latents, {
            "text": torch.from_numpy(text),
            "text_mask": torch.from_numpy(mask),
            "cls": latents.mean((2, 3)),
            "patches": patches,
            "size": torch.tensor([width, height]),
        }


class FakeCodec:
    """Latents are the colours of patches."""

    def pictures(self, latents):
        pixels = latents.float().clamp(0, 255).round().to(torch.uint8)
        return pixels.repeat_interleave(_CELL, 2).repeat_interleave(_CELL, 3)


@dataclasses.dataclass
class FakeGenerator:
    """Makes the colour of the text and the picture of the patches, in proportion to their scales.

    ``noise`` is the amplitude of the seed's part. ``ignores`` names a condition that has no
    influence. Every call is kept.
    """

    ignores: str = ""
    noise: int = 0
    guidance: DualGuidanceConfig = DualGuidanceConfig(text_scale=1.0, visual_scale=1.0)
    device: torch.device = torch.device("cpu")

    def __post_init__(self):
        self.calls = []
        self.codec = FakeCodec()

    def protocol(self):
        return dict(sampling=dict(steps=1, scales=(1, 2)), guidance=dict(form="fake"))

    def generate(self, seeds, cond, bucket, *, guidance=None):
        self.calls.append((tuple(seeds), cond, bucket, guidance))
        guidance = guidance or self.guidance
        width, height = bucket.size
        rows, columns = height // _CELL, width // _CELL
        parts, scales = [torch.zeros(1, 3, rows, columns)], [0.0]
        if "text" in cond and self.ignores != "text":
            colour = cond["text"].float().masked_fill(~cond["text_mask"][:, :, None], 0).sum(1)
            parts.append(colour[:, :, None, None].expand(-1, -1, rows, columns))
            scales.append(guidance.text_scale)
        if "cls" in cond and self.ignores != "visual":
            parts.append(cond["patches"].float().transpose(1, 2).unflatten(2, (rows, columns)))
            scales.append(guidance.visual_scale)
        total = sum(scales) or 1
        mixed = sum(scale / total * part for scale, part in zip(scales, parts, strict=True))
        noise = torch.stack(
            [
                torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )
        return self.codec.pictures(mixed + self.noise * noise)
