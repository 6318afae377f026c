"""Judges whether a run is normal: whether its curves lie in the bands of a reference."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dnnlib.text import format_kimg, join_names
from training.reference_curves.bands import tolerance_band
from training.reference_curves.curves import Aligned, Series, align, curves_of
from training.reference_curves.reference import Curve, Reference
from training.reference_curves.settings import Comparison
from training.reference_curves.titles import GRADIENT, LOSS, VALIDATION, order_of, title_of
from training.run_report.history import History
from training.run_report.levels import range_of

_MAX_NAMED = 3  # Most curves that a verdict names after the first.


@dataclasses.dataclass(frozen=True)
class Placed:
    """A curve of a run beside its reference, at P points.

    Attributes:
        low, mean, high: [P], band and mean of the reference.
    """

    name: str
    kimg: np.ndarray
    values: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray

    @property
    def side(self) -> np.ndarray:
        """For each point 1 above the band, -1 below it and 0 inside, [P]."""
        return np.where(self.values > self.high, 1, np.where(self.values < self.low, -1, 0))


@dataclasses.dataclass(frozen=True)
class Departure:
    """A curve's departure from its band: the one that lasts, or else the first.

    Attributes:
        side: 1 above, -1 below.
        since: Kimg of the departure's first point.
        lasts: Whether the departure includes the newest point of the curve.
        kimg, value, low, high: The departure's last point, and the band there.
    """

    name: str
    side: int
    since: float
    lasts: bool
    kimg: float
    value: float
    low: float
    high: float

    @property
    def title(self) -> str:
        return title_of(self.name)

    @property
    def where(self) -> str:
        """Where the curve is or was outside, in words."""
        side = "above" if self.side > 0 else "below"
        normal = f"{self.value:.4g} at kimg {format_kimg(self.kimg)}, where {self.low:.4g} to "
        normal += f"{self.high:.4g} is normal"
        if self.lasts:
            return f"is {side} its band since kimg {format_kimg(self.since)} ({normal})"
        start, end = format_kimg(self.since), format_kimg(self.kimg)
        place = f"at kimg {start}" if start == end else f"from kimg {start} to {end}"
        return f"was {side} its band {place} ({normal})"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a run compares with a reference.

    Attributes:
        kimg: How far the run was judged; 0 if there was nothing to judge.
        placed: The curves that were judged.
        departures: Departures from the bands, the most important first.
        left_out: Clauses that say which curves were not judged, and why.
    """

    reference: Reference
    kimg: float
    placed: list[Placed]
    departures: list[Departure]
    left_out: list[str]

    @property
    def is_normal(self) -> bool:
        return bool(self.placed) and not self.departures

    def __str__(self) -> str:
        """Return the verdict as a sentence or two."""
        reference = self.reference
        if not self.placed:
            why = self.left_out[0] if self.left_out else "no tick after the first is recorded yet"
            return f"Nothing to compare yet: {why}."
        seeds = f"{reference.num_runs} runs of preset {reference.preset}"
        if not self.departures:
            which = f"all {len(self.placed)} curves lie in the bands"
            if len(self.placed) == 1:
                which = f"{title_of(self.placed[0].name)} lies in the band"
            return f"Normal: up to kimg {format_kimg(self.kimg)}, {which} of {seeds}."
        first, *others = self.departures
        text = f"Not normal: {first.title} {first.where}"
        if others:
            shown = [other.title for other in others[:_MAX_NAMED]]
            if len(others) > _MAX_NAMED:
                shown.append(f"{len(others) - _MAX_NAMED} more")
            text += f"; outside as well: {join_names(shown)}"
        hold = f"hold {reference.coverage:.0%} of further ones altogether"
        return f"{text}. The bands are those of {seeds}, and {hold}."


def judge(
    run_dir: Path, history: History, reference: Reference, comparison: Comparison | None = None
) -> Verdict:
    """Return how the curves of a run lie in the bands of a reference, as far as both go.

    ``history`` holds what was read of the run's ``stats.jsonl``. ``comparison`` is that of the
    settings, which count as equal without it.
    """
    own = curves_of(run_dir, history)
    placed, left_out = [], []
    for name, curve in reference.curves.items():
        reason = _not_judged(name, curve, own.get(name), comparison)
        if reason:
            left_out.append(reason)
            continue
        found = place(name, own[name], reference)
        if len(found.kimg):
            placed.append(found)
    departures = [found for one in placed if (found := departure_of(one)) is not None]
    kimg = max((float(one.kimg[-1]) for one in placed), default=0.0)
    return Verdict(reference, kimg, placed, _by_meaning(departures), left_out)


