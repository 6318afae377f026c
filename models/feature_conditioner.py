"""Conditioner of a feature-conditioned DiT: text, CLS token and patches of a visual encoder."""

from typing import Any

import torch
from torch import Tensor, nn

from models.architectures.feature_dit import FeatureDiTConfig
from models.conditioners import Conditioner
from models.context import Context
from models.layers import draw_layers, lattice_embedding
from torch_utils import reuse

# Columns of ``drop``.
CONDITIONS = ("text", "cls", "patches")


class FeatureConditioner(Conditioner):
    """Projects the features of an image and joins them into one context, [text, CLS, patches].

    Dropped features are replaced, before projection, by a learned null of their kind, which is in
    the graph of every batch. Dropped text leaves a single token to attend to, so that its length
    does not leak.

    Conditions of a batch of N images of the same size; features are normalised:

    - ``text`` [N, L, text_dim] and ``text_mask``, bool [N, L], true where there is a token; without
      the mask, all are tokens. Missing text counts as dropped.
    - ``cls`` [N, visual_dim] and ``patches`` [N, P, visual_dim], row by row in the grid
      ``patch_grid``. Either counts as dropped if it is missing.
    - ``size``: (width, height) of the images in pixels, two numbers or int64 [2] on the CPU. A
      model that uses patches needs it, even if ``patches`` are missing.
    - ``patch_bias`` [N], added to the scores of attention to patches; 0 if missing.
    """

    num_classes = 0

    def __init__(self, config: FeatureDiTConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.text_proj = nn.Linear(config.text_dim, dim)
        self.dino_proj = nn.Linear(config.visual_dim, dim)
        self.null_text = nn.Parameter(torch.empty(1, 1, config.text_dim))
        self.null_dino = nn.Parameter(torch.empty(1, config.visual_dim))
        if config.use_dino_patches:
            self.dino_patch_proj = nn.Linear(config.visual_dim, dim)
            self.null_dino_patch_token = nn.Parameter(torch.empty(1, 1, config.visual_dim))
        self._positions = reuse.Kept()
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator."""
        draw_layers(self)
        for null in self.parameters(recurse=False):
            nn.init.normal_(null, std=0.02)
            null.spares_decay = True

    def check(self, cond: dict[str, Tensor]) -> None:
        """Raise ValueError if there is no condition at all, or one of the wrong width."""
        if not set(CONDITIONS) & set(cond):
            raise ValueError("This model is conditioned on text or images, but none are given.")
        text, visual = self.config.text_dim, self.config.visual_dim
        for name, dim in zip(CONDITIONS, (text, visual, visual), strict=True):
            if name in cond and cond[name].shape[-1] != dim:
                raise ValueError(
                    f"This model takes {name} features of {dim} numbers, not "
                    f"{cond[name].shape[-1]}; give those of the encoder that it was trained with."
                )

    def forward(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> Context:
        """Return the context of N images: a vector [N, dim], tokens [N, L + 1 + P, dim], a mask.

        ``drop``, bool [N, 3], is true where text, CLS token or patches are replaced by their nulls.
        A model that uses patches raises ValueError without a size, or if it does not fit them.
        """
        given = [cond[name] for name in CONDITIONS if name in cond]
        num = given[0].shape[0] if given else num
        device = self.null_text.device
        drops = [None] * 3 if drop is None else list(drop.unbind(1))
        dropped = dict(zip(CONDITIONS, drops, strict=True))

        text, text_mask = self._text(cond, dropped["text"], num)
        cls = self.dino_proj(_or_null(cond.get("cls"), self.null_dino, dropped["cls"], num))
        tokens, masks = [text, cls[:, None]], [text_mask, None]
        if self.config.use_dino_patches:
            patches = self._patches(cond, dropped["patches"], num)
            tokens.append(patches)
            bias = cond.get("patch_bias")
            masks.append(None if bias is None else bias[:, None].expand(-1, patches.shape[1]))
        return Context(
            vector=cls,
            tokens=torch.cat(tokens, dim=1),
            mask=_join_masks(masks, [part.shape[1] for part in tokens], num, device),
        )

    def _text(self, cond: dict[str, Tensor], drop: Tensor | None, num: int) -> tuple[Tensor, Any]:
        """Return the text tokens [N, L, dim], and their mask [N, L] or None."""
        if "text" not in cond:
            return self.text_proj(self.null_text.expand(num, 1, -1)), None
        text, mask = cond["text"], cond.get("text_mask")
        if drop is not None:
            if mask is None:
                mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            first = torch.zeros_like(mask[:1])
            first[:, 0] = True
            mask = torch.where(drop[:, None], first, mask)
        return self.text_proj(_or_null(text, self.null_text, drop, num)), mask

    def _patches(self, cond: dict[str, Tensor], drop: Tensor | None, num: int) -> Tensor:
        if "size" not in cond:
            raise ValueError("The size of the images is needed where patches take part.")
        size = cond["size"]
        width, height = size.tolist() if isinstance(size, Tensor) else size
        grid, patches = self.config.patch_grid(width, height), cond.get("patches")
        count = grid[0] * grid[1]
        if patches is None:
            patches = self.null_dino_patch_token.expand(num, count, -1)
        else:
            if patches.shape[1] != count:
                raise ValueError(
                    f"Images of {width}x{height} have {grid[0]}x{grid[1]} patches of "
                    f"{self.config.visual_patch_size} pixels, but {patches.shape[1]} are given."
                )
            patches = _or_null(patches, self.null_dino_patch_token, drop, num)
        tokens = self.dino_patch_proj(patches)
        return tokens + self._positions_of(width, height) if self.config.patch_pos else tokens

    def _positions_of(self, width: int, height: int) -> Tensor:
        """Return sinusoids of the patches' centres, float32 [P, dim], in units of DiT tokens."""
        device = self.null_text.device

        def make() -> Tensor:
            edge = self.config.latent_downsampling * self.config.patch_size
            axes = []
            counts = self.config.patch_grid(width, height)
            for side, count in zip((height, width), counts, strict=True):
                centres = (torch.arange(count, device=device) + 0.5) * (side / count)
                axes.append(centres / edge - 0.5)
            return lattice_embedding(self.dino_proj.out_features, *axes)

        return self._positions.get((width, height, device), make)


def _or_null(value: Tensor | None, null: Tensor, drop: Tensor | None, num: int) -> Tensor:
    """Return ``value`` [num, ...] with ``null`` in dropped rows; ``null`` is always in the graph.

    Without a value, all rows are ``null``.
    """
    if value is None:
        return null.expand(num, *null.shape[1:])
    if drop is None:
        drop = torch.zeros(num, dtype=torch.bool, device=value.device)
    return torch.where(drop.view(-1, *[1] * (value.ndim - 1)), null.to(value.dtype), value)


def _join_masks(
    masks: list[Tensor | None], lengths: list[int], num: int, device: torch.device
) -> Tensor | None:
    """Return the masks of several parts joined along the tokens, [num, sum of lengths].

    The mask of a part is bool [num, L]; float32 [num, L], added to the attention scores; or None,
    which lets all its tokens be attended to. The result is None if all masks are; float32, with
    -inf for bool False, if any is float32; else bool.
    """
    if all(mask is None for mask in masks):
        return None
    is_bias = any(mask is not None and mask.dtype != torch.bool for mask in masks)
    parts = []
    for mask, length in zip(masks, lengths, strict=True):
        if mask is None:
            mask = torch.ones(num, length, dtype=torch.bool, device=device)
        if is_bias and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf)
        parts.append(mask)
    return torch.cat(parts, dim=1)
