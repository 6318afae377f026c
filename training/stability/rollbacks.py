"""Rollbacks to an earlier state: their record, and the removal of what they make obsolete.

``rollbacks.jsonl`` in the run folder has a row for each rollback, written before the run continues.
States and snapshots record how many rollbacks preceded them, so that any later start knows which of
them belong to an abandoned part of the run.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dnnlib.errors import refusal
from dnnlib.files import atomic_write, read_file
from dnnlib.saver import remove_state
from dnnlib.text import format_kimg
from dnnlib.typed import parse_json
from training.checkpoint import (
    find_profiles,
    find_snapshots,
    find_states,
    load_state,
    read_header,
)
from training.saving.state_folder import is_of_stop

ROLLBACKS_FILE = "rollbacks.jsonl"


class RollbackRequested(BaseException):  # Not an Exception: handlers of errors let it pass.
    """Asks to continue from a state of at most ``first_nimg`` images, with other data."""

    def __init__(self, reason: str, cur_nimg: int, first_nimg: int) -> None:
        super().__init__(reason)
        self.reason, self.cur_nimg, self.first_nimg = reason, cur_nimg, first_nimg


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One rollback of a run: its number, from 1, and the image counts that it goes from and to."""

    number: int
    from_nimg: int
    to_nimg: int
    reason: str


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Return the rollbacks of a run so far, in order; raises ValueError for a damaged file."""
    path = run_dir / ROLLBACKS_FILE
    if not path.exists():
        return []
    found = []
    try:
        for line in read_file(path).decode().splitlines():
            row = parse_json(line)
            numbers = [row[name] for name in ("number", "from_nimg", "to_nimg")]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("a number is not valid")
            found.append(Rollback(*numbers, reason=str(row["reason"])))
        if [rollback.number for rollback in found] != list(range(1, len(found) + 1)):
            raise ValueError("rows are missing")
    except (ValueError, KeyError, TypeError, OSError) as error:
        remedy = "restore it, or start a new run"
        raise refusal(path, but=f"cannot be read ({error})", remedy=remedy) from error
    return found


def add_rollback(run_dir: Path, asked: RollbackRequested, report: Callable[[str], None]) -> int:
    """Record a rollback to the newest state before the problem; return how many there are now.

    States that were written only for a stop do not count, because an uninterrupted run has none. If
    no state is old enough, the rollback goes to the oldest; without states, to the beginning. What
    the run made after that point is removed.
    """
    before = read_rollbacks(run_dir)
    regular = [made for path, made in _states(run_dir) if not is_of_stop(path)]
    known = [made["cur_nimg"] for made in regular]  # Newest first.
    earlier = [nimg for nimg in known if nimg <= asked.first_nimg]
    to_nimg = earlier[0] if earlier else known[-1] if known else 0
    number = len(before) + 1
    found = [*before, Rollback(number, asked.cur_nimg, to_nimg, asked.reason)]
    with atomic_write(run_dir / ROLLBACKS_FILE, "w", encoding="utf-8") as file:
        for rollback in found:
            file.write(json.dumps(dataclasses.asdict(rollback)) + "\n")
    places = [format_kimg(nimg / 1000) for nimg in (asked.cur_nimg, to_nimg)]
    report(
        f"Rollback {number}: from kimg {places[0]} to kimg {places[1]}, continuing with other data."
    )
    return remove_abandoned(run_dir)


def remove_abandoned(run_dir: Path, *, only_count: bool = False) -> int:
    """Remove what abandoned parts of a run made; return the number of its rollbacks.

    If a kill interrupts the removal, the next call completes it. With ``only_count`` nothing is
    removed.
    """
    rollbacks = read_rollbacks(run_dir)
    if not rollbacks or only_count:
        return len(rollbacks)

    def is_abandoned(made: dict[str, Any]) -> bool:
        later = [found.to_nimg for found in rollbacks if found.number > made.get("rollbacks", 0)]
        return made["cur_nimg"] > min(later, default=made["cur_nimg"])

    for path in [*find_snapshots(run_dir), *find_profiles(run_dir)]:
        try:
            made = read_header(path)[1]
        except ValueError:
            continue  # The command that reads it reports the damage.
        if is_abandoned(made):
            # What was made of a snapshot does not record its rollbacks: it goes before that does.
            count = path.stem.removeprefix("network-snapshot-")
            for suffix in ("png", "jsonl"):
                for shown in run_dir.glob(f"*-{count}.{suffix}"):
                    shown.unlink()
            path.unlink()
    for path, made in list(_states(run_dir)):
        if is_abandoned(made):
            remove_state(path)
    return len(rollbacks)


def _states(run_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the readable states, newest first, each with the progress that it records."""
    for path in find_states(run_dir):
        try:
            yield path, load_state(path, lazily=True)["progress"]
        except ValueError:
            continue
