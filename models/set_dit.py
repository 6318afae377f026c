"""A DiT conditioned on a set of images, for few-shot generation.

It is a DiT (Peebles & Xie, arXiv 2212.09748) with the context of few-shot diffusion models
(Giannone et al., arXiv 2205.15463): a vector that modulates the blocks, or tokens that blocks
attend to.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import layers
from models.architectures.set_dit import SetDiTConfig
from models.context import Context

_NUM_SINUSOIDS = 256
# With a warm start: standard deviation of the modulation weights, as DiT's embeddings have it, and
# initial gate of cross-attention.
_WARM_STD, _WARM_GATE = 0.02, 0.1


class GatedBlock(nn.Module):
    """Self-attention, cross-attention and MLP, with scale, shift and gate from a vector.

    Args:
        dim: Width of the tokens and of the vector.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden width of the MLP, relative to ``dim``.
        context_dim: Width of the context's tokens; None for a block without cross-attention.
        gate: What scales the cross-attention: ``adaln`` (the vector), ``scalar`` (tanh of one
            learned number, initially 0) or ``none``.
        norm_vector: Whether the vector is normalised first.
        qk_norm: Whether queries and keys are normalised.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        context_dim: int | None = None,
        gate: str = "adaln",
        norm_vector: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.vector_norm = nn.LayerNorm(dim, eps=1e-6, bias=False) if norm_vector else nn.Identity()
        self.attn = layers.SelfAttention(dim, num_heads, qk_norm=qk_norm)
        self.mlp = layers.MLP(dim, int(dim * mlp_ratio))
        self.cross: layers.CrossAttention | None = None
        self.gate: nn.Parameter | None = None
        if context_dim is not None:
            self.cross = layers.CrossAttention(dim, context_dim, num_heads, qk_norm=qk_norm)
            self.gate = nn.Parameter(torch.zeros(1)) if gate == "scalar" else None
        self._num_vectors = 6 if self.cross is None else 9 if gate == "adaln" else 8
        self.modulation = nn.Linear(dim, self._num_vectors * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Tensor, u: Tensor, context: Tensor | None, keys_values: Tensor | None = None
    ) -> Tensor:
        """Return tokens [N, L, h] from tokens x [N, L, h], vectors u [N, h], context [N, M, c].

        ``keys_values`` [N, 2 heads, M, d] are the context's, if they have already been computed.
        """
        u = functional.silu(self.vector_norm(u))
        parts = self.modulation(u).chunk(self._num_vectors, dim=1)
        scale, shift, gate = parts[:3]
        x = x + gate[:, None] * self.attn(layers.modulate(self.norm(x), scale, shift))
        if self.cross is not None:
            scale, shift = parts[6:8]
            y = layers.modulate(self.norm(x), scale, shift)
            y = self.cross(y, context, keys_values=keys_values)
            if len(parts) == 9:
                y = parts[8][:, None] * y
            elif self.gate is not None:
                y = self.gate.tanh() * y
            x = x + y
        scale, shift, gate = parts[3:6]
        return x + gate[:, None] * self.mlp(layers.modulate(self.norm(x), scale, shift))


