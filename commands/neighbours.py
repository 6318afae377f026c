"""fid.py neighbours: the training images nearest to generated ones."""

import dataclasses
from pathlib import Path

from commands.options import AnyConfig, SourceOptions, check_targets, score_command, used_detectors
from dnnlib.click_options import param, takes
from metrics.detectors import DETECTORS

_NUM_GENERATED = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighboursOptions:
    data: str = param(required=True, help="Folder, zip or .npz of the training images.")
    held_out: str | None = param(
        help="Real images not used in training, to compare with.  [default: training images, each "
        "against all other ones]"
    )
    detector: str = param(
        default="inception",
        choices=DETECTORS,
        help="Detector whose outputs are compared to measure distances.",
    )
    num_images: int | None = param(
        min=1,
        max=10_000_000,
        help="Number of generated images.  [default: 1000, or all of --images]",
    )
    neighbours: int = param(
        default=4, min=1, max=100, help="Number of training images shown beside each generated one."
    )
    rows: int = param(
        default=16, min=1, max=1_000, help="Number of generated images in the picture."
    )
    outdir: Path = param(required=True, help="Folder for the report.")


@score_command()
@takes(SourceOptions, "given")
@takes(NeighboursOptions)
def command(config: AnyConfig, given: SourceOptions, options: NeighboursOptions) -> None:
    """Look for copies: find the training images nearest to generated ones, and to held-out reals.

    Writes neighbours.png (the generated images nearest to the training data, each with its
    neighbours and their distances), distances.png (their distances against those of held-out real
    images) and neighbours.json.

    \b
    Example:
      python fid.py neighbours --network=network.pkl --data=cifar10.zip --outdir=report
    """
    name, k = options.detector, options.neighbours
    detector_config = used_detectors(config, [name], f"--detector={name}")
    check_targets(outdir=options.outdir)
    from data.images.dataset import open_images
    from evaluation.neighbours import check_neighbours, find_neighbours, write_report
    from evaluation.scoring import make_detectors
    from torch_utils import distributed

    source, device = given.open(config)
    dataset = open_images(options.data)
    unseen = None if options.held_out is None else open_images(options.held_out)
    num_images = options.num_images or source.num_images or _NUM_GENERATED
    check_neighbours(source, num_images, dataset, k, unseen)
    detectors = make_detectors([name], detector_config, source.image_shape, device)
    settings = dict(num_images=num_images, num_neighbours=k, batch=given.batch, held_out=unseen)
    found = find_neighbours(source, dataset, detectors[name], device, **settings)
    shown = dict(num_images=num_images, num_rows=options.rows)
    write_report(found, options.outdir, source, dataset, **shown)
    distributed.shutdown()
