"""Sections with charts: training, noise levels, scores, effect of conditions, other statistics."""

from collections.abc import Iterator, Sequence

from dnnlib.text import format_kimg
from training.reference_curves.judge import judge
from training.run_report.charts import Canvas, Chart, Line
from training.run_report.conditions import ConditionsReport
from training.run_report.curves import level_charts, other_charts, score_charts, topic_charts
from training.run_report.files import Run
from training.run_report.history import Curve
from training.run_report.markup import Html, details, section, table, tag
from training.run_report.scores import Score, best

TOOLBAR = tag(
    "div",
    tag("button", "Logarithmic kimg", type="button", id="log-kimg", aria_pressed="false"),
    tag(
        "label",
        "Smoothing",
        tag("input", type="range", id="smoothing", min=0, max=0.95, step=0.05, value=0),
        tag("output", "0.00"),
    ),
    tag("button", "Reset zoom", type="button", id="reset-zoom", hidden=True),
    class_="toolbar",
    hidden=True,
)
CHART_HELP = tag(
    "p",
    "Drag across a chart to zoom, double-click to see all of it again. With the keyboard: arrow "
    "keys read values, + and - zoom, Escape goes back.",
    class_="note",
)


def training_section(runs: list[Run], canvas: Canvas) -> Html:
    """Return the section with the training curves and, for one run, the verdict on them."""
    figures = canvas.figures(topic_charts(runs)) or tag("p", "No tick is recorded yet.")
    verdict = _verdict(runs[0]) if len(runs) == 1 else None
    return section("training", "Training", verdict, TOOLBAR, figures, CHART_HELP)


def _verdict(run: Run) -> Html | None:
    """Return the sentence that says whether a run lies within the bands of other seeds."""
    if run.reference is None:
        return None
    return tag("p", str(judge(run.run_dir, run.history, run.reference)))


def levels_section(runs: list[Run], canvas: Canvas) -> Html | None:
    """Return the section on the loss by noise level; None for runs that recorded none."""
    figures = canvas.figures(level_charts(runs))
    text = "Each range holds an equal share of the noise levels in training, or of time."
    return figures and section(
        "levels", "Loss by noise level", tag("p", text, class_="note"), figures
    )


def scores_section(runs: list[Run], canvas: Canvas) -> Html:
    """Return the section with the scores: charts over kimg with noise bands, and a table."""
    figures = canvas.figures(score_charts(runs))
    rows = [row for run in runs for row in _score_rows(run, len(runs) > 1)]
    if not rows:
        text = "No score is recorded. Give --metrics, or score a snapshot (see What comes next)."
        return section("scores", "Scores", tag("p", text))
    heading = ["Score", "Newest", "± by chance", "At kimg", "Images", "Best", "At kimg"]
    body = table(heading, rows, label="Scores", class_="numbers")
    return section("scores", "Scores", figures, tag("h3", "In numbers"), body)


def _score_rows(run: Run, with_name: bool) -> Iterator[list[str]]:
    for scores in run.scores.values():
        by_source: dict[str, list[Score]] = {}
        for score in scores:
            by_source.setdefault(score.source, []).append(score)
        for source, own in by_source.items():
            last, top = own[-1], best(own)
            words = [run.name if with_name else "", last.title, "" if last.is_in_run else source]
            yield [
                ", ".join(filter(None, words)),
                f"{last.value:.5g}",
                "unknown" if last.error is None else f"{last.error:.2g}",
                "unknown" if last.kimg is None else format_kimg(last.kimg),
                "unknown" if last.num_images is None else f"{last.num_images:,}",
                f"{top.value:.5g}" if top else "-",
                format_kimg(top.kimg) if top and top.kimg is not None else "-",
            ]


def others_section(runs: list[Run], canvas: Canvas) -> Html | None:
    """Return the section with all other statistics, folded at first; None if there are none."""
    charts = other_charts(runs)
    if not charts:
        return None
    inner = details(f"Show {len(charts)} more charts", canvas.figures(charts))
    return section("others", "Other statistics", inner)


