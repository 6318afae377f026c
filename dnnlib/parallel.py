"""An ordered map over processes that keeps only a bounded number of items in flight."""

import collections
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from dnnlib import launcher

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
    ranks_here = launcher.number("LOCAL_WORLD_SIZE", 1)
    return min(max(num_usable_cores() // ranks_here, 1), most)


def thread_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, num_ahead: int
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item in order, computed in threads.

    At most ``num_ahead`` items are under way or done before their turn.
    """
    executor = ThreadPoolExecutor(num_threads)
    try:
        yield from _in_order((executor.submit(function, item) for item in items), num_ahead)
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
    if num_workers == 1:
        yield from map(function, items)
        return
    iterator = iter(items)
    chunks = iter(lambda: list(itertools.islice(iterator, chunk_size)), [])
    executor = ProcessPoolExecutor(
        num_workers,
        # A fresh interpreter: forking a process that has threads can deadlock.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_exit_with_parent,
    )

    def submit(chunk: list[Item]) -> Future:
        # A process that starts here never sees Ctrl-C, which reaches every process of a terminal.
        # This process gets it afterwards, and decides what happens.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return executor.submit(_apply, function, chunk)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    try:
        for results in _in_order(map(submit, chunks), num_workers * _CHUNKS_PER_WORKER):
            yield from results
    except BrokenProcessPool:
        problem = "A process that decodes images was killed, perhaps for want of memory"
        raise ValueError(f"{problem}; try fewer with --workers=1.") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(futures: Iterable[Future], num_ahead: int) -> Iterator[Any]:
    """Yield the results of calls, each submitted when ``futures`` yields it."""
    pending: collections.deque[Future] = collections.deque()
    for future in futures:
        pending.append(future)
        if len(pending) >= num_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _apply(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _exit_with_parent() -> None:
    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
