"""The Inception Score."""

import torch
from numpy.typing import ArrayLike

from metrics.vectors import check_finite

_BLOCK = 4096


def inception_score(
    logits: ArrayLike | torch.Tensor, *, num_splits: int = 10
) -> tuple[float, float]:
    """Return mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))).

    ``logits`` are [N, classes] in the order of the images. Splits are consecutive: split i begins
    at image i N // num_splits. The standard deviation has the divisor ``num_splits``. Values are
    computed in float64 on the CPU.

    Raises ValueError for fewer images than splits and for values that are not finite. Source:
    Salimans et al., "Improved techniques for training GANs", arXiv:1606.03498, Section 4.
    """
    logits = torch.as_tensor(logits)
    num_images = len(logits)
    if logits.ndim != 2 or num_images < num_splits:
        expected = f"[N, classes] with at least {num_splits} images, one for each split"
        raise ValueError(f"Got logits of shape {list(logits.shape)}; expected {expected}.")
    check_finite(logits)
    scores = []
    for split in range(num_splits):
        part = logits[split * num_images // num_splits : (split + 1) * num_images // num_splits]
        # mean KL(p || q) = mean sum p log p - sum q log q, where q is the mean of p.
        negentropy = torch.zeros([], dtype=torch.float64)
        marginal = torch.zeros(logits.shape[1], dtype=torch.float64)
        for rows in part.split(_BLOCK):
            log_probabilities = torch.log_softmax(rows.to("cpu", torch.float64), dim=1)
            probabilities = log_probabilities.exp()
            negentropy += (probabilities * log_probabilities).sum()
            marginal += probabilities.sum(0)
        marginal /= len(part)
        divergence = negentropy / len(part) - torch.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    found = torch.stack(scores)
    return found.mean().item(), found.std(unbiased=False).item()
