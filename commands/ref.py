"""fid.py ref: stores the reference statistics of real images in a file."""

import dataclasses
from pathlib import Path

import click

from commands.options import BATCH_HELP, check_targets, parse_metrics, score_command, used_detectors
from dnnlib.click_options import overwrites, param, takes
from metrics.config import DetectorConfig
from metrics.metric import needed_outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefOptions:
    data: str = param(required=True, help="Folder, zip or .npz of real images.")
    dest: Path = param(required=True, help="The .npz file to write.")
    metrics: str = param(
        default="fid50k_full",
        help="Metrics to prepare for, separated by commas; the file holds what they need.",
    )
    batch: int = param(default=64, min=1, max=1_000_000, help=BATCH_HELP)


@score_command(base=lambda args: DetectorConfig())
@takes(RefOptions)
@overwrites
def command(config: DetectorConfig, options: RefOptions) -> None:
    """Write reference statistics or vectors of real images, so that later scoring starts at once.

    \b
    Example:
      python fid.py ref --data=datasets/cifar10.zip --dest=cifar10.npz
    """
    dest, metrics = options.dest, options.metrics
    check_targets(dest=dest)
    if dest.suffix != ".npz":
        raise click.UsageError(f"--dest: got {dest}; the file's name must end with .npz.")
    needs = needed_outputs(parse_metrics(metrics), of_reference=True)
    if not needs:
        raise click.UsageError(f"--metrics: {metrics} does not compare with real images.")
    names = {feature.detector for feature in needs}
    used_detectors(config, names, f"--metrics={metrics}")
    from data.images.dataset import open_images
    from evaluation.images import shape_of
    from evaluation.scoring import dataset_references, make_detectors
    from metrics.reference import save_references
    from torch_utils import distributed

    device = distributed.init()
    dataset = open_images(options.data)
    detectors = make_detectors(names, config, shape_of(dataset), device)
    references = dataset_references(dataset, needs, detectors, device, options.batch)
    if distributed.is_main():
        save_references(dest, references)
        print(f"{len(dataset):,} images: {', '.join(map(str, references))} written to {dest}")
    distributed.shutdown()
