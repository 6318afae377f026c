"""fid.py compare: score rows side by side."""

from pathlib import Path

import click

from dnnlib.click_options import PathType
from metrics.rows import compare_rows, read_rows


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@click.argument("files", nargs=-1, required=True, type=PathType())
@click.option("--anyway", is_flag=True, help="Print the rows even if their protocols differ.")
def command(files: tuple[Path, ...], anyway: bool) -> None:
    """Print score rows (.jsonl of a run, .json of calc) side by side.

    Rows of the same metric with different protocols are refused, and the fields that differ are
    listed.

    \b
    Example:
      python fid.py compare runs/00000-a/metric-fid50k_full.jsonl score.json
    """
    print(compare_rows([row for path in files for row in read_rows(path)], anyway=anyway))
