"""Encoders of a set of images: they return one vector, and one token per patch position, per set.

They are a ViT (Dosovitskiy et al., arXiv 2010.11929), and its variant for small datasets with
shifted patch tokenisation and locality self-attention (Lee et al., arXiv 2112.13492), as few-shot
diffusion models use them (Giannone et al., arXiv 2205.15463).

The order of tokens is always [CLS, TIME, patches]; patches begin at ``PATCH_OFFSET``.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.architectures.set_dit import SetDiTConfig
from models.attention import attend, head_norms
from models.layers import PositionalEmbedding, draw_layers, merge_heads, split_heads

PATCH_OFFSET = 2
_SPT_SHIFTS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def extract_patches(images: Tensor, patch: int) -> Tensor:
    """Return the patches [..., P, patch * patch * C] of images [..., C, H, W], row by row.

    The values of a patch are in the order (row, column, channel).
    """
    height, width = images.shape[-2:]
    x = images.unflatten(-1, (width // patch, patch)).unflatten(-3, (height // patch, patch))
    x = x.movedim(-5, -1)  #                                            [..., gy, p, gx, p, C]
    return x.transpose(-4, -3).flatten(-3).flatten(-3, -2)


def shift_images(images: Tensor, patch: int) -> Tensor:
    """Return images with their four diagonal shifts by half a patch as additional channels.

    [..., C, H, W] becomes [..., 5 C, H, W], padded with zeros (arXiv 2112.13492, Eq. 3).
    """
    step = max(patch // 2, 1)
    height, width = images.shape[-2:]
    padded = functional.pad(images, (step, step, step, step))
    shifted = [
        padded[..., step + dy * step :, step + dx * step :][..., :height, :width]
        for dy, dx in _SPT_SHIFTS
    ]
    return torch.cat([images, *shifted], dim=-3)


class EncoderAttention(nn.Module):
    """Self-attention whose inner width, heads times ``dim_head``, may differ from that of tokens.

    With ``locality``, a learned temperature scales the scores; the mask then has to keep tokens
    from attending to themselves (arXiv 2112.13492, Eq. 5-6). ``qk_norm`` normalises queries and
    keys before that.
    """

    def __init__(
        self, dim: int, num_heads: int, dim_head: int, *, locality: bool, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.dim_head = dim_head
        self.qkv = nn.Linear(dim, 3 * num_heads * dim_head, bias=False)
        self.proj = nn.Linear(num_heads * dim_head, dim)
        self.q_norm, self.k_norm = head_norms(dim_head, qk_norm)
        self.log_temperature: nn.Parameter | None = None
        if locality:
            self.log_temperature = nn.Parameter(torch.tensor(-0.5 * math.log(dim_head)))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens [B, L, C] from x [B, L, C].

        ``mask``, bool, is true where a query may attend to a key; it broadcasts to
        [B, heads, L, L].
        """
        q, k, v = split_heads(self.qkv(x), self.dim_head).chunk(3, dim=1)
        q, k, scale = self.q_norm(q), self.k_norm(k), None
        if self.log_temperature is not None:
            q, scale = q * self.log_temperature.exp().to(q.dtype), 1.0
        return self.proj(merge_heads(attend(q, k, v, mask, scale=scale)))


