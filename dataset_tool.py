"""Turns images into a dataset, its latents or features, describes and checks one."""

import os
import signal
import sys
from typing import Any

import click
import numpy as np

from data.convert import convert as conversion
from data.convert import verify as verification
from data.convert.cifar_mnist import SPLITS
from data.convert.fewshot_sources import CIFAR_SPLITS
from data.convert.sources import open_source
from data.features import record as feature_record
from data.images.labels import CLASS_SPLITS, read_labels
from data.images.transforms import TRANSFORMS, parse_resolution
from data.latents import record as latent_archive
from dnnlib.cli import run
from dnnlib.text import format_count


@click.group(context_settings=dict(help_option_names=["-h", "--help"]))
def main() -> None:
    """Turn images into a dataset, its latents or features, describe and check one.

    \b
    Examples:
      python dataset_tool.py convert --source=digits --dest=datasets/digits.zip
      python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=datasets/cifar10.zip
      python dataset_tool.py encode --source=datasets/ffhq-256.zip --dest=datasets/ffhq-latents \\
          --vae=stabilityai/sd-vae-ft-ema
      python dataset_tool.py features --source=photos/ --dest=datasets/photos-features \\
          --vae=models/flux-vae --visual=models/dinov3-vitl16 --text=models/t5-v1_1-xxl
      python dataset_tool.py info datasets/cifar10.zip
      python dataset_tool.py verify datasets/cifar10.zip
    """


@main.command(no_args_is_help=True)
@click.option(
    "--source",
    required=True,
    metavar="PATH|digits",
    help="Folder or zip of images, .npz of samples in ADM's layout, CIFAR-10/100 python archive, "
    "MNIST idx file or folder, pickles of FC100, CIFAR-FS or miniImageNet, folder of Omniglot's "
    "train_small.npz and test_small.npz; or digits: the handwritten digits of scikit-learn.",
)
@click.option(
    "--dest",
    required=True,
    metavar="ZIP|DIR|NPZ",
    help="New .zip file or folder, or .npz of samples for ADM's evaluator (always RGB).",
)
@click.option(
    "--resolution",
    metavar="N|WxH",
    help="Size of the result; without it all images must have one square size already. WxH is for "
    "center-crop-wide, where N alone means 4:3.",
)
@click.option(
    "--transform",
    type=click.Choice(TRANSFORMS),
    help="How images that are not square become so; without it only square ones are accepted.",
)
@click.option("--max-images", type=click.IntRange(min=1), help="Use only the first N images.")
@click.option("--skip-broken", is_flag=True, help="Leave out broken images instead of failing.")
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    help="Part of a CIFAR archive or MNIST folder to take.  [default: train]",
)
@click.option(
    "--class-split",
    type=click.Choice(CIFAR_SPLITS),
    help="Divide the classes of CIFAR-100 for few-shot learning, and take all its images.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Number of processes that decode.  [default: one per core]",
)
def convert(
    source: str,
    dest: str,
    resolution: str | None,
    transform: str | None,
    max_images: int | None,
    skip_broken: bool,
    split: str | None,
    class_split: str | None,
    workers: int | None,
) -> None:
    """Write a dataset for training or scoring from a source of images.

    Labels come from the source's dataset.json or, for folders and zips, from the first folder
    level. Grayscale stays one channel; if any image is RGB, all become RGB; transparency is put on
    white. In an .npz all images are RGB: grayscale is repeated to three equal channels. The target
    is complete or absent, whatever happens on the way.

    \b
    Examples:
      # CIFAR-10: 50,000 labelled 32x32 images
      python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=datasets/cifar10.zip
      # FFHQ at 64x64, from a folder of larger images
      python dataset_tool.py convert --source=ffhq/ --dest=datasets/ffhq-64x64.zip --resolution=64
      # ImageNet at 256x256, cropped as by ADM; labels from the class folders
      python dataset_tool.py convert --source=ILSVRC/train --dest=datasets/imagenet-256.zip \\
          --resolution=256 --transform=center-crop-dhariwal
      # MNIST; its labels are found beside it
      python dataset_tool.py convert --source=train-images-idx3-ubyte.gz --dest=datasets/mnist.zip
      # CIFAR-100 with FC100's division into classes to train on, to validate on and unseen ones
      python dataset_tool.py convert --source=cifar-100-python.tar.gz --class-split=fc100 \\
          --dest=datasets/fc100.zip
      # miniImageNet from a folder of its three pickles, at 32x32
      python dataset_tool.py convert --source=mini-imagenet --dest=datasets/mini.zip --resolution=32
      # Generated images as a sample archive for ADM's evaluator, and one made into a zip
      python dataset_tool.py convert --source=out/ --dest=samples.npz
      python dataset_tool.py convert --source=samples.npz --dest=samples.zip
    """
    # A request to stop cleans up; what SIGKILL leaves is a hidden .NAME.*.tmp beside --dest.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    summary = conversion.convert(
        open_source(source, split, class_split),
        dest,
        size=parse_resolution(resolution, transform),
        transform=transform,
        max_images=max_images,
        skip_broken=skip_broken,
        num_workers=workers,
    )
    for note in summary.notes:
        click.echo(note)
    if summary.skipped:
        click.echo("Broken:\n  " + "\n  ".join(summary.skipped), err=True)
        click.echo(f"Skipped {len(summary.skipped)} broken image(s).")
    size = f"{summary.resolution}x{summary.resolution}x{summary.img_channels}"
    classes = f"{summary.num_classes} classes" if summary.num_classes else "no labels"
    click.echo(f"{dest}: {summary.num_images} images of {size}, {classes}.")


