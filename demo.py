"""Demonstrates the whole chain from files to a score, on real data that needs no download.

It runs the commands that a user would run, shows them, and checks the result.
"""

import dataclasses
import time
from pathlib import Path

import click

from dnnlib.click_options import param, takes
from dnnlib.files import check_target
from dnnlib.program import run
from dnnlib.text import format_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    outdir: Path = param(default="demo-out", help="Folder for data, runs and images.")
    latent: bool = param(help="Train latent DiffiT instead, and sample it with guidance.")
    sets: bool = param(
        help="Train set-conditioned DiT instead, and generate digits that it never saw."
    )
    letters: bool = param(
        help="Train set-conditioned DiT on letters of fonts, and generate scripts that it never "
        "saw."
    )
    features: bool = param(
        help="Train NanoDiT instead, on photographs with text and image conditions."
    )


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@takes(DemoOptions)
@click.argument("train_args", nargs=-1, type=click.UNPROCESSED)
def main(options: DemoOptions, train_args: tuple[str, ...]) -> int:
    """Train, sample and score a small class-conditional DiffiT on 1,797 real handwritten digits.

    TRAIN_ARGS are passed to train.py after the demo's own options, as in

    \b
      python demo.py -- --kimg=300
      python demo.py --latent
      python demo.py --sets
      python demo.py --letters
      python demo.py --features
    """
    sets, letters, features = options.sets, options.letters, options.features
    if options.latent + sets + letters + features > 1:
        raise click.UsageError("Give one of --latent, --sets, --letters and --features.")
    check_target("--outdir", options.outdir, is_folder=True)
    start = time.time()
    what = "photographs" if features else "letters" if letters else "digits"
    minutes = "8 to 10" if sets or letters else "2 to 5"
    click.echo(
        f"This prepares {what}, trains on them, generates images and checks them. It takes "
        f"{minutes} minutes on two CPU cores (less on a GPU)."
    )
    # These modules load PyTorch, which --help does not need.
    if letters:
        from demos.glyphs import demo_glyphs as demo
    elif sets:
        from demos.sets import demo_sets as demo
    elif features:
        from demos.features import demo_features as demo
    elif options.latent:
        from demos.images import demo_latents as demo
    else:
        from demos.images import demo_pixels as demo
    passed = demo(options.outdir, train_args)
    verdict = "As expected." if passed else "NOT as expected."
    click.echo(f"Total time: {format_time(time.time() - start)}. {verdict}")
    return 0 if passed else 1


if __name__ == "__main__":
    run(main)
