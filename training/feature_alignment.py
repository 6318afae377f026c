"""Tells whether stored patches lie where the visual encoder sees them."""

import torch
from torch import Tensor

MAX_SHIFT = 8  # Rows of patches by which stored and new ones are compared.
MIN_COSINE = 0.99
_TOLERANCE = 1e-4  # What rounding may add to a mean cosine.


def misalignment(stored: Tensor, fresh: Tensor) -> str | None:
    """Return what is wrong with stored patches [N, D] beside those encoded again, or None.

    They are compared at every shift of up to MAX_SHIFT rows.
    """
    if stored.shape != fresh.shape:
        return f"{list(stored.shape)} instead of {list(fresh.shape)}"
    cosines = {}
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        first = stored[max(shift, 0) : len(stored) + min(shift, 0)]
        second = fresh[max(-shift, 0) : len(fresh) + min(-shift, 0)]
        if len(first):
            cosine = torch.nn.functional.cosine_similarity(first, second, dim=1)
            cosines[shift] = float(cosine.mean())
    best = max(cosines, key=lambda shift: (cosines[shift], -abs(shift)))
    if cosines[best] - cosines[0] > _TOLERANCE:
        return (
            f"shifted by {best} rows (mean cosine {cosines[best]:.4f}, unshifted {cosines[0]:.4f})"
        )
    if cosines[0] <= MIN_COSINE:
        return f"with a mean cosine of {cosines[0]:.4f} to those encoded again"
    return None
