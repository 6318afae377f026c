"""The Fréchet distance between two Gaussians, computed without a general matrix square root."""

import numpy as np
import torch
from numpy.typing import ArrayLike

from metrics.vectors import check_vectors


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Return the squared Fréchet distance between N(mu1, sigma1) and N(mu2, sigma2).

        ||mu1 - mu2||^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    The last trace is the sum of the square roots of the eigenvalues of the symmetric matrix
    sigma1^(1/2) sigma2 sigma1^(1/2), so no general matrix square root is taken and the result is
    always real. Directions in which a covariance is zero up to rounding are left out; they arise
    from having fewer samples than dimensions and from constant values.

    Args:
        mu1, mu2: Means [D].
        sigma1, sigma2: Covariances [D, D], symmetric and positive semidefinite up to rounding.

    Returns:
        A number >= 0, computed in float64; negative rounding errors are returned as 0. The distance
        of a distribution from itself is 0 to about 1e-14 times tr(sigma).

    Raises ValueError for shapes that do not match, values that are not finite, and a matrix that
    is not a covariance. Source: Dowson and Landau, "The Fréchet distance between multivariate
    normal distributions" (1982); as a score of images, Heusel et al., arXiv:1706.08500, Eq. 6.
    """
    mu1, sigma1 = _checked(mu1, sigma1, "first")
    mu2, sigma2 = _checked(mu2, sigma2, "second")
    if mu1.shape != mu2.shape:
        dims = f"{mu1.size} and {mu2.size} dimensions"
        raise ValueError(f"The distributions have {dims}; they must come from the same detector.")
    value = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2)
    return max(float(value - 2 * _trace_of_root(sigma1, sigma2)), 0.0)


def frechet_distance_of_samples(x: ArrayLike, y: ArrayLike) -> float:
    """Return :func:`frechet_distance` of the Gaussians fitted to the rows of x [N, D], y [M, D].

    Covariances have the divisors N - 1 and M - 1. For few rows, N M <= D^2, they are not formed:
    tr((sigma1 sigma2)^(1/2)) is then the sum of the singular values of
    X Y^T / sqrt((N - 1) (M - 1)), where X and Y are the centred rows. That is cheaper, and exact
    even where the covariances are singular.

    Raises ValueError for fewer than two rows, widths that differ, and values that are not finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    check_vectors(x, y, at_least=2)
    if len(x) * len(y) > x.shape[1] ** 2:
        sigma1, sigma2 = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (x, y))
        return frechet_distance(x.mean(0), sigma1, y.mean(0), sigma2)
    mu1, mu2 = x.mean(0), y.mean(0)
    root1, root2 = (x - mu1) / np.sqrt(len(x) - 1), (y - mu2) / np.sqrt(len(y) - 1)
    overlap = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    value = np.sum((mu1 - mu2) ** 2) + np.sum(root1**2) + np.sum(root2**2) - 2 * overlap
    return max(float(value), 0.0)


def _checked(mu: ArrayLike, sigma: ArrayLike, label: str) -> tuple[np.ndarray, np.ndarray]:
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        got = f"a mean of shape {list(mu.shape)} and a covariance of shape {list(sigma.shape)}"
        raise ValueError(f"The {label} distribution has {got}; expected [D] and [D, D].")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"The {label} distribution has values that are not finite.")
    return mu, (sigma + sigma.T) / 2


def _trace_of_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """Return tr((sigma1 sigma2)^(1/2)).

    With sigma = R R^T, it is the sum of the square roots of the eigenvalues of R1^T sigma2 R1, and
    also the sum of the singular values of R1^T R2. The first takes half the time. The second is
    needed if some of those eigenvalues are lost in rounding: their square roots would not be.
    """
    # Cholesky takes a third of the time of an eigendecomposition, but fails if an eigenvalue is
    # zero. PyTorch's LAPACK takes less than half the time of NumPy's.
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(sigma1))
    root1 = torch.from_numpy(_factor(sigma1)) if failed else factor
    if root1.shape[1] == 0:
        return 0.0
    product = root1.T @ torch.from_numpy(sigma2) @ root1
    # The product is symmetric up to rounding; eigvalsh reads its lower triangle alone.
    eigenvalues = torch.linalg.eigvalsh(product).numpy()
    root1 = root1.numpy()
    if eigenvalues[0] > _rounding(eigenvalues):
        return float(np.sqrt(eigenvalues).sum())
    root2 = _factor(sigma2)
    if root2.shape[1] == 0:
        return 0.0
    return float(np.linalg.svd(root1.T @ root2, compute_uv=False).sum())


def _factor(sigma: np.ndarray) -> np.ndarray:
    """Return R [D, rank] with sigma = R R^T; ValueError for a clearly negative eigenvalue."""
    eigenvalues, vectors = np.linalg.eigh(sigma)
    if eigenvalues[0] < -1e-3 * max(eigenvalues[-1], 0.0) - 1e-12:
        got = f"the eigenvalue {eigenvalues[0]:.3g} besides {eigenvalues[-1]:.3g}"
        raise ValueError(f"Not a covariance: it has {got}; expected none below zero.")
    kept = eigenvalues > _rounding(eigenvalues)
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def _rounding(eigenvalues: np.ndarray) -> float:
    """Return the size below which ascending ``eigenvalues`` are indistinguishable from zero."""
    return eigenvalues.size * np.finfo(np.float64).eps * max(eigenvalues[-1], 0.0)
