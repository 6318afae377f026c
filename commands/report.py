"""fid.py report: HTML pages that show training runs."""

from pathlib import Path

import click

from dnnlib.click_options import PathType, output_rules, overwrites
from dnnlib.files import check_target

_COMPARISON_FILE = "comparison.html"


@click.command(context_settings=dict(help_option_names=["-h", "--help"]), no_args_is_help=True)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PathType())
@click.option(
    "--out", type=PathType(), help="File to write, instead of the pages in the run folders."
)
@overwrites
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write report.html, which shows a run: curves, samples, scores, warnings and next steps.

    RUN is the folder of a run, or a folder of such folders. Every run gets its own report.html,
    which training also writes with every snapshot. For several runs, comparison.html beside the
    first one overlays the curves and lists the settings that differ. A page is one file of at most
    20 MB, which needs no network. With --out only that file is written.

    \b
    Examples:
      python fid.py report runs/00000-a
      python fid.py report runs/00000-a runs/00001-b --out=comparison.html
    """
    from training.run_report.files import find_runs
    from training.run_report.page import is_page
    from training.run_report.write import REPORT_FILE, write_report

    found = find_runs(runs)
    if out is not None:
        check_target("--out", out, is_ours=is_page, **output_rules("out"))
        targets = [(found, out)]
    else:
        targets = [([run_dir], run_dir / REPORT_FILE) for run_dir in found]
        if len(found) > 1:
            targets.append((found, found[0].absolute().parent / _COMPARISON_FILE))
        for _, path in targets:
            check_target(str(path.name), path, is_ours=is_page, **output_rules("out"))
    for shown, path in targets:
        write_report(shown, path)
        click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
