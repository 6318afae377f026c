"""Data loaders: worker processes, prefetching of remote data, and single passes over a dataset."""

import collections
import contextlib
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.images.dataset import ImageDataset
from data.resumable import progress_of_ranks
from dnnlib.parallel import num_cores_of_rank
from torch_utils import distributed

_PREFETCH_FACTOR = 4
# How far ahead remote data are fetched, in bytes, and the limits on that in batches.
_AHEAD_BYTES = 256e6
_MIN_AHEAD, _MAX_AHEAD = 4, 256
_MIN_IMAGES_FOR_WORKERS = 4096
_MAX_READERS = 8


class TrainingItems(Protocol):
    """What a loader needs of a dataset."""

    remote_bytes: float  # Average number of bytes to download per item; 0 for local data.

    def prefetch(self, keys: Sequence[Any]) -> None:
        """Start fetching the remote data of ``keys`` in the background."""
        ...

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        """Return the batch of ``keys``."""
        ...


def make_loader(
    dataset: TrainingItems, sampler: Sampler, *, num_workers: int, device: torch.device
) -> DataLoader:
    """Return a loader that yields ``dataset.__getitems__(keys)`` for each ``keys`` of ``sampler``.

    ``keys`` is whatever the dataset understands, so each family of models can bring its own sampler
    and dataset. ``num_workers`` processes decode ahead of time, in the sampler's order; with 0 this
    process decodes. Remote data are fetched ahead of time, in the same order.
    """
    return _loader(
        dataset,
        sampler,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
    )


def _loader(
    dataset: TrainingItems, batches: Iterable[Sequence[Any]], *, num_workers: int, **settings: Any
) -> DataLoader:
    if dataset.remote_bytes:
        batches = _LookAhead(batches, dataset.remote_bytes, 2 * num_workers + _MIN_AHEAD)
        dataset = _Fetched(dataset)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH_FACTOR if num_workers else None,
        collate_fn=collate,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # Leaves the state of the global generator unchanged.
        **settings,
    )


def collate(batch: Any) -> Any:
    """Return a batch unchanged: these datasets deliver whole batches."""
    return batch


class Request(NamedTuple):
    """The keys of a batch to read, and of the batches to start fetching before that."""

    keys: Sequence[Any]
    soon: Sequence[Sequence[Any]]


class _LookAhead:
    """Iterable over batches of keys as :class:`Request`, with the batches to fetch meanwhile.

    Each batch occurs in exactly one ``soon``, early enough to keep about 256 MB in flight: at least
    ``least`` and at most 256 batches ahead. The worker processes of a loader thus share the
    fetching evenly, whichever of them reads a batch later.
    """

    def __init__(self, batches: Iterable[Sequence[Any]], bytes_per_key: float, least: int) -> None:
        self._batches, self._bytes_per_key, self._least = batches, bytes_per_key, least

    def __iter__(self) -> Iterator[Request]:
        source = iter(self._batches)
        ahead = collections.deque(itertools.islice(source, 1))
        named = 0  # Number of batches at the front of `ahead` that an earlier request named.
        while ahead:
            per_batch = max(self._bytes_per_key * len(ahead[0]), 1)
            wanted = min(max(math.ceil(_AHEAD_BYTES / per_batch), self._least), _MAX_AHEAD)
            # More may be there already: batches differ in size where they are split into passes.
            ahead.extend(itertools.islice(source, max(wanted + 1 - len(ahead), 0)))
            soon = list(itertools.islice(ahead, named, None))
            yield Request(ahead.popleft(), soon)
            named = len(ahead)


def growing(batches: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    """Yield the keys of the first batch, then of the next one, two, four, ... batches, flattened.

    The data that are needed first are thus requested first, and adjacent ranges of later batches
    can be fetched together.
    """
    first, num = 0, 1
    while first < len(batches):
        yield list(itertools.chain.from_iterable(batches[first : first + num]))
        first += num
        num = first


class _Fetched(Dataset):
    """A dataset of :class:`Request` keys: starts fetching what a request names, then reads."""

    def __init__(self, dataset: TrainingItems) -> None:
        self._dataset = dataset

    def __getitems__(self, request: Request) -> Any:
        for keys in growing(request.soon):
            self._dataset.prefetch(keys)
        return self._dataset.__getitems__(request.keys)


def read_batches(
    dataset: ImageDataset, batches: Sequence[Sequence[int]], num_workers: int | None = None
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Yield each batch of indices with its images, uint8 [N, C, H, W].

    ``num_workers`` processes decode ahead, by default one per core of this rank's share, up to 8,
    and none for fewer than 4,096 images. Remote data are fetched ahead of time.
    """
    if num_workers is None:
        # For few images, starting processes would take longer than they save.
        is_much = sum(map(len, batches)) >= _MIN_IMAGES_FOR_WORKERS
        num_workers = num_cores_of_rank(_MAX_READERS) if is_much else 0
    pinned = torch.cuda.is_available()
    loader = _loader(dataset, batches, num_workers=num_workers, pin_memory=pinned)
    for batch, (images, _) in zip(batches, loader, strict=True):
        yield batch, images


def iterate_images(
    dataset: ImageDataset,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    indices: Sequence[int] | None = None,
    label: str = "Reading images",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this rank's share of all images in order, each batch preceded by its indices.

    A batch is ``(indices, images)``, int64 [N] and uint8 [N, C, H, W]; the last one may be smaller.
    Shares are contiguous, differ by at most one image and may be empty. ``num_workers`` is as in
    :func:`read_batches`. ``indices`` selects a part of the dataset. ``label`` is the title of the
    progress bar on rank 0.
    """
    wanted = range(len(dataset)) if indices is None else indices
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = wanted[len(wanted) * rank // world_size : len(wanted) * (rank + 1) // world_size]
    batches = [list(mine[first : first + batch_size]) for first in range(0, len(mine), batch_size)]
    with progress_of_ranks(len(wanted), len(mine), label, transient=True) as on_done:
        for batch, images in read_batches(dataset, batches, num_workers):
            yield torch.tensor(batch), images
            on_done(len(images))


def init_worker(worker_id: int) -> None:
    """Set up a worker process: one thread, and deaf to the signals that stop a run.

    Schedulers signal every process of a job, but the main process decides when to stop and needs
    batches until then. A SIGTERM that comes from the main process still ends the worker. If the
    main process stops while it waits for a batch, the worker prints no traceback about it.
    """
    torch.set_num_threads(1)
    sys.excepthook = _tell_unless_left
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_request, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _tell_unless_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print an uncaught error, unless the main process has closed its end of the connection."""
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def _exit_on_parents_request(parent: int) -> None:
    while True:
        with contextlib.suppress(InterruptedError):
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
                os._exit(0)
