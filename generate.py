"""Generate images from a snapshot: one seed an image, on one process or under torchrun."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from dnnlib.cli import ConfigCommand, is_given, parse_int_ranges, raw_value, run
from dnnlib.config import Config
from dnnlib.files import check_target
from dnnlib.progress import progress
from torch_utils import distributed
from torch_utils.misc import allow_tf32
from training.generation import (
    AUTOCAST_DTYPES,
    GenerateConfig,
    cached_snapshot,
    claim_outdir,
    image_path,
    labels_of_seeds,
    make_generator,
    parse_classes,
)
from training.pictures import image_grid, read_image, save_image, to_pil

EXAMPLES = """
  # 64 images, one per seed, and one picture of them all:
  python generate.py --network=runs/00000-x/network-snapshot-000154.pkl --outdir=out \\
      --seeds=0-63 --grid=out.png

  # Ten images of each of ten classes, more alike to their class:
  python generate.py --network=network.pkl --outdir=out --seeds=0-99 --class=0-9 --cfg-scale=1.5

  # 50,000 images on eight GPUs, a thousand to a folder; start again to continue:
  torchrun --standalone --nproc_per_node=8 generate.py --network=network.pkl --outdir=out \\
      --seeds=0-49999 --subdirs --batch=256
"""


def base_config(args: Sequence[str]) -> GenerateConfig:
    """Return the protocol of the snapshot named in the raw arguments."""
    return GenerateConfig.of_snapshot(raw_value(args, "network"))


def option_elsewhere(name: str, config: Config | None) -> str | None:
    """Return a sentence for an option of training given to sampling."""
    if name in ("preset", "data", "precond", "resolution"):
        return f"--{name}: the snapshot decides this; generate.py has no such option."
    return None


@click.command(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere, examples=EXAMPLES)
@click.option("--network", required=True, help="Snapshot written by train.py.")
@click.option("--outdir", required=True, type=click.Path(path_type=Path), help="Image folder.")
@click.option("--seeds", default="0-63", show_default=True, help="Seeds, such as 0-63,100.")
@click.option("--class", "classes", help="Classes that seeds take in turn: cat or 7 or 0-9.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(1), help="Per rank.")
@click.option("--subdirs", is_flag=True, help="Make a subfolder for every 1,000 seeds.")
@click.option("--grid", type=click.Path(path_type=Path), help="Also write one picture of all.")
@click.option("--columns", default=10, show_default=True, type=click.IntRange(1), help="Of --grid.")
@click.option("--guide", help="Second snapshot, to guide away from with weight --cfg-scale.")
@click.option("--tf32", is_flag=True, help="Allow TF32 matrix products on NVIDIA GPUs.")
@click.option("--vae", help="Autoencoder of a latent model, if not where it was in training.")
@click.option("--precision", type=click.Choice(list(AUTOCAST_DTYPES)), help="As in training.")
def main(
    config: GenerateConfig,
    network: str,
    outdir: Path,
    seeds: str,
    classes: str | None,
    batch: int,
    subdirs: bool,
    grid: Path | None,
    columns: int,
    guide: str | None,
    tf32: bool,
    vae: str | None,
    precision: str | None,
) -> None:
    """Generate one image per seed. An image depends on its seed, its class and the options below,
    not on the batch size or the number of processes. Images that exist are kept, so that an
    interrupted job goes on when it is started again.
    """
    if grid is None and is_given("columns"):
        raise click.UsageError("--columns arranges the picture of --grid; give that too.")
    snapshot = cached_snapshot(network)
    seed_list = parse_int_ranges(seeds)
    chosen = parse_classes(classes, snapshot.data.class_names)
    labels = labels_of_seeds(seed_list, chosen)
    paths = [image_path(outdir, seed, subdirs) for seed in seed_list]
    check_target("--outdir", outdir, is_folder=True)
    if grid is not None:
        check_target("--grid", grid)
        if grid.absolute() in {path.absolute() for path in paths}:
            raise click.UsageError(f"--grid: {grid} is the file of one of the images.")
    device = distributed.init()
    allow_tf32(tf32)
    generator = make_generator(
        snapshot,
        device,
        sampling=config.sampling,
        guidance=config.guidance,
        precision=precision,
        guide=None if guide is None else cached_snapshot(guide),
        vae=vae,
    )

    # Images of another protocol in the same folder would pass for this one's.
    protocol = dict(snapshot=snapshot.sha256, classes=chosen, **generator.protocol())
    distributed.on_main(lambda: claim_outdir(outdir, protocol))
    todo = distributed.broadcast_object([row for row, p in enumerate(paths) if not p.is_file()])
    if len(todo) < len(paths):
        distributed.print0(f"{len(paths) - len(todo)} of {len(paths)} images exist already.")
    mine = todo[distributed.rank() :: distributed.world_size()]
    with progress(total=len(todo), label="Generating", disable=not distributed.is_main()) as bar:
        for start in range(0, len(mine), batch):
            rows = mine[start : start + batch]
            own = None if labels is None else [labels[row] for row in rows]
            images = generator.generate([seed_list[row] for row in rows], own).cpu()
            for row, image in zip(rows, images, strict=True):
                save_image(to_pil(image), paths[row])
            bar.update(min(len(rows) * distributed.world_size(), len(todo)))
    distributed.barrier()
    if grid is not None and distributed.is_main():
        images = torch.stack([read_image(path) for path in paths])
        save_image(image_grid(images, columns), grid)
    distributed.print0(f"{len(paths)} images in {outdir}" + (f", all in {grid}" if grid else ""))
    distributed.shutdown()


if __name__ == "__main__":
    run(main)