@main.command(no_args_is_help=True)
@click.option("--source", required=True, metavar="ZIP|DIR|NPZ", help="Images, made by convert.")
@click.option("--dest", required=True, metavar="DIR", help="Folder for the latents.")
@click.option(
    "--vae",
    required=True,
    metavar="DIR|ID",
    help="Autoencoder: folder of a diffusers AutoencoderKL, or its Hugging Face id.",
)
@click.option("--hflip", is_flag=True, help="Add the latents of the mirror images.")
@click.option("--mean-only", is_flag=True, help="Leave out the standard deviations.")
@click.option(
    "--batch",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images a rank encodes at a time.",
)
@click.option(
    "--shard-size",
    default=4096,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images in a file.",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "bf16"]),
    help="Of the autoencoder's products; bf16 is faster and rounds latents to 3 digits.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Number of processes a rank that decode; 0: the rank itself.  [default: up to 8, as cores "
    "allow]",
)
def encode(
    source: str,
    dest: str,
    vae: str,
    hflip: bool,
    mean_only: bool,
    batch: int,
    shard_size: int,
    precision: str,
    workers: int | None,
) -> None:
    """Write the latents of a dataset, which training reads instead of the images.

    Runs on one process, or under torchrun on many GPUs. Started again after a stop, with any
    number of processes, it makes what is missing. Needs the package diffusers.

    \b
    Examples:
      # ImageNet at 256x256 for latent models, with mirror images, on eight GPUs
      torchrun --standalone --nproc_per_node=8 dataset_tool.py encode --hflip \\
          --source=datasets/imagenet-256.zip --dest=datasets/imagenet-256-latents \\
          --vae=stabilityai/sd-vae-ft-ema
      # On one process, with an autoencoder from a folder
      python dataset_tool.py encode --source=datasets/ffhq-256.zip --dest=datasets/ffhq-latents \\
          --vae=models/sd-vae-ft-ema --batch=16
    """
    # They need PyTorch, which starts slowly.
    from data.latents import encode as encoding
    from torch_utils import distributed

    options = encoding.Encoding(
        hflip=hflip,
        mean_only=mean_only,
        precision=precision,
        shard_size=shard_size,
        batch_size=batch,
        num_workers=workers,
    )
    device = distributed.init()
    record, num_made = encoding.encode(source, dest, vae, options, device)
    size = "x".join(map(str, record.latent_shape))
    total = len(record.shards)
    if num_made is None:
        distributed.print0(f"{dest}: complete already.")
    elif num_made < total:
        distributed.print0(f"{total - num_made} of {total} shards existed already.")
    classes = f"{len(record.class_names)} classes" if record.class_names else "no labels"
    distributed.print0(f"{dest}: {record.num_images} latents of {size}, {classes}.")
    distributed.shutdown()


