"""Batch samplers: the order of the training data as a function of (seed, position in the run)."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from torch_utils.rng import STREAM_BUCKET, STREAM_DATA, epoch_permutation

_NUM_CACHED_EPOCHS = 4
_IMAGES_PER_GROUP = 1000
_BY_SHARDS = 1  # Appended to the keys of the shard-wise order, to seed it independently.
MAX_POSITIONS = 2**40  # More positions than any run has.


def rank_passes(batch: int, batch_gpu: int, rank: int, world_size: int) -> tuple[range, ...]:
    """Return the rows of a global batch that a rank computes, one range for each pass.

    Each rank takes a contiguous part of the batch, and each pass a contiguous part of that, of at
    most ``batch_gpu`` rows. All ranks have the same number of passes. Parts differ by one row at
    most; with ``batch_gpu=1`` some are empty if the number of ranks does not divide the batch.
    """
    num_passes = -(-batch // (batch_gpu * world_size))
    return tuple(_split(_split(range(batch), world_size)[rank], num_passes))


def _split(rows: range, num: int) -> list[range]:
    """Return ``num`` contiguous parts of some rows, whose lengths differ by one at most."""
    ends = [rows.start + -(-len(rows) * part // num) for part in range(num + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


class BatchSampler(Sampler[list[int]]):
    """Endless micro-batches of one rank, drawn from shuffled streams of images.

    A stream is a gapless sequence of epochs, each a permutation determined by (seed, stream,
    epoch). A step takes the next ``batch_size`` positions of one stream, and each rank those that
    :func:`rank_passes` gives it. Hence the global batches do not depend on the number of ranks or
    on ``batch_gpu``, and a run resumes exactly from ``start_nimg``.
    """

    def __init__(
        self,
        num_streams: int,
        *,
        seed: int,
        start_nimg: int,
        batch_size: int,
        batch_gpu: int,
        rank: int,
        world_size: int,
    ) -> None:
        assert start_nimg >= 0
        assert 0 <= rank < world_size
        self._seed, self._start_nimg = seed, start_nimg
        self._batch_size, self._batch_gpu = batch_size, batch_gpu
        self._rank, self._world_size = rank, world_size
        cache = functools.lru_cache(_NUM_CACHED_EPOCHS * num_streams)
        self._permutation = cache(self._make_permutation)

    def _make_permutation(self, stream: int, epoch: int) -> np.ndarray:
        """Return the order of the images in one epoch of a stream, int64 [length of the stream]."""
        raise NotImplementedError

    def _micro_batches(self, first: int) -> Iterator[np.ndarray]:
        """Yield this rank's positions in the step that starts at ``first``, int64 [N] per pass."""
        for rows in rank_passes(self._batch_size, self._batch_gpu, self._rank, self._world_size):
            yield np.arange(first + rows.start, first + rows.stop)

    def _shuffled(self, stream: int, length: int, positions: np.ndarray) -> np.ndarray:
        """Return the image at each position of a stream of ``length`` images, int64 [N]."""
        epochs, offsets = np.divmod(positions, length)
        result = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            result[rows] = self._permutation(stream, epoch)[offsets[rows]]
        return result


