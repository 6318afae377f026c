"""Tiny random autoencoders and latent archives for tests."""

import numpy as np
import torch
from helpers import succeed

import dataset_tool


def tiny_autoencoder(
    folder,
    *,
    img_channels=3,
    latent_channels=4,
    num_stages=2,
    width=8,
    scaling_factor=0.5,
    shift_factor=None,
    **settings,
):
    """Write a random AutoencoderKL that halves an image's sides for all stages but one.

    Returns its folder.
    """
    import diffusers

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.AutoencoderKL(
            in_channels=img_channels,
            out_channels=img_channels,
            latent_channels=latent_channels,
            block_out_channels=(width, *[2 * width] * 3)[:num_stages],
            down_block_types=("DownEncoderBlock2D",) * num_stages,
            up_block_types=("UpDecoderBlock2D",) * num_stages,
            norm_num_groups=4,
            layers_per_block=1,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            **settings,
        )
    network.save_pretrained(folder)
    return folder


def tiny_images(path, *, num_images=37, size=8, img_channels=3, num_classes=3):
    """Write a sample archive of random images, labelled unless ``num_classes`` is 0."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, size, size, img_channels), dtype=np.uint8)
    labels = {"arr_1": rng.integers(0, num_classes, num_images)} if num_classes else {}
    np.savez(path, arr_0=images, **labels)
    return path


def encode(source, dest, vae, *options):
    """Run ``dataset_tool.py encode`` in this process, with success; return what it printed."""
    command = ("encode", f"--source={source}", f"--dest={dest}", f"--vae={vae}", *options)
    return succeed(dataset_tool, *command).output


def tiny_latents(base, *options, name="latents", **images):
    """Return a latent archive of :func:`tiny_images`, made once per folder and name.

    The images are ``images.npz`` and the autoencoder is ``vae``, both in ``base``.
    """
    vae, source, dest = base / "vae", base / "images.npz", base / name
    if not vae.is_dir():
        tiny_autoencoder(vae, img_channels=images.get("img_channels", 3))
    if not source.is_file():
        tiny_images(source, **images)
    if not dest.is_dir():
        encode(source, dest, vae, "--shard-size=10", *options)
    return dest
