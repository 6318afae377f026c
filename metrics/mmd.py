"""Squared maximum mean discrepancies (MMD) between two sets of vectors: KID and CMMD."""

from collections.abc import Sequence

import numpy as np
import torch

from metrics.vectors import Vectors, as_floats, check_vectors, products

# Side of the blocks of a kernel matrix. It is fixed, so that rounding does not depend on memory.
_BLOCK = 4096


def kernel_distance(
    real: Vectors,
    fake: Vectors,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Return mean and standard deviation over random subsets of the unbiased squared MMD.

    The kernel is cubic, k(x, y) = (x . y / D + 1)^3. For each subset, m = min(N, M, subset_size)
    vectors are drawn from either side without replacement. Its value is
    (S_ff + S_rr) / (m (m - 1)) - 2 S_fr / m^2, where S sums k over pairs; S_ff and S_rr omit the
    pairs of a vector with itself.

    Vectors are [N, D] and [M, D]; equal seeds draw equal subsets. Kernels are computed on
    ``device``, in float64 from :func:`~metrics.vectors.products`, with an error below 1e-7 of the
    mean kernel. Raises ValueError for fewer than two vectors on a side, widths that differ, and
    values that are not finite. Source: Bińkowski et al., "Demystifying MMD GANs", arXiv:1801.01401,
    Section 4; the estimator is StyleGAN's.
    """
    real, fake = check_vectors(real, fake, at_least=2)
    size = min(len(real), len(fake), subset_size)
    rng = np.random.default_rng(seed)
    chosen_fake, chosen_real = [], []
    for _ in range(num_subsets):
        chosen_fake.append(torch.from_numpy(rng.choice(len(fake), size, replace=False)))
        chosen_real.append(torch.from_numpy(rng.choice(len(real), size, replace=False)))
    x, y = as_floats(fake, device), as_floats(real, device)
    # Subsets overlap: the kernels of all pairs, computed once, may be fewer than those per subset.
    num_pairs = len(x) ** 2 / 2 + len(y) ** 2 / 2 + len(x) * len(y)
    sums = _sums_from_all if num_pairs < 2 * num_subsets * size**2 else _sums_one_by_one
    total_ff, total_rr = sums(x, x, chosen_fake, chosen_fake), sums(y, y, chosen_real, chosen_real)
    unbiased = (total_ff + total_rr) / (size * (size - 1))
    found = (unbiased - 2 * sums(x, y, chosen_fake, chosen_real) / size**2).cpu()
    return found.mean().item(), found.std(unbiased=False).item()


def _sums_from_all(
    x: torch.Tensor,
    y: torch.Tensor,
    chosen_x: Sequence[torch.Tensor],
    chosen_y: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the kernel sum over the pairs of each subset, float64 [S], without self-pairs.

    It is s^T K t with the kernel matrix K and, for each subset, columns s and t of ones and zeros.
    """
    within = x is y
    members_x, members_y = _members(chosen_x, x), _members(chosen_y, y)
    total = torch.zeros(len(chosen_x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        # Within one set K is symmetric: blocks right of the diagonal ones count twice.
        for first in range(start if within else 0, len(y), _BLOCK):
            columns = slice(first, first + _BLOCK)
            kernel = _cubic(x[rows], y[columns])
            if within and first == start:
                kernel.fill_diagonal_(0)
            part = (members_x[rows] * (kernel @ members_y[columns])).sum(0)
            total += part if not within or first == start else 2 * part
    return total


def _members(chosen: Sequence[torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """Return 1 where a vector is in a subset and 0 elsewhere, float64 [N, S]."""
    members = torch.zeros(len(vectors), len(chosen), dtype=torch.float64)
    for column, rows in enumerate(chosen):
        members[rows, column] = 1
    return members.to(vectors.device)


def _sums_one_by_one(
    x: torch.Tensor,
    y: torch.Tensor,
    chosen_x: Sequence[torch.Tensor],
    chosen_y: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the sums of :func:`_sums_from_all`, computed from one kernel matrix per subset."""
    sums = []
    for rows, columns in zip(chosen_x, chosen_y, strict=True):
        kernel = _cubic(x[rows.to(x.device)], y[columns.to(y.device)])
        sums.append(kernel.sum() - (kernel.diagonal().sum() if x is y else 0))
    return torch.stack(sums)


def _cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kernel = products(x, y).div_(x.shape[1]).add_(1)
    return kernel.square().mul_(kernel)


def rbf_mmd(
    real: Vectors,
    fake: Vectors,
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    device: torch.device | str = "cpu",
) -> float:
    """Return ``scale`` times the squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)).

    It is the biased, minimum-variance estimator, which includes each vector's pair with itself: the
    mean kernels within the two sides, minus twice the mean kernel between them. With the defaults
    and CLIP embeddings of unit length it is CMMD.

    Vectors are [N, D] and [M, D]; kernels are computed on ``device``, in float64 from
    :func:`~metrics.vectors.products`. Raises ValueError for empty sets, widths that differ, and
    values that are not finite. Sources: Jayasumana et al., "Rethinking FID", arXiv:2401.09603;
    Gretton et al., "A kernel two-sample test" (2012), Eq. 5.
    """
    real, fake = check_vectors(real, fake)

    def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # With a large sigma all kernels are near 1. Summing k - 1 keeps their digits, and the ones
        # cancel in the end: 1 + 1 - 2.
        total = torch.zeros([], dtype=torch.float64, device=device)
        for rows in x.split(_BLOCK):
            rows = as_floats(rows, device)
            for columns in y.split(_BLOCK):
                columns = as_floats(columns, device)
                lengths = rows.double().square().sum(1)[:, None] + columns.double().square().sum(1)
                squared = lengths.sub_(products(rows, columns), alpha=2).clamp_min_(0)
                total += squared.div_(-2 * sigma**2).expm1_().sum()
        return total / (len(x) * len(y))

    value = mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake)
    return scale * value.item()
