"""Threads that fetch blocks of remote files before they are read, once for all processes."""

import collections
import functools
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from dnnlib.remote.blocks import BLOCK_BYTES, Blocks

NUM_THREADS = 16  # Connections of a process, as most of their time is waiting.
_BLOCKS_PER_REQUEST = 16  # 4 MB.
_LOOK_SEC = 0.005  # Between looks at whether another process has fetched a block.
_MAX_WAIT_SEC = 60.0  # For another process, which may be stopped.


class Source(Protocol):
    """What blocks are fetched of."""

    blocks: Blocks

    def fetch(self, first: int, end: int) -> bytes | None:
        """Return the bytes of some blocks in a row; None if they now lie in ``blocks``."""
        ...


class Job:
    """Some blocks in a row that are to be fetched, by a thread or by who wants them first."""

    def __init__(self, source: Source, numbers: Sequence[int]) -> None:
        self._source, self.numbers = source, numbers
        self._data: dict[int, memoryview] = {}
        self._error: Exception | None = None
        self._begun, self._done = threading.Lock(), threading.Event()

    def run(self) -> None:
        """Fetch the blocks, unless another thread has begun to."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._fetch()
        except Exception as error:  # For whoever waits; an error of what nobody wants is none.
            self._error = error
        finally:
            fetcher().forget(self)
            self._done.set()

    def result(self, number: int) -> memoryview | None:
        """Return a block; None if another process has put it on the disk. Raises its error."""
        self.run()
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._data.get(number)

    @property
    def place(self) -> str:
        """The key of the file."""
        return self._source.blocks.key

    def _fetch(self) -> None:
        blocks = self._source.blocks
        others = self._fetch_free(self.numbers)
        deadline = time.monotonic() + _MAX_WAIT_SEC
        while others := [number for number in others if number not in blocks]:
            if time.monotonic() > deadline:
                self._take(others)
                return
            time.sleep(_LOOK_SEC)
            others = self._fetch_free(others)

    def _fetch_free(self, numbers: Sequence[int]) -> list[int]:
        """Fetch the blocks that no other process fetches just now; return the others."""
        blocks, others = self._source.blocks, []
        for run in runs(numbers):
            # Usually no other process has any of them.
            parts = [run] if blocks.lock(run[0], len(run)) else [[n] for n in run if blocks.lock(n)]
            own = [number for part in parts for number in part]
            try:
                self._take([number for number in own if number not in blocks])
            finally:
                for part in parts:
                    blocks.unlock(part[0], len(part))
            others += [number for number in run if number not in own]
        return others

    def _take(self, numbers: Sequence[int]) -> None:
        blocks = self._source.blocks
        for run in runs(numbers):
            data = self._source.fetch(run[0], run[-1] + 1)
            if data is None:
                continue
            view = memoryview(data)
            for number, start in zip(run, itertools.count(0, BLOCK_BYTES), strict=False):
                self._data[number] = view[start : start + BLOCK_BYTES]
                blocks.write(number, self._data[number])
            blocks.count(len(data))


def runs(numbers: Iterable[int], most: int = _BLOCKS_PER_REQUEST) -> Iterator[list[int]]:
    """Yield rising numbers in groups of at most ``most`` that follow each other."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


class Fetcher:
    """The jobs of a process, in the order in which they were asked for, and the threads for them.

    The threads end with the process, whatever they are doing.
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._queue: collections.deque[Job] = collections.deque()
        self._pending: dict[tuple[str, int], Job] = {}
        self._num_threads = self._num_idle = 0

    def want(self, source: Source, numbers: Iterable[int]) -> None:
        """Have blocks fetched that are not on their way; ``numbers`` rise."""
        key = source.blocks.key
        with self._lock:
            new = [number for number in numbers if (key, number) not in self._pending]
            for run in runs(new):
                self._add(Job(source, run))

    def job(self, source: Source, number: int) -> Job:
        """Return the job that fetches a block, a new one if there is none."""
        with self._lock:
            found = self._pending.get((source.blocks.key, number))
            return self._add(Job(source, [number])) if found is None else found

    def forget(self, job: Job) -> None:
        """Remove a job that is done."""
        with self._lock:
            for number in job.numbers:
                self._pending.pop((job.place, number), None)

    def _add(self, job: Job) -> Job:
        self._pending |= {(job.place, number): job for number in job.numbers}
        self._queue.append(job)
        if self._num_idle >= len(self._queue) or self._num_threads == NUM_THREADS:
            self._lock.notify()
        else:
            self._num_threads += 1
            threading.Thread(target=self._work, name="fetch", daemon=True).start()
        return job

    def _work(self) -> None:
        while True:
            with self._lock:
                self._num_idle += 1
                while not self._queue:
                    self._lock.wait()
                self._num_idle -= 1
                job = self._queue.popleft()
            job.run()
            del job  # Its blocks need not stay in memory.


def fetcher() -> Fetcher:
    """Return the fetcher of this process; a fork has one of its own."""
    return _fetcher(os.getpid())


@functools.lru_cache(1)
def _fetcher(pid: int) -> Fetcher:
    return Fetcher()
