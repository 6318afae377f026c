"""DiT conditioned on a set of images: few-shot diffusion.

DiT (Peebles & Xie, arXiv 2212.09748) with the context of few-shot diffusion models (Giannone et
al., arXiv 2205.15463): a vector that modulates every layer, or tokens that every layer attends to.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dnnlib.config import inherited, option
from dnnlib.errors import refusal
from models import layers
from models.conditioners import Conditioner
from models.config import ModelConfig, check_divides
from models.context import Context

_NUM_SINUSOIDS = 256
_LAG: dict[str, Any] = dict(requires={"mode_conditioning": ("lag",)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetDiTConfig(ModelConfig):
    """Architecture of :class:`SetDiT` and of the encoder of its sets."""

    family: ClassVar[str] = "set-dit"
    title: ClassVar[str] = "Model options (set-conditioned DiT)"

    resolution: int = inherited(ModelConfig, "resolution", aliases=("image-size",))
    attention: str = inherited(ModelConfig, "attention", "sdpa", choices=("sdpa",), exposed=False)
    sample_size: int = option(
        6,
        min=1,
        max=1_000,
        help="Images in a set; with leave-one-out each is made from the others.",
    )
    patch_size: int = option(
        2, min=1, max=1_024, help="Edge of the square of pixels that is a token."
    )
    hidden_dim: int = option(
        450, min=1, max=65_536, aliases=("hidden-size",), help="Width of the tokens of the DiT."
    )
    num_blocks: int = option(6, min=1, max=1_000, aliases=("depth",), help="Blocks of the DiT.")
    num_heads: int = option(
        9, min=1, max=1_024, help="Attention heads of the DiT; divides its width."
    )
    mlp_ratio: float = option(3.0, min=0.01, max=100, help="Hidden width of an MLP over its width.")
    mode_conditioning: str = option(
        "film",
        choices=("film", "lag"),
        help="How the set conditions the DiT. film: a vector modulates all layers; lag: layers "
        "attend to tokens.",
    )
    context_channels: int | None = option(
        None, min=1, max=65_536, help="Width of the context; none: that of the encoder."
    )
    context_proj: bool = option(
        False, help="Project the encoder's result to --context-channels, if they differ."
    )
    use_context_layernorm: bool = option(True, help="Normalise the context in the DiT.")
    cross_attn_layers: tuple[int, ...] = option(
        (),
        min=0,
        max=1_000,
        **_LAG,
        help="Blocks that attend to the context, counted from 0; none: all.",
    )
    gate: str = option(
        "adaln",
        choices=("adaln", "scalar", "none"),
        **_LAG,
        help="What scales the context's part: the noise level, one learned number, or nothing.",
    )
    context_pool_size: int | None = option(
        None,
        min=1,
        max=1_024,
        **_LAG,
        help="Average the context's tokens down to this many, a square number; none: keep all.",
    )
    hdim: int | None = option(
        None, min=1, max=65_536, help="Width of the encoder; none: that of the DiT."
    )
    encoder_mode: str = option(
        "vit_set",
        choices=("vit", "vit_set"),
        help="Encoder of sets: every image's patches in one sequence, or one token per position.",
    )
    encoder_tokenizer: str = option(
        "stack",
        choices=("stack", "per_sample_mean"),
        requires={"encoder_mode": ("vit_set",)},
        help="How the images of a set make one token: side by side, or by their mean.",
    )
    encoder_depth: int = option(6, min=0, max=1_000, help="Blocks of the encoder.")
    encoder_heads: int = option(8, min=1, max=1_024, help="Attention heads of the encoder.")
    encoder_dim_head: int = option(56, min=1, max=65_536, help="Width of a head of the encoder.")
    encoder_mlp_ratio: float = option(
        1.0, min=0.01, max=100, help="Hidden width of the encoder's MLPs over its width."
    )
    encoder_dropout: float = option(0.0, min=0, max=0.99, help="Dropout in the encoder.")
    encoder_pool: str = option(
        "cls",
        choices=("cls", "mean", "sum"),
        help="What becomes the set's vector: the CLS token, or the mean or sum of the patches.",
    )
    encoder_time: bool = option(
        False, help="Give the encoder the noise level; it then runs at every sampling step."
    )
    spt_shifts: bool = option(
        False,
        requires={"encoder_mode": ("vit_set",)},
        help="Give the encoder each image with four diagonal shifts of it.",
    )
    second_pass: bool = option(
        False,
        requires={"encoder_mode": ("vit",)},
        help="Run the encoder's blocks again over the mean of the images.",
    )
    leave_one_out: bool = option(
        True, help="Make each image of a set from the others; off: from all, itself among them."
    )
    mode_context: str = option(
        "deterministic",
        choices=("deterministic", "variational"),
        help="Take the set's vector as it is, or draw it from a learned distribution.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(
            self, "patch_size", self.resolution, f"images of {self.resolution}x{self.resolution}"
        )
        check_divides(self, "num_heads", "hidden_dim")
        if self.leave_one_out and self.sample_size < 2:
            got = "1, which leaves nothing to learn from when one image is left out"
            raise refusal("--sample-size", got, remedy="give at least 2, or --no-leave-one-out")
        if self.context_dim != self.encoder_dim and not self.context_proj:
            but = f"the encoder has --hdim {self.encoder_dim}"
            remedy = "make them equal, or add --context-proj to project"
            raise refusal("--context-channels", self.context_dim, but=but, remedy=remedy)
        if self.context_dim == self.encoder_dim and self.context_proj:
            but = f"--context-channels and --hdim are both {self.encoder_dim}"
            raise refusal("--context-proj has no effect", but=but, remedy="leave it out")
        pools_cls = self.mode_conditioning == "film" and self.encoder_pool == "cls"
        if pools_cls and self.encoder_depth == 0:
            got = "0, with which the CLS token sees no image"
            raise refusal("--encoder-depth", got, remedy="give at least 1, or --encoder-pool=mean")
        chosen = self.cross_attn_layers
        if len(set(chosen)) < len(chosen) or max(chosen, default=0) >= self.num_blocks:
            accepted = f"different blocks from 0 to {self.num_blocks - 1}, or none for all"
            raise refusal("--cross-attn-layers", ",".join(map(str, chosen)), accepted=accepted)
        sizes = [edge**2 for edge in range(1, self.grid + 1) if self.grid % edge == 0]
        if self.context_pool_size not in (None, *sizes):
            accepted = f"{', '.join(map(str, sizes))} for a grid of {self.grid}x{self.grid} tokens"
            raise refusal("--context-pool-size", self.context_pool_size, accepted=accepted)

    def example_cond(self) -> dict[str, Tensor]:
        support = torch.empty(1, self.context_size, *self.input_shape)
        return {**super().example_cond(), "support": support}

    def make_backbone(self) -> nn.Module:
        return SetDiT(self)

    def make_conditioner(self, dim: int) -> Conditioner:
        from models.set_conditioner import SetConditioner  # It imports this module.

        return SetConditioner(self, dim)

    @property
    def grid(self) -> int:
        """Height and width of the grid of tokens."""
        return self.resolution // self.patch_size

    @property
    def encoder_dim(self) -> int:
        """Width of the encoder."""
        return self.hdim or self.hidden_dim

    @property
    def context_dim(self) -> int:
        """Width of the context, as the DiT takes it."""
        return self.context_channels or self.encoder_dim

    @property
    def context_size(self) -> int:
        """Images that the encoder sees in training."""
        return self.sample_size - self.leave_one_out

    @property
    def stacks_images(self) -> bool:
        """Whether the encoder takes no more images than in training."""
        return self.encoder_mode == "vit_set" and self.encoder_tokenizer == "stack"

    @property
    def context_layers(self) -> tuple[int, ...]:
        """Blocks with cross-attention."""
        if self.mode_conditioning == "film":
            return ()
        return self.cross_attn_layers or tuple(range(self.num_blocks))

    @property
    def num_context_tokens(self) -> int:
        """Tokens per image that ``lag`` attends to."""
        return (self.context_pool_size or self.grid**2) + (self.mode_context == "variational")

    @property
    def images_per_row(self) -> int:
        return self.sample_size


class GatedBlock(nn.Module):
    """Self-attention, cross-attention and MLP, with shift, scale and gate from a vector.

    Args:
        dim: Width of the tokens and of the vector.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        context_dim: Width of the context's tokens; None without cross-attention.
        gate: What scales the cross-attention: ``adaln``, ``scalar`` (tanh of one number, which
            begins at 0) or ``none``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        context_dim: int | None = None,
        gate: str = "adaln",
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = layers.SelfAttention(dim, num_heads)
        self.mlp = layers.MLP(dim, int(dim * mlp_ratio))
        self.cross: layers.CrossAttention | None = None
        self.gate: nn.Parameter | None = None
        if context_dim is not None:
            self.cross = layers.CrossAttention(dim, context_dim, num_heads)
            self.gate = nn.Parameter(torch.zeros(1)) if gate == "scalar" else None
        self._num_vectors = 6 if self.cross is None else 9 if gate == "adaln" else 8
        self.modulation = nn.Linear(dim, self._num_vectors * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, u: Tensor, context: Tensor | None) -> Tensor:
        """Return tokens [N, L, h] of tokens x [N, L, h], vectors u [N, h], context [N, M, c]."""
        parts = self.modulation(functional.silu(u)).chunk(self._num_vectors, dim=1)
        scale, shift, gate = parts[:3]
        x = x + gate[:, None] * self.attn(layers.modulate(self.norm(x), scale, shift))
        if self.cross is not None:
            scale, shift = parts[6:8]
            y = self.cross(layers.modulate(self.norm(x), scale, shift), context)
            if len(parts) == 9:
                y = parts[8][:, None] * y
            elif self.gate is not None:
                y = self.gate.tanh() * y
            x = x + y
        scale, shift, gate = parts[3:6]
        return x + gate[:, None] * self.mlp(layers.modulate(self.norm(x), scale, shift))


