"""Generate images from a snapshot, one per seed, on one process or under torchrun."""

# First, so that a process that torchrun starts also ends with it.
import dnnlib.launcher  # noqa: F401

# isort: split
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import click

import families
from diffusion.config import PRECISIONS
from dnnlib.cli import ConfigCommand, is_given, raw_value
from dnnlib.click_options import output_rules, overwrites, param, takes
from dnnlib.config import Config
from dnnlib.files import check_target
from dnnlib.program import run
from dnnlib.text import MAX_LISTED, check_seeds, parse_ranges
from sampling.config import GenerateConfig
from training.asked import Asked, GeneratorOptions
from training.config import CPU_MATMUL

EXAMPLES = """
  # 64 images, one per seed, and one picture of them all:
  python generate.py --network=runs/00000-x/network-snapshot-000154.pkl --outdir=out \\
      --seeds=0-63 --grid=out.png

  # Ten images of each of ten classes, more typical of their class:
  python generate.py --network=network.pkl --outdir=out --seeds=0-99 --class=0-9 --cfg-scale=1.5

  # DDIM with the spacing of published code, at timesteps 980, 960, ..., 0 of 1,000:
  python generate.py --network=network.pkl --outdir=out --sampler=ddim --respacing=ddim50

  # An animation of 16 images as they are denoised, step by step:
  python generate.py --network=network.pkl --outdir=out --num=16 --gif=out.gif

  # A set-conditioned model: 64 images like those in a folder, and a picture of both:
  python generate.py --network=network.pkl --outdir=out --support=my-images --num=64 --grid=out.png

  # The same for ten supports, drawn from classes that it was not trained on:
  python generate.py --network=network.pkl --outdir=out --episodes=10 --split=unseen --num=16

  # A feature-conditioned model: 16 images of a prompt, in the style and layout of an image:
  python generate.py --network=network.pkl --outdir=out --num=16 --grid=out.png \\
      --prompt="a red house by a lake" --reference=house.jpg --bucket=1216x832 \\
      --text-scale=3 --visual-scale=2.5

  # 50,000 images on eight GPUs, 1,000 per folder; run it again to continue:
  torchrun --standalone --nproc_per_node=8 generate.py --network=network.pkl --outdir=out \\
      --seeds=0-49999 --subdirs --batch=256
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Which images to generate, where to write them, and how the network computes."""

    network: str = param(required=True, help="Snapshot written by train.py.")
    outdir: Path = param(required=True, help="Folder for the images.")
    seeds: str = param(default="0-63", help="Seeds, one image each, such as 0-63,100.")
    num: int | None = param(
        "--num-images",
        "--num",
        min=1,
        max=MAX_LISTED,
        help="Short for --seeds=0-(N-1) (under torchrun use --num-images: it parses --num itself).",
    )
    batch: int = param(default=64, min=1, max=1_000_000, help="Images per rank and pass.")
    subdirs: bool = param(help="Make a subfolder for every 1,000 seeds.")
    grid: Path | None = param(help="File for one picture of all images.")
    gif: Path | None = param(help="File for an animation of up to 16 images as they are denoised.")
    columns: int = param(
        default=10, min=1, max=1_000, help="Images, or supports, in a row of --grid."
    )
    guide: str | None = param(help="Second snapshot, to guide away from with weight --cfg-scale.")
    tf32: bool = param(help="Allow TF32 matrix products on NVIDIA GPUs.")
    vae: str | None = param(
        help="Autoencoder of a latent model.  [default: where it was in training]"
    )
    precision: str | None = param(
        choices=PRECISIONS, help="Arithmetic of the network.  [default: as in training]"
    )
    cpu_matmul: str | None = param(
        choices=CPU_MATMUL,
        help="Library for float32 matrix products on CPUs.  [default: as in training]",
    )
    compile: bool = param(
        "--compile/--no-compile", default=False, help="Compile the network with torch.compile."
    )

    def seed_list(self) -> list[int]:
        """Return all seeds; raises UsageError for a repeated seed, or --num beside --seeds."""
        if self.num is None:
            seeds = parse_ranges("--seeds", self.seeds)
            if len(set(seeds)) < len(seeds):
                raise click.UsageError("--seeds names a seed twice; an image is named by its seed.")
            check_seeds("--seeds", seeds)
            return seeds
        if is_given("seeds"):
            raise click.UsageError("Give --seeds or --num, not both.")
        return list(range(self.num))


