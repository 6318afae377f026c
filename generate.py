"""Generate images from a snapshot: one seed an image, on one process or under torchrun."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from data.fewshot.episodes import PROTOCOLS, Episodes
from data.fewshot.supports import read_support
from dnnlib.cli import ConfigCommand, is_given, raw_value, run
from dnnlib.config import Config
from dnnlib.files import check_target
from dnnlib.progress import progress
from dnnlib.ranges import parse_ranges
from families.sets import episodes_of_snapshot
from sampling.images import AUTOCAST_DTYPES, GenerateConfig, cached_snapshot, make_generator
from sampling.outputs import claim_outdir, image_path, labels_of_seeds, parse_classes
from sampling.requests import (
    Request,
    RequestGenerator,
    encode_requests,
    make_feature_generator,
    stored_requests,
)
from sampling.supports import SupportGenerator
from torch_utils import distributed
from torch_utils.misc import allow_tf32
from torch_utils.pictures import (
    image_grid,
    mixed_grid,
    read_image,
    save_image,
    support_picture,
    to_pil,
)
from training.checkpoint import Snapshot

EXAMPLES = """
  # 64 images, one per seed, and one picture of them all:
  python generate.py --network=runs/00000-x/network-snapshot-000154.pkl --outdir=out \\
      --seeds=0-63 --grid=out.png

  # Ten images of each of ten classes, more alike to their class:
  python generate.py --network=network.pkl --outdir=out --seeds=0-99 --class=0-9 --cfg-scale=1.5

  # A model of sets: 64 images like those in a folder, and a picture of both:
  python generate.py --network=network.pkl --outdir=out --support=my-images --num=64 --grid=out.png

  # The same for ten supports, drawn from classes that it was not trained on:
  python generate.py --network=network.pkl --outdir=out --episodes=10 --split=unseen --num=16

  # A model of features: 16 images of a text, with the style and layout of an image:
  python generate.py --network=network.pkl --outdir=out --num=16 --grid=out.png \
      --prompt="a red house by a lake" --reference=house.jpg --bucket=1216x832 \
      --text-scale=3 --visual-scale=2.5

  # 50,000 images on eight GPUs, a thousand to a folder; start again to continue:
  torchrun --standalone --nproc_per_node=8 generate.py --network=network.pkl --outdir=out \\
      --seeds=0-49999 --subdirs --batch=256
