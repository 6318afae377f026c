"""NanoDiT: a latent DiT conditioned on text, and on a visual encoder's CLS token and patches.

It is a DiT (Peebles & Xie, arXiv 2212.09748), by default without gates, whose blocks also attend to
one context of text tokens, CLS token and patch tokens. It takes latents of any height and width, so
that one network serves all aspect ratios.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import layers
from models.architectures.feature_dit import FeatureDiTConfig
from models.context import Context
from torch_utils import reuse

_NUM_SINUSOIDS = 256


class ContextBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each modulated by a conditioning vector.

    Args:
        dim: Width of the tokens, of the vector and of the context.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden width of the MLP, relative to ``dim``.
        has_gates: Whether the output of each branch is also multiplied by a gate.
        qk_norm: Whether queries and keys are normalised.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, has_gates: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = layers.SelfAttention(dim, num_heads, bias=False, qk_norm=qk_norm)
        self.cross = layers.CrossAttention(dim, dim, num_heads, bias=False, qk_norm=qk_norm)
        self.mlp = layers.MLP(dim, int(dim * mlp_ratio), bias=False)
        self._num_vectors = 9 if has_gates else 6
        self.modulation = nn.Linear(dim, self._num_vectors * dim)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        context: Tensor,
        mask: Tensor | None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """Return tokens [N, L, C] from x [N, L, C], vectors c [N, C] and a context [N, M, C].

        ``mask`` [N, M] is that of :class:`~models.layers.CrossAttention`. ``keys_values``
        [N, 2 heads, M, d] are those of the context, if they have already been computed.
        """
        vectors = self.modulation(functional.silu(c)).chunk(self._num_vectors, dim=1)
        shifts, scales, gates = vectors[:3], vectors[3:6], vectors[6:]

        def modulated(branch: int) -> Tensor:
            return layers.modulate(self.norm(x), scales[branch], shifts[branch])

        def gated(branch: int, y: Tensor) -> Tensor:
            return gates[branch][:, None] * y if gates else y

        x = x + gated(0, self.attn(modulated(0)))
        x = x + gated(1, self.cross(modulated(1), context, mask, keys_values))
        return x + gated(2, self.mlp(modulated(2)))


class FeatureDiT(nn.Module):
    """The raw network F of a feature-conditioned DiT, which predicts the velocity of a flow."""

    def __init__(self, config: FeatureDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_dim, config.patch_size
        # Width of the context.
        self.context_dim = dim
        self.patch_embedding = nn.Conv2d(config.latent_channels, dim, patch, stride=patch)
        self.noise_embedding = layers.PositionalEmbedding(_NUM_SINUSOIDS, like="dit")
        self.noise_mlp = nn.Sequential(
            nn.Linear(_NUM_SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.blocks = nn.ModuleList(
            ContextBlock(dim, config.num_heads, config.mlp_ratio, config.gates, config.qk_norm)
            for _ in range(config.num_blocks)
        )
        self.head_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, patch**2 * config.out_channels)
        self.refine = nn.Conv2d(config.out_channels, config.out_channels, 3, padding=1)
        self._positions = reuse.Kept()
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator."""
        layers.draw_layers(self)
        # Afterwards, so as not to be overwritten, the modulations and the refinement are zeroed.
        # The head is small, not zero: the first velocity is about zero, yet gradients pass it.
        for layer in (*(block.modulation for block in self.blocks), self.refine):
            nn.init.zeros_(layer.weight)
        nn.init.normal_(self.head.weight, std=0.1 / self.config.hidden_dim**0.5)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, out_channels, H, W].

        Args:
            x: Latents z [N, latent_channels, H, W]; H and W are multiples of ``patch_size``.
            c_noise: Time t in [0, 1], [N].
            context: The output of :class:`~models.feature_conditioner.FeatureConditioner`.

        Raises ValueError if the latents or the context have another shape.
        """
        self._check(x, context)
        t = self.noise_mlp(self.noise_embedding(1000 * c_noise))  #     [N, C]
        tokens = context.tokens
        if self.config.cls_token_time:
            tokens = self._add_to_cls_token(tokens, t, self._num_patches(x))
        c = t + context.vector

        grid = (x.shape[2] // self.config.patch_size, x.shape[3] // self.config.patch_size)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  #       [N, L, C]
        x = x + self.positions(grid, x.device)
        kept: Sequence[Tensor | None] = [None] * len(self.blocks)
        if context.keys_values is not None:
            kept = context.keys_values.unbind(1)
        for block, keys_values in zip(self.blocks, kept, strict=True):
            x = layers.run_block(self, block, x, c, tokens, context.mask, keys_values)
        x = self.head(self.head_norm(x)).unflatten(1, grid)  #          [N, h, w, p p C_out]
        x = layers.unpatchify(x, self.config.patch_size)  #             [N, C_out, H, W]
        return x + self.refine(x)

    def prepare(self, context: Context) -> Context:
        """Return the context with the keys and values of its tokens, for passes at many times.

        It is returned unchanged if its tokens depend on the time (``cls_token_time``).
        """
        if self.config.cls_token_time:
            return context
        attentions = [block.cross for block in self.blocks]
        return layers.with_keys_values(context, context.tokens, attentions)

    def positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return the position sinusoids of a grid, float32 [rows * columns, hidden_dim].

        ``grid`` is the number of rows and of columns.
        """

        def make() -> Tensor:
            rows, columns = (torch.arange(side, device=device) for side in grid)
            return layers.lattice_embedding(self.config.hidden_dim, rows, columns)

        return self._positions.get((*grid, device), make)

    def _num_patches(self, x: Tensor) -> int:
        if not self.config.use_dino_patches:
            return 0
        height, width = (side * self.config.latent_downsampling for side in x.shape[2:])
        rows, columns = self.config.patch_grid(width, height)
        return rows * columns

    def _add_to_cls_token(self, tokens: Tensor, t: Tensor, num_patches: int) -> Tensor:
        at = tokens.shape[1] - 1 - num_patches
        return torch.cat([tokens[:, :at], tokens[:, at, None] + t[:, None], tokens[:, at + 1 :]], 1)

    def _check(self, x: Tensor, context: Context) -> None:
        patch, channels = self.config.patch_size, self.config.latent_channels
        if x.shape[1] != channels or x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(
                f"This model denoises latents of {channels} channels whose sides are multiples of "
                f"{patch}, not {'x'.join(map(str, x.shape[1:]))}."
            )
        num_others = context.tokens.shape[1] - self._num_patches(x) - 1
        if context.tokens.shape[0] != x.shape[0] or num_others < 1:
            raise ValueError(
                f"A context of {list(context.tokens.shape[:2])} tokens does not fit {x.shape[0]} "
                f"latents of {x.shape[2]}x{x.shape[3]}, which have {self._num_patches(x)} patches."
            )
