"""Rollbacks to an earlier state: their record, and what they leave behind.

``rollbacks.jsonl`` in the run folder has a row for each rollback, and is there before the run goes
on. States and snapshots say how many came before them, so that any later start knows which belong
to a part of the run that was given up.
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


class RollbackRequested(BaseException):  # Nobody who catches errors means this.
    """Training is to go back to a state before ``first_nimg`` images, and on with other data."""

    def __init__(self, reason: str, cur_nimg: int, first_nimg: int) -> None:
        super().__init__(reason)
        self.reason, self.cur_nimg, self.first_nimg = reason, cur_nimg, first_nimg


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One rollback of a run: its number, from 1, and the images before and after it."""

    number: int
    from_nimg: int
    to_nimg: int
    reason: str


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Return the rollbacks of a run so far; raises ValueError for a damaged file."""
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
    """Write down a rollback to the newest state before the trouble; return how many there are.

    States of a stop do not count, as a run that was not stopped has none. Where no state is as old,
    it goes to the oldest; without any, to the beginning. What the run made after that state is
    removed.
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
    """Remove what was made after the states to which a run went back; return how often it did.

    A kill in between is made up for by the next call. With ``only_count`` nothing is removed.
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
            continue  # Whoever uses it says what is wrong.
        if is_abandoned(made):
            # Pictures cannot tell, and go first.
            count = path.stem.removeprefix("network-snapshot-")
            for picture in run_dir.glob(f"*-{count}.png"):
                picture.unlink()
            path.unlink()
    for path, made in list(_states(run_dir)):
        if is_abandoned(made):
            remove_state(path)
    return len(rollbacks)


def _states(run_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the readable states, newest first, and the progress that each holds."""
    for path in find_states(run_dir):
        try:
            yield path, load_state(path, lazily=True)["progress"]
        except ValueError:
            continue