@main.command(no_args_is_help=True)
@click.option("--source", required=True, metavar="DIR|ZIP", help="Images of any size and shape.")
@click.option(
    "--captions",
    metavar="FILE.jsonl|DIR|metadata",
    help="JSONL of file and caption; folder of IMAGE.txt files; or metadata: captions in the "
    "source's dataset.json.  [default: IMAGE.txt beside each image]",
)
@click.option("--caption-key", metavar="KEY", help="Name of the captions in the JSONL or metadata.")
@click.option("--dest", required=True, metavar="DIR", help="Folder for the shards of features.")
@click.option("--vae", metavar="DIR|ID", help="Autoencoder: AutoencoderKL of diffusers.")
@click.option("--visual", metavar="DIR|ID", help="Visual encoder: DINOv3 ViT of transformers.")
@click.option("--text", metavar="DIR|ID", help="Text encoder: T5 of transformers, and tokenizer.")
@click.option(
    "--buckets",
    metavar="WxH,...",
    help="Sizes that images are brought to, each to the one of the nearest shape.  [default: "
    "1024x1024, 1216x832, 1280x768, 1344x704 and their transposes]",
)
@click.option(
    "--only",
    type=click.Choice(["vae", "visual", "text"]),
    help="Prepare one feature, and leave shards to a later run.",
)
@click.option(
    "--shard-size",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Samples in a shard, of about 11 MB each at the default sizes.",
)
@click.option(
    "--validation-share",
    default=0.02,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Part of each bucket that validates, at least one of two; 0: none.",
)
@click.option(
    "--batch",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images, or captions, a rank encodes at a time.",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "bf16"]),
    help="Of the encoders' products; bf16 is faster and rounds features to 3 digits.",
)
@click.option("--max-images", type=click.IntRange(min=1), help="Use only the first N images.")
@click.option("--skip-broken", is_flag=True, help="Leave out broken images instead of failing.")
@click.option("--overwrite", is_flag=True, help="Make everything again.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Number of threads a rank that decode and write.  [default: up to 16, as cores allow]",
)
def features(source: str, dest: str, buckets: str | None, **options: Any) -> None:
    """Write what feature-conditioned models learn from: latents, DINOv3 and T5 features.

    Every image is cropped once, to the size of its bucket; all features of it are of that crop.
    Runs on one process, or under torchrun on many GPUs. Started again after a stop, with any
    number of processes, or with changed images, captions or encoders, it makes what is missing or
    no longer right, and nothing else. Needs the packages diffusers and transformers.

    \b
    Examples:
      # Photographs with their captions in text files beside them, on eight GPUs
      torchrun --standalone --nproc_per_node=8 dataset_tool.py features --precision=bf16 \\
          --source=photos/ --dest=datasets/photos-features \\
          --vae=models/flux-vae --visual=facebook/dinov3-vitl16-pretrain-lvd1689m \\
          --text=models/t5-v1_1-xxl
      # Captions in one file, and half the default sizes, on one process
      python dataset_tool.py features --source=photos.zip --captions=captions.jsonl \\
          --dest=datasets/photos-512 --buckets=512x512,608x416,416x608 \\
          --vae=models/flux-vae --visual=models/dinov3-vitl16 --text=models/t5-v1_1-xxl
      # The captions alone, on another machine
      python dataset_tool.py features --source=photos/ --dest=datasets/photos-features \\
          --only=text --text=models/t5-v1_1-xxl
    """
    # They need PyTorch, which starts slowly.
    from data.features.buckets import DEFAULT_BUCKETS, parse_buckets
    from data.features.preparation import prepare as preparation
    from data.features.preparation import report as feature_report
    from torch_utils import distributed

    locations = {name: options.pop(name) for name in ("vae", "visual", "text")}
    settings = preparation.Preparation(
        buckets=DEFAULT_BUCKETS if buckets is None else parse_buckets(buckets),
        batch_size=options.pop("batch"),
        num_threads=options.pop("workers"),
        **options,
    )
    device = distributed.init()
    outcome = preparation.prepare(source, dest, locations, settings, device)
    for line in feature_report.describe_outcome(dest, outcome, settings.only):
        distributed.print0(line)
    distributed.shutdown()