class SetDiT(nn.Module):
    """The raw network F of a set-conditioned DiT.

    ``film``: the noise level's vector and the context's make one that modulates every block, whose
    modulation begins at zero (adaLN-Zero). ``lag``: the noise level alone modulates, and blocks
    attend to the context's tokens between self-attention and MLP.
    """

    def __init__(self, config: SetDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_dim, config.patch_size
        # Width of the label's embedding, which is added to that of the noise level.
        self.context_dim = dim
        self.patch_embedding = nn.Conv2d(config.img_channels, dim, patch, stride=patch)
        positions = layers.position_embedding(dim, config.grid).flatten(0, 1)
        self.register_buffer("position_embedding", positions, persistent=False)
        self.noise_embedding = layers.PositionalEmbedding(_NUM_SINUSOIDS, like="dit")
        self.noise_mlp = nn.Sequential(
            nn.Linear(_NUM_SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.context_norm = nn.Identity()
        if config.use_context_layernorm:
            self.context_norm = nn.LayerNorm(config.context_dim, eps=1e-6, bias=False)
        if config.mode_conditioning == "film":
            self.join = nn.Linear(dim + config.context_dim, dim)
        contexts = dict.fromkeys(config.context_layers, config.context_dim)
        self.blocks = nn.ModuleList(
            GatedBlock(dim, config.num_heads, config.mlp_ratio, contexts.get(index), config.gate)
            for index in range(config.num_blocks)
        )
        self.head_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch**2 * config.out_channels)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator: DiT's (arXiv 2212.09748)."""
        layers.draw_linear_layers(self)
        for layer in (self.noise_mlp[0], self.noise_mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

        # Blocks begin as identities, and the first estimate is c_skip x.
        modulations = [block.modulation for block in self.blocks]
        for layer in (*modulations, self.head_modulation, self.head):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, out_channels, H, W].

        Args:
            x: [N, C, H, W], scaled to about unit variance.
            c_noise: [N], the noise level as the preconditioner encodes it, such as a timestep.
            context: ``film``: its vector [N, context_dim]. ``lag``: its tokens
                [N, M, context_dim]. Its label [N, hidden_dim], if any, is added to the embedding of
                the noise level.

        Raises ValueError if H and W are not those of the configuration, or if the context is of
        another number of images or of another shape than the mode of conditioning needs.
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
        for block in self.blocks:
            x = layers.run_block(self, block, x, u, tokens)
        scale, shift = self.head_modulation(functional.silu(u)).chunk(2, dim=1)
        x = self.head(layers.modulate(self.head_norm(x), scale, shift))  # [N, L, p p C_out]
        x = x.unflatten(1, (self.config.grid, -1))  #                   [N, g, g, p p C_out]
        return layers.unpatchify(x, self.config.patch_size)  #          [N, C_out, H, W]

    def _check(self, x: Tensor, context: Context) -> None:
        config = self.config
        layers.check_input(x, config.input_shape, "images")
        part, name = context.tokens, "tokens [N, M, D]"
        expected = [len(x), config.num_context_tokens, config.context_dim]
        if config.mode_conditioning == "film":
            part, name, expected = context.vector, "vector [N, D]", [len(x), config.context_dim]
        if part is None or part.ndim != len(expected):
            found = "none" if part is None else f"shape {list(part.shape)}"
            raise ValueError(f"This model needs the context's {name}; there is {found}.")
        if list(part.shape) != expected:
            raise ValueError(
                f"The context has shape {list(part.shape)}, but this model needs {expected} for "
                f"{len(x)} images."
            )
