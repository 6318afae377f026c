"""Patch features in 8 bits: for each token, integers from -127 to 127 and their scale.

An array of them is one member of a sample like any other, so that integers and scales cannot be
separated. Its dtype, which an ``.npy`` file states, tells it from features in 16 bits.
"""

import numpy as np

BITS = (16, 8)
_LARGEST = 127


def quantise(patches: np.ndarray) -> np.ndarray:
    """Return features [P, D] in 8 bits: [P] of ``scale`` and ``values`` [D].

    A token's scale is its largest magnitude / 127, so that each value is off by half of it at most.
    It is a float32: in float16 its own rounding would be 1/16 of a step at the largest values, and
    small scales would be subnormal, to save 2 bytes of over 1,000. A token of zeros has scale 0.
    """
    values = patches.astype(np.float32)
    scale = np.abs(values).max(axis=1, initial=0) / np.float32(_LARGEST)
    steps = np.where(scale > 0, scale, np.float32(1))[:, None]
    stored = np.empty(len(values), _dtype(values.shape[1]))
    stored["scale"], stored["values"] = scale, np.rint(values / steps)
    return stored


def as_float16(stored: np.ndarray) -> np.ndarray:
    """Return features as they are computed with, float16 [P, D]; those in 16 bits as they are.

    Raises ValueError for an array in neither form.
    """
    if bits_of(stored) == 16:
        return stored
    values = stored["values"] * stored["scale"][:, None]
    with np.errstate(over="ignore"):  # Of damaged scales, which give infinite values.
        return values.astype(np.float16)


def bits_of(stored: np.ndarray) -> int:
    """Return 8 or 16; raises ValueError for an array with fields that are not those of 8 bits."""
    dtype = stored.dtype
    if dtype.names is None:
        return 16
    shape = dtype["values"].shape if "values" in dtype.names else ()
    if stored.ndim != 1 or len(shape) != 1 or dtype != _dtype(*shape):
        raise ValueError(f"its fields are {', '.join(dtype.names)}")
    return 8


def _dtype(dim: int) -> np.dtype:
    return np.dtype([("scale", "<f4"), ("values", "i1", (dim,))])
