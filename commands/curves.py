"""fid.py curves: reference curves from runs that differ only in their seeds."""

import dataclasses
from pathlib import Path

import click

from dnnlib.click_options import PathType, output_rules, overwrites, param, takes
from dnnlib.files import check_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesOptions:
    out: Path = param(required=True, help="File to write (.json).")
    coverage: float = param(
        default=0.99,
        min=0.5,
        max=0.9999,
        help="Probability that another seed stays inside all bands throughout.",
    )
    note: str = param(default="", may_be_empty=True, help="A sentence to store in the file.")


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PathType())
@takes(CurvesOptions)
@overwrites
def command(options: CurvesOptions, runs: tuple[Path, ...]) -> None:
    """Write what is normal for a configuration: the curves of several runs, and bands around them.

    RUN is the folder of a run, or a folder of such folders. The runs differ in --seed alone; five
    or more make good bands. The file holds the training loss, the loss by noise level, the gradient
    norm, the validation loss and the scores, as far as all runs have them. Compare other runs with
    it using fid.py check --against. examples/reference.sh also trains the runs. See
    docs/reference.md.

    \b
    Examples:
      python fid.py curves runs/seed-0 runs/seed-1 runs/seed-2 runs/seed-3 --out=mine.json
      examples/reference.sh mine.json 5 1 --preset=digits --data=demo-out/digits.zip
    """
    import families  # noqa: F401 (registers them)
    from training.reference_curves.make import make_reference
    from training.reference_curves.reference import is_reference, write_reference
    from training.run_report.files import find_runs, read_run
    from training.runs import read_start

    check_target("--out", options.out, is_ours=is_reference, **output_rules("out"))
    found = [read_run(run_dir) for run_dir in find_runs(runs)]
    starts = [read_start(run.run_dir, click.echo) for run in found]
    reference = make_reference(found, starts, coverage=options.coverage, note=options.note)
    write_reference(options.out, reference)
    left = reference.left_out
    click.echo(
        f"{options.out}: {len(reference.curves)} curves of {reference.num_runs} runs of preset "
        f"{reference.preset} up to kimg {reference.kimg:g}; {left.num_inside} of {left.num_runs} "
        "runs lie in the bands of the remaining runs."
    )
