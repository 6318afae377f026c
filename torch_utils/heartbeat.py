"""Signs of life, by which stopped or lost ranks are named long before a collective times out."""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dnnlib import launcher

_MAX_INTERVAL_SEC = 10.0
STALL_SEC = 55 * 60.0  # Less than the timeout of collectives, which is an hour.
_VERDICT = "ended: "
_ROOT = f"{Path(__file__).resolve().parent.parent}{os.sep}"
_MAX_FRAMES = 12  # Shown of a stack.


def beat_key(name: str, rank: int) -> str:
    """Return the store's key for a rank's signs of life; ``name`` is that of the whole group."""
    return f"{name}/alive/{rank}"


def beat(count: int | str = 0, moves: int = 0, waits: bool = False) -> str:
    """Return a sign of life, as text for the store.

    Args:
        count: Changes with every sign of life; "left" when the rank leaves.
        moves: Number of collective blocks that the rank has entered.
        waits: Whether it is in such a block, where it may wait for others.
    """
    return f"{socket.gethostname()} {count} {moves} {int(waits)}"


class Heartbeat:
    """Ends this process with a message once another rank no longer gives signs of life.

    A thread of each rank increments a count in the store. Rank 0 reads all counts, the other ranks
    that of rank 0. If a count stays the same for as many readings as fit into ``limit_sec``, its
    process is stopped or unreachable; rank 0 reports this to the others. Readings are counted
    instead of time, because all processes may have been suspended for a while and then continue.

    A process that waits, computes or is stuck in a library goes on counting as long as Python's
    threads run, so pictures, scores and compilation may take any time. But once others have waited
    for ``limit_sec``, rank 0 warns, naming the ranks that lag behind a waiting one. It counts the
    blocks that each main thread has entered :meth:`together` to know. If all ranks are in the same
    block, the warning shows where each one is. Shortly before the hour after which collectives time
    out, rank 0 ends all ranks if some are waiting for others.

    Each sign of life comes with what the message says about a rank that is named: the last step
    recorded by :meth:`finish_step`, and the stack of its main thread.

    Args:
        store: A connection to the store used by nothing else, as a call may never return.
        name: Name of the group that :func:`torch_utils.meeting.meet` returned.
        limit_sec: Seconds without a sign of life that are tolerated.
        host: Process that holds the store and its address, for the message.
    """

    def __init__(
        self, store: Any, name: str, rank: int, world_size: int, *, limit_sec: float, host: str
    ) -> None:
        self._moves, self._waits, self._step = 0, False, ""
        self._told: Sequence[int] = ()  # The ranks' moves at the last warning.
        self._store, self._name, self._rank, self._host = store, name, rank, host
        self._watched = range(world_size) if rank == 0 else range(1)
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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Count a block that all ranks enter in the same order, and may wait for others in."""
        self._moves += 1
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def finish_step(self, step: str) -> None:
        """Record the step that has ended, as text for the message, such as ``kimg 12.5``."""
        self._step = step

    def stop(self) -> None:
        """Stop watching, and let the other ranks know that this process leaves."""
        atexit.unregister(self.stop)
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _talk(self) -> None:
        own = beat_key(self._name, self._rank)
        keys = [beat_key(self._name, other) for other in self._watched]
        silent, waiting, behind = (_Stillness(len(keys)) for _ in range(3))
        try:
            while not self._stop.is_set():
                self._rounds += 1
                about = dict(step=self._step, stack=_main_stack())
                self._store.set(_about_key(self._name, self._rank), json.dumps(about))
                self._store.set(own, beat(self._rounds, self._moves, self._waits))
                found = [value.decode() for value in self._store.multi_get(keys)]
                if found[0].startswith(_VERDICT):
                    return self._end(found[0].removeprefix(_VERDICT))
                hosts, counts, moves, waits = zip(*map(str.split, found), strict=True)
                silent.read(counts, [count != "left" for count in counts])
                moves, waits = [int(number) for number in moves], [wait == "1" for wait in waits]
                waiting.read(moves, waits)
                furthest = max((n for n, wait in zip(moves, waits, strict=True) if wait), default=0)
                behind.read(moves, [number < furthest for number in moves])
                self._judge(silent, waiting, behind, hosts)
                if self._rank == 0:
                    self._warn(waiting, behind, hosts, moves)
                self._stop.wait(self._interval)
            self._store.set(own, beat("left", self._moves))
        except RuntimeError:
            # The process that holds the store has ended, so whatever needs the store fails anyway.
            self._stop.set()

    def _judge(
        self,
        silent: "_Stillness",
        waiting: "_Stillness",
        behind: "_Stillness",
        hosts: Sequence[str],
    ) -> None:
        """End this process, and from rank 0 all others, if a rank is silent or long waited for."""
        stall = round(STALL_SEC / self._interval)
        if late := silent.late(self._max_silent):
            what, why = f"No sign of life for {self._limit} from", "stopped or unreachable"
        elif waiting.late(stall) and (late := behind.late(stall)):
            what = f"Others have waited {STALL_SEC / 60:g} minutes for"
            why = "it is alive but stuck, perhaps while reading data"
        else:
            return
        remedy = "start again, with --resume=auto if it is a training run"
        message = f"{what} {self._names(late, hosts)}: {why}. This ends all ranks; {remedy}."
        message += self._whereabouts(late)
        if self._rank == 0:
            self._store.set(beat_key(self._name, 0), _VERDICT + message)
            time.sleep(2 * self._interval)
        self._end(message)

    def _warn(
        self,
        waiting: "_Stillness",
        behind: "_Stillness",
        hosts: Sequence[str],
        moves: Sequence[int],
    ) -> None:
        """Warn once about ranks that others have long waited for; they may merely be busy."""
        if list(moves) == self._told or len(waiting.late(self._max_silent)) == 0:
            return
        late = behind.late(self._max_silent)
        if late:
            text = f"Others have waited {self._limit} for {self._names(late, hosts)}."
        elif len(waiting.late(self._max_silent)) == len(moves):
            late = range(len(moves))
            text = f"All ranks have been in the same operation for {self._limit}."
        else:
            return
        self._told = list(moves)
        print(f"Warning: {text}{self._whereabouts(late)}", file=sys.stderr, flush=True)

    def _names(self, ranks: Sequence[int], hosts: Sequence[str]) -> str:
        return ", ".join(f"rank {self._watched[i]} (on {hosts[i]})" for i in ranks)

    def _whereabouts(self, ranks: Sequence[int]) -> str:
        """Return lines that say where ranks were, with those in the same place on one line."""
        found: dict[str, list[str]] = {}
        for rank in (self._watched[i] for i in ranks):
            key = _about_key(self._name, rank)
            if self._store.check([key]):
                about = json.loads(self._store.get(key))
                after = f" after the step that ends at {about['step']}" if about["step"] else ""
                lines = "".join(f"\n    {line}" for line in about["stack"])
                found.setdefault(f"{after} in{lines}", []).append(f"rank {rank}")
        return "".join(f"\n  {', '.join(names)} was{where}" for where, names in found.items())

    def _watch_store(self) -> None:
        """End this process if the store does not answer, so that :meth:`_talk` hangs."""
        silent, rounds = 0, 0
        while not self._stop.wait(self._interval):
            silent, rounds = silent + 1 if self._rounds == rounds else 0, self._rounds
            if silent > self._max_silent:
                self._end(
                    f"No sign of life for {self._limit} from {self._host}, through which the "
                    "processes of this run find each other: stopped or unreachable. This "
                    "ends this rank; start again, with --resume=auto if it is a training run."
                )

    def _end(self, message: str) -> None:
        if self._stop.is_set():
            return
        launcher.record_error(message)
        print(f"Error: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # The main thread may be waiting for the silent rank.


def _about_key(name: str, rank: int) -> str:
    return f"{name}/about/{rank}"


def _main_stack() -> list[str]:
    """Return the call stack of the main thread, innermost function first."""
    frame, found = sys._current_frames().get(threading.main_thread().ident), []
    while frame is not None and len(found) < _MAX_FRAMES:
        code = frame.f_code
        place = code.co_filename.removeprefix(_ROOT)
        found.append(f"{place}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return found


class _Stillness:
    """Counts, for each of several values, the successive readings in which it has not changed."""

    def __init__(self, num: int) -> None:
        self._values: Sequence[Any] = [None] * num
        self._counts = [0] * num

    def read(self, values: Sequence[Any], watched: Sequence[bool]) -> None:
        """Take a reading; values not watched in it count as changed."""
        for i, (before, now) in enumerate(zip(self._values, values, strict=True)):
            self._counts[i] = self._counts[i] + 1 if watched[i] and before == now else 0
        self._values = values

    def late(self, limit: int) -> list[int]:
        """Return the positions of values that have not changed in ``limit`` readings.

        If there are any, values within two readings of the limit are included: the ranks of a lost
        machine fall silent together, but not in the same reading.
        """
        if max(self._counts) < limit:
            return []
        return [i for i, count in enumerate(self._counts) if count >= limit - 2]
