"""Shards of features as endless streams through webdataset, from a folder or an object store."""

import dataclasses
import functools
import os
import random
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import get_worker_info

from data.features.dataset import LISTED, FeatureDataset
from data.features.manifests import Manifest
from data.features.record import KEYS
from data.images.dataset import Cond
from data.images.decode import ImageError
from data.samplers import BucketSampler
from dnnlib.addresses import AddressError, is_address, open_address
from torch_utils.rng import STREAM_DATA, mix

_BUFFER_BYTES = 4 << 30  # Of all samples that a rank holds to shuffle them.
_MAX_SHUFFLED = 1000
# What webdataset and the modules below it raise on files that cannot be read, or are no tars.
_FAULTS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


@dataclasses.dataclass(frozen=True)
class Draw:
    """A request for the next images of a bucket.

    Attributes:
        num: Number of images.
        seed: Of the shards' order: one for each start of a run and rank.
    """

    bucket: int
    num: int
    seed: int


class StreamSampler(BucketSampler):
    """Endless requests for micro-batches of one rank, with the buckets of :class:`BucketSampler`.

    The bucket of every step is the same function of (seed, step). Which images of it come depends
    on the step at which the run started too, so that a run that resumes does not repeat the images
    that it began with.
    """

    def __iter__(self) -> Iterator[Draw]:
        num_rounds = self._batch_size // (self._batch_gpu * self._world_size)
        seed = mix(self._seed, STREAM_DATA, self._start_step, self._rank)
        step = self._start_step
        while True:
            bucket = int(self.buckets(step + 1)[step])
            for _ in range(num_rounds):
                yield Draw(bucket, self._batch_gpu, seed)
            step += 1


class StreamedFeatures(FeatureDataset):
    """A dataset of features that also delivers :class:`Draw`, from shards read begin to end.

    Every loader process of every rank has a stream of its own for each bucket, opened at its first
    use: shards drawn at random with replacement, endlessly, and their samples shuffled among those
    that memory holds. So all samples are equally frequent, a bucket of a single shard serves any
    number of processes, and none ever waits for another. The order is a function of the seed, the
    start of the run and the numbers of ranks and of loader processes. A DataLoader gives its
    requests to its processes in turn and keeps their order.

    Single items are read at their places, as :class:`FeatureDataset` reads them, also from an
    address.

    The arguments are those of :class:`FeatureDataset`. Raises ValueError if webdataset is missing.
    """

    batch_sampler = StreamSampler
    notice = (
        "Streaming: the order of sizes is exact, but which images come is random, and drawn anew "
        "after a resume."
    )

    def __init__(self, path: str | os.PathLike, split: str = "train", **settings: Any) -> None:
        _import_webdataset()
        super().__init__(path, split, **settings)
        self._streams: dict[tuple[int, int, int], _Stream] = {}

    def __getstate__(self) -> dict[str, Any]:
        return dict(super().__getstate__(), _streams={})

    def __getitems__(self, keys: Draw | Sequence[int]) -> tuple[torch.Tensor, Cond]:
        """Return a batch of the form of :meth:`FeatureDataset.__getitems__`."""
        if not isinstance(keys, Draw):
            return super().__getitems__(keys)
        # A fork would read on in its parent's open files.
        place = (os.getpid(), keys.bucket, keys.seed)
        found = self._streams.get(place)
        if found is None:
            found = self._streams[place] = self._open_stream(keys)
        items = []
        for _ in range(keys.num):
            sample = next(found)
            label = f"{sample['__url__']}: {sample['__key__']}"
            items.append((label, functools.partial(_member, label, sample, found.crc32)))
        return self._batch(keys.bucket, items)

    def _open_stream(self, draw: Draw) -> "_Stream":
        worker = get_worker_info()
        index, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        manifest = self._manifests[draw.bucket]
        num_bytes = sum(shard["num_bytes"] for shard in manifest.shards)
        share = _BUFFER_BYTES / num_workers / len(self.buckets)
        num_shuffled = int(share * len(manifest) / max(num_bytes, 1))
        return _Stream(
            manifest,
            seed=mix(draw.seed, draw.bucket, index),
            num_shuffled=max(min(num_shuffled, len(manifest), _MAX_SHUFFLED), 1),
        )


