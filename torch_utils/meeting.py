"""How processes agree on which of them start together.

They use a store of ``torch.distributed``: keys and values held by one process, which all can read
and write.
"""

import time
import uuid
from typing import Any

from torch_utils.heartbeat import beat, beat_key

_POLL_SEC = 0.05


def meet(store: Any, rank: int, world_size: int, deadline: float) -> str:
    """Return a new name shared by the processes that start together now, and by no others.

    After a restart, torchrun's store still holds what earlier processes wrote: the addresses that
    they listened at, and their answers here. So each process sends a word of its own, which rank 0
    repeats to it together with the name, until every process has shown that it knows the name. It
    does so by its first sign of life; see :mod:`torch_utils.heartbeat`.

    Raises TimeoutError after ``deadline``, on the clock of ``time.monotonic``; it names the missing
    ranks, or says that rank 0 did not answer.
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
        store.set(beat_key(name, rank), beat())
        return name
    store.set(beat_key(name, rank), beat())
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([beat_key(name, other)]):
                missing.remove(other)
            elif hello := _read(store, f"hello/{other}"):
                store.set(f"answer/{other}", f"{hello} {name}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"missing: rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(_POLL_SEC)
    return name


def _read(store: Any, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
