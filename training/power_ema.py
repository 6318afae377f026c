"""The mathematics of power-function averages of weights, in float64 NumPy.

A profile is an average over training, up to the time t at which it is taken, in which the weights
at time tau (in images) count in proportion to ``tau ** gamma``. It is named by its relative
standard deviation ``std``: that of tau / t. Any profile can be approximated after training from
snapshots of others. Source: EDM2 (Karras et al. 2023, arXiv 2312.02696), Section 3 and Appendix C.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from training.config import MAX_STD, MIN_STD


def power_gamma(std: float) -> float:
    """Return the exponent gamma of the profile with relative standard deviation ``std``.

    It is the largest root of ``g^3 + 7 g^2 + (16 - std^-2) g + (12 - std^-2)``. Raises ValueError
    for a std out of range. Source: EDM2, Appendix C.1.
    """
    if not MIN_STD <= std <= MAX_STD:
        raise ValueError(f"A relative std of {std:g}; accepted: {MIN_STD} to {MAX_STD}.")
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def power_beta(gamma: float, cur_nimg: int, batch: int) -> float:
    """Return the decay of one step, ``(1 - batch / cur_nimg) ** (gamma + 1)``.

    ``cur_nimg`` counts the images after the step, so that the first step copies the weights. In the
    resulting average, the weights after the step from a to b images count in proportion to the
    integral of ``tau ** gamma`` from a to b.
    """
    return (1 - batch / cur_nimg) ** (gamma + 1)


def posthoc_coefficients(
    in_nimg: Sequence[float], in_stds: Sequence[float], out_nimg: float, out_std: float
) -> tuple[np.ndarray, float]:
    """Return the combination of given profiles that approximates another, and its relative error.

    Args:
        in_nimg: Training images [N] at which the given profiles end.
        in_stds: Relative standard deviations [N] of the given profiles.
        out_nimg: Training images at which the wanted profile ends.
        out_std: Relative standard deviation of the wanted profile.

    Returns:
        Coefficients, float64 [N], whose sum is 1; and the L2 norm of the difference between the
        combination and the wanted profile, as functions of time, relative to the wanted profile's.

    The coefficients are the least-squares solution, divided by its sum. Raises ValueError if two
    given profiles are equal. Source: EDM2, Appendix C.2.
    """
    if len(set(zip(in_nimg, in_stds, strict=True))) < len(in_nimg):
        raise ValueError("Two of the given profiles are equal; leave one out.")
    times = np.append(np.asarray(in_nimg, dtype=np.float64), out_nimg)
    gammas = np.array([power_gamma(std) for std in (*in_stds, out_std)])
    products = _inner_products(gammas[:, None], times[:, None], gammas, times)
    # Normalised: early profiles are narrow and high, which would make the system ill-conditioned.
    norms = np.sqrt(np.diag(products))
    unit = products / norms / norms[:, None]
    given, wanted = unit[:-1, :-1], unit[:-1, -1]
    coefficients = np.linalg.solve(given, wanted) * norms[-1] / norms[:-1]
    coefficients /= coefficients.sum()
    scaled = coefficients * norms[:-1] / norms[-1]
    error = 1 - 2 * scaled @ wanted + scaled @ given @ scaled
    return coefficients, float(np.sqrt(max(error, 0.0)))


def _inner_products(
    gamma_a: npt.ArrayLike, t_a: npt.ArrayLike, gamma_b: npt.ArrayLike, t_b: npt.ArrayLike
) -> np.ndarray:
    """Return the inner products of profiles a and b: ``(g + 1) tau^g / t^(g + 1)`` up to t."""
    gamma_a, t_a, gamma_b, t_b = np.broadcast_arrays(gamma_a, t_a, gamma_b, t_b)
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    ratio = (t_a / t_b) ** exponent / np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio
