"""fid.py calc: the scores of a snapshot, or of images in files."""

import dataclasses
from pathlib import Path

import click

from commands.options import (
    AnyConfig,
    SourceOptions,
    check_targets,
    metric_names,
    parse_metrics,
    score_command,
    used_detectors,
)
from dnnlib.cli import is_given, usage_errors
from dnnlib.click_options import overwrites, param, takes
from dnnlib.files import write_json

EXAMPLES = """
  # Score a snapshot, generating on the fly, against the data that it was trained on:
  torchrun --standalone --nproc_per_node=8 fid.py calc --network=network.pkl \\
      --ref=datasets/cifar10.zip --metrics=fid50k_full,kid50k_full,pr50k3_full --json=score.json

  # Score a folder of images against published statistics:
  python fid.py calc --images=out --ref=cifar10-32x32.npz --metrics=fid50k_full

  # How much the score of a snapshot depends on the seeds:
  python fid.py calc --network=network.pkl --ref=cifar10.npz --metrics=fid50k_full --noise-band=3
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalcOptions:
    ref: str | None = param(
        help="Real images, or their statistics: .npz, .pkl in EDM2's layout, path or URL."
    )
    metrics: str = param(
        required=True,
        help=f"Metrics to compute, separated by commas: {metric_names(of_supports=False)}.",
    )
    num_images: int | None = param(
        min=2, max=10_000_000, help="Number of images to score.  [default: that of each metric]"
    )
    per_class: bool = param(
        "--per-class/--no-per-class",
        default=True,
        help="Score each class as well, where class labels are known.",
    )
    noise_band: int | None = param(
        min=2,
        max=1_000,
        metavar="BLOCKS",
        help="Score this many disjoint blocks of seeds, and report the spread of the scores.",
    )
    json: Path | None = param(help="File to write the score rows to.")


@score_command(examples=EXAMPLES)
@takes(SourceOptions, "given")
@takes(CalcOptions)
@overwrites
def command(config: AnyConfig, given: SourceOptions, options: CalcOptions) -> None:
    """Score the images of a snapshot, folder, zip or .npz against real ones.

    Only the rows you ask for are written; images generated from a snapshot never touch the disk.
    """
    check_targets(json=options.json)
    specs = parse_metrics(options.metrics)
    names = sorted({spec.output.detector for spec in specs})
    detector_config = used_detectors(config, names, f"--metrics={options.metrics}")
    from evaluation import scoring
    from torch_utils import distributed

    with usage_errors():
        scoring.check_reference(specs, options.ref, "--ref")
    source, device = given.open(config, shuffled=True)
    real = None if options.ref is None else scoring.RealImages(options.ref)
    comparison = scoring.Comparison(
        metrics=specs,
        real=real,
        detectors=detector_config,
        num_images=options.num_images,
        num_blocks=options.noise_band or 1,
        batch=given.batch,
    )
    comparison.check(source)
    has_classes = source.labels(range(1)) is not None and (real is None or real.knows_classes())
    if is_given("per_class") and options.per_class and not has_classes:
        raise click.UsageError("--per-class: the images or the reference have no class labels.")
    per_class = options.per_class and has_classes
    rows = comparison.rows(source, device, per_class=per_class)
    if distributed.is_main():
        for row in rows:
            print(scoring.describe_score(row))
        if options.json is not None:
            write_json(options.json, {"rows": rows})
    distributed.shutdown()
