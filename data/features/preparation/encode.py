"""Encodes images and captions on this rank, and stages each feature in a file of its own."""

import collections
import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data.features.buckets import Bucket, fit_image
from data.features.preparation.plan import Plan, PlannedImage
from data.features.preparation.stage import Stage
from data.features.record import KEYS_OF
from data.features.shards import to_npy
from data.images.decode import decode_image
from data.images.members import Archive
from data.resumable import BackgroundWriter, memory_for, to_float16
from dnnlib.parallel import thread_map

Batch = Sequence[tuple[PlannedImage, frozenset[str]]]  # Samples, and what each is without.

_BATCHES_AHEAD = 3


class FeatureEncoder:
    """Encodes batches and stages the results; decoding and writing go on beside that in threads.

    Attributes:
        num_made: How many of each feature are staged so far.
    """

    def __init__(
        self,
        plan: Plan,
        archive: Archive,
        encoders: Mapping[str, Any],
        stage: Stage,
        *,
        num_threads: int,
    ) -> None:
        """``encoders`` has those of the features that are to be made, by name."""
        self.num_made: collections.Counter[str] = collections.Counter()
        self._plan = plan
        self._archive = archive
        self._positions = {name: index for index, name in enumerate(archive.names)}
        self._encoders = encoders
        self._stage = stage
        self._num_threads = num_threads

    def encode_texts(
        self, batches: Sequence[Sequence[PlannedImage]], on_done: Callable[[int], None]
    ) -> None:
        """Stage the text features of batches; ``on_done`` gets the numbers of captions done."""
        with self._writer() as writer:
            for batch in batches:
                encoder = self._encoders["text"]
                captions = [image.caption for image in batch]
                _, truncated = encoder.tokenize(captions)
                with memory_for(len(captions), "captions"):
                    hidden, mask, _ = encoder.encode(captions)
                rows = self._to_float16(hidden, batch, "text")
                lengths = mask.sum(dim=1).tolist()
                for image, row, length, is_cut in zip(batch, rows, lengths, truncated, strict=True):
                    arrays = {"t5h.npy": row[:length], "t5m.npy": np.ones(length, bool)}
                    self._put(writer, image, "text", arrays, truncated=is_cut)
                on_done(len(batch))

    def encode_images(self, batches: Sequence[Batch], on_done: Callable[[int], None]) -> None:
        """Stage latents and visual features of batches, each of one bucket."""
        images = [image for batch in batches for image, _ in batch]
        num_ahead = (1 + _BATCHES_AHEAD) * max(map(len, batches), default=1)
        pixels_of = thread_map(self._pixels, images, self._num_threads, num_ahead)
        with contextlib.closing(pixels_of) as decoded, self._writer() as writer:
            for batch in batches:
                pixels = [next(decoded) for _ in batch]
                for feature in ("vae", "visual"):
                    rows = [i for i, (_, wanted) in enumerate(batch) if feature in wanted]
                    if rows:
                        x = torch.from_numpy(np.stack([pixels[i] for i in rows]))
                        self._encode(writer, feature, [batch[i][0] for i in rows], x)
                on_done(len(batch))

    def _encode(
        self,
        writer: BackgroundWriter,
        feature: str,
        batch: Sequence[PlannedImage],
        images: torch.Tensor,
    ) -> None:
        encoder = self._encoders[feature]
        images = images.to(encoder.device, non_blocking=True)
        with memory_for(len(images), "images"):
            if feature == "vae":
                values = {"vae.npy": encoder.moments(images)[:, : encoder.latent_channels]}
            else:
                values = dict(zip(KEYS_OF[feature], encoder.encode(images), strict=True))
        halves = {k: self._to_float16(value, batch, feature) for k, value in values.items()}
        for row, image in enumerate(batch):
            self._put(writer, image, feature, {key: value[row] for key, value in halves.items()})

    def _writer(self) -> BackgroundWriter:
        return BackgroundWriter(self._num_threads, 4 * self._num_threads)

    def _pixels(self, image: PlannedImage) -> np.ndarray:
        """Return the pixels of a sample's crop, uint8 [3, H, W]."""
        try:
            data = self._archive.read(self._positions[image.file])
            if hashlib.sha256(data).hexdigest() != image.sha256:
                raise ValueError("was changed while features were made; start again")
            fitted, crop = fit_image(decode_image(data), Bucket.of(image.bucket))
        except ValueError as error:
            raise ValueError(f"{self._archive.path}/{image.file}: {error}.") from None
        assert crop == image.crop
        return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))

    def _to_float16(
        self, values: torch.Tensor, batch: Sequence[PlannedImage], feature: str
    ) -> np.ndarray:
        def label(row: int) -> str:
            return f"{self._archive.path}/{batch[row].file}"

        return to_float16(
            values, label, f"{feature} features have", self._encoders[feature].location
        )

    def _put(
        self,
        writer: BackgroundWriter,
        image: PlannedImage,
        feature: str,
        arrays: Mapping[str, np.ndarray],
        *,
        truncated: bool = False,
    ) -> None:
        members = {key: to_npy(array) for key, array in arrays.items()}
        key = image.id, feature, self._plan.fingerprints[image.id][feature]
        writer.submit(self._stage.put, *key, members, truncated=truncated)
        self.num_made[feature] += 1
