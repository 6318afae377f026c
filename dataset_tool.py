"""Make datasets, latents and features out of images; describe and check them."""

import click

from dnnlib.click_options import LazyGroup
from dnnlib.program import run


@click.group(
    cls=LazyGroup,
    package="commands",
    summaries={
        "convert": "Write a dataset for training or scoring from a source of images.",
        "encode": "Write the latents of a dataset, for latent models.",
        "features": "Write the features of captioned images, for feature-conditioned models.",
        "index": "Write the index of a tar of images, so that it can be read in place.",
        "info": "Print size, classes and content hash of a dataset.",
        "verify": "Check every image of a dataset, and list all problems.",
    },
)
def main() -> None:
    """Make datasets, latents and features out of images; describe and check them.

    \b
    Examples:
      python dataset_tool.py convert --source=digits --dest=datasets/digits.zip
      python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=datasets/cifar10.zip
      python dataset_tool.py encode --source=datasets/ffhq-256.zip --dest=datasets/ffhq-latents \\
          --vae=stabilityai/sd-vae-ft-ema
      python dataset_tool.py features --source=photos/ --dest=datasets/photos-features \\
          --vae=models/flux-vae --visual=models/dinov3-vitl16 --text=models/t5-v1_1-xxl
      python dataset_tool.py index datasets/photos.tar
      python dataset_tool.py info datasets/cifar10.zip
      python dataset_tool.py verify datasets/cifar10.zip
    """


if __name__ == "__main__":
    run(main)
