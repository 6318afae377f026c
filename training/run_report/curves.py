"""Which curves are drawn together: charts of one run, or of several overlaid."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from training.reference_curves.titles import title_of
from training.run_report.charts import Chart, Line
from training.run_report.files import Run
from training.run_report.history import VALIDATION, Curve
from training.run_report.levels import Levels, kinds_of, range_of
from training.run_report.markup import join, tag
from training.run_report.scores import Score, better


class Topic(NamedTuple):
    """Statistics that one chart shows; ``names`` maps each to its name in the legend."""

    title: str
    names: dict[str, str]
    unit: str = ""
    log: bool = False


_STEEP = 10  # Ratio of the largest to the smallest value beyond which an axis is logarithmic.
_BAND_COLOUR = 7  # Grey.
TRAINING = (
    Topic("Loss", {"Loss/loss": "loss"}, log=True),
    Topic(
        "Loss of the averaged weights",
        {"Validation/loss": "held-out images", "Validation/loss_trained": "training images"},
        log=True,
    ),
    Topic("Loss on held-out images above that on training images", {"Validation/gap": "gap"}),
    Topic("Gradient norm", {"Loss/grad_norm": "gradient norm"}, log=True),
    Topic("Learning rate", {"Loss/learning_rate": "learning rate"}),
    Topic("Speed", {"Timing/images_per_sec": "images/s"}, "images/s"),
    Topic(
        "Memory",
        {
            "Resources/cpu_mem_gb": "main memory",
            "Resources/peak_gpu_mem_gb": "GPU, peak in use",
            "Resources/peak_gpu_mem_reserved_gb": "GPU, peak reserved",
        },
        "GiB",
    ),
    Topic("Skipped steps", {"Loss/skipped_steps": "skipped steps"}, "in all"),
)
_SHOWN = {name for topic in TRAINING for name in topic.names} | {"Progress/kimg"}


def topic_charts(runs: Sequence[Run], topics: Iterable[Topic] = TRAINING) -> list[Chart]:
    """Return a chart for every topic of which a run has statistics.

    With several runs, every statistic has its own chart, with a line for each run.
    """
    charts = []
    for topic in topics:
        if len(runs) == 1:
            own = runs[0].history
            present = [name for name in topic.names if own.last(name) is not None]
            lines = [
                Line(topic.names[name], own.curve(name), name.startswith(VALIDATION))
                for name in present
            ]
            lines += reference_lines(runs[0], present)
            look = dict(y=topic.unit, log=topic.log, note=band_note(runs[0], present))
            charts.append(Chart(topic.title, lines, **look))
            continue
        for name, shown in topic.names.items():
            title = topic.title if len(topic.names) == 1 else f"{topic.title}: {shown}"
            charts.append(over_runs(title, runs, name, y=topic.unit, log=topic.log))
    return [chart for chart in charts if chart.lines]


def reference_lines(run: Run, names: Sequence[str]) -> list[Line]:
    """Return the bands of a run's reference curves for those statistics that have one."""
    curves = {} if run.reference is None else run.reference.curves
    found = []
    for name in names:
        if name in curves:
            own = curves[name]
            title = "band of other seeds" if len(names) == 1 else f"band of {title_of(name)}"
            band = Curve(own.kimg, list(own.mean), list(own.low), list(own.high))
            found.append(Line(title, band, own.kind == "point", _BAND_COLOUR))
    return found


def band_note(run: Run, names: Sequence[str]) -> str | None:
    """Return a note on the band of :func:`reference_lines`; None if there is none."""
    if not reference_lines(run, names):
        return None
    return (
        f"Shaded: where {run.reference.num_runs} other seeds of this preset lie; "
        f"{run.reference.coverage:.0%} of runs stay inside all bands."
    )


def over_runs(title: str, runs: Sequence[Run], name: str, **look: Any) -> Chart:
    """Return a chart of one statistic, with a line for every run that has it."""
    lines = [
        Line(run.name, run.history.curve(name), name.startswith(VALIDATION), number)
        for number, run in enumerate(runs)
        if run.history.last(name) is not None
    ]
    return Chart(title, lines, **look)