"""


def base_config(args: Sequence[str]) -> GenerateConfig:
    """Return the protocol of the snapshot named in the raw arguments."""
    return GenerateConfig.of_snapshot(raw_value(args, "network"))


def option_elsewhere(name: str, config: Config | None) -> str | None:
    """Return a sentence for an option of training given to sampling."""
    if name in ("preset", "precond", "resolution"):
        return f"--{name}: the snapshot decides this; generate.py has no such option."
    return None


def find_supports(
    snapshot: Snapshot,
    support: tuple[str, ...],
    episodes: int | None,
    split: str | None,
    data: str | None,
    classes: str | None,
) -> Episodes | None:
    """Return what a model of sets makes images from, as the options say; None for another model.

    Raises UsageError if they say nothing, or too much.
    """
    if snapshot.config.sets is None:
        given = [name for name in ("support", "episodes", "split", "data") if is_given(name)]
        if given:
            raise click.UsageError(f"--{given[0]}: this model was not trained on sets of images.")
        return None
    if classes is not None:
        raise click.UsageError("--class: this model makes images from a support; give --support.")
    if bool(support) == (episodes is not None):
        raise click.UsageError(
            "This model makes images from a support: give --support=IMAGES, or --episodes=N."
        )
    if support:
        for name in ("split", "data"):
            if is_given(name):
                raise click.UsageError(f"--{name} says where --episodes come from; give that too.")
        return read_support(support, snapshot.config.model)
    return episodes_of_snapshot(snapshot, split or "unseen", episodes, data=data)


def paths_of_parts(
    outdir: Path, num: int, seeds: list[int], subdirs: bool, nested: bool | None = None
) -> tuple[list[Path], list[int], list[int]]:
    """Return files, part and seed of all images of ``num`` parts, each of all ``seeds``.

    Parts have folders of their own if ``nested``; by default, if there are several.
    """
    nested = num > 1 if nested is None else nested
    folders = [outdir / f"{n:04d}" for n in range(num)] if nested else [outdir]
    paths = [image_path(folder, seed, subdirs) for folder in folders for seed in seeds]
    return paths, [row for row in range(num) for _ in seeds], seeds * num


def find_requests(
    snapshot: Snapshot,
    device: torch.device,
    prompts: tuple[str, ...],
    reference: Path | None,
    bucket: str | None,
    features: str | None,
    ids: str | None,
    encoders: dict[str, str | None],
) -> list[Request]:
    """Return what a model of features is asked for, as the options say.

    Raises UsageError if they say nothing, or too much.
    """
    is_stored = features is not None or ids is not None
    if is_stored == bool(prompts or reference is not None):
        raise click.UsageError(
            "This model makes images of a text, of an image, or of both: give --prompt or "
            "--reference, or --features and --id."
        )
    if is_stored:
        if features is None or ids is None:
            raise click.UsageError("Give --features and --id together.")
        for name, value in encoders.items():
            if value is not None:
                raise click.UsageError(f"--{name} has no effect on stored features.")
        return stored_requests(snapshot, features, ids.split(","), bucket)
    for name, value in (("text", prompts), ("visual", reference)):
        if encoders[name] is not None and not value:
            raise click.UsageError(
                f"--{name} encodes --{'prompt' if name == 'text' else 'reference'}; give that too."
            )
    return encode_requests(
        snapshot, device, prompts=prompts, reference=reference, bucket=bucket, **encoders
    )


@click.command(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere, examples=EXAMPLES)
@click.option("--network", required=True, help="Snapshot written by train.py.")
@click.option("--outdir", required=True, type=click.Path(path_type=Path), help="Image folder.")
@click.option("--seeds", default="0-63", show_default=True, help="Seeds, such as 0-63,100.")
@click.option(
    "--num-images",
    "--num",
    "num",
    type=click.IntRange(1),
    help="Short for --seeds=0-(N-1); torchrun takes --num for its own.",
)
@click.option("--support", multiple=True, help="Images like which to make: file, folder or zip.")
@click.option("--episodes", type=click.IntRange(1), help="Draw so many supports from --split.")
@click.option("--split", type=click.Choice(PROTOCOLS), help="Of --episodes.  [default: unseen]")
@click.option("--data", help="Of --episodes, if not where it was in training.")
@click.option("--class", "classes", help="Classes that seeds take in turn: cat or 7 or 0-9.")
@click.option("--prompt", multiple=True, help="Text of which to make images; may be given often.")
@click.option("--reference", type=click.Path(path_type=Path), help="Image like which to make.")
@click.option("--bucket", help="Size, such as 1216x832.  [default: nearest to --reference]")
@click.option("--features", help="Folder of stored features, with --id.")
@click.option("--id", "ids", help="Names of samples in --features: ID,ID.")
@click.option("--text", help="Text encoder, if not where it was when features were made.")
@click.option("--visual", help="Visual encoder, likewise.")
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
    num: int | None,
    support: tuple[str, ...],
    episodes: int | None,
    split: str | None,
    data: str | None,
    classes: str | None,
    prompt: tuple[str, ...],
    reference: Path | None,
    bucket: str | None,
    features: str | None,
    ids: str | None,
    text: str | None,
    visual: str | None,
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

    A model of sets makes images like those of a support, which --support or --episodes gives. With
    --episodes every support has a folder of its own, and the picture of --grid shows each above
    what was made of it.

    A model of features makes images of texts (--prompt), of an image (--reference), or of both, in
    one of the sizes that it was trained on.
    """
    if grid is None and is_given("columns"):
        raise click.UsageError("--columns arranges the picture of --grid; give that too.")
    if num is not None and is_given("seeds"):
        raise click.UsageError("Give --seeds or --num, not both.")
    snapshot = cached_snapshot(network)
    seed_list = parse_ranges("--seeds", seeds) if num is None else list(range(num))
    is_feature_model = snapshot.config.features is not None
    if is_feature_model and guide is not None:
        raise click.UsageError("--guide: this model is guided by --text-scale and --visual-scale.")
    for name in ("prompt", "reference", "bucket", "features", "ids", "text", "visual"):
        if is_given(name) and not is_feature_model:
            option = "id" if name == "ids" else name
            raise click.UsageError(f"--{option}: this model was not trained on features.")
    supports = find_supports(snapshot, support, episodes, split, data, classes)
    chosen = parse_classes(classes, snapshot.data.class_names)
    labels = labels_of_seeds(seed_list, chosen)
    paths = [image_path(outdir, seed, subdirs) for seed in seed_list]
    if supports is not None:
        paths, labels, seed_list = paths_of_parts(
            outdir, len(supports), seed_list, subdirs, nested=episodes is not None
        )
    check_target("--outdir", outdir, is_folder=True)
    if grid is not None:
        check_target("--grid", grid)
    device = distributed.init()
    allow_tf32(tf32)
    protocol = dict(sampling=config.sampling, precision=precision, vae=vae)
    if is_feature_model:
        requests = find_requests(
            snapshot,
            device,
            prompt,
            reference,
            bucket,
            features,
            ids,
            dict(text=text, visual=visual),
        )
        paths, labels, seed_list = paths_of_parts(outdir, len(requests), seed_list, subdirs)
        generator = RequestGenerator(
            make_feature_generator(snapshot, device, guidance=config.dual_guidance, **protocol),
            requests,
        )
    else:
        generator = make_generator(
            snapshot,
            device,
            guidance=config.guidance,
            guide=None if guide is None else cached_snapshot(guide),
            **protocol,
        )
    if supports is not None:
        generator = SupportGenerator.of(generator, supports)
    if grid is not None and grid.absolute() in {path.absolute() for path in paths}:
        raise click.UsageError(f"--grid: {grid} is the file of one of the images.")

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
            images = generator.generate([seed_list[row] for row in rows], own)
            for row, image in zip(rows, images, strict=True):
                save_image(to_pil(image), paths[row])
            bar.update(min(len(rows) * distributed.world_size(), len(todo)))
    distributed.barrier()
    if grid is not None and distributed.is_main():
        images = [read_image(path) for path in paths]
        if is_feature_model:
            rows = [images[row : row + columns] for row in range(0, len(images), columns)]
            picture = mixed_grid(rows)
        elif supports is None:
            picture = image_grid(torch.stack(images), columns)
        else:
            samples = torch.stack(images).unflatten(0, (len(supports), -1))
            picture = support_picture(supports.supports, samples, bands=columns)
        save_image(picture, grid)
    distributed.print0(f"{len(paths)} images in {outdir}" + (f", all in {grid}" if grid else ""))
    distributed.shutdown()


if __name__ == "__main__":
    run(main)