def conditions_section(run: Run, canvas: Canvas) -> Html:
    """Return the section on the effect of each condition, and on how attention is split."""
    if not run.conditions:
        text = tag(
            "p",
            "How much each condition matters has not been measured. Run ",
            tag("code", "fid.py conditions"),
            " with ",
            tag("code", "--jsonl"),
            " in the run folder (see What comes next) to see it here.",
        )
        return section("conditions", "Effect of conditions", text)
    newest, *older = run.conditions
    parts = [tag("p", _report_title(newest)), canvas.figures(_effect_charts(newest))]
    parts += [_effects_table(newest)]
    if newest.attention:
        parts.append(canvas.figures([_attention_chart(newest)]))
    for report in older:
        parts.append(details(_report_title(report), _effects_table(report)))
    return section("conditions", "Effect of conditions", parts)


def _report_title(report: ConditionsReport) -> str:
    return f"{report.snapshot or report.source}, on {report.panel or 'an unnamed panel'}"


def _effect_charts(report: ConditionsReport) -> list[Chart]:
    conditions = list(dict.fromkeys(effect.condition for effect in report.effects))
    changes = list(dict.fromkeys(effect.change for effect in report.effects))
    charts = []
    for key, title, percent in (
        ("output_change", "Change of the output", False),
        ("loss_change", "Relative change of the loss", True),
    ):
        lines = []
        for change in changes:
            own = {e.condition: e.values for e in report.overall() if e.change == change}
            values = [own.get(condition, {}) for condition in conditions]
            lines.append(Line(change, _bars([(v.get(key), v.get(f"{key}_se")) for v in values])))
        look = dict(kind="bars", x="condition", names=conditions, percent=percent)
        charts.append(Chart(title, lines, band="one standard error", **look))
        by_level = [
            Line(f"{condition} {change}", _over_levels(report, condition, change, key), points=True)
            for condition in conditions
            for change in changes
        ]
        by_level = [line for line in by_level if line.curve.x]
        title = f"{title} by noise level"
        look = dict(x="noise level sigma", log_x=True, percent=percent)
        charts.append(Chart(title, by_level, **look))
    return charts


def _bars(values: Sequence[tuple[float | None, float | None]]) -> Curve:
    x = [float(place) for place in range(len(values))]
    y = [value for value, _ in values]
    ends = [
        [None if v is None or error is None else v + sign * error for v, error in values]
        for sign in (-1, 1)
    ]
    return Curve(x, y, *ends)


def _over_levels(report: ConditionsReport, condition: str, change: str, key: str) -> Curve:
    own = sorted(
        (effect.sigma, effect.values[key])
        for effect in report.effects
        if (effect.condition, effect.change) == (condition, change)
        and effect.sigma is not None
        and key in effect.values
    )
    return Curve([sigma for sigma, _ in own], [value for _, value in own])


def _effects_table(report: ConditionsReport) -> Html:
    rows = []
    for effect in report.overall():
        v = effect.values
        if "output_change" not in v:
            rows.append([effect.condition, effect.change, "-", "-", "-", effect.reason])
            continue
        output = f"{v['output_change']:.3f} ± {v.get('output_change_se', 0):.3f}"
        loss = f"{v.get('loss_change', 0):+.1%} ± {v.get('loss_change_se', 0):.1%}"
        worse = f"{v['worse_share']:.0%}" if "worse_share" in v else "-"
        rows.append([effect.condition, effect.change, output, loss, worse, effect.reason])
    heading = ["Condition", "Change", "Output", "Loss", "Worse for", "Note"]
    return table(heading, rows, label="Effect of conditions")


def _attention_chart(report: ConditionsReport) -> Chart:
    names = list(dict.fromkeys(name for layer in report.attention for name in layer))
    x = [float(index) for index in range(len(report.attention))]
    lines = [
        Line(name, Curve(x, [layer.get(name) for layer in report.attention])) for name in names
    ]
    layers = [str(index) for index in range(len(report.attention))]
    look = dict(kind="stack", x="layer", names=layers, percent=True)
    return Chart("Attention split by layer", lines, **look)