class SetDiT(nn.Module):
    """The raw network F of a set-conditioned DiT.

    ``film``: the embedding of the noise level and the context's vector are joined into one vector
    that modulates every block. ``lag``: the noise level alone modulates, and blocks attend to the
    context's tokens between self-attention and MLP. Modulations begin at zero (adaLN-Zero).
    """

    def __init__(self, config: SetDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_dim, config.patch_size
        # Width of the label's embedding, which is added to the noise level's.
        self.context_dim = dim
        self.patch_embedding = nn.Conv2d(config.img_channels, dim, patch, stride=patch)
        positions = layers.position_embedding(dim, config.grid).flatten(0, 1)
        self.register_buffer("position_embedding", positions, persistent=False)
        self.noise_embedding = layers.PositionalEmbedding(_NUM_SINUSOIDS, like="dit")
        self.noise_mlp = nn.Sequential(
            nn.Linear(_NUM_SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        is_film = config.mode_conditioning == "film"
        # The JAX code instead normalises the sum of noise level and context, in every block.
        norms_sum = config.use_context_layernorm and config.is_like_jax and is_film
        self.context_norm = nn.Identity()
        if config.use_context_layernorm and not norms_sum:
            self.context_norm = nn.LayerNorm(config.context_dim, eps=1e-6, bias=False)
        if is_film:
            self.join = nn.Linear(dim + config.context_dim, dim)
        contexts = dict.fromkeys(config.context_layers, config.context_dim)
        sizes = (dim, config.num_heads, config.mlp_ratio)
        settings = (config.gate, norms_sum, config.qk_norm)
        self.blocks = nn.ModuleList(
            GatedBlock(*sizes, contexts.get(index), *settings) for index in range(config.num_blocks)
        )
        self.head_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch**2 * config.out_channels)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the initial weights of DiT (arXiv 2212.09748) from torch's global generator."""
        layers.draw_layers(self)
        for layer in (self.noise_mlp[0], self.noise_mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

        # Blocks begin as identities, and the zero head makes c_skip x the first estimate.
        modulations = [block.modulation for block in self.blocks]
        for layer in (*modulations, self.head_modulation, self.head):
            nn.init.zeros_(layer.weight)
        if self.config.warm_start_adaln:
            self._warm_start()

    def _warm_start(self) -> None:
        """Give the context a small initial effect, so that the encoder has a gradient at once.

        With blocks that begin as identities, it has none until the modulations have grown.
        """
        for block in self.blocks:
            if self.config.mode_conditioning == "film":
                nn.init.normal_(block.modulation.weight, std=_WARM_STD)
            elif block.gate is not None:
                nn.init.constant_(block.gate, _WARM_GATE)
            elif block.cross is not None:
                # The last of the nine vectors scales the cross-attention.
                nn.init.constant_(block.modulation.bias.chunk(9)[8], _WARM_GATE)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, out_channels, H, W].

        Args:
            x: Images [N, C, H, W], scaled to about unit variance.
            c_noise: Noise level [N], as the preconditioner encodes it, such as a timestep.
            context: ``film`` uses its vector [N, context_dim], ``lag`` its tokens
                [N, M, context_dim]. Its label [N, hidden_dim], if any, is added to the noise
                level's embedding.

        Raises ValueError if H and W are not those of the configuration, or if the part of the
        context that the mode of conditioning uses is missing or has another shape.
        """
        self._check(x, context)
        e = self.noise_mlp(self.noise_embedding(c_noise))  #            [N, h]
        if context.label is not None:
            e = e + context.label
        if self.config.mode_conditioning == "film":
            c = self.context_norm(context.vector)
            u, tokens = self.join(torch.cat([e, c.to(e.dtype)], dim=1)), None
        else:
            u, tokens = e, self.context_norm(context.tokens)  #         [N, M, c]

        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  #       [N, L, h]
        x = x + self.position_embedding
        for block, keys_values in zip(self.blocks, self._keys_values(context), strict=True):
            x = layers.run_block(self, block, x, u, tokens, keys_values)
        scale, shift = self.head_modulation(functional.silu(u)).chunk(2, dim=1)
        x = self.head(layers.modulate(self.head_norm(x), scale, shift))  # [N, L, p p C_out]
        x = x.unflatten(1, (self.config.grid, -1))  #                   [N, g, g, p p C_out]
        return layers.unpatchify(x, self.config.patch_size)  #          [N, C_out, H, W]

    def prepare(self, context: Context) -> Context:
        """Return the context with the keys and values of its tokens, for many noise levels."""
        if context.tokens is None:
            return context
        attentions = [block.cross for block in self.blocks if block.cross is not None]
        return layers.with_keys_values(context, self.context_norm(context.tokens), attentions)

    def _keys_values(self, context: Context) -> list[Tensor | None]:
        """Return the precomputed keys and values for each block, None where there are none."""
        if context.keys_values is None:
            return [None] * len(self.blocks)
        kept = iter(context.keys_values.unbind(1))
        return [None if block.cross is None else next(kept) for block in self.blocks]

    def _check(self, x: Tensor, context: Context) -> None:
        config = self.config
        layers.check_input(x, config.input_shape, "images")
        part, name = context.tokens, "tokens [N, M, D]"
        expected = [x.shape[0], config.num_context_tokens, config.context_dim]
        if config.mode_conditioning == "film":
            part, name, expected = context.vector, "vector [N, D]", [x.shape[0], config.context_dim]
        if part is None or part.ndim != len(expected):
            found = "none" if part is None else f"shape {list(part.shape)}"
            raise ValueError(f"This model needs the context's {name}; there is {found}.")
        if list(part.shape) != expected:
            raise ValueError(
                f"The context has shape {list(part.shape)}, but this model needs {expected} for "
                f"{x.shape[0]} images."
            )
