"""How processes find out who starts together with them.

They do so through what ``torch.distributed`` calls a store: keys and values in one process, for all
to read.
"""

import time
import uuid
from typing import Any

from torch_utils.heartbeat import beat, beat_key

_POLL_SEC = 0.05


def meet(store: Any, rank: int, world_size: int, deadline: float) -> str:
    """Return a new name that the processes share which start together now, and no others.

    After a restart torchrun's store still holds what the processes before have written: where they
    listened, and their answers here. So each process comes with a word of its own, which rank 0
    repeats to it together with the name, until each has shown that it knows the name. The latter
    is its first sign of life, see :mod:`torch_utils.heartbeat`.

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
