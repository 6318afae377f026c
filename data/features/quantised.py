"""Patch features in 8 bits: for each token, integers from -127 to 127 and a scale.

Integers and scales form one structured array, stored as one member of a sample, so that they cannot
be separated. Its dtype, which an ``.npy`` file states, distinguishes it from features in 16 bits.
"""

import numpy as np

BITS = (16, 8)
_LARGEST = 127


def quantise(patches: np.ndarray) -> np.ndarray:
    """Return features [P, D] in 8 bits: a structured array [P] of ``scale`` and ``values`` [D].

    A token's scale is its largest magnitude / 127, so that each value is off by at most half the
    scale. The scale is a float32. In float16, its rounding error would shift the largest values by
    1/16 of a step, and small scales would be subnormal, to save only 2 of over 1,000 bytes. A token
    of zeros has scale 0.
    """
    values = patches.astype(np.float32)
    scale = np.abs(values).max(axis=1, initial=0) / np.float32(_LARGEST)
    steps = np.where(scale > 0, scale, np.float32(1))[:, None]
    stored = np.empty(len(values), _dtype(values.shape[1]))
    stored["scale"], stored["values"] = scale, np.rint(values / steps)
    return stored


def as_float16(stored: np.ndarray) -> np.ndarray:
    """Return 8-bit features as float16 [P, D], and an array without fields unchanged.

    Raises ValueError for a structured array that :func:`quantise` does not make.
    """
    if bits_of(stored) == 16:
        return stored
    values = stored["values"] * stored["scale"][:, None]
    with np.errstate(over="ignore"):  # Damaged scales may give infinite values.
        return values.astype(np.float16)


def bits_of(stored: np.ndarray) -> int:
    """Return 8, or 16 for an array without fields; ValueError for any other structured array."""
    dtype = stored.dtype
    if dtype.names is None:
        return 16
    shape = dtype["values"].shape if "values" in dtype.names else ()
    if stored.ndim != 1 or len(shape) != 1 or dtype != _dtype(*shape):
        raise ValueError(f"its fields are {', '.join(dtype.names)}")
    return 8


def _dtype(dim: int) -> np.dtype:
    return np.dtype([("scale", "<f4"), ("values", "i1", (dim,))])
