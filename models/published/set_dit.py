"""The layout of tensor names in the JAX code of few-shot diffusion models.

Flax stores weights as [in, out] (``kernel``), with a separate dimension for the heads of attention,
and names anonymous modules by class and number. Names here are paths in its tree, joined by dots.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.architectures.set_dit import SetDiTConfig
from models.layers import position_embedding
from models.published.layout import Constant, Layout, Shape, Source, filled, reordered, same

_DIT, _ENCODER = "dit", "encoder"
_BLOCK = f"{_DIT}.DiTBlock_"
_ATTENTION = "MultiHeadDotProductAttention"
_HEAD = (f"{_ENCODER}.mlp_norm", f"{_ENCODER}.mlp_dense")
_POSTERIOR = "posterior."
# Published rows: shift, scale and gate of self-attention, then of the MLP. Ours begin with scale.
_ROWS = (1, 0, 2, 4, 3, 5)
_HEAD_ROWS = (1, 0)


class SetDiTLayout(Layout):
    """DiT and set encoder of the JAX code; its encoder always depends on the noise level."""

    title = "few-shot diffusion models (JAX)"
    marker = f"{_ENCODER}.pos_embedding"

    def rename(self, name: str) -> str:
        name = super().rename(name.replace("/", "."))
        # Remove Flax's collection names, and the prefix of rematerialised blocks.
        return name.replace(".params.", ".").replace("CheckpointDiTBlock_", "DiTBlock_")

    def settings(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        found = dict(like="fsdm-jax", encoder_mode="vit_set", encoder_time=True)
        found["use_context_layernorm"] = f"{_BLOCK}0.context_scale" in shapes
        if any(name.endswith(f".{_ATTENTION}_1.out.kernel") for name in shapes):
            lag = dict(mode_conditioning="lag", gate="none", mode_context="deterministic")
            return {**found, **lag, "context_pool_size": None}
        modulation = shapes.get(f"{_BLOCK}0.Dense_0.kernel")
        if modulation is not None and modulation[1:] != (6 * modulation[0],):
            raise ValueError(
                "the weights are of the later form of lag, whose blocks have neither "
                "self-attention nor the noise level; no model here works that way."
            )
        is_drawn = any(name.startswith(_POSTERIOR) for name in shapes)
        mode = "variational" if is_drawn else "deterministic"
        return {**found, "mode_conditioning": "film", "mode_context": mode}

    def sources(self, config: SetDiTConfig) -> list[Source]:
        config.check_like()
        found = [
            _conv("backbone.patch_embedding.weight", f"{_DIT}.PatchEmbed_0.Conv_0.kernel"),
            same("backbone.patch_embedding.bias", f"{_DIT}.PatchEmbed_0.Conv_0.bias"),
            *_dense("backbone.noise_mlp.0", f"{_DIT}.TimestepEmbedder_0.Dense_0"),
            *_dense("backbone.noise_mlp.2", f"{_DIT}.TimestepEmbedder_0.Dense_1"),
            *_dense("backbone.head", f"{_DIT}.FinalLayer_0.Dense_1"),
            filled("conditioner.null", lambda: torch.zeros(config.context_dim)),
        ]
        final = _dense("backbone.head_modulation", f"{_DIT}.FinalLayer_0.Dense_0")
        found += [reordered(source, _HEAD_ROWS) for source in final]
        if config.mode_conditioning == "film":
            found.append(_joined("backbone.join.weight", f"{_DIT}.Dense_0.kernel"))
            found.append(same("backbone.join.bias", f"{_DIT}.Dense_0.bias"))
        for index in range(config.num_blocks):
            found += _block(config, index)
        return found + _encoder(config)

    def constants(self, config: SetDiTConfig) -> dict[str, Constant]:
        positions = position_embedding(config.hidden_dim, config.grid).flatten(0, 1)[None]
        problem = "other values than the sinusoids of this model"
        return {f"{_DIT}.pos_embed": Constant(positions, problem)}

    def is_unused(self, name: str, config: SetDiTConfig) -> bool:
        # Lag uses the tokens as the encoder's blocks return them, and not the set's vector.
        return config.mode_conditioning == "lag" and name.startswith((*_HEAD, _POSTERIOR))


def _block(config: SetDiTConfig, index: int) -> list[Source]:
    """Return the sources of block ``index`` of the DiT."""
    own, name = f"backbone.blocks.{index}", f"{_BLOCK}{index}"
    heads = config.num_heads
    found = [
        *_attention(f"{own}.attn.qkv", f"{name}.{_ATTENTION}_0", ("query", "key", "value"), heads),
        *_attention_out(f"{own}.attn.proj", f"{name}.{_ATTENTION}_0", heads),
        *_dense(f"{own}.mlp.fc1", f"{name}.MlpBlock_0.Dense_0"),
        *_dense(f"{own}.mlp.fc2", f"{name}.MlpBlock_0.Dense_1"),
    ]
    modulation = [reordered(s, _ROWS) for s in _dense(f"{own}.modulation", f"{name}.Dense_0")]
    if index not in config.context_layers:
        if config.use_context_layernorm:
            found.append(same(f"{own}.vector_norm.weight", f"{name}.context_scale"))
        return found + modulation
    cross = f"{name}.{_ATTENTION}_1"
    return [
        *found,
        *(_with_neither_scale_nor_shift(source) for source in modulation),
        *_attention(f"{own}.cross.q", cross, ("query",), heads),
        *_projected(f"{own}.cross.kv", cross, f"{name}.Dense_1", heads),
        *_attention_out(f"{own}.cross.proj", cross, heads),
    ]


def _encoder(config: SetDiTConfig) -> list[Source]:
    """Return the sources of the set encoder, and of the posterior of its vector."""
    own = "conditioner.encoder"
    layers = ("norm", "linear") if config.stacks_images else ("0", "1")
    embedding = f"{_ENCODER}.to_patch_embedding"
    found = [
        same(f"{own}.cls", f"{_ENCODER}.cls_token"),
        same(f"{own}.positions", f"{_ENCODER}.pos_embedding"),
        *_norm(f"{own}.tokeniser.{layers[0]}", f"{embedding}.norm"),
        *_dense(f"{own}.tokeniser.{layers[1]}", f"{embedding}.proj"),
        *_dense(f"{own}.time_mlp.0", "time_embed.Dense_0"),
        *_dense(f"{own}.time_mlp.2", "time_embed.Dense_1"),
        *_dense(f"{own}.time_mlp.3", f"{_ENCODER}.to_time_embedding"),
    ]
    for index in range(config.encoder_depth):
        block, name = f"{own}.blocks.{index}", f"{_ENCODER}.transformer.layer_{index}"
        found += [
            *_norm(f"{block}.norm1", f"{name}.LayerNorm_0"),
            same(f"{block}.attn.log_temperature", f"{name}.LSA_0.temperature"),
            _kernel(f"{block}.attn.qkv.weight", f"{name}.LSA_0.Dense_0.kernel"),
            *_dense(f"{block}.attn.proj", f"{name}.LSA_0.Dense_1"),
            *_norm(f"{block}.norm2", f"{name}.LayerNorm_1"),
            *_dense(f"{block}.mlp.0", f"{name}.FeedForward_0.Dense_0"),
            *_dense(f"{block}.mlp.3", f"{name}.FeedForward_0.Dense_1"),
        ]
    if config.mode_conditioning == "film":
        found += [*_norm(f"{own}.head.0", _HEAD[0]), *_dense(f"{own}.head.1", _HEAD[1])]
    if config.mode_context == "variational":
        found += _dense("conditioner.posterior.0", f"{_POSTERIOR}Dense_0")
        found += _dense("conditioner.posterior.2", f"{_POSTERIOR}Dense_1")
    return found


# Layers of Flax.


def _kernel(own: str, name: str) -> Source:
    return Source(own, (name,), lambda shape: (shape[::-1],), lambda kernel: kernel.T)


def _dense(own: str, name: str) -> tuple[Source, Source]:
    return _kernel(f"{own}.weight", f"{name}.kernel"), same(f"{own}.bias", f"{name}.bias")


def _norm(own: str, name: str) -> tuple[Source, Source]:
    return same(f"{own}.weight", f"{name}.scale"), same(f"{own}.bias", f"{name}.bias")


def _conv(own: str, name: str) -> Source:
    def shapes(shape: Shape) -> tuple[Shape, ...]:
        out, channels, height, width = shape
        return ((height, width, channels, out),)

    return Source(own, (name,), shapes, lambda kernel: kernel.permute(3, 2, 0, 1))


def _attention(own: str, name: str, parts: tuple[str, ...], heads: int) -> tuple[Source, Source]:
    """Return the sources of a linear layer [n h, h] that joins n kernels [h, heads, d]."""

    def shapes(shape: Shape) -> tuple[Shape, ...]:
        width = shape[0] // len(parts)
        return ((*shape[1:], heads, width // heads),) * len(parts)

    def make(*tensors: Tensor) -> Tensor:
        return torch.cat([tensor.flatten(-2).movedim(-1, 0) for tensor in tensors])

    return tuple(
        Source(f"{own}.{kind}", tuple(f"{name}.{part}.{flax}" for part in parts), shapes, make)
        for kind, flax in (("weight", "kernel"), ("bias", "bias"))
    )


def _attention_out(own: str, name: str, heads: int) -> tuple[Source, Source]:
    def shapes(shape: Shape) -> tuple[Shape, ...]:
        return ((heads, shape[1] // heads, shape[0]),)

    weight = Source(
        f"{own}.weight", (f"{name}.out.kernel",), shapes, lambda kernel: kernel.flatten(0, 1).T
    )
    return weight, same(f"{own}.bias", f"{name}.out.bias")


def _projected(own: str, name: str, projection: str, heads: int) -> tuple[Source, Source]:
    """Return the sources of keys and values [2 h, c] of a context that is projected first.

    The two consecutive linear layers are one: W (P c + p) + b = (W P) c + (W p + b).
    """
    weights, biases = _attention(own, name, ("key", "value"), heads)

    def shapes(shape: Shape) -> tuple[Shape, ...]:
        width, dim = shape[0] // 2, shape[1]
        return (*weights.shapes((shape[0], width)), (dim, width))

    def weight(key: Tensor, value: Tensor, kernel: Tensor) -> Tensor:
        return weights.make(key, value) @ kernel.T

    def bias_shapes(shape: Shape) -> tuple[Shape, ...]:
        width = shape[0] // 2
        return (*biases.shapes(shape), *weights.shapes((shape[0], width)), (width,))

    def bias(*tensors: Tensor) -> Tensor:
        return biases.make(*tensors[:2]) + weights.make(*tensors[2:4]) @ tensors[4]

    return (
        Source(f"{own}.weight", (*weights.names, f"{projection}.kernel"), shapes, weight),
        Source(
            f"{own}.bias",
            (*biases.names, *weights.names, f"{projection}.bias"),
            bias_shapes,
            bias,
        ),
    )


def _joined(own: str, name: str) -> Source:
    """Return the source of a weight [h, h + c] that adds the projected context to the first h."""

    def shapes(shape: Shape) -> tuple[Shape, ...]:
        return ((shape[1] - shape[0], shape[0]),)

    def make(kernel: Tensor) -> Tensor:
        return torch.cat([torch.eye(kernel.shape[1]), kernel.T], dim=1)

    return Source(own, (name,), shapes, make)


def _with_neither_scale_nor_shift(source: Source) -> Source:
    """Return the source of a modulation [8 h, ...] with zeros for the last two of eight parts.

    These are scale and shift before cross-attention, which the JAX code lacks.
    """

    def shapes(shape: Shape) -> tuple[Shape, ...]:
        return source.shapes((shape[0] // 8 * 6, *shape[1:]))

    def make(tensor: Tensor) -> Tensor:
        rows = source.make(tensor)
        return torch.cat([rows, torch.zeros_like(rows[: len(rows) // 3])])

    return Source(source.own, source.names, shapes, make)


LAYOUT = SetDiTLayout()
