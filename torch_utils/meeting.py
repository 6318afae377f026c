"""What processes tell each other through a store: that they start together, and that they live.

A store is what ``torch.distributed`` calls one: keys and values in one process, for all to read.
"""

import atexit
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

from dnnlib import launcher

_POLL_SEC = 0.05
_MAX_INTERVAL_SEC = 10.0
_VERDICT, _LEFT = "ended: ", " left"


def meet(store: Any, rank: int, world_size: int, deadline: float) -> str:
    """Return a new name that the processes share which start together now, and no others.

    After a restart torchrun's store still holds what the processes before have written: where they
    listened, and their answers here. So each process comes with a word of its own, which rank 0
    repeats to it together with the name, until each has shown that it knows the name. The latter
    is its first sign of life, see :class:`Heartbeat`.

    Raises TimeoutError at ``deadline``, a time of ``time.monotonic``; it names the ranks that did
    not come, or says that rank 0 did not answer.
    """
    name = word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", word)
        answer = ["", ""]
        while answer[0] != word:
            if time.monotonic() > deadline:
                raise TimeoutError("rank 0 does not answer")
            time.sleep(_POLL_SEC)
            answer = (_read(store, f"answer/{rank}") or " ").split(" ")
        name = answer[1]
        store.set(_beat_key(name, rank), f"{socket.gethostname()} 0")
        return name
    store.set(_beat_key(name, rank), f"{socket.gethostname()} 0")
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([_beat_key(name, other)]):
                missing.remove(other)
            elif hello := _read(store, f"hello/{other}"):
                store.set(f"answer/{other}", f"{hello} {name}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"missing: rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(_POLL_SEC)
    return name


def _read(store: Any, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _beat_key(name: str, rank: int) -> str:
    return f"{name}/alive/{rank}"


class Heartbeat:
    """Ends this process, with a sentence, once another rank gives no sign of life any more.

    A thread of each rank counts in the store. Rank 0 reads all counts, the others that of rank 0,
    and a count that stands still in as many readings as fit into ``limit_sec`` is that of a process
    that is stopped or cannot be reached. Rank 0 tells the others of it. Readings are counted, and
    not time, because all processes may have been stopped for a while and go on.

    A process that waits, computes or is stuck in a library goes on counting, as long as Python's
    threads run: no time that pictures, scores or the compilation take is too long.

    Args:
        store: A connection to the store that nobody else uses, as a call may never return.
        name: What :func:`meet` returned.
        host: Who holds the store, and where, for the message.
    """

    def __init__(
        self, store: Any, name: str, rank: int, world_size: int, *, limit_sec: float, host: str
    ) -> None:
        self._store, self._name, self._rank, self._host = store, name, rank, host
        self._watched = range(1, world_size) if rank == 0 else range(1)
        self._interval = min(limit_sec / 10, _MAX_INTERVAL_SEC)
        self._limit = f"{limit_sec / 60:g} minutes"
        self._max_silent = max(round(limit_sec / self._interval), 1)
        self._rounds = 0
        self._stop = threading.Event()
        works = (self._talk, self._watch_store)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Watch no longer, and let the others know that this process leaves."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _talk(self) -> None:
        own = _beat_key(self._name, self._rank)
        keys = [_beat_key(self._name, other) for other in self._watched]
        seen, silent = [b""] * len(keys), [0] * len(keys)
        machine = socket.gethostname()
        try:
            while not self._stop.is_set():
                self._rounds += 1
                self._store.set(own, f"{machine} {self._rounds}")
                found = self._store.multi_get(keys)
                for i, (before, now) in enumerate(zip(seen, found, strict=True)):
                    waits = before == now and not now.endswith(_LEFT.encode())
                    silent[i] = silent[i] + 1 if waits else 0
                seen = found
                self._judge(seen, silent)
                self._stop.wait(self._interval)
            self._store.set(own, f"{machine}{_LEFT}")
        except RuntimeError:
            # The store has gone, and with it the process that holds it: what needs that fails.
            self._stop.set()

    def _judge(self, seen: list[bytes], silent: list[int]) -> None:
        """End this process if a watched rank is silent, or if rank 0 says so of another."""
        if self._rank > 0 and seen[0].decode().startswith(_VERDICT):
            self._end(seen[0].decode().removeprefix(_VERDICT))
        if max(silent) < self._max_silent:
            return
        # The processes of a machine that is lost fall silent together, to within a reading.
        late = [i for i, count in enumerate(silent) if count >= self._max_silent - 2]
        names = [f"rank {self._watched[i]} (on {seen[i].decode().split()[0]})" for i in late]
        message = (
            f"No sign of life for {self._limit} from {', '.join(names)}: stopped, or not to be "
            "reached. This ends all ranks; start again, with --resume=auto if it is a training run."
        )
        if self._rank == 0:
            self._store.set(_beat_key(self._name, 0), _VERDICT + message)
            time.sleep(2 * self._interval)
        self._end(message)

    def _watch_store(self) -> None:
        """End this process if the store does not answer, which :meth:`_talk` waits for."""
        silent, rounds = 0, 0
        while not self._stop.wait(self._interval):
            silent, rounds = silent + 1 if self._rounds == rounds else 0, self._rounds
            if silent > self._max_silent:
                self._end(
                    f"No sign of life for {self._limit} from {self._host}, through which the "
                    "processes of this run find each other: stopped, or not to be reached. This "
                    "ends this rank; start again, with --resume=auto if it is a training run."
                )

    def _end(self, message: str) -> None:
        if self._stop.is_set():
            return
        launcher.record_error(message)
        print(f"Error: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # The main thread may wait for the silent rank, and hears of nothing.
