"""Which images are held out of training, as a function of the content of each image alone.

Their order and names, other images, ranks and seeds have no influence, and identical images always
fall on the same side.
"""

import numpy as np

from dnnlib.errors import refusal


def is_held_out(lengths: np.ndarray, crcs: np.ndarray, share: float) -> np.ndarray:
    """Return which images are held out, bool [N]: each with probability ``share``, in [0, 1].

    An image's content is represented by its length in bytes, int64 [N], and its CRC-32, uint32 [N].
    SplitMix64 (Steele, Lea & Flood 2014) mixes the two, because a CRC alone is not pseudo-random.
    """
    with np.errstate(over="ignore"):
        key = (np.asarray(lengths).astype(np.uint64) << np.uint64(32)) | np.asarray(crcs, np.uint64)
        key += np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key ^= key >> np.uint64(31)
    return (key >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def check_split(held_out: np.ndarray, share: float, what: str) -> None:
    """Raise ValueError if a split of ``what`` leaves one side empty."""
    num = int(held_out.sum())
    if 0 < num < len(held_out):
        return
    but = f"it holds out {'all' if num else 'none'} of {what}"
    remedy = f"give a {'smaller' if num else 'larger'} share"
    raise refusal("--validation-share", f"{share:g}", but=but, remedy=remedy)
