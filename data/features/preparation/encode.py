"""Encodes this rank's share of images and captions, and stages each feature in its own file."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.features.buckets import Bucket, fit_image
from data.features.preparation.plan import Key, Plan, PlannedImage
from data.features.preparation.stage import Stage
from data.features.quantised import quantise
from data.features.record import KEYS_OF, PATCHES, bits_of_facts
from data.features.shards import to_npy
from data.images.decode import decode_image
from data.images.members import Archive
from data.resumable import BackgroundWriter, memory_for, progress_of_ranks, share, to_float16
from dnnlib.parallel import thread_map
from torch_utils import distributed

Batch = Sequence[tuple[PlannedImage, Collection[str]]]  # Samples, each with the features it lacks.

_BATCHES_AHEAD = 3
_BATCHES_PER_ROUND = 32  # Per rank, between two rounds of packing shards.


@dataclasses.dataclass
class FeatureEncoder:
    """Encodes and stages the features that samples lack, with threads that decode and write.

    Attributes:
        encoders: Encoders of the features to be made, by the feature's name.
        num_made: Number of each feature that this rank has staged so far.
    """

    plan: Plan
    archive: Archive
    encoders: Mapping[str, Any]
    stage: Stage
    batch_size: int
    num_threads: int
    num_made: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @functools.cached_property
    def _positions(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.archive.names)}

    def encode(
        self,
        shards: Mapping[Path, Sequence[PlannedImage]],
        there: Collection[Key],
        pack: Callable[[Path], None] | None = None,
    ) -> None:
        """Stage all planned features of the samples of shards that are not ``there``. Collective.

        In each round, the ranks share the batches of several shards, and then these shards, to
        ``pack`` them in the background while they encode the next round. Batches are the same for
        any number of ranks and after an interruption, because the last digits of features depend
        on the batch.
        """
        images = list(chain(*shards.values()))
        lacking = {
            image.id: {key[1] for key in self.plan.keys(image) if key not in there}
            for image in images
        }
        self._encode_captions(images, {own for own in lacking if "text" in lacking[own]})
        batches = {}
        for path, images in shards.items():
            rows = [(image, lacking[image.id] - {"text"}) for image in images]
            whole = _chunks(rows, self.batch_size)
            batches[path] = [batch for batch in whole if any(wanted for _, wanted in batch)]
        num_images = self.batch_size * _BATCHES_PER_ROUND
        size = distributed.world_size() * max(num_images // self.plan.shard_size, 1)
        rounds = _chunks(list(shards), size)
        mine = [share(list(chain(*(batches[path] for path in part)))) for part in rounds]
        total, own = (sum(map(len, chain(*parts))) for parts in (batches.values(), mine))
        bar = progress_of_ranks(total, own, "Encoding images")
        with bar as on_done, BackgroundWriter(1, size) as packer:
            for part, batches_of_rank in zip(rounds, mine, strict=True):
                with distributed.together():
                    self.encode_images(batches_of_rank, on_done)
                    packer.wait()
                for path in share(part) if pack else ():
                    packer.submit(pack, path)
            with distributed.together():
                packer.wait()

    def _encode_captions(self, images: Sequence[PlannedImage], wanted: Collection[str]) -> None:
        images = sorted(images, key=lambda i: (len(i.caption), i.id))  # For little padding.
        whole = _chunks(images, self.batch_size)
        batches = [batch for batch in whole if any(image.id in wanted for image in batch)]
        mine = share(batches)
        total, own = (sum(map(len, parts)) for parts in (batches, mine))
        bar = progress_of_ranks(total, own, "Encoding captions")
        with bar as on_done, distributed.together(), self._new_writer() as self._writer:
            for batch in mine:
                encoder, captions = self.encoders["text"], [image.caption for image in batch]
                _, truncated = encoder.tokenize(captions)
                with memory_for(len(captions), "captions"):
                    hidden, mask, _ = encoder.encode(captions)
                rows = self._to_float16(hidden, batch, "text")
                lengths = mask.sum(dim=1).tolist()
                for image, row, length, is_cut in zip(batch, rows, lengths, truncated, strict=True):
                    arrays = {"t5h.npy": row[:length], "t5m.npy": np.ones(length, bool)}
                    if image.id in wanted:
                        self._put(image, "text", arrays, is_cut)
                on_done(len(batch))

    def encode_images(self, batches: Sequence[Batch], on_done: Callable[[int], None]) -> None:
        """Stage the latents and visual features that batches lack; a batch is of one bucket."""
        images = [image for batch in batches for image, _ in batch]
        num_ahead = (1 + _BATCHES_AHEAD) * self.batch_size
        pixels_of = thread_map(self._pixels, images, self.num_threads, num_ahead)
        with contextlib.closing(pixels_of) as decoded, self._new_writer() as self._writer:
            for batch in batches:
                pixels = [next(decoded) for _ in batch]
                x = torch.from_numpy(np.stack(pixels))
                for feature in ("vae", "visual"):
                    if any(feature in wanted for _, wanted in batch):
                        self._encode(feature, batch, x)
                on_done(len(batch))

    def _encode(self, feature: str, batch: Batch, images: torch.Tensor) -> None:
        encoder = self.encoders[feature]
        images = images.to(encoder.device, non_blocking=True)
        with memory_for(len(images), "images"):
            if feature == "vae":
                values = {"vae.npy": encoder.moments(images)[:, : encoder.latent_channels]}
            else:
                values = dict(zip(KEYS_OF[feature], encoder.encode(images), strict=True))
        planned = [image for image, _ in batch]
        halves = {k: self._to_float16(value, planned, feature) for k, value in values.items()}
        for row, (image, wanted) in enumerate(batch):
            if feature not in wanted:
                continue
            arrays = {key: value[row] for key, value in halves.items()}
            if feature == "visual" and bits_of_facts(self.plan.encoders["visual"]) == 8:
                arrays[PATCHES] = quantise(arrays[PATCHES])
            self._put(image, feature, arrays)

    def _new_writer(self) -> BackgroundWriter:
        return BackgroundWriter(self.num_threads, 4 * self.num_threads)

    def _pixels(self, image: PlannedImage) -> np.ndarray:
        """Return a sample's image, resized and cropped to its bucket, uint8 [3, H, W]."""
        try:
            data = self.archive.read(self._positions[image.file])
            if hashlib.sha256(data).hexdigest() != image.sha256:
                raise ValueError("was changed while features were made; start again")
            fitted, crop = fit_image(decode_image(data), Bucket.of(image.bucket))
        except ValueError as error:
            raise ValueError(f"{self.archive.path}/{image.file}: {error}.") from None
        assert crop == image.crop
        return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))

    def _to_float16(
        self, values: torch.Tensor, batch: Sequence[PlannedImage], feature: str
    ) -> np.ndarray:
        labels = [f"{self.archive.path}/{image.file}" for image in batch]
        location = self.encoders[feature].location
        return to_float16(values, labels.__getitem__, f"{feature} features have", location)

    def _put(
        self, image: PlannedImage, feature: str, arrays: Mapping[str, Any], is_cut: bool = False
    ) -> None:
        members = {key: to_npy(array) for key, array in arrays.items()}
        key = image.id, feature, self.plan.fingerprints[image.id][feature]
        self._writer.submit(self.stage.put, *key, members, is_cut)
        self.num_made[feature] += 1


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
