"""DiffiT in image space: a U-Net of residual blocks with time-dependent windowed attention.

Hatamizadeh et al., DiffiT: Diffusion Vision Transformers for Image Generation (arXiv 2312.02139).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import layers
from models.architectures.diffit import DiffiTConfig
from models.context import Context

# Width of the sinusoids of the noise level, and of the class and augmentation vectors that are
# added to them, as in EDM's DDPM++ (arXiv 2206.00364).
EMBEDDING_DIM = 128


class ResBlock(nn.Module):
    """x + Block(Conv3x3(Swish(GN x)), t) (arXiv 2312.02139, Eq. 9-10).

    Where the width changes, the shortcut is a 1x1 convolution, which the paper leaves open. Dropout
    comes before the 3x3 convolution, as in EDM's blocks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, dropout: float, block: layers.TransformerBlock
    ) -> None:
        super().__init__()
        self.norm = layers.group_norm(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.block = block
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return [B, C_out, H, W] from x [B, C_in, H, W], channels last in memory, and t [B, T]."""
        y = functional.silu(self.norm(x))
        # Dropout draws in memory order, which must not depend on the layout of earlier weights.
        y = self.conv(self.dropout(y.contiguous(memory_format=torch.channels_last)))
        y = self.block(y.permute(0, 2, 3, 1), t).permute(0, 3, 1, 2)
        return self.shortcut(x) + y


class DiffiT(nn.Module):
    """The raw network F of an image-space DiffiT.

    Encoder stages are residual blocks, with stride-2 convolutions between stages; the last stage is
    the bottleneck. Decoder stages begin with nearest-neighbour upsampling and a 3x3 convolution,
    and concatenate the encoder's outputs of the same resolution. Every position is a token; the
    only position embedding is the relative bias of attention. Patches larger than a pixel are our
    addition: all pixels of a patch become channels of one position.
    """

    # Width of the context's vector, which is added to the noise level's embedding.
    context_dim = EMBEDDING_DIM

    def __init__(self, config: DiffiTConfig) -> None:
        super().__init__()
        self.config = config
        widths, depths = config.widths, config.blocks_per_stage

        def make_block(stage: int, in_channels: int) -> ResBlock:
            sizes = (widths[stage], config.time_dim, config.num_heads, config.windows[stage])
            settings = (config.mlp_ratio, config.attention, config.qk_norm)
            block = layers.TransformerBlock(*sizes, *settings)
            return ResBlock(in_channels, widths[stage], config.dropout, block)

        self.noise_embedding = layers.PositionalEmbedding(EMBEDDING_DIM)
        self.time_token = nn.Sequential(
            nn.Linear(EMBEDDING_DIM, config.time_dim),
            nn.SiLU(),
            nn.Linear(config.time_dim, config.time_dim),
            nn.SiLU(),
        )
        per_patch = config.patch_size**2
        channels = per_patch * config.input_shape[0]
        self.tokenizer = nn.Conv2d(channels, widths[0], kernel_size=3, padding=1)

        self.encoder, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for stage, width in enumerate(widths):
            before = widths[max(stage - 1, 0)]
            if stage > 0:
                conv = nn.Conv2d(before, before, kernel_size=3, stride=2, padding=1)
                self.downsamplers.append(conv)
            blocks = [make_block(stage, before if i == 0 else width) for i in range(depths[stage])]
            self.encoder.append(nn.ModuleList(blocks))

        self.decoder, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(config.num_stages - 1)):
            below, width = widths[stage + 1], widths[stage]
            self.upsamplers.append(layers.UpsampleConv(below))
            blocks = []
            for i in range(depths[stage]):
                skipped = width if i == 0 or config.skip == "block" else 0
                blocks.append(make_block(stage, (below if i == 0 else width) + skipped))
            self.decoder.append(nn.ModuleList(blocks))

        self.head_norm = layers.group_norm(widths[0])
        channels = per_patch * config.out_channels
        self.head = nn.Conv2d(widths[0], channels, kernel_size=3, padding=1)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator.

        The sources specify none for image space; these are those of EDM's DDPM++.
        """
        # Weights of linear layers and convolutions: uniform (Glorot & Bengio, 2010); biases zero.
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # Every transformer block starts close to the identity, since the last layers of its two
        # branches are almost zero. So is the head, which makes c_skip x the first estimate.
        self.head.weight.mul_(1e-5)
        for module in self.modules():
            if isinstance(module, layers.TransformerBlock):
                module.attn.proj.weight.mul_(1e-5)
                module.mlp.fc2.weight.mul_(1e-5)
            elif isinstance(module, layers.TMSA):
                # Up to small noise, attention starts without a preference for distances.
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, out_channels, H, W].

        Args:
            x: Images [N, img_channels, H, W], scaled to about unit variance. H and W may differ
                from the configured resolution if the windows divide every stage's grid.
            c_noise: Noise level [N], as the preconditioner encodes it.
            context: Its vector [N, 128], if any, is added to the noise level's embedding.

        Raises ValueError if the patches, stages or windows do not divide H and W.
        """
        reduction, patch = self.config.reduction, self.config.patch_size
        if x.shape[2] % reduction or x.shape[3] % reduction:
            raise ValueError(
                f"A model of {len(self.encoder)} stages needs images with height and width "
                f"divisible by {reduction}, not {x.shape[2]}x{x.shape[3]}."
            )
        embedding = self.noise_embedding(c_noise)  #                    [N, 128]
        if context.vector is not None:
            embedding = embedding + context.vector
        t = self.time_token(embedding)  #                               [N, T]

        if patch > 1:
            x = functional.pixel_unshuffle(x, patch)  #                 [N, C p p, H / p, W / p]
        # With channels last in memory, images become tokens and back without a copy.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.tokenizer(x)  #                                        [N, base_dim, H / p, W / p]
        skips: list[list[Tensor]] = []
        for stage, blocks in enumerate(self.encoder):
            if stage > 0:
                x = self.downsamplers[stage - 1](x)  #                  [N, C, H / 2, W / 2]
            outputs = []
            for block in blocks:
                x = layers.run_block(self, block, x, t)
                outputs.append(x)
            skips.append(outputs if self.config.skip == "block" else outputs[-1:])

        skips.pop()
        for upsampler, blocks in zip(self.upsamplers, self.decoder, strict=True):
            x = upsampler(x)  #                                         [N, C, 2 H, 2 W]
            outputs = skips.pop()
            for block in blocks:
                if outputs:
                    x = torch.cat([x, outputs.pop()], dim=1)
                x = layers.run_block(self, block, x, t)
        x = self.head(functional.silu(self.head_norm(x)))
        return functional.pixel_shuffle(x, patch) if patch > 1 else x
