"""Prints the table of docs/sets.md that counts set-conditioned models module by module.

python tests/count_set_parameters.py
"""

import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from configs.set_dit import MODELS
from models import build_network
from torch_utils.misc import count_parameters

# Millions that the documents claim.
CLAIMED = {
    "fsdm-depth12": 43.5,
    "fsdm-depth6": 44.9,
    "fsdm-option-a": 43.5,
    "fsdm-option-b": 40.0,
    "fsdm-option-c": 35.0,
}
# What the documents may have counted otherwise, one on top of the other.
STEPS = (
    dict(mlp_ratio=4.0),
    dict(encoder_heads=12, encoder_dim_head=64),
    dict(encoder_time=True),
)
HEAD = (
    "preset",
    "blocks",
    "embeddings, output, null",
    "encoder",
    "total",
    "MLP ratio 4",
    "encoder 12 x 64",
    "noise level in the encoder",
    "largest",
    "claimed",
)


def build(config):
    """Return the network without memory for its weights, for the classes of no dataset."""
    with torch.device("meta"):
        return build_network(config)


def millions(count, sign=""):
    return f"{count / 1e6:{sign}.2f}"


def row(name):
    """Return the cells of a preset."""
    config = MODELS[name]
    network = build(config)
    counted = (network, network.backbone.blocks, network.conditioner.encoder)
    total, blocks, encoder = map(count_parameters, counted)
    parts = [blocks, total - blocks - encoder, encoder]
    cells, before = [*map(millions, parts), millions(total)], total
    for step in STEPS:
        config = dataclasses.replace(config, **step)
        now = count_parameters(build(config))
        cells.append(millions(now - before, "+"))
        before = now
    return [f"`{name}`", *cells, millions(before), f"{CLAIMED[name]:g}"]


def table():
    """Return the lines of the table."""
    rows = [HEAD, ["---"] * len(HEAD), *map(row, CLAIMED)]
    return ["| " + " | ".join(cells) + " |" for cells in rows]


if __name__ == "__main__":
    print("\n".join(table()))
