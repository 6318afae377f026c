"""Whether the samples of each snapshot differ from one another as real images do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from data.preview import evenly_spaced
from training.run_report.files import WATCH_FILE
from training.run_report.rows import is_finite, read_rows
from training.telemetry import Telemetry, metric_is_recorded
from training.watching.finding import Finding

METRIC = "sample_spread"
_NUM_REALS = 64
_MAX_SIDE = 16  # Images are reduced to at most 16x16 pixels before they are compared.
_FEWEST = 4  # Fewer samples are not judged.
# Lower limits, each relative to the same statistic of real images: the mean squared distance of two
# images, the median distance to the nearest other image, and the variance of a detector's outputs.
_LEAST_SPREAD = 0.05
_LEAST_NEAREST = 0.1
_LEAST_DETECTED = 0.05
# A young network generates the mean of all images. Until it has had time to learn, its samples only
# have to differ at all, which they do after a few steps.
_FIRST_STEP, _NONE = 40, 1e-5
_LATER_STEP, _LATER_SHARE = 1000, 0.1


def spread(images: Tensor) -> dict[str, float]:
    """Return how far vectors [N, D] lie from one another.

    ``spread`` is the mean squared distance between two of them, ``nearest`` the median distance of
    one to its nearest neighbour.
    """
    num = len(images)
    distances = torch.cdist(images.double(), images.double())
    others = distances + torch.diag(torch.full([num], torch.inf, dtype=torch.float64))
    squares = distances.square().sum() / (num * (num - 1))
    return dict(spread=float(squares), nearest=float(others.amin(1).median()))


def compared(fakes: Sequence[Tensor], reals: Sequence[Tensor]) -> dict[str, float]:
    """Return each statistic of :func:`spread` for samples, relative to as many real images.

    Images are uint8 [C, H, W] of any size; all are reduced to one square size first, of at most
    16x16 pixels.
    """
    num = min(len(fakes), len(reals))
    sides = (min(image.shape[1:]) for image in (*fakes, *reals))
    side = min(_MAX_SIDE, *sides)
    found = [
        spread(_small([images[row] for row in evenly_spaced(num, len(images))], side))
        for images in (fakes, reals)
    ]
    return {name: value / max(found[1][name], 1e-12) for name, value in found[0].items()}


def _small(images: Sequence[Tensor], side: int) -> Tensor:
    """Return images, uint8 [C, H, W] each, as vectors [N, C * side * side] in [0, 1]."""
    shrunk = [functional.adaptive_avg_pool2d(image.cpu().float(), side) for image in images]
    return torch.stack(shrunk).flatten(1) / 255


class SampleWatch:
    """Compares the spread of samples with that of real images, in pixels and in detector outputs.

    Used on rank 0 only. The pixel values are recorded as the metric ``sample_spread``; those of
    detector outputs are read from score rows.

    Args:
        job: The job that is trained, a :class:`training.loop.Job`.
        run_dir: The run folder, whose records tell what was found before.
        telemetry: Where findings are reported.
    """

    def __init__(self, job: Any, run_dir: Path, telemetry: Telemetry) -> None:
        self._job, self._run_dir, self._telemetry = job, run_dir, telemetry
        self._reals: list[Tensor] = []
        self._known: dict[str, set[str]] = {}
        for row in (row for path in self._records() for row in read_rows(path)[0]):
            self._known[str(row.get("metric"))] = {own.name for own in self._judged(row)}

    def see(self, pictures: Sequence[Tensor], cur_nimg: int) -> None:
        """Record the spread of samples, uint8 [C, H, W] each, and report new findings on it."""
        if not self.is_lacking(cur_nimg):
            return
        self._reals = self._reals or self._real_images()
        num = min(len(pictures), len(self._reals))
        if num < _FEWEST:
            return
        values = compared(pictures, self._reals)
        row = dict(metric=METRIC, value=values["spread"], values=values, num_images=num)
        row["kimg"] = cur_nimg / 1000
        self._tell(row, cur_nimg)
        self._telemetry.record_metric(row, cur_nimg)

    def is_lacking(self, cur_nimg: int) -> bool:
        """Return whether the spread of the samples after ``cur_nimg`` images is not recorded."""
        return not metric_is_recorded(self._run_dir, METRIC, cur_nimg)

    def see_scores(self, cur_nimg: int) -> None:
        """Report new findings on the scores after ``cur_nimg`` images."""
        for path in self._records():
            rows = [row for row in read_rows(path)[0] if row.get("kimg") == cur_nimg / 1000]
            for row in rows:
                if row.get("metric") != METRIC:
                    self._tell(row, cur_nimg)

    def _tell(self, row: Mapping[str, Any], cur_nimg: int) -> None:
        found, metric = self._judged(row), str(row.get("metric"))
        known = set().union(*self._known.values())
        # A killed process may have reported a finding before it recorded the row.
        rows = read_rows(self._run_dir / WATCH_FILE)[0]
        known |= {row.get("name") for row in rows if row.get("kimg") == cur_nimg / 1000}
        for finding in found:
            if finding.name not in known:
                self._telemetry.tell(finding, cur_nimg)
        self._known[metric] = {finding.name for finding in found}

    def _judged(self, row: Mapping[str, Any]) -> list[Finding]:
        """Return the findings on a row that count after as many steps as the network has trained.

        Early in a run, only samples that are all equal count.
        """
        config, kimg = self._job.config, row.get("kimg")
        step = kimg * 1000 / config.step_nimg if is_finite(kimg) else 0
        found = findings_of(row) if step >= _FIRST_STEP else []
        is_grown = step >= max(_LATER_STEP, _LATER_SHARE * config.total_nimg / config.step_nimg)
        values = [row.get("spread"), *dict(row.get("values") or {}).values()]
        if row.get("metric") != METRIC:
            values = values[:1]
        are_equal = any(is_finite(value) and value < _NONE for value in values)
        return found if is_grown or are_equal else []

    def _records(self) -> list[Path]:
        return sorted(self._run_dir.glob("metric-*.jsonl"))

    def _real_images(self) -> list[Tensor]:
        rows = self._job.data.preview(_NUM_REALS).rows
        return [self._job.codec.pictures(item[None])[0].cpu() for row in rows for item in row]


def findings_of(row: Mapping[str, Any]) -> list[Finding]:
    """Return a finding if a row of scores shows that samples are nearly the same."""
    if row.get("metric") == METRIC:
        values = row.get("values")
        values = values if isinstance(values, Mapping) else {}
        measured = (
            (values.get("spread"), _LEAST_SPREAD, "squared distance of two"),
            (values.get("nearest"), _LEAST_NEAREST, "distance to the nearest other"),
        )
    else:
        what = f"variance of what {row.get('detector')} sees"
        measured = ((row.get("spread"), _LEAST_DETECTED, what),)
    for value, least, what in measured:
        if is_finite(value) and value < least:
            return [
                Finding(
                    name="samples_collapsed",
                    message=f"samples are nearly the same, as their {what} is {value:.1%} of that "
                    f"of real images, where at least {least:.0%} is usual",
                    remedy="compare fakes-*.png with reals.png and go on from an earlier state "
                    "with a lower learning rate (--lr), or lower the guidance (--cfg-scale)",
                )
            ]
    return []