class PositionSampler(BatchSampler):
    """Micro-batches of dataset indices, from a single stream of all images.

    Position p of a run, counted in images from 0, holds image ``permutation(p // n)[p % n]`` of the
    n = ``dataset_size`` images, and the step at ``cur_nimg`` covers positions [cur_nimg, cur_nimg +
    batch_size). If ``dataset_size`` is None, as for sets, which are drawn by position, the keys are
    the positions themselves plus ``first_key``.
    """

    def __init__(self, dataset_size: int | None, *, first_key: int = 0, **settings: int) -> None:
        super().__init__(1, **settings)
        assert dataset_size is None or dataset_size > 0
        self._dataset_size, self._first_key = dataset_size, first_key

    def __iter__(self) -> Iterator[list[int]]:
        for cur_nimg in itertools.count(self._start_nimg, self._batch_size):
            for positions in self._micro_batches(cur_nimg):
                yield self.indices(positions).tolist()

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the dataset index, or the key of a set, at each position of the run, int64 [N]."""
        if self._dataset_size is None:
            return positions + self._first_key
        return self._shuffled(0, self._dataset_size, positions)

    def _make_permutation(self, stream: int, epoch: int) -> np.ndarray:
        return epoch_permutation(self._seed, epoch, self._dataset_size)


class BucketSampler(BatchSampler):
    """Micro-batches of dataset indices; all images of a step come from one aspect-ratio bucket.

    Step m = cur_nimg / batch_size picks a bucket with probability proportional to its number of
    images, as a function of (seed, m): all ranks and all accumulation rounds of a step agree on it.
    The images of each bucket form a stream of their own. The number of images so far is therefore
    the whole state of the sampler. ``counts`` holds the number of images of each bucket; the
    dataset's items are ordered by bucket.
    """

    def __init__(self, counts: Sequence[int], **settings: int) -> None:
        super().__init__(len(counts), **settings)
        assert min(counts) > 0
        self._counts = list(counts)
        self._firsts = np.cumsum([0, *counts])
        self._start_step = self._start_nimg // self._batch_size
        self._schedule = np.empty(0, np.int64)

    def buckets(self, num_steps: int) -> np.ndarray:
        """Return the bucket of each of the first ``num_steps`` steps, int64 [num_steps]."""
        if num_steps > len(self._schedule):
            # Drawn anew from the start: a longer draw begins with the shorter one.
            key = np.random.SeedSequence([self._seed % 2**64, STREAM_BUCKET])
            uniform = np.random.Generator(np.random.Philox(key)).random(max(2 * num_steps, 1024))
            ends = self._firsts[1:-1] / self._firsts[-1]
            self._schedule = np.searchsorted(ends, uniform, side="right")
        return self._schedule[:num_steps]

    def bucket_at(self, cur_nimg: int) -> int:
        """Return the bucket of the step that begins after ``cur_nimg`` images."""
        step = cur_nimg // self._batch_size
        return int(self.buckets(step + 1)[step])

    def __iter__(self) -> Iterator[list[int]]:
        steps_of = np.bincount(self.buckets(self._start_step), minlength=len(self._counts))
        cursors = (steps_of * self._batch_size).tolist()
        for step in itertools.count(self._start_step):
            bucket = int(self.buckets(step + 1)[step])
            for positions in self._micro_batches(cursors[bucket]):
                yield self.indices(bucket, positions).tolist()
            cursors[bucket] += self._batch_size

    def indices(self, bucket: int, positions: np.ndarray) -> np.ndarray:
        """Return the dataset index at each position of a bucket's stream, int64 [N]."""
        return self._shuffled(bucket, self._counts[bucket], positions) + self._firsts[bucket]

    def _make_permutation(self, stream: int, epoch: int) -> np.ndarray:
        key = [self._seed % 2**64, STREAM_DATA, stream, epoch]
        return np.random.default_rng(key).permutation(self._counts[stream])


class ShardSampler(BucketSampler):
    """A :class:`BucketSampler` that reads few shards at a time, for sequential access.

    In each epoch of a bucket, its shards are shuffled and divided into groups of about a thousand
    images (or one group, if there are fewer), and the images of each group are shuffled. Each image
    still occurs once in an epoch, the order is the same function of (seed, position) for any number
    of ranks, and only one group is read at a time. The images of a shard always share a group, but
    the other shards in it differ from epoch to epoch.

    ``shard_sizes`` holds the number of images of each shard, for each bucket.
    """

    def __init__(
        self, counts: Sequence[int], *, shard_sizes: Sequence[Sequence[int]], **settings: int
    ) -> None:
        super().__init__(counts, **settings)
        assert [sum(sizes) for sizes in shard_sizes] == self._counts
        self._shard_sizes = shard_sizes

    def _make_permutation(self, stream: int, epoch: int) -> np.ndarray:
        sizes = np.array(self._shard_sizes[stream], np.int64)
        key = [self._seed % 2**64, STREAM_DATA, stream, epoch, _BY_SHARDS]
        rng = np.random.default_rng(key)
        shards = rng.permutation(len(sizes))
        # Groups of about equal size, of a thousand images or a few more, or a single smaller one.
        num_groups = max(int(sizes.sum()) // _IMAGES_PER_GROUP, 1)
        group = (np.cumsum(sizes[shards]) - 1) * num_groups // sizes.sum()
        group_of_shard = np.empty(len(sizes), np.int64)
        group_of_shard[shards] = group
        return np.lexsort((rng.random(int(sizes.sum())), np.repeat(group_of_shard, sizes)))
