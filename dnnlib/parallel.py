"""An ordered map over processes that keeps only a bounded number of items in flight."""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNKS_PER_WORKER = 3


def num_usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_cores_of_rank(most: int) -> int:
    """Return how many cores each rank of this machine has for itself, from 1 to ``most``."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(num_usable_cores() // ranks_here, 1), most)


def thread_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, num_ahead: int
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item in order, computed in threads.

    At most ``num_ahead`` items are under way or done before their turn.
    """
    pending: collections.deque = collections.deque()
    executor = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def process_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int | None = None,
    chunk_size: int = 16,
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item in order, computed by all cores.

    ``function`` must be picklable. ``items`` is consumed only a few chunks ahead of the results,
    so that neither accumulates in memory. The processes end with the iterator, also when this
    process is killed.
    """
    num_workers = num_workers or num_usable_cores()
    chunks = _chunks(items, chunk_size)
    if num_workers == 1:
        for chunk in chunks:
            yield from _apply(function, chunk)
        return
    executor = ProcessPoolExecutor(
        num_workers,
        # A fresh interpreter: forking a process that has threads can deadlock.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_exit_with_parent,
    )
    pending: collections.deque = collections.deque()
    try:
        for chunk in chunks:
            with _sigint_blocked():
                pending.append(executor.submit(_apply, function, chunk))
            if len(pending) >= num_workers * _CHUNKS_PER_WORKER:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            "A process that decodes images was killed, perhaps for want of memory; try fewer "
            "with --workers=1."
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _apply(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start processes that never see Ctrl-C, which reaches every process of a terminal.

    This process gets it when the block ends, and decides what happens.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _exit_with_parent() -> None:
    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
