"""Squared maximum mean discrepancies between two sets of feature vectors: KID and CMMD."""

import numpy as np
import torch

from metrics.vectors import Vectors, check_vectors

# Rows of a kernel matrix that are in memory at once. Fixed, so that results do not depend on it.
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

    The kernel is cubic, (x . y / D + 1)^3. Each subset draws m = min(N, M, subset_size) vectors of
    either side without replacement; with S_xx the sum over different vectors, its value is
    (S_ff + S_rr) / (m (m - 1)) - 2 S_fr / m^2.

    Vectors are [N, D] and [M, D]; kernels are computed on ``device``, in float64. Equal seeds draw
    equal subsets. Raises ValueError for fewer than two vectors and for widths that differ. Source:
    Bińkowski et al., "Demystifying MMD GANs", arXiv:1801.01401, Section 4; the estimator is
    StyleGAN's.
    """
    real, fake = check_vectors(real, fake, at_least=2)
    size = min(len(real), len(fake), subset_size)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        chosen_fake = rng.choice(len(fake), size, replace=False)
        chosen_real = rng.choice(len(real), size, replace=False)
        x = fake[torch.from_numpy(chosen_fake)].to(device, torch.float64)
        y = real[torch.from_numpy(chosen_real)].to(device, torch.float64)
        within = _cubic(x, x) + _cubic(y, y)
        unbiased = (within.sum() - within.diagonal().sum()) / (size * (size - 1))
        values.append(unbiased - 2 * _cubic(x, y).mean())
    found = torch.stack(values).cpu()
    return found.mean().item(), found.std(unbiased=False).item()


def _cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def rbf_mmd(
    real: Vectors,
    fake: Vectors,
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    device: torch.device | str = "cpu",
) -> float:
    """Return ``scale`` times the squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)).

    It is the biased estimator of least variance, in which each vector also meets itself: the mean
    kernel within either side, minus twice the mean kernel between them. The defaults make it CMMD,
    for CLIP embeddings of unit length.

    Vectors are [N, D] and [M, D]; kernels are computed on ``device``, in float64. Raises ValueError
    for empty sets and for widths that differ. Sources: Jayasumana et al., "Rethinking FID",
    arXiv:2401.09603; Gretton et al., "A kernel two-sample test" (2012), Eq. 5.
    """
    real, fake = check_vectors(real, fake)

    def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # All kernels are near 1 where sigma is large. Their excess over 1 keeps its digits, and
        # the ones cancel: 1 + 1 - 2.
        total = torch.zeros([], dtype=torch.float64, device=device)
        for rows in x.split(_BLOCK):
            rows = rows.to(device, torch.float64)
            for columns in y.split(_BLOCK):
                columns = columns.to(device, torch.float64)
                lengths = rows.square().sum(1)[:, None] + columns.square().sum(1)
                squared = lengths - 2 * (rows @ columns.T)
                total += torch.expm1(-squared.clamp_min(0) / (2 * sigma**2)).sum()
        return total / (len(x) * len(y))

    value = mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake)
    return scale * value.item()
