"""Settings of the set-conditioned DiT and of its set encoder."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from dnnlib.config import inherited, option
from dnnlib.errors import refusal
from models.config import ModelConfig, check_divides

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.conditioners import Conditioner
    from models.context import Context

_LAG: dict[str, Any] = dict(requires={"mode_conditioning": ("lag",)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetDiTConfig(ModelConfig):
    """Architecture of :class:`SetDiT` and of its set encoder."""

    family: ClassVar[str] = "set-dit"
    title: ClassVar[str] = "Model options (set-conditioned DiT)"
    has_attention_bias: ClassVar[bool] = False

    resolution: int = inherited(ModelConfig, "resolution", aliases=("image-size",))
    attention: str = inherited(ModelConfig, "attention", "sdpa", choices=("sdpa",), exposed=False)
    sample_size: int = option(
        6,
        min=1,
        max=1_000,
        help="Images in a set; with leave-one-out, each is conditioned on all other ones.",
    )
    patch_size: int = option(
        2, min=1, max=1_024, help="Edge in pixels of the square that forms one token."
    )
    hidden_dim: int = option(
        450, min=1, max=65_536, aliases=("hidden-size",), help="Width of the tokens of the DiT."
    )
    num_blocks: int = option(6, min=1, max=1_000, aliases=("depth",), help="Blocks of the DiT.")
    num_heads: int = option(
        9,
        min=1,
        max=1_024,
        divides="hidden_dim",
        help="Attention heads of the DiT; divides its width. If you change only --hidden-dim, the "
        "nearest number that divides it is used.",
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
        False, help="Project the encoder's output to --context-channels if the widths differ."
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
        help="What scales the context's contribution: the noise level, one learned number, or "
        "nothing.",
    )
    warm_start_adaln: bool = option(
        False,
        help="Start training with a context that already has an effect. film: small modulations "
        "instead of none; lag: cross-attention with gates of 0.1 instead of 0.",
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
        help="How the images of a set form one token: side by side, or by their mean.",
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
        choices=("cls", "mean", "sum", "mean-all"),
        help="What the set's vector is: the CLS token, the mean or sum of the patches, or the "
        "mean of all tokens, which few-shot diffusion models call mean.",
    )
    encoder_time: bool = option(
        False, help="Condition the encoder on the noise level; it then runs at every sampling step."
    )
    spt_shifts: bool = option(
        False,
        requires={"encoder_mode": ("vit_set",)},
        help="Give the encoder each image together with four diagonally shifted copies.",
    )
    second_pass: bool = option(
        False,
        requires={"encoder_mode": ("vit",)},
        help="Run the encoder's blocks again over the mean of the images.",
    )
    like: str = option(
        "paper",
        choices=("paper", "fsdm-jax"),
        help="Which implementation to reproduce. fsdm-jax: the JAX code of few-shot diffusion "
        "models, for its weights; it differs in how the encoder treats sets that are not full, in "
        "its GELU, in the tokens of lag and in what film normalises.",
    )
    leave_one_out: bool = option(
        True,
        help="Condition each image of a set on all other ones; off: on the whole set, "
        "including itself.",
    )
    reconstructs: bool = option(
        False, help="The context predicts images, in the encoder's pre-training.", exposed=False
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
        if self.is_like_jax and self.encoder_mode != "vit_set":
            remedy = "give --encoder-mode=vit_set"
            raise refusal(
                "--like", f"fsdm-jax with --encoder-mode={self.encoder_mode}", remedy=remedy
            )
        if self.warm_start_adaln and self.mode_conditioning == "lag" and self.gate == "none":
            but = "with --gate=none the context has its full effect from the start"
            raise refusal("--warm-start-adaln", but=but, remedy="leave it out")
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

    def check_like(self) -> None:
        """Raise ValueError if the code to reproduce lacks the configured pooling.

        It is no check of the constructor, because earlier versions trained such models.
        """
        has_pool = self.encoder_pool in ("cls", "mean-all") or self.mode_conditioning != "film"
        if self.is_like_jax and not has_pool:
            got = f"fsdm-jax with --encoder-pool={self.encoder_pool}"
            remedy = "give --encoder-pool=mean-all, which is that code's mean, or cls"
            raise refusal("--like", got, remedy=remedy)

    def example_cond(self, size: tuple[int, int] | None = None) -> "dict[str, Tensor]":
        import torch

        support = torch.empty(1, self.context_size, *self.input_shape)
        return {**super().example_cond(), "support": support}

    def make_backbone(self) -> "nn.Module":
        from models.set_dit import SetDiT

        return SetDiT(self)

    def compiled_parts(self, backbone: "nn.Module") -> Iterable["nn.Module"]:
        return backbone.blocks

    def prepared(self, backbone: "nn.Module", context: "Context") -> "Context":
        return backbone.prepare(context)

    def make_conditioner(self, dim: int) -> "Conditioner":
        from models.set_conditioner import SetConditioner

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
        """Width of the context that the DiT receives."""
        return self.context_channels or self.encoder_dim

    @property
    def context_size(self) -> int:
        """Number of images per set that the encoder sees in training."""
        return self.sample_size - self.leave_one_out

    @property
    def is_like_jax(self) -> bool:
        """Whether the JAX code's arithmetic is reproduced."""
        return self.like == "fsdm-jax"

    @property
    def num_places(self) -> int:
        """Number of images that a stacking encoder has places for."""
        return self.sample_size if self.is_like_jax else self.context_size

    @property
    def stacks_images(self) -> bool:
        """Whether the encoder stacks images, and so accepts no more of them than in training."""
        return self.encoder_mode == "vit_set" and self.encoder_tokenizer == "stack"

    @property
    def context_layers(self) -> tuple[int, ...]:
        """Indices of the blocks with cross-attention."""
        if self.mode_conditioning == "film":
            return ()
        return self.cross_attn_layers or tuple(range(self.num_blocks))

    @property
    def context_grid(self) -> int:
        """Height and width of the grid of tokens that ``lag`` attends to."""
        return self.grid if self.context_pool_size is None else round(self.context_pool_size**0.5)

    @property
    def num_context_tokens(self) -> int:
        """Number of context tokens that ``lag`` attends to."""
        return self.context_grid**2 + (self.mode_context == "variational")

    @property
    def images_per_row(self) -> int:
        return self.sample_size
