"""Which images a rank reads, as a function of (seed, position in the run), and their loaders."""

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

from data.images.dataset import ImageDataset, collate
from dnnlib.parallel import num_cores_of_rank
from dnnlib.progress import progress

_PREFETCH_FACTOR = 4
# How far ahead remote data are fetched: in bytes, and in batches.
_AHEAD_BYTES = 256e6
_MIN_AHEAD, _MAX_AHEAD = 4, 256
_MIN_IMAGES_FOR_WORKERS = 4096
_MAX_READERS = 8


class TrainingItems(Protocol):
    """What a loader needs of a dataset."""

    remote_bytes: float  # That an item takes from a server, on average; 0 of local data.

    def prefetch(self, keys: Sequence[Any]) -> None:
        """Have what ``keys`` are read from fetched in the background."""
        ...

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        """Return the batch of ``keys``."""
        ...


def make_loader(
    dataset: TrainingItems, sampler: Sampler, *, num_workers: int, device: torch.device
) -> DataLoader:
    """Return a loader that yields ``dataset.__getitems__(keys)`` for each ``keys`` of ``sampler``.

    ``keys`` is whatever the dataset understands, so that a family of models brings its own sampler
    and dataset. ``num_workers`` processes decode ahead (0: this one does), in the sampler's order.
    What is at an address is fetched in that order, too, before its turn.
    """
    settings: dict[str, Any] = dict(pin_memory=device.type == "cuda")
    if num_workers:
        settings |= dict(prefetch_factor=_PREFETCH_FACTOR, persistent_workers=True)
    return _loader(dataset, sampler, num_workers=num_workers, **settings)


def _loader(
    dataset: TrainingItems, batches: Iterable[Sequence[Any]], *, num_workers: int, **settings: Any
) -> DataLoader:
    if dataset.remote_bytes:
        batches = _LookAhead(batches, dataset.remote_bytes, 2 * num_workers + _MIN_AHEAD)
        dataset = _Fetched(dataset)
    settings["num_workers"] = num_workers
    generator = torch.Generator()  # The global one stays as it is.
    settings |= dict(collate_fn=collate, worker_init_fn=init_worker, generator=generator)
    return DataLoader(dataset, batch_sampler=batches, **settings)


class Request(NamedTuple):
    """The keys of a batch, and those of batches to be fetched now, each of them once."""

    keys: Sequence[Any]
    soon: Sequence[Sequence[Any]]


class _LookAhead:
    """Batches of keys with those that are to be fetched while they are read: see :class:`Request`.

    Every batch is named ahead once, so far ahead that about 256 MB are on their way, and at least
    ``least`` batches. Hence each process of a loader has its share of them fetched, whichever
    process reads them later.
    """

    def __init__(self, batches: Iterable[Sequence[Any]], bytes_per_key: float, least: int) -> None:
        self._batches, self._bytes_per_key, self._least = batches, bytes_per_key, least

    def __iter__(self) -> Iterator[Request]:
        source = iter(self._batches)
        ahead = collections.deque(itertools.islice(source, 1))
        named = 0  # How many of those in `ahead`, from the first on, have been named.
        while ahead:
            per_batch = max(self._bytes_per_key * len(ahead[0]), 1)
            wanted = min(max(math.ceil(_AHEAD_BYTES / per_batch), self._least), _MAX_AHEAD)
            ahead.extend(itertools.islice(source, wanted + 1 - len(ahead)))
            soon = list(itertools.islice(ahead, named, None))
            yield Request(ahead.popleft(), soon)
            named = len(ahead)


def growing(batches: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    """Yield the keys of one batch, one, two, four and so on.

    What is needed first is so asked for first, and what lies side by side later on together.
    """
    first, num = 0, 1
    while first < len(batches):
        yield list(itertools.chain.from_iterable(batches[first : first + num]))
        first += num
        num = first


class _Fetched(Dataset):
    """A dataset whose remote data are fetched before they are read."""

    def __init__(self, dataset: TrainingItems) -> None:
        self._dataset = dataset

    def __getitems__(self, request: Request) -> Any:
        for keys in growing(request.soon):
            self._dataset.prefetch(keys)
        return self._dataset.__getitems__(request.keys)


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
    differ by at most one image and may be empty. ``num_workers`` processes decode ahead, by default
    as many as the rank's share of the cores allows, up to 8. ``indices`` chooses a part of the
    dataset; ``label`` names the progress bar with images/s that rank 0 shows.
    """
    wanted = range(len(dataset)) if indices is None else indices
    mine = wanted[len(wanted) * rank // world_size : len(wanted) * (rank + 1) // world_size]
    batches = [list(mine[first : first + batch_size]) for first in range(0, len(mine), batch_size)]
    if len(mine) < _MIN_IMAGES_FOR_WORKERS:
        num_workers = 0  # Processes pay off only for more work than starting them costs.
    elif num_workers is None:
        num_workers = num_cores_of_rank(_MAX_READERS)
    pinned = torch.cuda.is_available()
    loader = _loader(dataset, batches, num_workers=num_workers, pin_memory=pinned)
    with progress(total=len(wanted), label=label, disable=rank != 0, transient=True) as bar:
        for batch, (images, _) in zip(batches, loader, strict=True):
            yield torch.tensor(batch), images
            bar.update(len(images) * world_size)


def init_worker(worker_id: int) -> None:
    """Prepare a loader process: one thread, and deaf to the signals that stop a run.

    Schedulers signal every process of a job. The main process decides when to stop, and needs its
    batches until then; a SIGTERM that it sends by itself still ends the worker. Where a stop finds
    the main process between asking for a batch and having it, the worker says nothing of that.
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
    """Print an error of a thread, such as that which hands out batches, unless the asker left."""
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def _exit_on_parents_request(parent: int) -> None:
    while True:
        with contextlib.suppress(InterruptedError):
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
                os._exit(0)
