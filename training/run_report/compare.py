"""A page about several runs: their curves overlaid, and their differences."""

import dataclasses
from collections.abc import Sequence

from dnnlib.text import format_kimg, format_time
from training.run_report import measures, overview
from training.run_report.charts import Canvas
from training.run_report.files import Run
from training.run_report.markup import Html, details, join, section, show, table, tag
from training.run_report.scores import best

_MAX_METRICS = 6  # Columns of the table of runs.


def with_short_names(runs: Sequence[Run]) -> list[Run]:
    """Return runs titled by the words of their names that not all of them share.

    If these titles are empty or not unique, whole names are used, and otherwise paths.
    """
    words = [run.name.split("-") for run in runs]
    common = set(words[0]).intersection(*words[1:])
    short = ["-".join(word for word in own if word not in common) for own in words]
    names = [
        short if all(short) else [run.name for run in runs],
        [run.name for run in runs],
        [str(run.run_dir) for run in runs],
    ]
    chosen = next((own for own in names if len(set(own)) == len(own)), names[-1])
    return [dataclasses.replace(run, title=name) for run, name in zip(runs, chosen, strict=True)]


def header(runs: Sequence[Run]) -> Html:
    """Return the head of the page."""
    return join(
        tag("p", "Comparison", class_="kicker"),
        tag("h1", f"{len(runs)} training runs"),
        tag("p", f"{', '.join(run.name for run in runs)}.", class_="status"),
    )


def runs_section(runs: Sequence[Run]) -> Html:
    """Return a section with a table of the runs: their progress and their best scores."""
    keys = list(dict.fromkeys(key for run in runs for key in run.scores))[:_MAX_METRICS]
    titles = [metric if metric == name else f"{metric}: {name}" for metric, name in keys]
    heading = ["Run", "Folder", "Preset", "kimg", "Loss", "Images/s", "Time", "Skipped", *titles]
    rows = [[*_figures(run), *(_score(run, key) for key in keys)] for run in runs]
    note = tag("p", "Scores are the best during the run, with their variation by chance.")
    return section("runs", "Runs", table(heading, rows, label="Runs"), note if keys else None)


def _figures(run: Run) -> list[str]:
    last, total = run.history.last, run.total_kimg
    loss, speed = last("Loss/loss"), last("Timing/images_per_sec")
    seconds, skipped = last("Timing/total_sec"), last("Loss/skipped_steps")
    return [
        run.name,
        str(run.run_dir),
        show(run.settings.get("preset", "unknown")),
        format_kimg(run.kimg) + ("" if total is None else f" of {format_kimg(total)}"),
        "-" if loss is None else f"{loss:.4g}",
        "-" if speed is None else f"{speed:,.3g}",
        "-" if seconds is None else format_time(seconds),
        "-" if skipped is None else f"{skipped:,.0f}",
    ]


def _score(run: Run, key: tuple[str, str]) -> str:
    found = run.scores.get(key, [])
    score = best(found) or (found[-1] if found else None)
    if score is None:
        return "-"
    return f"{score.value:.4g}" + ("" if score.error is None else f" ± {score.error:.1g}")


def differences_section(runs: Sequence[Run]) -> Html:
    """Return a section with the settings in which the runs differ, side by side."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [show(run.settings[name]) if name in run.settings else "-" for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        return section("differences", "Differences", tag("p", "The configurations are equal."))
    heading = ["Setting", *(run.name for run in runs)]
    return section("differences", "Differences", table(heading, rows, label="Differences"))


def warnings_section(runs: Sequence[Run]) -> Html:
    """Return a section with the warnings of each run."""
    parts = [
        details(f"{run.name}: {len(run.notices) or 'none'}", overview.notice_list(run))
        for run in runs
    ]
    return section("warnings", "Warnings", parts)


def sections(runs: Sequence[Run], canvas: Canvas, samples: Html) -> list[Html | None]:
    """Return the sections of the page, in order, one of them with ``samples``."""
    runs = list(runs)
    return [
        runs_section(runs),
        measures.training_section(runs, canvas),
        measures.levels_section(runs, canvas),
        measures.scores_section(runs, canvas),
        section("samples", "Samples", samples),
        differences_section(runs),
        warnings_section(runs),
        measures.others_section(runs, canvas),
    ]