class EncoderBlock(nn.Module):
    """Pre-norm residual attention and MLP, with dropout on each branch."""

    def __init__(self, config: SetDiTConfig) -> None:
        super().__init__()
        dim, dropout = config.encoder_dim, config.encoder_dropout
        mlp_dim = int(dim * config.encoder_mlp_ratio)
        eps, gelu = (1e-6, "tanh") if config.is_like_jax else (1e-5, "none")
        self.norm1 = nn.LayerNorm(dim, eps)
        settings = dict(locality=config.encoder_mode == "vit_set", qk_norm=config.qk_norm)
        sizes = (dim, config.encoder_heads, config.encoder_dim_head)
        self.attn = EncoderAttention(*sizes, **settings)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(gelu), nn.Dropout(dropout), nn.Linear(mlp_dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class StackTokeniser(nn.Module):
    """Makes one token of the patches of all images of a set; it depends on the images' order.

    The values of a token are in the order (row, column, channel, image). In sets of fewer images
    than ``set_size``, normalisation takes the statistics of those present, absent ones become
    zeros, and the others are scaled by set_size / present.
    """

    def __init__(self, patch_dim: int, set_size: int, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.set_size = set_size
        self.norm = nn.LayerNorm(patch_dim * set_size, eps)
        self.linear = nn.Linear(patch_dim * set_size, dim)

    def forward(self, patches: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens [B, P, dim] of patches [B, k, P, F]; ``mask`` [B, k] is true if present.

        Raises ValueError for sets of more than ``set_size`` images.
        """
        batch, count, _, width = patches.shape
        if count > self.set_size:
            raise ValueError(
                f"This set encoder stacks at most {self.set_size} images, but a set holds {count}; "
                "give fewer, or train with a larger --sample-size or with "
                "--encoder-tokenizer=per_sample_mean."
            )
        if count < self.set_size:
            present = patches.new_ones(batch, count, dtype=torch.bool) if mask is None else mask
            mask = functional.pad(present, (0, self.set_size - count))
            patches = functional.pad(patches, (0, 0, 0, 0, 0, self.set_size - count))
        x = patches.permute(0, 2, 3, 1).flatten(2)  #                   [B, P, F k]
        if mask is None:
            return self.linear(self.norm(x))
        present = mask.repeat(1, width)[:, None].to(x.dtype)  #         [B, 1, F k]
        num_present = present.sum(-1, keepdim=True).clamp(min=1)
        mean = (x * present).sum(-1, keepdim=True) / num_present
        centred = (x - mean) * present
        variance = centred.square().sum(-1, keepdim=True) / num_present
        x = centred * (variance + self.norm.eps).rsqrt() * self.norm.weight + self.norm.bias
        return self.linear(x * present * (x.shape[-1] / num_present))


class SetEncoder(nn.Module):
    """Encodes each set of images into a vector [width] and a grid of tokens [patches, width].

    Its settings are the configuration's ``encoder_*`` fields:

    - ``vit``: the patches of all images are tokens of one sequence, and the outputs are averaged
      over the images. With ``second_pass``, the transformer runs again over the averaged tokens.
    - ``vit_set``: one token per patch position, made from all images, and locality self-attention.
      The tokenizer is ``stack`` (:class:`StackTokeniser`) or ``per_sample_mean``, the mean of the
      images' tokens, which depends on neither their order nor their number. With ``spt_shifts``,
      each image is accompanied by four diagonal shifts of it (arXiv 2112.13492).

    ``encoder_pool`` determines how the vector is made from the tokens. ``mean-all``, called
    ``mean`` in few-shot diffusion models, averages CLS, TIME and the patches of all images present.

    The TIME token encodes the noise level if the encoder depends on it, and is zero otherwise.

    With ``like`` set to fsdm-jax, sets are padded to ``sample_size`` with zeros, grey images that
    count like the others (the image left out leaves such a place, too). Tokens for ``lag`` have no
    head, GELU is the tanh approximation, and normalisation has an epsilon of 1e-6.
    """

    def __init__(self, config: SetDiTConfig) -> None:
        super().__init__()
        dim, patch_size = config.encoder_dim, config.patch_size
        self.num_patches = config.grid**2
        self.dim, self.patch_size, self.pool = dim, patch_size, config.encoder_pool
        self.is_set_mode = config.encoder_mode == "vit_set"
        self.stacks = config.stacks_images
        self._spt_shifts, self._second_pass = config.spt_shifts, config.second_pass
        # The size that sets are padded to with zeros; 0 for no padding.
        self._filled, eps = (config.num_places, 1e-6) if config.is_like_jax else (0, 1e-5)
        patch_dim = patch_size**2 * config.img_channels * (5 if config.spt_shifts else 1)
        if self.stacks:
            self.tokeniser = StackTokeniser(patch_dim, config.num_places, dim, eps)
        elif self.is_set_mode:
            norm = nn.LayerNorm(patch_dim, eps)
            self.tokeniser = nn.Sequential(norm, nn.Linear(patch_dim, dim))
        else:
            self.tokeniser = nn.Linear(patch_dim, dim)
        self.cls = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, PATCH_OFFSET + self.num_patches, dim))
        self.cls.spares_decay = self.positions.spares_decay = True
        self.with_time = config.encoder_time
        if self.with_time:
            quarter = max(dim // 4, 4)
            self.time_sinusoids = PositionalEmbedding(quarter, like="dit")
            self.time_mlp = nn.Sequential(
                nn.Linear(quarter, dim), nn.SiLU(), nn.Linear(dim, dim), nn.Linear(dim, dim)
            )
        if self.is_set_mode:
            diagonal = torch.eye(PATCH_OFFSET + self.num_patches, dtype=torch.bool)
            self.register_buffer("off_diagonal", ~diagonal, persistent=False)
        self.dropout = nn.Dropout(config.encoder_dropout)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        # Weight decay of the head would shrink the context to nothing.
        self.head: nn.Module = nn.Sequential(nn.LayerNorm(dim, eps), nn.Linear(dim, dim))
        if config.is_like_jax and config.mode_conditioning == "lag":
            self.head = nn.Identity()
        for parameter in self.head.parameters():
            parameter.spares_decay = True
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator."""
        draw_layers(self)
        nn.init.normal_(self.cls, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def tokenise(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the tokens of sets of images [B, k, C, H, W], for :meth:`forward`.

        ``mask`` [B, k] is true where an image is present. Tokens are [B, P, dim], one grid per set;
        those of ``vit`` are [B, k, P, dim], one grid per image.
        """
        images = _without_absent(images, mask)
        if self._filled:
            missing = max(self._filled - images.shape[1], 0)
            images, mask = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)), None
        patches = self._patches(images)
        if self.stacks:
            return self.tokeniser(patches, mask)
        tokens = self.tokeniser(patches)  #                             [B, k, P, d]
        return _mean_of_present(tokens, mask) if self.is_set_mode else tokens

    def tokenise_others(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the tokens of the n sets X without x_i, for every set X [b, n, C, H, W].

        They equal those of :meth:`tokenise` for the gathered sets, [b n, ...], b-major. Unless sets
        are padded, each image is cut into patches once and, if images are not stacked, embedded
        once.
        """
        others = leave_one_out_index(images.shape[1], images.device)
        if self._filled:
            present = None if mask is None else mask[:, others].flatten(0, 1)
            return self.tokenise(images[:, others].flatten(0, 1), present)
        patches = self._patches(_without_absent(images, mask))  #       [b, n, P, F]
        if self.stacks:
            present = None if mask is None else mask[:, others].flatten(0, 1)
            return self.tokeniser(patches[:, others].flatten(0, 1), present)
        tokens = self.tokeniser(patches)  #                             [b, n, P, d]
        if not self.is_set_mode:
            return tokens[:, others].flatten(0, 1)  #                   [b n, k, P, d]
        if tokens.dtype != torch.float64:
            # In half precision, subtracting the image left out would leave its rounding behind.
            tokens = tokens.to(torch.float32)
        count: Tensor | int = others.shape[1]
        if mask is not None:
            weight = mask[:, :, None, None].to(tokens.dtype)
            tokens, count = tokens * weight, (weight.sum(1, keepdim=True) - weight).clamp(min=1)
        return ((tokens.sum(1, keepdim=True) - tokens) / count).flatten(0, 1)

    def forward(
        self,
        tokens: Tensor,
        c_noise: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        with_tokens: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the vector [B, dim] and, ``with_tokens``, the tokens [B, P, dim] of B sets.

        Args:
            tokens: The result of :meth:`tokenise` or :meth:`tokenise_others`.
            c_noise: Noise level [B], for an encoder ``with_time``.
            mask: Bool [B, k], true where an image is present; here only ``vit`` needs it.

        Raises ValueError if an encoder ``with_time`` gets no noise level.
        """
        batch, count = tokens.shape[0], 1 if self.is_set_mode else tokens.shape[1]
        x = tokens if self.is_set_mode else tokens.flatten(1, 2)  #     [B, k P, d]
        time = self._time_token(batch, c_noise, x)
        x = torch.cat([self.cls.expand(batch, -1, -1), time, x], dim=1)
        # Positions repeat image by image, so that equal images have equal tokens.
        tiled = self.positions[:, PATCH_OFFSET:].repeat(1, count, 1)
        x = x + torch.cat([self.positions[:, :PATCH_OFFSET], tiled], dim=1)
        keys = self._keys(mask)
        x = self._transform(self.dropout(x), self._attention_mask(keys))
        of_all = _mean_of_present(x, keys) if self.pool == "mean-all" else None  # [B, d]
        if not self.is_set_mode:
            x = self._average(x, count, mask)
            if self._second_pass:
                x = self._transform(x, None)
                of_all = x.mean(1)
        patches = x[:, PATCH_OFFSET:]  #                                [B, P, d]
        pooled = {
            "cls": x[:, 0],
            "mean": patches.mean(1),
            "sum": patches.sum(1),
            "mean-all": of_all,
        }[self.pool]
        return self.head(pooled), self.head(patches) if with_tokens else None

    def _patches(self, images: Tensor) -> Tensor:
        if self._spt_shifts:
            images = shift_images(images, self.patch_size)
        return extract_patches(images, self.patch_size)

    def _time_token(self, batch: int, c_noise: Tensor | None, x: Tensor) -> Tensor:
        if not self.with_time:
            return x.new_zeros(batch, 1, self.dim)
        if c_noise is None:
            raise ValueError("This set encoder depends on the noise level, which was not given.")
        return self.time_mlp(self.time_sinusoids(c_noise))[:, None].to(x.dtype)

    def _keys(self, mask: Tensor | None) -> Tensor | None:
        """Return which tokens belong to images that are present, bool [B, L]; None for all."""
        if mask is None or self.is_set_mode:
            return None
        return functional.pad(
            mask.repeat_interleave(self.num_patches, dim=1), (PATCH_OFFSET, 0), value=True
        )

    def _attention_mask(self, keys: Tensor | None) -> Tensor | None:
        if self.is_set_mode:
            return self.off_diagonal
        return None if keys is None else keys[:, None, None]  #         [B, 1, 1, L]

    def _transform(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x

    def _average(self, x: Tensor, count: int, mask: Tensor | None) -> Tensor:
        """Return [CLS, TIME, patches averaged over the images present], [B, 2 + P, d]."""
        first, patches = x[:, :PATCH_OFFSET], x[:, PATCH_OFFSET:]
        patches = patches.unflatten(1, (count, -1))  #                  [B, k, P, d]
        return torch.cat([first, _mean_of_present(patches, mask)], dim=1)


def _mean_of_present(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean [B, ...] of tokens [B, k, ...] over those present in ``mask`` [B, k]."""
    if mask is None:
        return tokens.mean(1)
    weight = mask.view(*mask.shape, *[1] * (tokens.ndim - 2)).to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def _without_absent(images: Tensor, mask: Tensor | None) -> Tensor:
    """Return images with zeros in absent places, whatever they held."""
    return images if mask is None else torch.where(mask[:, :, None, None, None], images, 0.0)


def leave_one_out_index(num: int, device: torch.device | str = "cpu") -> Tensor:
    """Return int64 [num, num - 1], whose row i holds every index but i, in order."""
    row = torch.arange(num, device=device)[:, None]
    column = torch.arange(num - 1, device=device)[None]
    return column + (column >= row)
