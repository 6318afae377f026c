"""Batch samplers: the order of training as a function of (seed, position), shared by ranks."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from torch_utils.rng import STREAM_BUCKET, STREAM_DATA, epoch_permutation

_NUM_CACHED_EPOCHS = 4
_IMAGES_PER_GROUP = 1000
_BY_SHARDS = 1  # Ends the keys of another order than that of all images at once.
MAX_POSITIONS = 2**40  # More than any run has.


def rank_passes(batch: int, batch_gpu: int, rank: int, world_size: int) -> tuple[range, ...]:
    """Return the rows of a global batch that a rank computes, pass by pass.

    Ranks take contiguous parts, and passes contiguous parts of those, none of more than
    ``batch_gpu`` rows. All ranks have as many passes. Parts differ by one row at most; with
    ``batch_gpu=1`` they are empty where the ranks do not divide the batch.
    """
    num_passes = -(-batch // (batch_gpu * world_size))
    return tuple(_split(_split(range(batch), world_size)[rank], num_passes))


def _split(rows: range, num: int) -> list[range]:
    """Return ``num`` parts of some rows, which differ by one row at most."""
    ends = [rows.start + -(-len(rows) * part // num) for part in range(num + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


class BatchSampler(Sampler[list[int]]):
    """Endless micro-batches of one rank: the order of training on shuffled streams of images.

    A stream is an epoch after the other without a gap, each a permutation by (seed, stream, epoch).
    A step takes the next ``batch_size`` positions of one stream, of which a rank has those of its
    :func:`rank_passes`. Hence the global batches do not depend on the number of ranks or on
    ``batch_gpu``, and a run resumes exactly at any ``start_nimg``.
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
        """Return the order of one epoch of a stream, int64 [length of the stream]."""
        raise NotImplementedError

    def _micro_batches(self, first: int) -> Iterator[np.ndarray]:
        """Yield this rank's positions of the step that starts at ``first``, int64 [N] a pass."""
        for rows in rank_passes(self._batch_size, self._batch_gpu, self._rank, self._world_size):
            yield np.arange(first + rows.start, first + rows.stop)

    def _shuffled(self, stream: int, length: int, positions: np.ndarray) -> np.ndarray:
        """Return what is at each position of a stream of ``length`` images, int64 [N]."""
        epochs, offsets = np.divmod(positions, length)
        result = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            result[rows] = self._permutation(stream, epoch)[offsets[rows]]
        return result


class PositionSampler(BatchSampler):
    """Micro-batches of a dataset's indices, of one stream.

    Position p of a run, counted in images from 0, holds image ``permutation(p // n)[p % n]`` of the
    n = ``dataset_size`` images, and the step at ``cur_nimg`` covers positions [cur_nimg, cur_nimg +
    batch_size). Without a size, as for sets, which are drawn by position, keys are the positions,
    counted from ``first_key``.
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
        """Return the dataset index at each position of the run, int64 [N]."""
        if self._dataset_size is None:
            return positions + self._first_key
        return self._shuffled(0, self._dataset_size, positions)

    def _make_permutation(self, stream: int, epoch: int) -> np.ndarray:
        return epoch_permutation(self._seed, epoch, self._dataset_size)


class BucketSampler(BatchSampler):
    """Micro-batches of a dataset's indices, all of a step's images being of one size.

    Step m = cur_nimg / batch_size takes a bucket at random, in proportion to its images: a function
    of (seed, m), hence the same on every rank and in every round of accumulation. The images of a
    bucket are a stream of their own. The state of it all is therefore the number of images so far.
    ``counts`` are the images of each bucket; a dataset's items run bucket by bucket.
    """

    def __init__(self, counts: Sequence[int], **settings: int) -> None:
        super().__init__(len(counts), **settings)
        assert min(counts) > 0
        self._counts = list(counts)
        self._firsts = np.cumsum([0, *counts])
        self._start_step = self._start_nimg // self._batch_size
        self._schedule = np.empty(0, np.int64)

    def buckets(self, num_steps: int) -> np.ndarray:
        """Return the bucket of each of the first ``num_steps`` steps of a run, int64."""
        if num_steps > len(self._schedule):
            # A longer draw begins with the shorter one.
            key = np.random.SeedSequence([self._seed % 2**64, STREAM_BUCKET])
            uniform = np.random.Generator(np.random.Philox(key)).random(max(2 * num_steps, 1024))
            ends = self._firsts[1:-1] / self._firsts[-1]
            self._schedule = np.searchsorted(ends, uniform, side="right")
        return self._schedule[:num_steps]

    def bucket_at(self, cur_nimg: int) -> int:
        """Return the bucket of the step that begins at ``cur_nimg`` images."""
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
        """Return the dataset's item at each position of a bucket's stream, int64 [N]."""
        return self._shuffled(bucket, self._counts[bucket], positions) + self._firsts[bucket]

    def _make_permutation(self, stream: int, epoch: int) -> np.ndarray:
        key = [self._seed % 2**64, STREAM_DATA, stream, epoch]
        return np.random.default_rng(key).permutation(self._counts[stream])


class ShardSampler(BucketSampler):
    """As :class:`BucketSampler`, but an epoch of a bucket goes shard by shard.

    Its shards are shuffled and put into groups of about a thousand images, or all there are, and
    the images of a group are shuffled. So each image comes once in an epoch, the order is the same
    function of (seed, position) for any number of ranks, and no more than a group is read at a
    time. Images of one shard stay within a group, whose other shards are others in each epoch.

    ``shard_sizes`` are the images of each shard of each bucket.
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
        # As many groups of like size as have a thousand images each, one at least.
        num_groups = max(int(sizes.sum()) // _IMAGES_PER_GROUP, 1)
        group = (np.cumsum(sizes[shards]) - 1) * num_groups // sizes.sum()
        group_of_shard = np.empty(len(sizes), np.int64)
        group_of_shard[shards] = group
        return np.lexsort((rng.random(int(sizes.sum())), np.repeat(group_of_shard, sizes)))
