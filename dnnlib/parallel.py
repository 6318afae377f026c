"""Ordered maps over threads and processes that keep a bounded number of items in flight."""

import collections
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from dnnlib import launcher
from dnnlib.errors import transportable

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNKS_PER_WORKER = 3


def num_usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_cores_of_rank(most: int) -> int:
    """Return how many CPU cores each rank on this machine has to itself, from 1 to ``most``."""
    ranks_here = launcher.number("LOCAL_WORLD_SIZE", 1)
    return min(max(num_usable_cores() // ranks_here, 1), most)


def thread_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, num_ahead: int
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item in order, computed in threads.

    At most ``num_ahead`` items are in progress or waiting for their turn to be yielded.
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
    """Yield ``function(item)`` for every item in order, computed in ``num_workers`` processes.

    By default there is one process per usable core; a single worker computes in this process.
    ``function`` must be picklable. ``items`` is consumed only a few chunks ahead of the results,
    so that neither accumulates in memory. The processes end with the iterator, even if this process
    is killed. Raises the errors of ``function``, and ValueError if a worker is killed.
    """
    num_workers = num_workers or num_usable_cores()
    if num_workers == 1:
        yield from map(function, items)
        return
    iterator = iter(items)
    chunks = iter(lambda: list(itertools.islice(iterator, chunk_size)), [])
    pool = _Pool(function, num_workers)
    try:
        for results in _in_order(map(pool.submit, chunks), num_workers * _CHUNKS_PER_WORKER):
            yield from results
    finally:
        pool.end()


class _Pool:
    """Processes that apply a function to chunks of items, each with a connection of its own.

    If one is killed, even halfway through sending a result, its connection closes. With a queue
    shared by all, as in :mod:`concurrent.futures`, the others and the reader would wait forever for
    the rest of that result.
    """

    def __init__(self, function: Callable[[Any], Any], num_processes: int) -> None:
        self._function, self._num_processes = function, num_processes
        self._threads = ThreadPoolExecutor(num_processes)
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._idle: queue.SimpleQueue[multiprocessing.connection.Connection] = queue.SimpleQueue()

    def submit(self, chunk: list[Any]) -> Future:
        """Return a future for a chunk's results; a process works on it as soon as it is idle."""
        if len(self._processes) < self._num_processes:
            self._start()
        return self._threads.submit(self._call, chunk)

    def end(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()

    def _start(self) -> None:
        # A fresh interpreter: forking a process that has threads can deadlock.
        context = multiprocessing.get_context("spawn")
        with _starting_processes():
            # Starting this helper of Python's unblocks signals; below, that would come too early.
            multiprocessing.resource_tracker.ensure_running()
        with _starting_processes():
            connection, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._function), daemon=True)
            process.start()
            theirs.close()  # So that the connection closes when the process ends.
            self._processes.append(process)
            self._idle.put(connection)

    def _call(self, chunk: list[Any]) -> list[Any]:
        connection = self._idle.get()
        try:
            connection.send(chunk)
            results, error = connection.recv()
        except (EOFError, OSError):
            problem = "A process that decodes images was killed, perhaps because memory ran out"
            raise ValueError(f"{problem}; try fewer with --workers=1.") from None
        finally:
            self._idle.put(connection)
        if error is not None:
            raise error
        return results


def _work(connection: multiprocessing.connection.Connection, function: Callable) -> None:
    """Serve as a process of a pool until the other end of the connection closes."""
    _exit_with_parent()
    with contextlib.suppress(EOFError):
        while True:
            connection.send(_apply(function, connection.recv()))


def _apply(function: Callable, chunk: list[Any]) -> tuple[list[Any] | None, Exception | None]:
    try:
        return [function(item) for item in chunk], None
    except Exception as error:
        sent = transportable(error)
        sent.add_note("".join(traceback.format_exception(error)))
        return None, sent


@contextlib.contextmanager
def _starting_processes() -> Iterator[None]:
    """Hold back signals while a process starts, and start it with SIGINT and SIGHUP blocked.

    A terminal sends Ctrl-C and its own end to all of its processes. The new process never sees
    them; this one handles them once the block ends. A process interrupted during its start would
    print a traceback.
    """
    held: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        # A signal mask covers one thread. Another thread may receive the signal, and Python then
        # runs the handler in this one.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda number, frame: held.append(number))
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        for number in held:
            signal.raise_signal(number)


def _in_order(futures: Iterable[Future], num_ahead: int) -> Iterator[Any]:
    """Yield the results of futures in order; taking one from ``futures`` submits its call."""
    pending: collections.deque[Future] = collections.deque()
    for future in futures:
        pending.append(future)
        if len(pending) >= num_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _exit_with_parent() -> None:
    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
