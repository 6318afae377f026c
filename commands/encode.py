"""dataset_tool.py encode: writes the latents of a dataset."""

import dataclasses

import click

from dnnlib.click_options import param, takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    source: str = param(
        required=True, metavar="ZIP|DIR|NPZ", help="Dataset made by convert, or images like it."
    )
    dest: str = param(required=True, metavar="DIR", help="Folder for the latents.")
    vae: str = param(
        required=True,
        metavar="DIR|ID",
        help="Autoencoder: folder of a diffusers AutoencoderKL, or its Hugging Face id.",
    )
    hflip: bool = param(help="Add the latents of the mirror images.")
    mean_only: bool = param(help="Leave out the standard deviations.")
    batch: int = param(
        default=64, min=1, max=1_000_000, help="Number of images that a rank encodes at a time."
    )
    shard_size: int = param(default=4096, min=1, max=1_000_000, help="Number of images in a file.")
    precision: str = param(
        default="fp32",
        choices=("fp32", "bf16"),
        help="Arithmetic of the autoencoder; bf16 is faster and rounds latents to 3 digits.",
    )
    workers: int | None = param(
        min=0,
        max=1_024,
        help="Number of decoding processes per rank; 0: the rank itself decodes.  [default: up to "
        "8, as cores allow]",
    )


@click.command(no_args_is_help=True)
@takes(EncodeOptions)
def command(options: EncodeOptions) -> None:
    """Write the latents of a dataset, which training reads instead of the images.

    Runs in one process, or under torchrun on many GPUs. Run it again after an interruption, with
    any number of processes, to write what is missing. Requires the diffusers package.

    \b
    Examples:
      # ImageNet at 256x256 for latent models, with mirror images, on eight GPUs
      torchrun --standalone --nproc_per_node=8 dataset_tool.py encode --hflip \\
          --source=datasets/imagenet-256.zip --dest=datasets/imagenet-256-latents \\
          --vae=stabilityai/sd-vae-ft-ema
      # In one process, with an autoencoder from a folder
      python dataset_tool.py encode --source=datasets/ffhq-256.zip --dest=datasets/ffhq-latents \\
          --vae=models/sd-vae-ft-ema --batch=16
    """
    from data.latents.encode import Encoding, encode
    from torch_utils import distributed

    dest, same = options.dest, ("hflip", "mean_only", "precision", "shard_size")
    settings = {name: getattr(options, name) for name in same}
    encoding = Encoding(batch_size=options.batch, num_workers=options.workers, **settings)
    device = distributed.init()
    record, num_made = encode(options.source, dest, options.vae, encoding, device)
    size = "x".join(map(str, record.latent_shape))
    total = len(record.shards)
    if num_made is None:
        distributed.print0(f"{dest}: complete already.")
    elif num_made < total:
        distributed.print0(f"{total - num_made} of {total} shards existed already.")
    classes = f"{len(record.class_names)} classes" if record.class_names else "no labels"
    distributed.print0(f"{dest}: {record.num_images} latents of {size}, {classes}.")
    distributed.shutdown()
