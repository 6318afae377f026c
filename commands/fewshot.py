"""fid.py fewshot: scores of images generated from supports."""

import dataclasses
from pathlib import Path

import click

import families
from commands.options import (
    BATCH_HELP,
    CPU_MATMUL_HELP,
    PRECISION_HELP,
    PRECISIONS,
    check_targets,
    metric_names,
    parse_metrics,
    score_command,
    split_names,
    used_detectors,
)
from data.fewshot.config import PROTOCOLS
from dnnlib.cli import usage_errors
from dnnlib.click_options import overwrites, param, takes
from dnnlib.files import write_json
from evaluation.config import ScoreConfig
from training.config import CPU_MATMUL


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotOptions:
    network: str = param(required=True, help="Snapshot of a set-conditioned model.")
    data: str | None = param(help="Training data.  [default: where it was in training]")
    transfer: str | None = param(
        help="Another labelled dataset, whose (test) classes are scored as well."
    )
    protocols: str = param(
        default="seen,unseen",
        help=f"Classes to score, separated by commas: {', '.join(PROTOCOLS)}; --transfer adds "
        "the classes of another dataset.",
    )
    metrics: str = param(
        default="fewshot_kid,fewshot_fid,fewshot_pr",
        help=f"Metrics to compute, separated by commas: {metric_names(of_supports=True)}.",
    )
    num_images: int | None = param(
        min=2,
        max=10_000_000,
        help="Number of images to generate.  [default: 10,000, or as many as there are real ones]",
    )
    episodes_per_class: int | None = param(
        min=1,
        max=1_000_000,
        help="Number of supports of each class.  [default: enough to use a fifth of its images, "
        "up to 20]",
    )
    seed: int = param(default=0, min=0, max=2**32 - 1, help="Seed of the first generated image.")
    precision: str | None = param(choices=PRECISIONS, help=PRECISION_HELP)
    cpu_matmul: str | None = param(choices=CPU_MATMUL, help=CPU_MATMUL_HELP)
    compile: bool = param(
        "--compile/--no-compile", default=False, help="Compile the network with torch.compile."
    )
    batch: int = param(default=64, min=1, max=1_000_000, help=BATCH_HELP)
    outdir: Path | None = param(help="Folder for a picture of each protocol.")
    json: Path | None = param(help="File to write the score rows to.")


@score_command()
@takes(FewShotOptions)
@overwrites
def command(config: ScoreConfig, options: FewShotOptions) -> None:
    """Score images that a set-conditioned model makes from supports, against images of their class.

    Seen classes were trained on, but not with the images used here; unseen classes were never
    trained on. Images in a support are left out of the comparison. Each class is also scored
    separately. The distance to the nearest image of the support reveals copies.

    \b
    Example:
      python fid.py fewshot --network=network.pkl --transfer=mini-imagenet.zip --outdir=out
    """
    specs = parse_metrics(options.metrics, of_supports=True)
    protocols = split_names(options.protocols)
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown:
        raise click.UsageError(f"--protocols: got {unknown[0]}; accepted: {', '.join(PROTOCOLS)}.")
    protocols += ["transfer"] if options.transfer is not None else []
    if not protocols:
        raise click.UsageError("--protocols: there is nothing to score; name some.")
    check_targets(json=options.json, outdir=options.outdir)
    names = {spec.output.detector for spec in specs}
    used_detectors(config, names, f"--metrics={options.metrics}")
    from data.images.dataset import open_images
    from evaluation.fewshot import FewShotTest, describe_fewshot, score_fewshot
    from evaluation.images import Making
    from families.sets import open_data_of
    from sampling.images import cached_snapshot
    from torch_utils import distributed

    snapshot = cached_snapshot(options.network)
    with usage_errors():
        families.expect(snapshot, "sets", "was not trained on sets of images")
    needs_data = set(protocols) != {"transfer"}
    dataset = open_data_of(snapshot, options.data) if needs_data else None
    device = distributed.init()
    transfer = None if options.transfer is None else open_images(options.transfer)
    same = ("num_images", "episodes_per_class", "outdir")
    settings = {name: getattr(options, name) for name in same}
    test = FewShotTest(protocols=protocols, dataset=dataset, transfer=transfer, **settings)
    names = ("batch", "precision", "cpu_matmul", "compile")
    own = {name: getattr(options, name) for name in names}
    making = Making(first_seed=options.seed, **own)
    rows = []
    for found in score_fewshot(snapshot, config, specs, device, test, making):
        distributed.print0(describe_fewshot(found))
        rows += found
    if options.json is not None and distributed.is_main():
        write_json(options.json, {"rows": rows})
    distributed.shutdown()
