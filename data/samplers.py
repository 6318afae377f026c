"""Samplers of rows: the order of training as a function of (seed, position), shared by ranks."""

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from torch_utils.rng import STREAM_BUCKET, STREAM_DATA, epoch_permutation


class BucketSampler(Sampler[list[int]]):
    """Endless micro-batches of one rank, all of a step's images being of one size.

    Step m = cur_nimg / batch_size takes a bucket at random, in proportion to its images: a function
    of (seed, m), hence the same on every rank and in every round of accumulation. A bucket's
    images follow each other in a stream of its own, an epoch after the other, each a permutation by
    (seed, bucket, epoch); a step takes the next ``batch_size`` of it, of which each rank has its
    part. The state of it all is therefore the number of images so far, and a run resumes exactly
    from that.

    Args:
        counts: Number of images of each bucket; a dataset's items run bucket by bucket.

    The other arguments are those of :class:`~data.samplers.PositionSampler`. Raises ValueError
    if ``batch_size`` is no multiple of ``batch_gpu * world_size``.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        seed: int,
        start_nimg: int,
        batch_size: int,
        batch_gpu: int,
        rank: int,
        world_size: int,
    ) -> None:
        if batch_size % (batch_gpu * world_size):
            raise ValueError(
                f"--batch: got {batch_size}, which is no multiple of --batch-gpu {batch_gpu} x "
                f"{world_size} rank(s)."
            )
        assert min(counts) > 0
        self._counts = list(counts)
        self._firsts = np.cumsum([0, *counts])
        self._seed, self._start_step = seed, start_nimg // batch_size
        self._batch_size, self._batch_gpu = batch_size, batch_gpu
        self._rank, self._world_size = rank, world_size
        self._schedule = np.empty(0, np.int64)
        self._permutation = functools.lru_cache(_NUM_CACHED_EPOCHS * len(counts))(
            self._make_permutation
        )

    def buckets(self, num_steps: int) -> np.ndarray:
        """Return the bucket of each of the first ``num_steps`` steps of a run, int64."""
        if num_steps > len(self._schedule):
            # A longer draw begins with the shorter one.
            length = max(2 * num_steps, 1024)
            key = np.random.SeedSequence([self._seed % 2**64, STREAM_BUCKET])
            uniform = np.random.Generator(np.random.Philox(key)).random(length)
            ends = self._firsts[1:] / self._firsts[-1]
            found = np.searchsorted(ends, uniform, side="right")
            self._schedule = found.clip(max=len(ends) - 1)
        return self._schedule[:num_steps]

    def bucket_at(self, cur_nimg: int) -> int:
        """Return the bucket of the step that begins at ``cur_nimg`` images."""
        step = cur_nimg // self._batch_size
        return int(self.buckets(step + 1)[step])

    def __iter__(self) -> Iterator[list[int]]:
        per_rank = self._batch_size // self._world_size
        steps_of = np.bincount(self.buckets(self._start_step), minlength=len(self._counts))
        cursors = (steps_of * self._batch_size).tolist()
        step = self._start_step
        while True:
            bucket = int(self.buckets(step + 1)[step])
            first = cursors[bucket] + self._rank * per_rank
            for start in range(first, first + per_rank, self._batch_gpu):
                yield self.indices(bucket, np.arange(start, start + self._batch_gpu)).tolist()
            cursors[bucket] += self._batch_size
            step += 1

    def indices(self, bucket: int, positions: np.ndarray) -> np.ndarray:
        """Return the dataset's item at each position of a bucket's stream, int64 [N]."""
        epochs, offsets = np.divmod(positions, self._counts[bucket])
        result = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            result[rows] = self._permutation(bucket, epoch)[offsets[rows]]
        return result + self._firsts[bucket]

    def _make_permutation(self, bucket: int, epoch: int) -> np.ndarray:
        key = [self._seed % 2**64, STREAM_DATA, bucket, epoch]
        return np.random.default_rng(key).permutation(self._counts[bucket])


_NUM_CACHED_EPOCHS = 4


class PositionSampler(Sampler[list[int]]):
    """Endless micro-batches of dataset indices for one rank.

    Position p of a run, counted in images from 0, holds image ``permutation(p // n)[p % n]`` of
    the n images: every epoch is a new shuffle and epochs follow each other without a gap. The
    optimizer step at ``cur_nimg`` covers positions [cur_nimg, cur_nimg + batch_size); rank r takes
    the r-th of ``world_size`` equal parts of it, in rows of ``batch_gpu``. Hence the global batches
    depend on nothing but (seed, batch_size), and a run resumes exactly at any ``start_nimg``.

    A dataset that draws by position itself, as sets are drawn, has ``dataset_size`` None: its keys
    are the positions.

    Raises ValueError if ``batch_size`` is no multiple of ``batch_gpu * world_size``.
    """

    def __init__(
        self,
        dataset_size: int | None,
        *,
        seed: int,
        start_nimg: int,
        batch_size: int,
        batch_gpu: int,
        rank: int,
        world_size: int,
    ) -> None:
        if batch_size % (batch_gpu * world_size):
            raise ValueError(
                f"--batch: got {batch_size}, which is no multiple of --batch-gpu {batch_gpu} x "
                f"{world_size} rank(s)."
            )
        assert dataset_size is None or dataset_size > 0
        assert start_nimg >= 0
        assert 0 <= rank < world_size
        self._dataset_size = dataset_size
        self._seed = seed
        self._start_nimg = start_nimg
        self._batch_size = batch_size
        self._batch_gpu = batch_gpu
        self._rank = rank
        self._world_size = world_size
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()

    def __iter__(self) -> Iterator[list[int]]:
        per_rank = self._batch_size // self._world_size
        cur_nimg = self._start_nimg
        while True:
            first = cur_nimg + self._rank * per_rank
            for start in range(first, first + per_rank, self._batch_gpu):
                yield self.indices(np.arange(start, start + self._batch_gpu)).tolist()
            cur_nimg += self._batch_size

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the dataset index at each position of the run, int64 [N]."""
        if self._dataset_size is None:
            return positions
        epochs, offsets = np.divmod(positions, self._dataset_size)
        result = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            result[rows] = self._permutation(epoch)[offsets[rows]]
        return result

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            if len(self._permutations) >= _NUM_CACHED_EPOCHS:
                self._permutations.popitem(last=False)
            self._permutations[epoch] = epoch_permutation(self._seed, epoch, self._dataset_size)
        return self._permutations[epoch]
