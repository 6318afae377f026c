"""python -m training.posthoc_ema: weight averages of EMA lengths that a run did not track."""

import dataclasses
from pathlib import Path

import click

import families  # noqa: F401 (registers them)
from dnnlib.cli import ConfigCommand
from dnnlib.click_options import PathType, param, takes
from dnnlib.errors import refusal
from dnnlib.files import check_target
from dnnlib.program import run

EXAMPLES = """
  # Averages of two other EMA lengths at the end of a run, beside its snapshots:
  python -m training.posthoc_ema runs/00000-x --std=0.07,0.15

  # A sweep at kimg 100,000 into a folder of its own, to be scored with fid.py:
  python -m training.posthoc_ema runs/00000-x --std=0.06,0.08,0.10,0.12 --kimg=100000 --outdir=sweep

  # From the snapshots of one profile only:
  python -m training.posthoc_ema runs/00000-x --std=0.07 --snapshots="*-0.050.pkl"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PosthocOptions:
    stds: str = param(
        "--std", required=True, help="EMA lengths to make, as relative stds such as 0.07,0.15."
    )
    kimg: int | None = param(
        min=0, max=1_000_000_000, help="Kimg at which the averages end.  [default: the last]"
    )
    outdir: Path | None = param(help="Folder for the averages.  [default: RUN_DIR]")
    snapshots: str = param(
        default="*", help="File names of the snapshots to use, with wildcards, separated by commas."
    )


@click.command(cls=ConfigCommand, base=lambda args: None, examples=EXAMPLES)
@click.argument("run_dir", type=PathType(exists=True, file_okay=False))
@takes(PosthocOptions)
def main(config: None, run_dir: Path, options: PosthocOptions) -> None:
    """Make weight averages of a run at EMA lengths that it did not track in training.

    RUN_DIR holds compact snapshots, network-snapshot-KIMG-STD.pkl, as written by a run with
    --ema-stds=0.05,0.10. The EMA length is the standard deviation of the average over training
    time, relative to that time: 0.05 is short, 0.25 is nearly uniform. Results are snapshots for
    generate.py and fid.py, network-snapshot-KIMG-STD-posthoc.pkl.
    """
    from training.posthoc_ema import (
        POOR_FIT,
        make_averages,
        parse_stds,
        read_profiles,
        until,
    )

    outdir = options.outdir or run_dir
    stds = parse_stds(options.stds)
    check_target("--outdir", outdir, is_folder=True)
    profiles = read_profiles(run_dir, options.snapshots)
    profiles = until(profiles, options.kimg) if profiles else []
    if len(profiles) < 2:
        but = f"holds {len(profiles)} compact snapshots to use, but two are needed"
        remedy = "train with --ema-stds=0.05,0.10 and a smaller --snap"
        raise refusal(run_dir, but=but, remedy=remedy)
    for path, std, error in make_averages(profiles, stds, outdir):
        click.echo(f"{path}: std {std:g} from {len(profiles)} snapshots, error {error:.2%}")
        if error > POOR_FIT:
            poor = f"Warning: no combination of these snapshots is close to std {std:g}"
            click.echo(f"{poor}; those of more ticks or of nearer stds would be.", err=True)


if __name__ == "__main__":
    run(main)
