"""The layout of tensor names in the published weights of latent DiffiT."""

import torch

from models import build_network
from models.architectures.latent_diffit import LatentDiffiTConfig
from models.layers import position_embedding, relative_position_index
from models.published.layout import Constant, Layout, Source, same

# Published prefixes, and ours. Names within a block are equal.
_PREFIXES = {
    "x_embedder.proj.": "backbone.patch_embedding.",
    "t_embedder.mlp.": "backbone.time_token.",
    "y_embedder.embedding_table.": "conditioner.embedding_table.",
    "blocks.": "backbone.blocks.",
    "final_layer.linear.": "backbone.head.",
}


class LatentDiffiTLayout(Layout):
    """346 tensors at depth 28; the 28 relative position indices among them are optional."""

    title = "latent DiffiT"
    marker = "blocks.0.attn.qkv_temb.weight"

    def sources(self, config: LatentDiffiTConfig) -> list[Source]:
        with torch.device("meta"):
            own = build_network(config).state_dict()
        return [same(name, _published_name(name)) for name in own]

    def constants(self, config: LatentDiffiTConfig) -> dict[str, Constant]:
        positions = position_embedding(config.hidden_dim, config.grid).flatten(0, 1)[None]
        found = {"pos_embed": Constant(positions, "other values than the sinusoids of this model")}
        index = Constant(
            relative_position_index(config.grid), "another order of relative positions", True
        )
        for block in range(config.num_blocks):
            found[f"blocks.{block}.attn.relative_position_index"] = index
        return found


def _published_name(name: str) -> str:
    for published, own in _PREFIXES.items():
        if name.startswith(own):
            return published + name.removeprefix(own)
    raise AssertionError(name)


LAYOUT = LatentDiffiTLayout()
