"""The layout of tensor names in NanoDiT's own code."""

import math
from collections.abc import Mapping
from typing import Any

from models.architectures.feature_dit import FeatureDiTConfig
from models.published.layout import Layout, Shape, Source, both, reordered, same

# Published names of layers with a bias, and ours.
_LAYERS = {
    "x_embedder.proj": "backbone.patch_embedding",
    "t_embedder.mlp.0": "backbone.noise_mlp.0",
    "t_embedder.mlp.2": "backbone.noise_mlp.2",
    "dino_proj": "conditioner.dino_proj",
    "dino_patch_proj": "conditioner.dino_patch_proj",
    "text_proj": "conditioner.text_proj",
    "final_proj": "backbone.head",
    "output_conv": "backbone.refine",
}
_NULLS = ("null_dino", "null_dino_patch_token", "null_text")
# The same for the layers of a block, none of which has a bias.
_BLOCK = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "cross_attn.q": "cross.q",
    "cross_attn.kv": "cross.kv",
    "cross_attn.proj": "cross.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_MODULATION = "adaLN_modulation.1"
# Published rows: shift and scale of self-attention, of cross-attention and of the MLP. Our rows:
# the three shifts, then the three scales.
_ROWS = (0, 2, 4, 1, 3, 5)


class FeatureDiTLayout(Layout):
    """NanoDiT with patch tokens, no gates, no patch positions, and the time in the CLS token."""

    title = "NanoDiT"
    marker = "null_dino_patch_token"
    needs_data = True  # For sizes, widths, encoders, and the statistics of normalisation.

    def settings(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        return dict(use_dino_patches=True, patch_pos=False, cls_token_time=True, gates=False)

    def features(self, known: Mapping[str, Any]) -> dict[str, Any]:
        # The published code normalises all latent channels alike, and CLS and patches not at all.
        statistics = dict(known["statistics"])
        latents, num = statistics["vae"], len(statistics["vae"]["mean"])
        mean = math.fsum(latents["mean"]) / num
        squares = (m**2 + s**2 for m, s in zip(latents["mean"], latents["std"], strict=True))
        std = math.sqrt(math.fsum(squares) / num - mean**2)
        statistics["vae"] = dict(latents, mean=[mean] * num, std=[std] * num)
        for name in ("cls", "patches"):
            width = len(statistics[name]["mean"])
            statistics[name] = dict(statistics[name], mean=[0.0] * width, std=[1.0] * width)
        return dict(known, statistics=statistics)

    def sources(self, config: FeatureDiTConfig) -> list[Source]:
        found = [source for name, own in _LAYERS.items() for source in both(own, name)]
        found += [same(f"conditioner.{name}", name) for name in _NULLS]
        for index in range(config.num_blocks):
            published, own = f"blocks.{index}", f"backbone.blocks.{index}"
            for name, layer in _BLOCK.items():
                found.append(same(f"{own}.{layer}.weight", f"{published}.{name}.weight"))
            for source in both(f"{own}.modulation", f"{published}.{_MODULATION}"):
                found.append(reordered(source, _ROWS))
        return found


LAYOUT = FeatureDiTLayout()
