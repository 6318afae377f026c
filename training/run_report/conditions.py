"""Reports on conditions in the files of a run: rows that ``fid.py conditions --jsonl`` wrote."""

import dataclasses
from pathlib import Path
from typing import Any

from training.run_report.rows import is_finite, kimg_of_name, read_rows

ALL_LEVELS = "all"  # Value of ``sigma`` in rows that average over noise levels.
_METRICS = ("conditioning", "conditioning_attention")
_OTHERS = ("stats.", "watch.", "metric-")  # Prefixes of files with other rows.


@dataclasses.dataclass(frozen=True)
class Effect:
    """How much output and loss change when one condition is changed in one way."""

    condition: str
    change: str
    sigma: float | None  # Noise level; None for the average over all levels.
    values: dict[str, float]  # Empty if there is nothing to measure.
    reason: str  # Why nothing was measured, or a note on the values.


@dataclasses.dataclass(frozen=True)
class ConditionsReport:
    """The report on one snapshot."""

    source: str
    panel: str
    snapshot: str
    kimg: float | None
    effects: list[Effect]
    attention: list[dict[str, float]]  # For each layer, the share of each part of the context.

    def overall(self) -> list[Effect]:
        return [effect for effect in self.effects if effect.sigma is None]


def read_conditions(run_dir: Path) -> list[ConditionsReport]:
    """Return the reports in the ``.jsonl`` files of a run folder, the newest snapshot first."""
    found = []
    for path in sorted(run_dir.glob("*.jsonl")):
        if path.name.startswith(_OTHERS):
            continue
        by_snapshot: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in read_rows(path)[0]:
            if row.get("metric") in _METRICS:
                key = str(row.get("network", row.get("snapshot", ""))), str(row.get("kimg", ""))
                by_snapshot.setdefault(key, []).append(row)
        found += [_report(path.name, name, rows) for (name, _), rows in by_snapshot.items()]
    return sorted(found, key=lambda report: -1.0 if report.kimg is None else report.kimg)[::-1]


def _report(source: str, name: str, rows: list[dict[str, Any]]) -> ConditionsReport:
    snapshot, stated = Path(name).name, rows[0].get("kimg")
    effects, attention = [], []
    for row in rows:
        values = row.get("values")
        values = values if isinstance(values, dict) else {}
        values = {str(key): value for key, value in values.items() if is_finite(value)}
        if row["metric"] == "conditioning_attention":
            layer = row.get("layer")
            attention.append((layer if is_finite(layer) else len(attention), values))
            continue
        sigma = row.get("sigma")
        if is_finite(sigma) or sigma == ALL_LEVELS:
            reason = str(row.get("reason") or row.get("note") or "")
            sigma = None if sigma == ALL_LEVELS else float(sigma)
            names = (str(row.get(key, "?")) for key in ("condition", "change"))
            effects.append(Effect(*names, sigma, values, reason))
    attention = [values for _, values in sorted(attention, key=lambda pair: pair[0])]
    kimg = float(stated) if is_finite(stated) else kimg_of_name(snapshot)
    return ConditionsReport(
        source, str(rows[0].get("panel", "")), snapshot, kimg, effects, attention
    )
