"""dataset_tool.py features: writes latents, DINOv3 and T5 features of captioned images."""

import dataclasses

import click

from dnnlib.click_options import param, takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesOptions:
    source: str = param(
        required=True, metavar="DIR|ZIP", help="Folder or zip of images of any size and shape."
    )
    captions: str | None = param(
        metavar="FILE.jsonl|DIR|metadata",
        help="JSONL of file and caption; folder of IMAGE.txt files; or metadata: captions in the "
        "source's dataset.json.  [default: IMAGE.txt beside each image]",
    )
    caption_key: str | None = param(
        metavar="KEY", help="Name of the captions in the JSONL or metadata."
    )
    dest: str = param(required=True, metavar="DIR", help="Folder for the shards of features.")
    vae: str | None = param(metavar="DIR|ID", help="Autoencoder: AutoencoderKL of diffusers.")
    visual: str | None = param(metavar="DIR|ID", help="Visual encoder: DINOv3 ViT of transformers.")
    text: str | None = param(
        metavar="DIR|ID", help="Text encoder: T5 of transformers, with its tokenizer."
    )
    buckets: str | None = param(
        metavar="WxH,...",
        help="Sizes to crop images to; each image gets the one of the nearest shape.  [default: "
        "1024x1024, 1216x832, 1280x768, 1344x704 and their transposes]",
    )
    only: str | None = param(
        choices=("vae", "visual", "text"),
        help="Prepare one kind of feature, and leave the shards to a later run.",
    )
    shard_size: int = param(
        default=64,
        min=1,
        max=1_000_000,
        help="Number of samples in a shard, of about 11 MB each at the default sizes.",
    )
    validation_share: float = param(
        default=0.02,
        min=0,
        max=1,
        max_open=True,
        help="Share of each bucket to keep for validation, at least one image of two; 0: none.",
    )
    batch: int = param(
        default=8,
        min=1,
        max=1_000_000,
        help="Number of images, or captions, that a rank encodes at a time.",
    )
    precision: str = param(
        default="fp32",
        choices=("fp32", "bf16"),
        help="Arithmetic of the encoders; bf16 is faster and rounds features to 3 digits.",
    )
    feature_bits: str = param(
        default="16",
        choices=("16", "8"),
        help="Bits of each value of the visual encoder's patch features; 8 halves their size.",
    )
    max_images: int | None = param(min=1, max=1_000_000_000, help="Use only the first N images.")
    skip_broken: bool = param(help="Leave out broken images instead of failing.")
    overwrite: bool = param(help="Recompute everything.")
    workers: int | None = param(
        min=1,
        max=1_024,
        help="Number of threads per rank that decode and write.  [default: up to 16, as cores "
        "allow]",
    )


@click.command(no_args_is_help=True)
@takes(FeaturesOptions)
def command(options: FeaturesOptions) -> None:
    """Write the training data of feature-conditioned models: latents, DINOv3 and T5 features.

    Every image is cropped once, to the size of its bucket; all of its features are computed from
    that crop. Runs in one process, or under torchrun on many GPUs. Run it again after an
    interruption, with any number of processes, or after changing images, captions or encoders: it
    writes only what is missing or out of date. Requires the packages diffusers and transformers.

    \b
    Examples:
      # Photographs with their captions in text files beside them, on eight GPUs
      torchrun --standalone --nproc_per_node=8 dataset_tool.py features --precision=bf16 \\
          --source=photos/ --dest=datasets/photos-features \\
          --vae=models/flux-vae --visual=facebook/dinov3-vitl16-pretrain-lvd1689m \\
          --text=models/t5-v1_1-xxl
      # Captions in one file, and half the default sizes, in one process
      python dataset_tool.py features --source=photos.zip --captions=captions.jsonl \\
          --dest=datasets/photos-512 --buckets=512x512,608x416,416x608 \\
          --vae=models/flux-vae --visual=models/dinov3-vitl16 --text=models/t5-v1_1-xxl
      # The captions alone, on another machine
      python dataset_tool.py features --source=photos/ --dest=datasets/photos-features \\
          --only=text --text=models/t5-v1_1-xxl
    """
    from data.features.buckets import DEFAULT_BUCKETS, parse_buckets
    from data.features.preparation import prepare as preparation
    from data.features.preparation import report as feature_report
    from torch_utils import distributed

    locations = {name: getattr(options, name) for name in ("vae", "visual", "text")}
    same = ("captions", "caption_key", "only", "shard_size", "validation_share", "precision")
    same += ("max_images", "skip_broken", "overwrite")
    settings = preparation.Preparation(
        buckets=DEFAULT_BUCKETS if options.buckets is None else parse_buckets(options.buckets),
        batch_size=options.batch,
        num_threads=options.workers,
        feature_bits=int(options.feature_bits),
        **{name: getattr(options, name) for name in same},
    )
    device = distributed.init()
    outcome = preparation.prepare(options.source, options.dest, locations, settings, device)
    for line in feature_report.describe_outcome(options.dest, outcome, options.only):
        distributed.print0(line)
    distributed.shutdown()
