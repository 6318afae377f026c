"""What functions of two sets of vectors ask of them."""

from typing import Any


def check_vectors(first: Any, second: Any, at_least: int = 1) -> None:
    """Raise ValueError unless these are arrays or tensors [N, D] and [M, D] with enough rows."""
    comparable = first.ndim == second.ndim == 2 and first.shape[1] == second.shape[1]
    if not comparable or min(len(first), len(second)) < at_least:
        raise ValueError(
            f"Got vectors of shapes {list(first.shape)} and {list(second.shape)}; expected [N, D] "
            f"and [M, D] with at least {at_least} rows each."
        )
