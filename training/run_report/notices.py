"""Notices about a run: warnings that it gave, or that its files show, each with its remedy."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.text import format_kimg
from training.run_report.history import History
from training.run_report.rows import is_finite, read_text

LEVELS = ("error", "warning", "info")  # The worst first.
_NAMES_OF_LEVELS = {"critical": "error", "fatal": "error", "warn": "warning", "note": "info"}
_LOWER_STEPS = (
    "Lower the learning rate (--lr), clip gradients (--clip-grad=1), or train with "
    "--precision=bf16."
)
# Patterns, levels and remedies of log lines that do not begin with "Warning:".
_LOG_LINES = (
    (r"No (pictures|scores) at kimg .*", "warning", _LOWER_STEPS),
    (r"Stopped by \w+ at kimg .*", "info", ""),
    (r".*Written again from the training state\.", "warning", "Check the disk."),
    (r"Stopped early at kimg .*", "info", ""),
    (r"Weights & Biases cannot be used .*", "info", ""),
)
# Remedies for the warnings in score rows, by how the warning begins.
_ROW_REMEDIES = {
    "low count": "Score more images, or compare with scores of equally many only.",
    "the images are jpeg": "Compare images of one file format.",
    "the images are": "Compare images of one size and one file format.",
    "the classes have other names": "Give a reference with the classes of the training data.",
    "the median LPIPS has risen": "Compare the pictures of both snapshots, and continue "
    "from the better one with a lower --lr.",
    "an unchanged text": "Give the text encoder that the features were made with (--text).",
}


@dataclasses.dataclass(frozen=True)
class Notice:
    """A message about a run, with its remedy (empty if there is nothing to do)."""

    level: str
    message: str
    remedy: str = ""
    name: str = ""
    kimg: float | None = None


def line_of(row: Mapping[str, Any]) -> str:
    """Return the line of ``log.txt`` for a row of ``watch.jsonl``."""
    message, remedy = (_text(row.get(key)).rstrip(".") for key in ("message", "remedy"))
    heading = "Note" if _text(row.get("level")).lower() == "info" else "Warning"
    return f"{heading}: {message}: {remedy}."


def watch_notices(rows: Iterable[Mapping[str, Any]]) -> list[Notice]:
    """Return the notices in rows of ``watch.jsonl``; missing fields stay empty.

    Rows with neither a message nor a name are left out.
    """
    found = []
    for row in rows:
        texts = {key: _text(row.get(key)) for key in ("name", "message", "remedy", "level")}
        level = texts["level"].lower()
        level = _NAMES_OF_LEVELS.get(level, level)
        message = _sentence(texts["message"]) or texts["name"]
        kimg = row.get("kimg")
        if message:
            found.append(
                Notice(
                    level=level if level in LEVELS else "warning",
                    message=message,
                    remedy=_sentence(texts["remedy"]),
                    name=texts["name"] if message != texts["name"] else "",
                    kimg=kimg if is_finite(kimg) else None,
                )
            )
    return found


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, dict | list) else str(value)


def log_notices(run_dir: Path, watched: Iterable[Mapping[str, Any]] = ()) -> Iterator[Notice]:
    """Yield the warnings and other events in ``log.txt``, with the kimg of the tick before.

    Those that are also in ``watched``, the rows of ``watch.jsonl``, are left out.
    """
    kimg, known = None, {line_of(row) for row in watched}
    for line in read_text(run_dir / "log.txt").splitlines():
        if found := re.match(r"tick \d+ +kimg ([\d.]+) ", line):
            kimg = float(found[1])
        elif line in known:
            continue
        elif found := re.match(r"Warning: (.*)", line):
            message, _, remedy = found[1].partition(": ")
            yield Notice("warning", _sentence(message), _sentence(remedy), kimg=kimg)
        else:
            for pattern, level, remedy in _LOG_LINES:
                if re.fullmatch(pattern, line):
                    yield Notice(level, line, remedy, kimg=kimg)
                    break


def rollback_notices(rows: Iterable[Mapping[str, Any]]) -> Iterator[Notice]:
    """Yield a notice for each row of ``rollbacks.jsonl``: from where the run went back, and why."""
    for row in rows:
        places = [row.get(name) for name in ("from_nimg", "to_nimg")]
        if all(is_finite(place) for place in places):
            kimg, back = (place / 1000 for place in places)
            why = _text(row.get("reason"))
            text = f"Went back from kimg {format_kimg(kimg)} to kimg {format_kimg(back)}: {why}"
            yield Notice("warning", _sentence(text), _LOWER_STEPS, "rollback", kimg)


def score_notices(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Notice]:
    """Yield the warnings in score rows, which come with their sources."""
    for _, row in rows:
        warnings = row.get("warnings")
        for text in warnings if isinstance(warnings, list) else ():
            if isinstance(text, str):
                remedies = (r for start, r in _ROW_REMEDIES.items() if text.startswith(start))
                kimg = row.get("kimg")
                kimg = kimg if is_finite(kimg) else None
                yield Notice("warning", _sentence(text), next(remedies, ""), row["metric"], kimg)


def history_notices(history: History, num_damaged: int) -> Iterator[Notice]:
    """Yield notices on skipped steps, losses that are not finite, and damaged lines.

    ``num_damaged`` counts damaged lines in other files.
    """
    skipped = history.values("Loss/skipped_steps")
    total = np.nanmax(skipped, initial=0)
    if total > 0:
        first = history.kimg[int(np.flatnonzero(skipped > 0)[0])]
        text = f"{total:,.0f} steps were skipped, because their gradients were not finite."
        yield Notice("warning", text, _LOWER_STEPS, "skipped steps", first)
    lost = np.flatnonzero(~np.isfinite(history.values("Loss/loss")))
    if len(lost):
        text = f"The loss was not finite in {len(lost):,} of {len(history.kimg):,} ticks."
        level = "error" if lost[-1] == len(history.kimg) - 1 else "warning"
        yield Notice(level, text, _LOWER_STEPS, "loss", history.kimg[int(lost[0])])
    num_damaged += history.num_damaged
    if num_damaged:
        text = f"{num_damaged:,} lines of the run's files cannot be read and are left out."
        remedy = "Resume the run, which drops them, if it was killed; else check the disk."
        yield Notice("info", text, remedy, "damaged lines")


def merged(notices: Iterable[Notice]) -> list[tuple[Notice, int]]:
    """Return notices, the worst first, each with the number of times that it was given.

    Of notices whose messages differ only in numbers, the latest stands for all. If it has no
    remedy, that of an earlier one is kept.
    """
    found: dict[str, tuple[Notice, int]] = {}
    for notice in notices:
        key = re.sub(r"[\d.]+", "#", notice.message).strip(" .#").lower()
        before, num = found.get(key, (notice, 0))
        if not notice.remedy:
            notice = dataclasses.replace(notice, remedy=before.remedy)
        found[key] = notice, num + 1
    return sorted(found.values(), key=lambda pair: LEVELS.index(pair[0].level))


def where(notice: Notice) -> str:
    """Return the kimg at which a notice was given, as text; empty if unknown."""
    return "" if notice.kimg is None else f"at kimg {format_kimg(notice.kimg)}"


def _sentence(text: str) -> str:
    """Return a text with a capital at its start and a full stop at its end."""
    text = text.strip()
    stop = "" if text.endswith((".", "?", "!", ")")) else "."
    return f"{text[0].upper()}{text[1:]}{stop}" if text else ""
