"""fid.py check: whether a run is normal."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnnlib.click_options import PathType, output_rules, overwrites, param, takes

if TYPE_CHECKING:
    from training.reference_curves.judge import Verdict
    from training.reference_curves.reference import Reference
    from training.reference_curves.settings import Comparison
    from training.run_report.files import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    against: str | None = param(
        help="Preset, or file written by fid.py curves, to compare with.  [default: the run's "
        "preset]"
    )
    out: Path | None = param(help="Picture to write of the run against the bands (.png).")
    anyway: bool = param(help="Compare the run even if its settings differ.")


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@click.argument("run", metavar="RUN", type=PathType())
@takes(CheckOptions)
@overwrites
def command(options: CheckOptions, run: Path) -> int:
    """Check whether a run is normal, that is, whether its curves lie among those of other seeds.

    RUN is the folder of a run; an unfinished run is judged on what it has so far. It is compared
    with the curves of its preset, or of --against. A run with a different model, batch size,
    learning rate or dataset is reported as not comparable; --anyway compares it regardless. For
    large presets, published figures are shown but do not affect the verdict. The exit code is 0 for
    a normal run and 1 for any other. See docs/reference.md.

    \b
    Examples:
      python fid.py check runs/00000-digits
      python fid.py check runs/00000-digits --out=check.png
      python fid.py check runs/00000-mine --against=mine.json
    """
    import families  # noqa: F401 (registers them)
    from configs.reference import reference_of
    from dnnlib.errors import refusal
    from training.reference_curves.judge import judge
    from training.reference_curves.make import data_facts
    from training.reference_curves.settings import compare_settings, deciding_settings
    from training.run_report.files import find_runs, read_run
    from training.runs import read_start

    if options.out is not None:
        from torch_utils.charts import check_charts
        from torch_utils.pictures import check_picture_target

        check_picture_target("--out", options.out, **output_rules("out"))
        check_charts("--out")
    run_dir, *more = find_runs([run])
    if more:
        raise refusal("RUN", but=f"{run} holds {len(more) + 1} runs", remedy="give one of them")
    found = read_run(run_dir)
    config, origin = read_start(run_dir, click.echo)
    reference = reference_of(options.against or config.preset, given=options.against)
    for line in _published(reference, found):
        click.echo(line)
    if not reference.curves:
        click.echo(f"There are no reference curves of preset {reference.preset}.")
        return 1
    own = deciding_settings(config, origin), data_facts(found.options)
    comparison = compare_settings(own[0], reference.settings, own[1], reference.data)
    _tell_differences(comparison, reference.preset, options.anyway)
    if comparison.differences and not options.anyway:
        return 1
    verdict = judge(run_dir, found.history, reference, comparison)
    _tell(verdict, found.kimg)
    if options.out is not None:
        _draw(verdict, options.out, found.name)
    return 0 if verdict.is_normal else 1


def _tell_differences(comparison: "Comparison", preset: str, anyway: bool) -> None:
    for note in comparison.notes:
        click.echo(f"Note: {note}.")
    if comparison.differences and not anyway:
        what = "\n".join(f"  {text}" for text in comparison.differences)
        click.echo(
            f"Not comparable with the reference curves of preset {preset}:\n{what}\n"
            "To compare it regardless, add --anyway."
        )
        return
    for text in comparison.differences:
        click.echo(f"Warning: {text}.")


def _tell(verdict: "Verdict", kimg: float) -> None:
    """Print the verdict on a run trained for ``kimg``, with its reasons and omissions."""
    from training.reference_curves.judge import reasons

    click.echo(str(verdict))
    end = verdict.reference.kimg
    if kimg > 1.001 * end:
        click.echo(f"What follows kimg {end:g} is not judged, because the reference ends there.")
    sides = {one.name: one.side for one in verdict.departures}
    for one in verdict.departures[:3]:
        click.echo(f"  {one.title} {one.where}: {reasons(one, sides)}.")
    for text in verdict.left_out:
        click.echo(f"Not compared: {text}.")


def _published(reference: "Reference", run: "Run") -> list[str]:
    """Return a line for each published figure, beside the best score of the run."""
    from training.run_report.scores import best

    lines = []
    for figure in reference.published:
        own = best(run.scores.get((figure.metric, figure.name), ()))
        here = "not measured in this run" if own is None else f"{own.value:.4g} in this run"
        lines.append(
            f"Published, not measured by this project: {figure.metric} {figure.name} "
            f"{figure.value:g} ({figure.settings}; {figure.source}); {here}."
        )
    return lines


def _draw(verdict: "Verdict", path: Path, name: str) -> None:
    from torch_utils.pictures import save_image
    from training.reference_curves.picture import draw_verdict

    save_image(draw_verdict(verdict, name), path)
    click.echo(f"Written to {path}")
