"""The scores of a run, recorded during it or in files beside it, and their variation by chance."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.run_report.rows import is_finite, kimg_of_name, read_object, read_rows

# Values that are better if higher, and those that are better if lower; others are not ranked.
_HIGHER = {"is", "precision", "recall", "density", "coverage"}
_LOWER = {"fid", "sfid", "kid", "cmmd", "fd_dinov2", "fd_pixels", "val_loss", "lpips_p50"}
_SHARES = {"precision": "num_images", "recall": "reference_count", "coverage": "reference_count"}
_SPREADS = ("_std", "_se")
_MEDIAN_FACTOR = (math.pi / 2) ** 0.5
IN_RUN = "during the run"


@dataclasses.dataclass(frozen=True)
class Score:
    """One value of a score row.

    Attributes:
        metric, name: The metric, and which of its values.
        kimg: Kimg of the snapshot; None if unknown.
        error: One standard deviation of the value from seed to seed; None if unknown.
        error_from: How the error was found, in words.
        num_images: Images that were scored; None if unknown.
        source: ``during the run``, or the name of the file.
    """

    metric: str
    name: str
    kimg: float | None
    value: float
    error: float | None
    error_from: str
    num_images: int | None
    source: str

    @property
    def is_in_run(self) -> bool:
        return self.source == IN_RUN

    @property
    def title(self) -> str:
        return self.metric if self.name == self.metric else f"{self.metric}: {self.name}"


def better(name: str) -> str | None:
    """Return whether ``higher`` or ``lower`` is better for a value; None if unknown."""
    return "higher" if name in _HIGHER else "lower" if name in _LOWER else None


def is_spread(name: str) -> bool:
    """Return whether a value is the standard deviation or error of another one."""
    return name.endswith(_SPREADS)


def best(scores: Iterable[Score]) -> Score | None:
    """Return the best score of one value during a run.

    None if there is no score, or if it is unknown whether higher or lower is better.
    """
    found = [score for score in scores if score.is_in_run]
    direction = better(found[0].name) if found else None
    if direction is None:
        return None
    sign = 1 if direction == "higher" else -1
    return max(found, key=lambda score: sign * score.value)


def read_score_rows(run_dir: Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Return score rows with their sources, and the number of lines that could not be read.

    The run writes its rows to ``metric-*.jsonl``; ``fid.py`` writes others to ``.json`` files.
    """
    found, num_damaged = [], 0
    for path in sorted(run_dir.glob("metric-*.jsonl")):
        rows, damaged = read_rows(path)
        num_damaged += damaged
        found += [(IN_RUN, row) for row in rows if _is_score_row(row)]
    for path in sorted(run_dir.glob("*.json")):
        rows = read_object(path).get("rows")
        if isinstance(rows, list):
            found += [(path.name, row) for row in rows if _is_score_row(row)]
    return found, num_damaged


def _is_score_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("metric"), str)


def scores_of(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[tuple[str, str], list[Score]]:
    """Return the scores in rows by (metric, value), in the order of kimg, with their errors.

    Of several scores during the run at the same kimg, the last counts. The error is the first of
    these that is known: the standard deviation over blocks of seeds (``noise_band``), the spread or
    standard error in the row, the standard error over items, or that of a share of so many images.
    If a row has none, the one over blocks of another row is used, in proportion to the value and to
    1 / sqrt(images).
    """
    found: dict[tuple[str, str], dict[Any, Score]] = {}
    for index, (source, row) in enumerate(rows):
        for score in _scores_of_row(source, row):
            key = score.kimg if score.is_in_run else (source, index)
            found.setdefault((score.metric, score.name), {})[key] = score
    scores = {key: _by_kimg(own.values()) for key, own in found.items()}
    return {key: [_with_band_of_others(score, own) for score in own] for key, own in scores.items()}


def _by_kimg(scores: Iterable[Score]) -> list[Score]:
    return sorted(scores, key=lambda s: math.inf if s.kimg is None else s.kimg)


def _scores_of_row(source: str, row: Mapping[str, Any]) -> Iterable[Score]:
    values = row.get("values")
    if not isinstance(values, dict) or not values:
        values = {row["metric"]: row.get("value")}
    kimg = row.get("kimg")
    if not is_finite(kimg):
        names = [row.get(name) for name in ("snapshot", "network")]
        known = (kimg_of_name(Path(n).name) for n in names if isinstance(n, str))
        kimg = next((k for k in known if k is not None), None)
    for name, value in values.items():
        if not is_finite(value) or is_spread(str(name)):
            continue
        error, error_from = _error(row, values, name, value)
        num = row.get("num_images", row.get("num"))
        num = num if type(num) is int else None
        yield Score(row["metric"], str(name), kimg, value, error, error_from, num, source)


def _error(
    row: Mapping[str, Any], values: Mapping[str, Any], name: str, value: float
) -> tuple[float | None, str]:
    bands = row.get("noise_band")
    band = bands.get(name) if isinstance(bands, dict) else None
    if isinstance(band, dict) and is_finite(band.get("std")):
        blocks = band.get("values")
        num = f"{len(blocks)} " if isinstance(blocks, list) else ""
        return band["std"], f"over {num}blocks of seeds"
    for suffix in _SPREADS:
        if is_finite(values.get(f"{name}{suffix}")):
            return values[f"{name}{suffix}"], "spread over subsets, as the row holds it"
    error = _error_over_items(row.get("per_item"), value)
    if error is not None:
        return error, "standard error over images"
    num = row.get(_SHARES.get(name, ""))
    if type(num) is int and num > 0 and 0 <= value <= 1:
        return (value * (1 - value) / num) ** 0.5, f"of a share of {num:,} images"
    return None, ""


def _error_over_items(items: Any, value: float) -> float | None:
    """Return the standard error of a value that is the mean or median of a column of items.

    For the median, the numbers are taken to be normally distributed. None if no column fits.
    """
    items = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    for column in dict.fromkeys(name for item in items for name in item):
        numbers = [item[column] for item in items if is_finite(item.get(column))]
        if len(numbers) < 2 or len(numbers) < len(items):
            continue
        error = statistics.stdev(numbers) / len(numbers) ** 0.5
        if math.isclose(statistics.fmean(numbers), value, rel_tol=1e-6):
            return error
        if math.isclose(statistics.median(numbers), value, rel_tol=1e-6):
            return _MEDIAN_FACTOR * error
    return None


def _with_band_of_others(score: Score, others: Iterable[Score]) -> Score:
    """Return a score with an error: if it has none, that of the score nearest in kimg, scaled.

    Only errors measured over blocks of seeds are passed on.
    """
    measured = [s for s in others if s.error_from.startswith("over ") and s.value]
    if score.error is not None or not measured:
        return score
    kimg = score.kimg or 0.0
    nearest = min(measured, key=lambda s: abs((s.kimg or 0.0) - kimg))
    error = abs(nearest.error * score.value / nearest.value)
    if score.num_images and nearest.num_images:
        error *= (nearest.num_images / score.num_images) ** 0.5
    error_from = f"in proportion to that of {nearest.source}"
    return dataclasses.replace(score, error=error, error_from=error_from)