def base_config(args: Sequence[str]) -> GenerateConfig:
    """Return the protocol of the snapshot named in the raw arguments."""
    return GenerateConfig.of_snapshot(raw_value(args, "network"))


def option_elsewhere(name: str, config: Config | None) -> str | None:
    """Return what to tell the user about an option of train.py or other software, or None."""
    if name in ("preset", "precond", "resolution"):
        return f"--{name}: the snapshot decides this; generate.py has no such option."
    from commands.synonyms import used_here

    return used_here(name)


@click.command(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere, examples=EXAMPLES)
@takes(GenerateOptions)
@takes(Asked, "asked")
@overwrites
def main(config: GenerateConfig, options: GenerateOptions, asked: Asked) -> None:
    """Generate one image per seed. An image depends on its seed, its class and the options below,
    not on the batch size or the number of processes. Existing images are kept, so an interrupted
    job continues when you run it again.

    A set-conditioned model generates images like those in a support, which you give with --support
    or --episodes. With --episodes every support gets its own folder, and the picture of --grid
    shows each support above its images.

    A feature-conditioned model generates images from prompts (--prompt), from an image
    (--reference), or from both, in one of the sizes that it was trained on.

    Sampling and guidance options default to the snapshot's values, which --network=FILE --help
    shows.
    """
    # Cheap checks first: nothing is loaded or started before they pass.
    if options.grid is None and is_given("columns"):
        raise click.UsageError("--columns arranges the picture of --grid; give that too.")
    seeds = options.seed_list()
    from sampling.animation import animate
    from sampling.images import cached_snapshot, describe_sampling
    from sampling.outputs import check_layout, claim_outdir, make_images, places
    from torch_utils import distributed
    from torch_utils.misc import allow_tf32
    from torch_utils.pictures import check_picture_target, read_image, save_image

    snapshot = cached_snapshot(options.network)
    family = families.of(snapshot.config)
    given = click.get_current_context().meta["given"]
    requests = family.requests(snapshot, dataclasses.replace(asked, given=given))
    todo = places(options.outdir, requests, seeds, options.subdirs)
    check_target("--outdir", options.outdir, is_folder=True)
    check_layout(places(options.outdir, requests, seeds, not options.subdirs), options.subdirs)
    if options.grid is not None:
        check_picture_target("--grid", options.grid, **output_rules("grid"))
        if options.grid.absolute() in {place.path.absolute() for place in todo}:
            raise click.UsageError(f"--grid: {options.grid} is the file of one of the images.")
    if options.gif is not None:
        check_picture_target("--gif", options.gif, ".gif", **output_rules("gif"))

    device = distributed.init()
    allow_tf32(options.tf32)
    how = GeneratorOptions.of(options, config)
    generator = requests.bind(family.load(snapshot, device, how), device)
    # Images made by another protocol in the same folder would pass for this one's.
    facts = dict(snapshot=snapshot.sha256, **requests.facts, **generator.protocol())
    distributed.on_main(lambda: claim_outdir(options.outdir, facts, todo))
    make_images(generator, todo, options.batch)
    if options.grid is not None and distributed.is_main():
        images = [read_image(place.path) for place in todo]
        labels = [place.label for place in todo]
        heading = describe_sampling(generator.protocol())
        picture = requests.picture(images, labels, options.columns, heading)
        save_image(picture, options.grid)
    if options.gif is not None:
        distributed.on_main(lambda: animate(generator, requests, todo, options.gif))
    shown = f", all in {options.grid}" if options.grid else ""
    shown += f", how they are denoised in {options.gif}" if options.gif else ""
    distributed.print0(f"{len(todo)} images in {options.outdir}{shown}")
    distributed.shutdown()


if __name__ == "__main__":
    run(main)
