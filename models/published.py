"""The layout in which the published weights of latent DiffiT name their tensors."""

from collections.abc import Mapping

import torch

from models import build_network
from models.architectures.latent_diffit import LatentDiffiTConfig
from models.layers import relative_position_index
from models.network import Network

# Published prefixes, and ours. Names inside a block are the same.
_PREFIXES = {
    "x_embedder.proj.": "backbone.patch_embedding.",
    "t_embedder.mlp.": "backbone.time_token.",
    "y_embedder.embedding_table.": "conditioner.embedding_table.",
    "blocks.": "backbone.blocks.",
    "final_layer.linear.": "backbone.head.",
}
_POSITIONS = "pos_embed"
_INDEX = "attn.relative_position_index"
_MAX_LISTED = 4


def published_shapes(config: LatentDiffiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every published tensor: 346 of them at depth 28.

    28 of those, the indices into the tables of relative position biases, may be absent.
    """
    with torch.device("meta"):
        own = build_network(config).state_dict()
    shapes = {_published_name(name): tuple(tensor.shape) for name, tensor in own.items()}
    num_tokens = config.grid**2
    shapes[_POSITIONS] = (1, num_tokens, config.hidden_dim)
    for block in range(config.num_blocks):
        shapes[f"blocks.{block}.{_INDEX}"] = (num_tokens, num_tokens)
    return shapes


def network_of_published(
    tensors: Mapping[str, torch.Tensor], config: LatentDiffiTConfig
) -> Network:
    """Return a network of ``config`` with published weights, in float32.

    Raises ValueError that lists all missing, unexpected and mismatched names, or if the constants
    among the tensors are not those of this network.
    """
    shapes = published_shapes(config)
    optional = {name for name in shapes if name.endswith(_INDEX)}
    others = {
        "missing": [n for n in shapes if n not in tensors and n not in optional],
        "unexpected": [n for n in tensors if n not in shapes],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    problems = []
    for title, names in others.items():
        if names:
            listed = ", ".join(names[:_MAX_LISTED])
            rest = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
            problems.append(f"{len(names)} {title}: {listed}{rest}")
    if problems:
        raise ValueError(f"the weights are not of this model; {'; '.join(problems)}.")

    network = build_network(config)
    positions = tensors[_POSITIONS].to(torch.float32).reshape(config.grid, config.grid, -1)
    if not torch.allclose(positions, network.backbone.position_embedding, atol=1e-4):
        raise ValueError(f"{_POSITIONS} holds other values than the sinusoids of this model.")
    index = relative_position_index(config.grid)
    for name in sorted(optional & set(tensors)):
        if not torch.equal(tensors[name].to(torch.int64), index):
            raise ValueError(f"{name} holds another order of relative positions.")
    own = network.state_dict()
    network.load_state_dict({name: tensors[_published_name(name)] for name in own})
    return network


def _published_name(name: str) -> str:
    for published, own in _PREFIXES.items():
        if name.startswith(own):
            return published + name.removeprefix(own)
    raise AssertionError(name)
