"""Checks and products that the distances between two sets of vectors share."""

import torch
from numpy.typing import ArrayLike

from dnnlib.errors import NotFiniteError

Vectors = ArrayLike | torch.Tensor

_PART_WIDTH = 1024
_ROWS = 4096  # Checked at a time, so that little memory is needed.


def check_vectors(
    first: Vectors, second: Vectors, at_least: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as tensors; raises ValueError unless they are [N, D] and [M, D], and finite.

    Each must have at least ``at_least`` rows.
    """
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    comparable = first.ndim == second.ndim == 2 and first.shape[1] == second.shape[1]
    if not comparable or min(len(first), len(second)) < at_least:
        got = f"vectors of shapes {list(first.shape)} and {list(second.shape)}"
        expected = f"[N, D] and [M, D] with at least {at_least} rows each"
        raise ValueError(f"Got {got}; expected {expected}.")
    check_finite(first)
    check_finite(second)
    return first, second


def check_finite(vectors: torch.Tensor) -> None:
    """Raise NotFiniteError if any value of the vectors is infinite or NaN."""
    if not all(rows.isfinite().all() for rows in vectors.split(_ROWS)):
        raise NotFiniteError(f"{len(vectors)} vectors have values that are not finite.")


def as_floats(vectors: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return the vectors on ``device``, as float64 if they already are, else as float32."""
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    return vectors.to(device, dtype)


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the inner products of all pairs of rows of x [N, D] and y [M, D], float64 [N, M].

    float32 vectors are multiplied in float32, in parts of 1,024 values, whose results are added in
    float64. The error of a product is then at most 6.2e-5 |x| |y| (Higham, "Accuracy and stability
    of numerical algorithms", section 3.1), and far smaller in the mean over many pairs.
    """
    if torch.float64 in (x.dtype, y.dtype):
        return x.double() @ y.double().T
    total = None
    for part_x, part_y in zip(x.split(_PART_WIDTH, 1), y.split(_PART_WIDTH, 1), strict=True):
        part = part_x @ part_y.T
        total = part.double() if total is None else total.add_(part)
    return total
