"""Makes the features of images and captions on this rank, and stages each in a file of its own."""

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from data.features.buckets import fit_image
from data.features.preparation.plan import PlannedImage
from data.features.preparation.staging import stage
from data.features.shards import to_npy
from data.images.decode import decode_image
from data.images.members import Archive
from encoders.autoencoder import Autoencoder
from encoders.text import TextEncoder
from encoders.visual import VisualEncoder

Batch = Sequence[tuple[PlannedImage, frozenset[str]]]  # Samples, and what each is without.
T, R = TypeVar("T"), TypeVar("R")

_BATCHES_AHEAD = 3


class FeatureMaker:
    """Encodes batches and stages the results; decoding and writing go on beside that in threads.

    Attributes:
        num_made: How many of each feature are staged so far.
    """

    def __init__(
        self,
        folder: Path,
        archive: Archive,
        encoders: Mapping[str, Any],
        fingerprints: Mapping[str, Mapping[str, str]],
        *,
        num_threads: int,
    ) -> None:
        """``encoders`` has those of the features that are to be made, by name."""
        self.num_made: collections.Counter[str] = collections.Counter()
        self._folder = folder
        self._archive = archive
        self._positions = {name: index for index, name in enumerate(archive.names)}
        self._encoders = encoders
        self._fingerprints = fingerprints
        self._num_threads = num_threads

    def make_texts(
        self, batches: Sequence[Sequence[PlannedImage]], on_done: Callable[[int], None]
    ) -> None:
        """Stage the text features of batches; ``on_done`` is told how many captions are done."""
        encoder: TextEncoder = self._encoders["text"]
        with _Writer(self._num_threads) as writer:
            for batch in batches:
                captions = [image.caption for image in batch]
                _, truncated = encoder.tokenize(captions)
                hidden, mask, _ = self._guarded(encoder.encode, captions, "captions")
                rows = self._to_half(hidden, batch, "text", encoder.location)
                lengths = mask.sum(dim=1).tolist()
                for image, row, length, is_cut in zip(batch, rows, lengths, truncated, strict=True):
                    arrays = {"t5h.npy": row[:length], "t5m.npy": np.ones(length, bool)}
                    self._stage(writer, image, "text", arrays, truncated=is_cut)
                on_done(len(batch))

    def make_images(self, batches: Sequence[Batch], on_done: Callable[[int], None]) -> None:
        """Stage latents and visual features of batches, each of one bucket."""
        with ThreadPoolExecutor(self._num_threads) as pool, _Writer(self._num_threads) as writer:
            for batch, pixels in _ahead(
                batches, lambda b: [pool.submit(self._pixels, image) for image, _ in b]
            ):
                for feature in ("vae", "visual"):
                    rows = [i for i, (_, wanted) in enumerate(batch) if feature in wanted]
                    if rows:
                        images = torch.from_numpy(np.stack([pixels[i] for i in rows]))
                        self._make(writer, feature, [batch[i][0] for i in rows], images)
                on_done(len(batch))

    def _make(
        self, writer: "_Writer", feature: str, batch: Sequence[PlannedImage], images: torch.Tensor
    ) -> None:
        encoder: Autoencoder | VisualEncoder = self._encoders[feature]
        images = images.to(encoder.device, non_blocking=True)
        if feature == "vae":
            channels = encoder.latent_channels
            moments = self._guarded(encoder.moments, images, "images")
            values = {"vae.npy": moments[:, :channels]}
        else:
            cls, patches = self._guarded(encoder.encode, images, "images")
            values = {"dinov3.npy": cls, "dinov3_patches.npy": patches}
        halves = {
            key: self._to_half(value, batch, feature, encoder.location)
            for key, value in values.items()
        }
        for row, image in enumerate(batch):
            arrays = {key: value[row] for key, value in halves.items()}
            self._stage(writer, image, feature, arrays)

    def _pixels(self, image: PlannedImage) -> np.ndarray:
        """Return the pixels of a sample's crop, uint8 [3, H, W]."""
        scanned = image.scanned
        try:
            data = self._archive.read(self._positions[scanned.file])
            if hashlib.sha256(data).hexdigest() != scanned.sha256:
                raise ValueError("was changed while features were made; start again")
            fitted, crop = fit_image(decode_image(data), image.bucket)
        except ValueError as error:
            raise ValueError(f"{self._archive.path}/{scanned.file}: {error}.") from None
        assert crop == image.crop
        return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))

    def _guarded(self, function: Callable[[T], R], values: T, what: str) -> R:
        try:
            return function(values)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"--batch: no memory for {len(values)} {what} at once; give a smaller one."
            ) from None

    def _to_half(
        self, values: torch.Tensor, batch: Sequence[PlannedImage], feature: str, location: str
    ) -> np.ndarray:
        rows = values.to(torch.float16).cpu()
        bad = ~torch.isfinite(rows).flatten(1).all(dim=1)
        if bad.any():
            image = batch[int(bad.nonzero()[0])]
            raise ValueError(
                f"{self._archive.path}/{image.scanned.file}: its {feature} features have values "
                f"that are not finite or beyond float16 (65504); {location} does not fit these "
                "images, use another one, or --precision=fp32 if it is not yet."
            )
        return rows.numpy()

    def _stage(
        self,
        writer: "_Writer",
        image: PlannedImage,
        feature: str,
        arrays: Mapping[str, np.ndarray],
        **facts: Any,
    ) -> None:
        members = {key: to_npy(array) for key, array in arrays.items()}
        fingerprint = self._fingerprints[image.id][feature]
        writer.submit(stage, self._folder, feature, image.id, fingerprint, members, **facts)
        self.num_made[feature] += 1


class _Writer:
    """Runs calls in threads, a bounded number ahead; their errors come up at the next call."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads)
        self._pending: collections.deque[Future] = collections.deque()
        self._limit = 4 * num_threads

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            while self._pending and exc[0] is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._pending.append(self._pool.submit(function, *args, **kwargs))
        while len(self._pending) > self._limit:
            self._pending.popleft().result()


def _ahead(
    batches: Iterable[T], submit: Callable[[T], list[Future]]
) -> Iterator[tuple[T, list[Any]]]:
    """Yield batches with the results of their futures, a few batches after they were submitted."""
    pending: collections.deque[tuple[T, list[Future]]] = collections.deque()
    try:
        for batch in batches:
            pending.append((batch, submit(batch)))
            if len(pending) > _BATCHES_AHEAD:
                first, futures = pending.popleft()
                yield first, [future.result() for future in futures]
        while pending:
            first, futures = pending.popleft()
            yield first, [future.result() for future in futures]
    finally:
        for _, futures in pending:
            for future in futures:
                future.cancel()
