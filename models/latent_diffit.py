"""Latent DiffiT: transformer blocks of one width on the latents of an autoencoder.

Hatamizadeh et al., DiffiT: Diffusion Vision Transformers for Image Generation (arXiv 2312.02139),
section 3.3 and Appendix H.2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import layers
from models.architectures.latent_diffit import LatentDiffiTConfig
from models.context import Context


class LatentDiffiT(nn.Module):
    """The raw network F of a latent DiffiT.

    Patches become tokens, to which fixed sinusoids of their positions are added. The attention
    window of every block covers the whole grid. The time token is the sum of the embeddings of
    noise level and class.
    """

    def __init__(self, config: LatentDiffiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_dim, config.patch_size
        # Width of the context's vector, which is added to the noise level's embedding.
        self.context_dim = dim
        self.patch_embedding = nn.Conv2d(config.input_shape[0], dim, patch, stride=patch)
        positions = layers.position_embedding(dim, config.grid)
        self.register_buffer("position_embedding", positions, persistent=False)
        self.noise_embedding = layers.PositionalEmbedding(2 * config.base_dim, like="dit")
        self.time_token = nn.Sequential(
            nn.Linear(2 * config.base_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        sizes = (dim, dim, config.num_heads, config.grid, config.mlp_ratio, config.attention)
        blocks = (layers.TransformerBlock(*sizes, config.qk_norm) for _ in range(config.num_blocks))
        self.blocks = nn.ModuleList(blocks)
        self.head_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, patch**2 * config.out_channels)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the initial weights of DiT (arXiv 2212.09748) from torch's global generator."""
        layers.draw_layers(self)
        for layer in (self.time_token[0], self.time_token[2]):
            nn.init.normal_(layer.weight, std=0.02)

        # A zero head makes c_skip x the first estimate.
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, out_channels, H, W].

        Args:
            x: Latents [N, latent_channels, H, W], scaled to about unit variance.
            c_noise: Noise level [N], as the preconditioner encodes it, such as a timestep.
            context: Its vector [N, hidden_dim], if any, is added to the noise level's embedding.

        Raises ValueError if H and W are not those of the configuration.
        """
        layers.check_input(x, self.config.input_shape, "latents")
        t = self.time_token(self.noise_embedding(c_noise))  #           [N, D]
        if context.vector is not None:
            t = t + context.vector

        x = self.patch_embedding(x).permute(0, 2, 3, 1)  #              [N, g, g, D]
        x = x + self.position_embedding
        for block in self.blocks:
            x = layers.run_block(self, block, x, t)
        x = self.head(functional.silu(self.head_norm(x)))  #            [N, g, g, p p C_out]
        return layers.unpatchify(x, self.config.patch_size)  #          [N, C_out, H, W]
