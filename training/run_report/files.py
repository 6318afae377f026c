"""A run, read from nothing but the files in its folder."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dnnlib.errors import refusal
from dnnlib.text import format_kimg
from training.reference_curves.reference import RUN_FILE, Reference, read_reference
from training.run_report import notices
from training.run_report.conditions import ConditionsReport, read_conditions
from training.run_report.history import History
from training.run_report.notices import Notice
from training.run_report.pictures import Source, find_pictures
from training.run_report.rows import flat, is_finite, kimg_of_name, read_object, read_rows
from training.run_report.scores import Score, read_score_rows, scores_of

OPTIONS_FILE, STATS_FILE, WATCH_FILE = "training_options.json", "stats.jsonl", "watch.jsonl"
ROLLBACKS_FILE = "rollbacks.jsonl"
PREDICTION_FILE = "prediction.json"
_SNAPSHOT = re.compile(r"network-snapshot-\d+(?:\.\d{3})?\.pkl")
_STATE = re.compile(r"training-state-\d+(?:\.\d{3})?(?:\.pt)?")


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a run folder.

    Attributes:
        options: The content of ``training_options.json``; empty if it cannot be read.
        settings: The configuration by name, such as ``training.batch``.
        scores: Scores by (metric, name of the value), in the order of kimg.
        notices: Each notice with the number of times that it was given, the worst first.
        pictures: The pictures of each series, in the order of kimg.
        conditions: Reports on conditions, the newest snapshot first.
        snapshots, states: Paths of snapshots and training states, the newest last.
        reference: The reference curves that the run is compared with, if any.
        title: What a page calls the run instead of the name of its folder.
    """

    run_dir: Path
    options: dict[str, Any]
    settings: dict[str, Any]
    history: History
    scores: dict[tuple[str, str], list[Score]]
    notices: list[tuple[Notice, int]]
    pictures: dict[str, list[Source]]
    conditions: list[ConditionsReport]
    snapshots: list[Path]
    states: list[Path]
    reference: Reference | None = None
    title: str | None = None

    @property
    def name(self) -> str:
        """What a page calls the run: ``title``, or else the name of its folder."""
        return self.title or self.run_dir.resolve().name

    @property
    def kimg(self) -> float:
        """Kimg of the newest tick."""
        return self.history.kimg[-1] if len(self.history.kimg) else 0.0

    @property
    def total_kimg(self) -> float | None:
        """Kimg after which the run ends; None if that is unknown."""
        found = self.options.get("total_kimg", self.settings.get("training.kimg"))
        return float(found) if is_finite(found) and found > 0 else None

    @property
    def is_complete(self) -> bool:
        return self.total_kimg is not None and self.kimg >= self.total_kimg - 1e-9

    @property
    def status(self) -> str:
        """How far the run is, as a sentence."""
        if not len(self.history.kimg):
            return "No tick is recorded yet."
        if self.is_complete:
            return f"Complete at kimg {format_kimg(self.kimg)}."
        end = "" if self.total_kimg is None else f" of {format_kimg(self.total_kimg)}"
        why = " Stopped by a signal." if (self.run_dir / "requeue").is_file() else ""
        return f"At kimg {format_kimg(self.kimg)}{end}.{why}"


def is_run(run_dir: Path) -> bool:
    """Return whether a folder is that of a run."""
    return any((run_dir / name).is_file() for name in (OPTIONS_FILE, STATS_FILE))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the run folders among ``paths``, and those directly inside the other folders, by name.

    Raises ValueError for a path that is no run folder and contains none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        inner = [path] if is_run(path) else []
        if not inner and path.is_dir():
            inner = sorted(child for child in path.iterdir() if is_run(child))
        if not inner:
            names = f"neither {OPTIONS_FILE} nor {STATS_FILE}"
            but = f"has {names}, and no folder in it has" if path.is_dir() else "is not a folder"
            raise refusal(path, but=but, remedy="give the folder of a training run")
        found |= dict.fromkeys(inner)
    return list(found)


def read_run(run_dir: Path, history: History | None = None) -> Run:
    """Return the contents of a run folder; ``history`` holds the curves that were read before.

    Missing and damaged files are not errors; lines that cannot be read are counted in a notice.
    """
    options = read_object(run_dir / OPTIONS_FILE)
    history = history or History(run_dir / STATS_FILE)
    history.read()
    rows, num_damaged = read_score_rows(run_dir)
    watched, damaged = read_rows(run_dir / WATCH_FILE)
    rollbacks, lost = read_rows(run_dir / ROLLBACKS_FILE)
    found = [
        *notices.watch_notices(watched),
        *notices.history_notices(history, num_damaged + damaged + lost),
        *notices.rollback_notices(rollbacks),
        *notices.log_notices(run_dir, watched),
        *notices.score_notices(rows),
    ]
    return Run(
        run_dir=run_dir,
        options=options,
        settings=dict(flat(options.get("config"))),
        history=history,
        scores=scores_of(rows),
        notices=notices.merged(found),
        pictures=find_pictures(run_dir),
        conditions=read_conditions(run_dir),
        snapshots=_by_kimg(run_dir, _SNAPSHOT),
        states=_by_kimg(run_dir, _STATE),
        reference=_reference_of(run_dir),
    )


def _reference_of(run_dir: Path) -> Reference | None:
    """Return the reference curves in the folder of a run; None if it has none that can be read."""
    path = run_dir / RUN_FILE
    try:
        return read_reference(path) if path.is_file() else None
    except ValueError:
        return None


def _by_kimg(run_dir: Path, pattern: re.Pattern) -> list[Path]:
    found = [
        path
        for path in run_dir.glob("*-*")
        if pattern.fullmatch(path.name) and (path.is_file() or (path / "manifest.json").is_file())
    ]
    return sorted(found, key=lambda path: kimg_of_name(path.name))
