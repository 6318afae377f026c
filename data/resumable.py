"""Folders that several ranks fill together, and that can be completed after an interruption.

A claim file states what the folder is to become, a lock keeps other processes out, each part
appears whole or not at all, and the ranks divide the missing parts among themselves.
"""

import collections
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dnnlib.errors import refusal
from dnnlib.files import check_target, lock_folder, write_json
from dnnlib.parallel import thread_map
from dnnlib.progress import progress
from dnnlib.text import join_names
from dnnlib.typed import parse_json
from torch_utils import distributed

T = TypeVar("T")
R = TypeVar("R")
IsSame = Callable[[str, Any], bool]
_LOOK_AHEAD = 4  # Items per thread.


def check_folder(
    dest: Path, what: str, is_ours: Callable[[Path], bool], option: str = "--dest"
) -> None:
    """Raise ValueError unless ``dest``, given by ``option``, can be a folder of ``what``."""
    check_target(option, dest, is_folder=True)
    if dest.suffix.lower() in (".zip", ".npz", ".npy", ".tar"):
        raise ValueError(f"{option}: got {dest}; {what} are written to a folder, give its name.")
    others = dest.is_dir() and any(not path.name.startswith(".") for path in dest.iterdir())
    if others and not is_ours(dest):
        remedy = "delete it or choose another name"
        raise refusal(option, but=f"{dest} holds other files and no {what}", remedy=remedy)


@contextlib.contextmanager
def locked(dest: Path, verb: str, option: str = "--dest") -> Iterator[None]:
    """Lock a folder during the block, and first delete temporary files that killed writers left.

    Collective; rank 0 holds the lock on behalf of all ranks. Raises ValueError if another process
    holds it; ``verb`` says in that message what it is doing there (``encoding into``).
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            dest.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(dest, f"{option}: another process is {verb} {dest}"))
            for leftover in dest.rglob(".*.tmp"):
                leftover.unlink()

        distributed.on_main(lock)
        yield


def check_claim(
    file: Path, protocol: Mapping[str, Any], option: str, what: str, is_same: IsSame | None = None
) -> None:
    """Raise ValueError if a claim file exists and is unreadable or differs from ``protocol``."""
    if not file.is_file():
        return
    try:
        there = dict(parse_json(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        problem = f"cannot be read ({error}), so the origin of the {what} beside it is unknown"
        remedy = "choose another folder, or delete that one"
        raise refusal(file, but=problem, remedy=remedy) from None
    check_protocol(file.parent, protocol, there, option, what, is_same)


def check_protocol(
    folder: Path,
    protocol: Mapping[str, Any],
    there: Mapping[str, Any],
    option: str,
    what: str,
    is_same: IsSame | None = None,
) -> None:
    """Raise ValueError, naming the differences, if ``folder`` holds ``what`` made in another way.

    Args:
        protocol: Settings that determine the content, as plain values by the names that users know.
        there: The protocol by which the content of the folder was made.
        option: The option that gave the folder.
        is_same: Called with a name and its value in ``there``; returns whether that value counts
            as the one in ``protocol``. Equality by default.
    """
    is_same = is_same or (lambda name, value: value == protocol[name])
    names = [name for name in protocol if not is_same(name, there.get(name))]
    if names:
        problem = f"{folder} holds {what} made with another {join_names(names)}"
        remedy = "choose another folder, or delete that one to start anew"
        raise refusal(option, but=problem, remedy=remedy)


def claim(file: Path, protocol: Mapping[str, Any], option: str, what: str) -> None:
    """Write the claim file of a folder; raises ValueError if it was claimed for others."""
    protocol = json.loads(json.dumps(protocol))
    check_claim(file, protocol, option, what)
    write_json(file, protocol)


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's share of the items: every ``world_size``-th one, from ``rank`` on."""
    return items[distributed.rank() :: distributed.world_size()]


@contextlib.contextmanager
def progress_of_ranks(
    total: int, own: int, label: str, unit: str = "img", *, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show the progress of all ranks towards ``total``, extrapolated from that of rank 0.

    Yields a function to call with the number of units that this rank has completed since the last
    call; ``own`` is the number of units that it has in all. The end of the block completes the
    bar, even if rank 0 had nothing to do.
    """
    done, look = 0, dict(label=label, unit=unit, transient=transient)
    with progress(total=total, disable=not distributed.is_main(), **look) as bar:

        def on_done(count: int = 1) -> None:
            nonlocal done
            done += count
            bar.update(round(done * total / own) - bar.n)

        yield on_done
        bar.update(total - bar.n)


def map_of_ranks(
    function: Callable[[T], R], items: Sequence[T], num_threads: int, label: str, unit: str = "img"
) -> list[R]:
    """Return ``function(item)`` for all items, in order, computed by all ranks. Collective."""
    mine, found = share(items), []
    bar = progress_of_ranks(len(items), len(mine), label, unit)
    with distributed.together(), bar as on_done:
        for result in thread_map(function, mine, num_threads, _LOOK_AHEAD * num_threads):
            found.append(result)
            on_done()
    parts = distributed.gather_objects(found)
    return [parts[index % len(parts)][index // len(parts)] for index in range(len(items))]


class BackgroundWriter:
    """Runs calls in threads, with a bounded number pending; a later method re-raises their errors.

    Use it as a context manager: leaving the block waits for all calls, unless it raised an error.
    """

    def __init__(self, num_threads: int, num_ahead: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads)
        self._pending: collections.deque[Future] = collections.deque()
        self._num_ahead = num_ahead

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Schedule a call, then wait until at most ``num_ahead`` calls are pending."""
        self._pending.append(self._pool.submit(function, *args, **kwargs))
        self.wait(self._num_ahead)

    def wait(self, num_left: int = 0) -> None:
        """Wait until at most ``num_left`` calls are pending."""
        while len(self._pending) > num_left:
            self._pending.popleft().result()


@contextlib.contextmanager
def memory_for(count: int, what: str) -> Iterator[None]:
    """Turn an out-of-memory error for a batch of ``count`` items into a one-sentence ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        problem = f"no memory for {count} {what} at once; give a smaller one"
        raise refusal("--batch", but=problem) from None


def to_float16(
    values: torch.Tensor, label: Callable[[int], str], what: str, location: str
) -> np.ndarray:
    """Return the values [N, ...] of a batch in float16, on the CPU.

    Raises ValueError if any of them is not finite in float16. In the message, ``label(row)`` names
    the image, ``what`` its values, and ``location`` the encoder.
    """
    rows = values.to(torch.float16).cpu()
    bad = ~torch.isfinite(rows).flatten(1).all(dim=1)
    if bad.any():
        problem = f"its {what} values that are not finite or beyond float16 (65504)"
        remedy = f"{location} does not fit these images, use another one, or --precision=fp32 if it"
        raise refusal(label(int(bad.nonzero()[0])), but=problem, remedy=f"{remedy} is not yet")
    return rows.numpy()
