"""The digits of scikit-learn as a testbed: an autoencoder of them, and a classifier."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib.progress import progress
from training.dataset import ImageDataset

_KL_WEIGHT = 1e-3


def class_agreement(images: np.ndarray, labels: Sequence[int]) -> float:
    """Return the share of images in which a 3-nearest-neighbour classifier sees the asked class.

    Args:
        images: uint8 [N, 8, 8] or with further dimensions of one, as generated.
        labels: [N], the class that each was asked to be of.

    The classifier is fitted on the 1,797 real digits.
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    digits = load_digits()
    classifier = KNeighborsClassifier(n_neighbors=3).fit(digits.data, digits.target)
    features = images.reshape(len(images), -1) * (16 / 255)
    return float(np.mean(classifier.predict(features) == np.asarray(labels)))


def train_autoencoder(
    data: str | Path, folder: str | Path, *, num_steps: int = 400, batch: int = 128, seed: int = 0
) -> float:
    """Train a small AutoencoderKL on a dataset, write it to ``folder``, and return its last error.

    Latents have 4 channels and half the edge of the images. Its ``scaling_factor`` gives them unit
    variance, as in latent diffusion (Rombach et al., arXiv 2112.10752). The error is the mean
    square over pixels in [-1, 1].
    """
    from diffusers import AutoencoderKL

    dataset = ImageDataset(data)
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=dataset.img_channels,
        out_channels=dataset.img_channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=dataset.resolution,
        mid_block_add_attention=False,
    )
    images = dataset.__getitems__(range(len(dataset)))[0].to(torch.float32) / 127.5 - 1
    optimizer = torch.optim.Adam(vae.parameters())
    generator = torch.Generator().manual_seed(seed)
    with progress(total=num_steps, label="Autoencoder", unit="step") as bar:
        for step in range(num_steps):
            chosen = images[torch.randint(len(images), [batch], generator=generator)]
            posterior = vae.encode(chosen).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
            error = (decoded - chosen).square().mean()
            loss = error + _KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 + math.cos(math.pi * step / num_steps)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
    with torch.no_grad():
        std = vae.encode(images).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / std)
    vae.save_pretrained(folder)
    return error.item()