@main.command(no_args_is_help=True)
@click.argument("data", metavar="ZIP|DIR|NPZ")
def info(data: str) -> None:
    """Print size, classes and content hash of a dataset, or the record of latents or features."""
    if feature_record.is_feature_folder(data):
        from data.features.preparation import report as feature_report

        for line in feature_report.describe_folder(data):
            click.echo(line)
        return
    if latent_archive.is_latent_folder(data):
        _latent_info(data)
        return
    from data.images.dataset import ImageDataset

    dataset = ImageDataset(data)
    labels, class_names = read_labels(dataset.archive) or (None, [])
    click.echo(f"images        {len(dataset)}")
    click.echo(f"resolution    {dataset.resolution}x{dataset.resolution}")
    click.echo(f"channels      {dataset.img_channels}")
    click.echo(f"size          {format_count(dataset.archive.num_bytes, 'B')}")
    click.echo(f"content hash  {dataset.content_hash}")
    splits = ImageDataset(data, use_labels=None).class_splits
    if splits:
        parts = [f"{len(splits[name])} {name}" for name in CLASS_SPLITS if name in splits]
        click.echo(f"class split   {', '.join(parts)}")
    _show_classes(labels, class_names)


def _latent_info(data: str) -> None:
    from data.latents.dataset import LatentDataset

    dataset = LatentDataset(data)
    record = dataset.record
    num_bytes = sum(os.path.getsize(os.path.join(data, s["file"])) for s in record.shards)
    twins = ", each with its mirror image" if record.mirrored else ""
    kind = "mean and standard deviation" if record.kind == "mean-std" else "mean alone"
    packages = ", ".join(f"{name} {version}" for name, version in record.packages.items())
    size = "x".join(map(str, record.latent_shape))
    click.echo(f"latents       {record.num_images}{twins}")
    click.echo(f"latent shape  {size}, {kind}, float16")
    click.echo(f"normalised    (latent - {record.shift:g}) * {record.scale:g}")
    click.echo(f"images        {record.resolution}x{record.resolution}x{record.img_channels}")
    click.echo(f"source        {record.source}, content hash {record.source_hash}")
    click.echo(f"autoencoder   {record.vae}, hash {record.vae_hash}")
    click.echo(f"made with     {record.precision}, x = {record.input_transform}; {packages}")
    click.echo(f"size          {format_count(num_bytes, 'B')} in {len(record.shards)} file(s)")
    click.echo(f"content hash  {dataset.content_hash}")
    _show_classes(dataset.labels, dataset.class_names)


def _show_classes(labels: np.ndarray | None, class_names: list[str]) -> None:
    click.echo(f"classes       {len(class_names) if class_names else 'none (no labels)'}")
    if class_names:
        click.echo("\nindex   images  name")
        counts = np.bincount(labels, minlength=len(class_names))
        for index, (name, count) in enumerate(zip(class_names, counts, strict=True)):
            click.echo(f"{index:5d} {count:8d}  {name}")


@main.command(no_args_is_help=True)
@click.argument("data", metavar="ZIP|DIR|NPZ")
@click.option("--workers", type=click.IntRange(min=1), help="Number of processes that decode.")
@click.option("--source", metavar="DIR|ZIP", help="Of features: compare the images as well.")
@click.option("--visual", metavar="DIR|ID", help="Of features: encode some images anew.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Of features, with --visual: how many images of each bucket.  [default: 4]",
)
def verify(
    data: str, workers: int | None, source: str | None, visual: str | None, samples: int | None
) -> None:
    """Decode every image of a dataset, check sizes, labels and checksums, and list all problems.

    Of latents, check record, labels, checksums and values. Of features, count for each bucket what
    is ok, missing, stale and corrupt; with --source and --visual, also whether patches lie where
    the encoder sees them.

    \b
    Examples:
      python dataset_tool.py verify datasets/cifar10.zip
      python dataset_tool.py verify datasets/photos-features --source=photos/ \\
          --visual=models/dinov3-vitl16
    """
    if samples is not None and visual is None:
        raise ValueError("--samples: has an effect only with --visual; give both, or neither.")
    if feature_record.is_feature_folder(data):
        from data.features.preparation.verify import verify_features
        from torch_utils import distributed

        found = verify_features(
            data,
            source=source,
            visual=visual,
            num_samples=samples or 4,
            num_threads=workers,
            device=distributed.init() if visual is not None else "cpu",
        )
        for line in found.table():
            click.echo(line)
        problems = found.problems
    elif source is not None or visual is not None:
        raise ValueError(f"--source, --visual: are for folders of features, and {data} is none.")
    else:
        is_latent = latent_archive.is_latent_folder(data)
        check = latent_archive.verify_latents if is_latent else verification.verify
        problems = check(data, num_workers=workers)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.ClickException(f"{data}: {len(problems)} problem(s) found.")
    click.echo(f"{data}: no problems found.")


if __name__ == "__main__":
    run(main)