class _Stream:
    """Endless samples of a bucket: dicts of the members' data with ``__key__`` and ``__url__``.

    Raises ImageError, one sentence, if a shard cannot be read or is not what the manifest says.
    """

    def __init__(self, manifest: Manifest, *, seed: int, num_shuffled: int) -> None:
        wds = _import_webdataset()
        shards = {
            str(file): shard["num_samples"]
            for file, shard in zip(manifest.files, manifest.shards, strict=True)
            if shard["num_samples"]
        }
        self._expected, self._url = shards, ""
        self._rows = {name: row for row, name in enumerate(manifest.ids)}
        self._crc32 = manifest.crc32
        rng = random.Random(mix(seed, 1))
        pipeline = wds.DataPipeline(
            # Its own seed would be one of the process, and know no rank where torch has no group.
            wds.ResampledShards(list(shards), seed=seed, worker_seed=lambda: 0, deterministic=True),
            self._open,
            # Raw bytes alone: no decoder of webdataset, some of which unpickle, is ever reached.
            functools.partial(wds.tariterators.tar_file_expander, select_files=_is_needed),
            self._check,
            wds.tariterators.group_by_keys,
            wds.shuffle(num_shuffled, initial=num_shuffled, rng=rng),
        )
        self._samples = iter(pipeline)

    def crc32(self, name: str, key: str) -> int | None:
        """Return the checksum of a member of a sample; None if the manifest does not know it."""
        row = self._rows.get(name)
        return None if row is None else int(self._crc32[key][row])

    def __next__(self) -> dict[str, Any]:
        try:
            return next(self._samples)
        except ImageError:
            raise
        except AddressError as error:
            raise ImageError(error.args[0]) from None
        except _FAULTS as error:
            # On its way through webdataset, an error is given more arguments behind its own.
            own = [getattr(error, "strerror", None), *error.args[:1]]
            reason = next((text for text in own if isinstance(text, str)), type(error).__name__)
            raise ImageError(f"{self._url}: cannot be read as a shard ({reason}).") from None

    def _open(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            self._url = url = shard["url"]
            with open_address(url) if is_address(url) else open(url, "rb") as stream:
                yield dict(shard, stream=stream)

    def _check(self, members: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass members on; of a damaged header, tarfile makes the silent end of a shard."""
        num = 0
        for member in members:
            num += bool(member)
            if not member:  # webdataset's mark of the end of a shard.
                expected = self._expected[self._url] * (len(KEYS) - 1)
                if num != expected:
                    found = f"it holds {num} members of samples where the manifest counts"
                    raise ImageError(f"{self._url}: damaged, {found} {expected}; {LISTED} file.")
                num = 0
            yield member


def _is_needed(name: str) -> bool:
    """Return whether a member of a shard is one that training needs: any but the description."""
    return not name.endswith(".json")


def _member(
    label: str, sample: dict[str, Any], crc32: Callable[[str, str], int | None], key: str
) -> bytes:
    if key not in sample:
        raise ImageError(f"{label}: has no {key}; {LISTED} image.")
    if zlib.crc32(sample[key]) != crc32(sample["__key__"], key):
        raise ImageError(f"{label}: {key} differs from its checksum; {LISTED} image.")
    return sample[key]


def _import_webdataset() -> ModuleType:
    try:
        import webdataset
    except ModuleNotFoundError as error:
        problem = f"--streaming needs the package {error.name}, which is not installed"
        remedy = 'pip install webdataset, or pip install -e ".[streaming]"'
        raise ValueError(f"{problem}: {remedy}.") from None
    return webdataset
