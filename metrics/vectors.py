"""What functions of two sets of vectors ask of them."""

import torch
from numpy.typing import ArrayLike

Vectors = ArrayLike | torch.Tensor


def check_vectors(
    first: Vectors, second: Vectors, at_least: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as tensors; ValueError unless they are [N, D] and [M, D] with enough rows."""
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    comparable = first.ndim == second.ndim == 2 and first.shape[1] == second.shape[1]
    if not comparable or min(len(first), len(second)) < at_least:
        got = f"vectors of shapes {list(first.shape)} and {list(second.shape)}"
        expected = f"[N, D] and [M, D] with at least {at_least} rows each"
        raise ValueError(f"Got {got}; expected {expected}.")
    return first, second
