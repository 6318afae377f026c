"""Which images a rank reads, as a function of (seed, position in the run), and their loaders."""

import contextlib
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dnnlib.progress import progress
from torch_utils.rng import epoch_permutation
from training.dataset import ImageDataset, collate
from training.parallel import num_usable_cores

_PREFETCH_FACTOR = 4
_NUM_CACHED_EPOCHS = 4
_MIN_IMAGES_FOR_WORKERS = 4096
_MAX_READERS = 8


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


def make_loader(
    dataset: Dataset, sampler: Sampler, *, num_workers: int, device: torch.device
) -> DataLoader:
    """Return a loader that yields ``dataset.__getitems__(keys)`` for each ``keys`` of ``sampler``.

    ``keys`` is whatever the dataset understands, so that a family of models brings its own sampler
    and dataset. ``num_workers`` processes decode ahead (0: this one does), in the sampler's order.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=_PREFETCH_FACTOR if num_workers else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # The global one stays as it is.
    )


def iterate_images(
    dataset: ImageDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 64,
    num_workers: int | None = None,
    indices: Sequence[int] | None = None,
    label: str = "Reading images",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this rank's share of all images in order, each batch with its indices.

    A batch is ``(int64 [N], uint8 [N, C, H, W])``, the last one partial. Shares are contiguous,
    differ by at most one image and may be empty. Processes decode ahead of the use of a batch:
    ``num_workers``, by default as many as the rank's share of the cores allows, up to 8.
    ``indices`` chooses a part of the dataset; ``label`` names the progress bar with
    images/s that rank 0 shows.
    """
    wanted = range(len(dataset)) if indices is None else indices
    mine = wanted[len(wanted) * rank // world_size : len(wanted) * (rank + 1) // world_size]
    batches = [list(mine[first : first + batch_size]) for first in range(0, len(mine), batch_size)]
    if num_workers is None:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_workers = min(max(num_usable_cores() // ranks_here, 1), _MAX_READERS)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        # Processes pay off only for more work than starting them costs.
        num_workers=num_workers if len(mine) >= _MIN_IMAGES_FOR_WORKERS else 0,
        collate_fn=collate,
        worker_init_fn=init_worker,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    with progress(total=len(wanted), label=label, disable=rank != 0, transient=True) as bar:
        for batch, (images, _) in zip(batches, loader, strict=True):
            yield torch.tensor(batch), images
            bar.update(len(images) * world_size)


def init_worker(worker_id: int) -> None:
    """Prepare a loader process: one thread, and deaf to the signals that stop a run.

    Schedulers signal every process of a job. The main process decides when to stop, and needs its
    batches until then; a SIGTERM that it sends by itself still ends the worker.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_request, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _exit_on_parents_request(parent: int) -> None:
    while True:
        with contextlib.suppress(InterruptedError):
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
                os._exit(0)
