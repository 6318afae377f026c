"""Threads that fetch blocks of remote files before they are read, once for all processes."""

import collections
import functools
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from dnnlib.remote.blocks import Blocks, Segment

NUM_THREADS = 32  # Connections of a process: they spend most of their time waiting.
# 4 MB: with 20 ms until a response begins, the threads reach up to 6 GB/s. Queued jobs whose blocks
# are adjacent become one request.
_BLOCKS_PER_REQUEST = 16
_LOOK_SEC = 0.005  # Between checks of whether another process has fetched a block.
_MAX_WAIT_SEC = 60.0  # For another process, which may have been suspended.


class Source(Protocol):
    """A remote file whose blocks can be fetched."""

    blocks: Blocks

    def fetch(self, first: int, end: int) -> Segment | None:
        """Put blocks ``first`` to ``end`` (exclusive) into ``blocks``.

        Returns the segment that holds the first one, or None if that is not at hand.
        """
        ...


class Job:
    """Consecutive blocks to fetch, by a thread or by whoever needs them first."""

    def __init__(self, source: Source, numbers: Sequence[int]) -> None:
        self._source, self.numbers = source, numbers
        self._fetched: Segment | None = None
        self._error: Exception | None = None
        self._begun, self._done = threading.Lock(), threading.Event()

    def begin(self) -> bool:
        """Return whether the caller is the first to begin the job, and so has to :meth:`run` it."""
        return self._begun.acquire(blocking=False)

    def run(self, others: Sequence["Job"] = ()) -> None:
        """Fetch the blocks, together with those of other jobs adjacent to it in the same file.

        The caller must have begun all of these jobs.
        """
        jobs = sorted([self, *others], key=lambda job: job.numbers[0])
        try:
            self._fetch([number for job in jobs for number in job.numbers])
        except Exception as error:  # Raised in whoever waits; unwanted blocks may fail silently.
            self._error = error
        finally:
            for job in jobs:
                job._fetched, job._error = self._fetched, self._error
                fetcher().forget(job)
                job._done.set()

    def wait(self) -> Segment | None:
        """Wait until the job is done; return a segment with some of its blocks, if one is at hand.

        Runs the job itself if nobody has begun it. Raises the job's error.
        """
        if self.begin():
            self.run()
        fetcher().wait_for(self._done)
        if self._error is not None:
            raise self._error
        return self._fetched

    @property
    def place(self) -> str:
        """Key of the file in the cache."""
        return self._source.blocks.key

    def _fetch(self, numbers: Sequence[int]) -> None:
        blocks = self._source.blocks
        others = self._fetch_free(numbers)
        deadline = time.monotonic() + _MAX_WAIT_SEC
        while others := [number for number in others if number not in blocks]:
            if time.monotonic() > deadline:
                self._take(others)
                return
            time.sleep(_LOOK_SEC)
            others = self._fetch_free(others)

    def _fetch_free(self, numbers: Sequence[int]) -> list[int]:
        """Fetch the blocks that no other process is fetching; return the numbers of the others."""
        blocks, others = self._source.blocks, []
        for run in runs(numbers):
            # Usually no other process has claimed any of them.
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
        for run in runs(numbers):
            self._fetched = self._source.fetch(run[0], run[-1] + 1)


def runs(numbers: Iterable[int], most: int = _BLOCKS_PER_REQUEST) -> Iterator[list[int]]:
    """Yield ascending numbers in groups of at most ``most`` consecutive ones."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


class Fetcher:
    """The fetching jobs of a process, in the order of their requests, and the threads for them.

    The threads end with the process, whatever they are doing.
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._queue: collections.deque[Job] = collections.deque()
        self._pending: dict[tuple[str, int], Job] = {}
        self._num_threads = self._num_idle = self._num_waiting = 0

    def want(self, source: Source, numbers: Iterable[int]) -> None:
        """Queue the blocks that no job is fetching yet; ``numbers`` are ascending."""
        key = source.blocks.key
        with self._lock:
            new = [number for number in numbers if (key, number) not in self._pending]
            for run in runs(new):
                self._add(Job(source, run))

    def job(self, source: Source, number: int) -> Job:
        """Return the job that fetches a block, queueing a new one if there is none."""
        with self._lock:
            found = self._pending.get((source.blocks.key, number))
            return self._add(Job(source, [number])) if found is None else found

    def forget(self, job: Job) -> None:
        """Remove a finished job."""
        with self._lock:
            for number in job.numbers:
                self._pending.pop((job.place, number), None)

    def wait_for(self, done: threading.Event) -> None:
        """Wait until a job is done; jobs are not merged meanwhile, so that it is done sooner."""
        if not done.is_set():
            with self._lock:
                self._num_waiting += 1
            try:
                done.wait()
            finally:
                with self._lock:
                    self._num_waiting -= 1

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
                is_first = job.begin()
                neighbours = self._neighbours(job) if is_first else []
            if is_first:
                job.run(neighbours)

    def _neighbours(self, job: Job) -> list[Job]:
        """Begin and return the pending jobs whose blocks are adjacent to those of ``job``."""
        found: list[Job] = []
        if self._num_waiting:
            return found
        first, last = job.numbers[0], job.numbers[-1]
        for step in (1, -1):
            while last - first + 1 < _BLOCKS_PER_REQUEST:
                other = self._pending.get((job.place, last + 1 if step == 1 else first - 1))
                if other is None or not other.begin():
                    break
                found.append(other)
                first, last = min(first, other.numbers[0]), max(last, other.numbers[-1])
        return found


def fetcher() -> Fetcher:
    """Return the fetcher of this process; a forked process gets its own."""
    return _fetcher(os.getpid())


@functools.lru_cache(1)
def _fetcher(pid: int) -> Fetcher:
    return Fetcher()
