"""Signs of life: ranks that are stopped or lost are named, long before a collective gives up."""

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
STALL_SEC = 55 * 60.0  # Less than the hour that a collective operation waits.
_VERDICT = "ended: "
_ROOT = f"{Path(__file__).resolve().parent.parent}{os.sep}"
_MAX_FRAMES = 12  # Of a stack that is shown.


def beat_key(name: str, rank: int) -> str:
    """Return under which key of the store a rank gives signs of life; ``name`` is of all ranks."""
    return f"{name}/alive/{rank}"


def beat(count: int | str = 0, moves: int = 0, waits: bool = False) -> str:
    """Return a sign of life: this machine, a number that changes, how far it is, if it waits."""
    return f"{socket.gethostname()} {count} {moves} {int(waits)}"


class Heartbeat:
    """Ends this process, with a sentence, once another rank gives no sign of life any more.

    A thread of each rank counts in the store. Rank 0 reads all counts, the others that of rank 0,
    and a count that stands still in as many readings as fit into ``limit_sec`` is that of a process
    that is stopped or cannot be reached. Rank 0 tells the others of it. Readings are counted, and
    not time, because all processes may have been stopped for a while and go on.

    A process that waits, computes or is stuck in a library goes on counting, as long as Python's
    threads run: no time that pictures, scores or the compilation take is too long. But after
    ``limit_sec`` in which others waited, rank 0 names who has come less far than one that waits.
    That is known from what the main threads do :meth:`together`. Where all are in the same
    operation, it shows where each is. As the others give up an operation of all ranks after an
    hour, it ends all shortly before that.

    With every sign of life goes what is told of a rank that is named: the last step that it
    finished, as far as :meth:`finish_step` was told, and where its main thread was.

    Args:
        store: A connection to the store that nobody else uses, as a call may never return.
        name: What the ranks agreed on in :mod:`torch_utils.meeting`.
        host: Who holds the store, and where, for the message.
    """

    def __init__(
        self, store: Any, name: str, rank: int, world_size: int, *, limit_sec: float, host: str
    ) -> None:
        self._moves, self._waits, self._step = 0, False, ""
        self._told: Sequence[int] = ()  # How far all were when the last stall was told.
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
        """Count a block that all ranks come to in the same order, and may wait in for others."""
        self._moves += 1
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def finish_step(self, step: str) -> None:
        """Record which step has ended, in the form in which it is reported."""
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
            # The store has gone, and with it the process that holds it: what needs that fails.
            self._stop.set()

    def _judge(
        self,
        silent: "_Stillness",
        waiting: "_Stillness",
        behind: "_Stillness",
        hosts: Sequence[str],
    ) -> None:
        """End this process, and on rank 0 the others, if a rank is silent or long waited for."""
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
        """Say once for whom others have long waited; it may only have a lot to do."""
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
        """Return lines that tell where ranks were; those that were in the same place together."""
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
        """End this process if the store does not answer, which :meth:`_talk` waits for."""
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
        os._exit(1)  # The main thread may wait for the silent rank, and hears of nothing.


def _about_key(name: str, rank: int) -> str:
    return f"{name}/about/{rank}"


def _main_stack() -> list[str]:
    """Return the functions that the main thread is in, the innermost first."""
    frame, found = sys._current_frames().get(threading.main_thread().ident), []
    while frame is not None and len(found) < _MAX_FRAMES:
        code = frame.f_code
        place = code.co_filename.removeprefix(_ROOT)
        found.append(f"{place}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return found


class _Stillness:
    """Of several values, in how many readings in a row each has not changed."""

    def __init__(self, num: int) -> None:
        self._values: Sequence[Any] = [None] * num
        self._counts = [0] * num

    def read(self, values: Sequence[Any], watched: Sequence[bool]) -> None:
        """Take a reading; values that are not watched now count as changed."""
        for i, (before, now) in enumerate(zip(self._values, values, strict=True)):
            self._counts[i] = self._counts[i] + 1 if watched[i] and before == now else 0
        self._values = values

    def late(self, limit: int) -> list[int]:
        """Return the positions of values that have not changed in ``limit`` readings.

        If there are some, those that will probably be in the next ones are among them: what is lost
        with a machine falls silent together.
        """
        if max(self._counts) < limit:
            return []
        return [i for i, count in enumerate(self._counts) if count >= limit - 2]