def other_charts(runs: Sequence[Run], most: int = 150) -> list[Chart]:
    """Return charts of up to ``most`` statistics that no other part of the page shows."""
    names = dict.fromkeys(name for run in runs for name in run.history.names)
    rest = [name for name in names if name not in _SHOWN and not range_of(name)]
    charts = [over_runs(name, runs, name) for name in sorted(rest)[:most]]
    return [chart for chart in charts if chart.lines]


def level_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return charts of the loss by noise level: over kimg, and over the noise level."""
    charts = []
    for kind in dict.fromkeys(kind for run in runs for kind in kinds_of(run.history)):
        over_kimg, lines = [], []
        for number, run in enumerate(runs):
            levels = Levels.of(run.history, kind)
            ticks = levels.some_ticks()
            if len(runs) > 1:
                lines += [Line(run.name, levels.profile(last), True, number) for last in ticks[-1:]]
                continue
            names = levels.texts()
            over_kimg = [Line(names[n], run.history.curve(n)) for n in names]
            for tick in ticks:
                title = f"kimg {run.history.kimg[tick]:.4g}"
                lines.append(Line(title, levels.profile(tick), True))
        axis = kind.axis
        charts.append(Chart(f"{kind.loss} by {axis}", over_kimg, log=True))
        lines = [line for line in lines if line.curve.x]
        charts.append(Chart(f"{kind.loss} over {axis}", lines, x=axis, log=True, log_x=kind.is_log))
    if len(runs) > 1:
        ranges = {n: range_of(n) for run in runs for n in run.history.names if range_of(n)}
        titles = {name: f"{found.kind.loss}, {found.text}" for name, found in ranges.items()}
        charts += [over_runs(title, runs, name, log=True) for name, title in titles.items()]
    return [chart for chart in charts if chart.lines]


def score_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart for every value of every metric, with its noise band."""
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    charts = []
    for key in keys:
        lines, reasons = [], []
        for number, run in enumerate(runs):
            own = run.scores.get(key, [])
            name = run.name if len(runs) > 1 else key[1]
            lines += _score_lines(name, own, number if len(runs) > 1 else None)
            reasons += [score.error_from for score in own if score.error is not None]
        shown = next(score for run in runs for score in run.scores.get(key, ()))
        direction = better(key[1])
        title = shown.title + (f" ({direction} is better)" if direction else "")
        look = dict(log=_is_steep(lines), band="one standard deviation")
        charts.append(Chart(title, lines, note=_band_note(key[0], reasons), **look))
    return [chart for chart in charts if chart.lines]


def _is_steep(lines: Sequence[Line]) -> bool:
    """Return whether values differ so much that they need a logarithmic axis."""
    values = [y for line in lines for y in line.curve.y if y is not None]
    return bool(values) and min(values) > 0 and max(values) > _STEEP * min(values)


def _score_lines(name: str, scores: Sequence[Score], colour: int | None) -> list[Line]:
    """Return a line of the scores that a run recorded, and one for each file of other scores."""
    sources: dict[str, list[Score]] = {}
    for score in scores:
        if score.kimg is not None:
            sources.setdefault("" if score.is_in_run else score.source, []).append(score)
    return [
        Line(", ".join(filter(None, (name, source))), _score_curve(own), True, colour)
        for source, own in sources.items()
    ]


def _score_curve(scores: Sequence[Score]) -> Curve:
    x, y = [score.kimg for score in scores], [score.value for score in scores]
    if all(score.error is None for score in scores):
        return Curve(x, y)
    ends = [
        [None if s.error is None else s.value + sign * s.error for s in scores] for sign in (-1, 1)
    ]
    return Curve(x, y, *ends)


def _band_note(metric: str, reasons: Sequence[str]) -> Any:
    if not reasons and metric.startswith("val"):  # Its seeds are fixed: --noise-band does not help.
        return "How much this varies by chance is not known."
    if not reasons:
        return join(
            "How much this varies from seed to seed is not known. Score a snapshot with ",
            tag("code", "--noise-band=3"),
            " and ",
            tag("code", "--json"),
            " in the run folder to see it here (see What comes next).",
        )
    found = "; ".join(dict.fromkeys(reasons))
    return f"The band is one standard deviation to either side: {found}."
