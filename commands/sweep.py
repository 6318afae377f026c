"""fid.py sweep: finds the best guidance, sampling settings and weight average."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from commands.options import (
    SnapshotOptions,
    base_config,
    metric_names,
    parse_metrics,
    score_command,
    used_detectors,
)
from dnnlib.axes import Axes, AxesCommand, expand_ranges, options_of, value_text
from dnnlib.cli import usage_errors
from dnnlib.click_options import param, takes
from evaluation.config import ScoreConfig

EXAMPLES = """
  # Guidance and the number of steps of a snapshot, 100 cells:
  torchrun --standalone --nproc_per_node=8 fid.py sweep --network=network.pkl \\
      --ref=datasets/cifar10.zip --metrics=fid50k_full,pr50k3_full --outdir=sweep \\
      --cfg-scale=1:3:0.25 --cfg-interval=none/0.3,5 --steps=9,12,18,24,32

  # Which average of a run that was trained with --ema-stds=0.05,0.10, and which guidance:
  python fid.py sweep --network=runs/00000-x --ref=datasets/cifar10.zip --metrics=fid10k_full \\
      --outdir=sweep --ema-std=0.03:0.20:0.01 --cfg-scale=1:2:0.1
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    ref: str | None = param(
        help="Real images, or their statistics: .npz, .pkl in EDM2's layout, path or URL."
    )
    metrics: str = param(
        required=True,
        help="Metrics to compute, separated by commas; the first one chooses: "
        f"{metric_names(of_supports=False)}.",
    )
    ema_std: str | None = param(
        help="EMA lengths to compare, as relative stds such as 0.05:0.20:0.01. --network must "
        "then be the folder of a run with compact snapshots."
    )
    num_images: int | None = param(
        min=40,
        max=10_000_000,
        help="Number of images per cell in the last comparison.  [default: that of the first "
        "metric]",
    )
    share: float = param(
        default=0.1, min=0.001, max=1, help="Largest share of the whole grid's images to generate."
    )
    confidence: float = param(
        default=0.95,
        min=0.5,
        max=0.999,
        help="Confidence of the intervals, and that no cell is dropped by chance.",
    )
    outdir: Path = param(
        required=True, help="Folder for outputs, averages and results; run again to continue."
    )


def _base(args: Sequence[str]) -> Any:
    if "--help" not in args and not any(arg.startswith("--network") for arg in args):
        return ScoreConfig()  # The command itself reports that --network is missing.
    return base_config(args)


@score_command(cls=AxesCommand, axes=("sampling", "guidance"), base=_base, examples=EXAMPLES)
@takes(SnapshotOptions, "given")
@takes(SweepOptions)
def command(config: Axes, given: SnapshotOptions, options: SweepOptions) -> None:
    """Search for the best guidance, sampler and weight average.

    Options of sampling and guidance take several values: a list, 9,18,32; a range with a step,
    1:4:0.25; pairs separated by slashes, none/0.3,5. All combinations are the cells of a grid.
    Every cell generates images from the same seeds, few at first. Cells that are worse than the
    best one by more than chance are dropped, as are the worst of the rest when the image budget
    runs short; what remains is compared on twice as many images. The winner is scored on fresh
    seeds.

    Writes into --outdir: report.html (heat maps, trade-offs), winner.json and cells.json (score
    rows), and the detector outputs of every image, from which an interrupted or extended sweep
    continues.
    """
    if given.network is None:
        raise click.UsageError("Give --network: a snapshot, or the folder of a run.")
    specs = parse_metrics(options.metrics)
    names = sorted({spec.output.detector for spec in specs})
    detectors = used_detectors(config.base, names, f"--metrics={options.metrics}")
    with usage_errors():
        stds = [] if options.ema_std is None else _stds(options.ema_std)
    from evaluation.scoring import check_reference
    from evaluation.sweep.grid import make_grid
    from evaluation.sweep.report import commands, describe_plan, describe_result, describe_round
    from evaluation.sweep.start import Wanted, open_cells
    from evaluation.sweep.store import Store
    from evaluation.sweep.sweep import run_sweep
    from evaluation.sweep.write import write_results
    from torch_utils import distributed

    with usage_errors():
        check_reference(specs, options.ref, "--ref")
        grid = make_grid(config, stds)
    Store(options.outdir).check()
    making, device = given.start()
    wanted = Wanted(given.network, stds, specs, options.ref, detectors, options.num_images)
    with open_cells(grid, wanted, making, options.outdir, device) as (cells, num_images):
        plan = cells.plan(num_images, options.share, options.confidence)
        own = cells.grid.cells
        distributed.print0(f"{cells.grid.describe()}\n{describe_plan(plan, len(own))}")
        result = run_sweep(
            cells, plan, lambda found: distributed.print0(describe_round(found, own))
        )
        if distributed.is_main():
            network = str(cells.network(result.found.winner))
            scoring = _scoring_options(options, given, config)
            texts = commands(result, config.base, network, _how_options(given), scoring)
            write_results(options.outdir, result, texts)
            print(f"\n{describe_result(result)}\n")
            for what, text in texts.items():
                print(f"To {what}:\n  {text}")
    distributed.shutdown()


def _stds(text: str) -> list[float]:
    from training.posthoc_ema import parse_stds

    try:
        return parse_stds(expand_ranges(text), "--ema-std")
    except ValueError as error:
        if str(error).startswith("--ema-std"):
            raise
        raise ValueError(
            f"--ema-std: got the range {str(error)!r}; give START:STOP:STEP."
        ) from None


def _how_options(given: SnapshotOptions) -> list[str]:
    """Return the given options for generating images with a snapshot, as arguments."""
    names = ("guide", "vae", "tf32", "precision", "cpu_matmul", "compile")
    typed_ones = {name: getattr(given, name) for name in names}
    options = {name.replace("_", "-"): value for name, value in typed_ones.items() if value}
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()
    ]


def _scoring_options(options: SweepOptions, given: SnapshotOptions, config: Axes) -> list[str]:
    """Return the arguments with which fid.py calc scores images as this sweep does."""
    found = [] if options.ref is None else [f"--ref={options.ref}"]
    found += [f"--metrics={options.metrics}", f"--batch={value_text(given.batch)}"]
    return found + options_of(config.base, ScoreConfig(), ("detectors",))
