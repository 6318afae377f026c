"""Tiny set-conditioned networks, and what makes conditions for them."""

import dataclasses

import torch

from models import build_network
from models.architectures.set_dit import SetDiTConfig

NUM, CHANNELS, SIZE = 4, 2, 8  # Images in a set; their channels; their height and width.

# Sixteen tokens of an image; inner widths of attention differ from those of the tokens.
TINY = SetDiTConfig(
    resolution=SIZE,
    img_channels=CHANNELS,
    sample_size=NUM,
    patch_size=2,
    hidden_dim=24,
    num_blocks=2,
    num_heads=2,
    mlp_ratio=2.0,
    hdim=12,
    encoder_depth=2,
    encoder_heads=3,
    encoder_dim_head=5,
)

ENCODERS = {
    "vit": dict(encoder_mode="vit"),
    "second pass": dict(encoder_mode="vit", second_pass=True),
    "stack": dict(),
    "shifted stack": dict(spt_shifts=True),
    "mean": dict(encoder_tokenizer="per_sample_mean"),
}


def build(**changes):
    """Return the tiny network with its initial weights, always the same."""
    torch.manual_seed(0)
    return build_network(dataclasses.replace(TINY, **changes))


def build_active(**changes):
    """Return the tiny network with random numbers added to all weights: no gate is closed."""
    network = build(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def random_images(*shape, seed=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, CHANNELS, SIZE, SIZE, generator=generator, dtype=dtype)


def value_of(context):
    """What the DiT takes: the vector or the tokens."""
    return context.tokens if context.vector is None else context.vector
