"""Warnings when a run leaves the bands of its reference curves."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import RunConfig
from training.reference_curves.judge import judge, reasons
from training.reference_curves.make import data_facts
from training.reference_curves.reference import RUN_FILE, Reference, read_reference, write_reference
from training.reference_curves.settings import compare_settings, deciding_settings
from training.run_report.files import OPTIONS_FILE, STATS_FILE, WATCH_FILE
from training.run_report.history import History
from training.run_report.rows import is_finite, read_object, read_rows
from training.watching.finding import Finding

_NAME = "outside_reference"


def place_reference(
    run_dir: Path,
    config: RunConfig,
    origin: Mapping[str, Any] | None,
    reference: Reference | None,
) -> str:
    """Write reference curves into the folder of a run that is comparable, and return a message.

    If the run is not comparable, as after a change of settings, any older copy is removed and the
    message is empty. ``origin`` describes the initial weights of the run.
    """
    if reference is not None and reference.curves:
        own = deciding_settings(config, origin), data_facts(read_object(run_dir / OPTIONS_FILE))
        found = compare_settings(own[0], reference.settings, own[1], reference.data)
        if not found.differences:
            if not found.same_average:  # Validation and scores depend on the weight average.
                curves = {k: own for k, own in reference.curves.items() if own.kind == "window"}
                reference = dataclasses.replace(reference, curves=curves)
            write_reference(run_dir / RUN_FILE, reference)
            notes = f" ({'; '.join(found.notes)})" if found.notes else ""
            what = f"the reference curves of {reference.num_runs} seeds"
            return f"Compared with {what} up to kimg {reference.kimg:g}{notes}.\n"
    (run_dir / RUN_FILE).unlink(missing_ok=True)
    return ""


class ReferenceWatch:
    """Compares a run with the ``reference.json`` in its folder, if there is one.

    It keeps all its state in the files of the run, so that a resumed run warns of the same things.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._history = run_dir, History(run_dir / STATS_FILE)
        path = run_dir / RUN_FILE
        self._reference = read_reference(path) if path.is_file() else None

    def findings(self) -> list[Finding]:
        """Return a finding if the run is outside its bands, unless reported since it left them.

        A comparison that fails is reported once as a finding of level ``info``.
        """
        if self._reference is None:
            return []
        try:
            return self._judged(self._reference)
        except Exception as error:  # Whatever it is, a comparison never ends a run.
            self._reference = None
            message = f"the run cannot be compared with its reference curves ({error})"
            remedy = f"find the reason with python fid.py check {self._run_dir}"
            return [Finding(name="reference_curves", message=message, remedy=remedy, level="info")]

    def _judged(self, reference: Reference) -> list[Finding]:
        self._history.read()
        verdict = judge(self._run_dir, self._history, reference)
        lasting = [found for found in verdict.departures if found.lasts]
        if not lasting:
            return []
        since = min(found.since for found in lasting)
        rows, _ = read_rows(self._run_dir / WATCH_FILE)
        told = [row.get("kimg") for row in rows if row.get("name") == _NAME]
        if any(is_finite(kimg) and kimg >= since - 1e-9 for kimg in told):
            return []
        sides = {found.name: found.side for found in verdict.departures}
        first, num = lasting[0], len(lasting)
        more = f", and so are {num - 1} other curves" if num > 1 else ""
        return [
            Finding(
                name=_NAME,
                message=f"{first.title} {first.where}{more}",
                remedy=f"{reasons(first, sides)}; see python fid.py check {self._run_dir}",
            )
        ]
