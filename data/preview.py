"""Previews of training data: the items that a picture shows, arranged in rows, and its titles."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from torch_utils.pictures import Titles

PREVIEW_COLUMNS = 8


class Preview(NamedTuple):
    """Rows of stored items (images or latents, [C, H, W] each), and the titles of their picture."""

    rows: list[list[torch.Tensor]]
    titles: Titles


def evenly_spaced(num: int, length: int) -> np.ndarray:
    """Return up to ``num`` distinct positions, spread evenly over ``range(length)``, int64 [M]."""
    return np.linspace(0, length - 1, min(num, length)).round().astype(int)


def rows_of(items: Sequence[torch.Tensor] | torch.Tensor) -> list[list[torch.Tensor]]:
    """Return items in rows of ``PREVIEW_COLUMNS``, the last of which may be shorter."""
    starts = range(0, len(items), PREVIEW_COLUMNS)
    return [list(items[start : start + PREVIEW_COLUMNS]) for start in starts]