def _not_judged(
    name: str, curve: Curve, own: Series | None, comparison: Comparison | None
) -> str | None:
    """Return why a curve of the reference is not judged; None if it is."""
    title = title_of(name)
    if own is None:
        return f"the run has not recorded {title}"
    if curve.kind == "point" and comparison is not None and not comparison.same_average:
        return f"{title} is of weights that are averaged differently (--ema-kimg, --ema-rampup)"
    if curve.protocol is not None:
        there = curve.protocol
        names = {**there, **(own.protocol or {})}
        changed = [n for n in names if (own.protocol or {}).get(n) != there.get(n)]
        if changed:
            return f"{title} is measured differently there ({', '.join(changed[:4])})"
    return None


def place(name: str, own: Series, reference: Reference) -> Placed:
    """Return a run's curve beside its reference, at the points that both have.

    Means over longer ticks vary less between seeds. Where the run's ticks are longer than the
    reference's, the band of such means is used if it is narrower.
    """
    curve = reference.curves[name]
    found: Aligned = align(own, curve.kind, curve.start, np.array(curve.kimg))
    widths = np.diff(np.concatenate([[curve.start], curve.kimg]))

    def average(column: Sequence[float]) -> np.ndarray:
        return np.array(
            [np.average(column[a : b + 1], weights=widths[a : b + 1]) for a, b in found.groups]
        )

    low, mean, high = (average(column) for column in (curve.low, curve.mean, curve.high))
    if any(first < last for first, last in found.groups):
        values = np.stack([average(column) for column in curve.values])
        num_points = sum(len(one.kimg) for one in reference.curves.values())
        band = tolerance_band(values, reference.coverage, num_points)
        if np.log(band.high / band.low).mean() < np.log(high / low).mean():
            low, mean, high = band.low, band.mean, band.high
    return Placed(name, found.kimg, found.values, low, mean, high)


def departure_of(placed: Placed) -> Departure | None:
    """Return the departure of a curve that lasts, or else its first one; None without any."""
    side = placed.side
    outside = np.flatnonzero(side)
    if not len(outside):
        return None
    newest = int(outside[-1])
    lasts = newest == len(side) - 1
    first = newest if lasts else int(outside[0])
    if lasts:
        while first > 0 and side[first - 1] == side[newest]:
            first -= 1
    else:
        newest = first
        while newest + 1 < len(side) and side[newest + 1] == side[first]:
            newest += 1
    return Departure(
        name=placed.name,
        side=int(side[newest]),
        since=float(placed.kimg[first]),
        lasts=lasts,
        kimg=float(placed.kimg[newest]),
        value=float(placed.values[newest]),
        low=float(placed.low[newest]),
        high=float(placed.high[newest]),
    )


def _by_meaning(departures: Sequence[Departure]) -> list[Departure]:
    """Return departures by importance: lasting ones first, and among those losses first."""

    def rank(found: Departure) -> tuple[bool, tuple[int, float], float]:
        return not found.lasts, order_of(found.name), found.since

    return sorted(departures, key=rank)


def reasons(departure: Departure, others: Mapping[str, int]) -> str:
    """Return likely reasons for a departure, and where to look.

    ``others`` maps the names of other curves outside their bands to their sides, 1 or -1.
    """
    name, above = departure.name, departure.side > 0
    if name == GRADIENT:
        if above and others.get(LOSS, 0) > 0:
            return "the learning rate is too high, or training is becoming unstable: lower --lr"
        return (
            "look for a change of the loss's scale, of --batch, of initial weights or of layers; "
            "the norm alone, with a normal loss, does no harm"
        )
    if name == VALIDATION and others.get(LOSS, 0) <= 0:
        return (
            "the model overfits, or other images are held out: compare with the training loss"
            if above
            else "held-out images may be among those trained on: check --validation-share"
        )
    if name in (LOSS, VALIDATION) or range_of(name) is not None:
        if above:
            return (
                "the learning rate, the order or the labels of the data, or the code of loss and "
                "network are likely to have changed: look at the loss by noise level, the gradient "
                "norm and reals.png"
            )
        return (
            "the data are easier than those of the reference (fewer or repeated images, no "
            "augmentation), or noise is weaker than asked for: look at reals.png and at the loss "
            "by noise level"
        )
    return (
        "if losses are normal, the reason is in sampling, the average of the weights or the "
        "reference images: look at the fakes and at --ema-kimg, --steps and --metrics-ref"
    )
