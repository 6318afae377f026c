"""dataset_tool.py verify: lists the problems of a dataset, latents or features."""

import dataclasses
from collections.abc import Sequence

import click

from dnnlib.addresses import is_address
from dnnlib.click_options import TextType, param, takes
from dnnlib.errors import refusal

_NUM_SAMPLES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    workers: int | None = param(
        min=1, max=1_024, help="Number of processes, or threads, that decode."
    )
    source: str | None = param(
        metavar="DIR|ZIP",
        help="Images from which a folder of features was made, to check it against.",
    )
    visual: str | None = param(
        metavar="DIR|ID",
        help="Visual encoder that encodes some images of a folder of features again.",
    )
    samples: int | None = param(
        min=1,
        max=1_000_000,
        help=f"Number of images per bucket that --visual encodes.  [default: {_NUM_SAMPLES}]",
    )


@click.command(no_args_is_help=True)
@click.argument("data", metavar="ZIP|DIR|NPZ|TAR", type=TextType())
@takes(VerifyOptions)
def command(data: str, options: VerifyOptions) -> None:
    """Decode every image of a dataset, check sizes, labels and checksums, and list all problems.

    For latents, the record, labels, checksums and values are checked. For features, the numbers of
    ok, missing, stale and corrupt samples are printed for each bucket; with --source and --visual,
    the positions of patch features are also checked against the encoder.

    \b
    Examples:
      python dataset_tool.py verify datasets/cifar10.zip
      python dataset_tool.py verify datasets/photos-features --source=photos/ \\
          --visual=models/dinov3-vitl16
    """
    from data.convert.verify import verify_images
    from data.features.record import is_feature_folder
    from data.latents.record import is_latent_folder, verify_latents

    if options.samples is not None and options.visual is None:
        raise ValueError("--samples: has an effect only with --visual; give both, or neither.")
    if is_address(data) and is_latent_folder(data):
        remedy = "verify it on the machine that holds it"
        raise refusal(data, but="a folder at an address cannot be listed", remedy=remedy)
    if is_feature_folder(data):
        problems = _problems_of_features(data, options)
    elif options.source is not None or options.visual is not None:
        raise ValueError(f"--source, --visual: are for folders of features, and {data} is not one.")
    else:
        check = verify_latents if is_latent_folder(data) else verify_images
        problems = check(data, num_workers=options.workers)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.ClickException(f"{data}: {len(problems)} problem(s) found.")
    click.echo(f"{data}: no problems found.")


def _problems_of_features(data: str, options: VerifyOptions) -> Sequence[str]:
    """Print a table of the buckets of a feature folder, and return its problems."""
    from data.features.preparation.verify import verify_features
    from torch_utils import distributed

    device = distributed.init() if options.visual is not None else "cpu"
    numbers = dict(num_samples=options.samples or _NUM_SAMPLES, num_threads=options.workers)
    encoder = dict(visual=options.visual, device=device)
    found = verify_features(data, source=options.source, **encoder, **numbers)
    for line in found.table():
        click.echo(line)
    return found.problems
