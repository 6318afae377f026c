"""Whether patch features are aligned with the latents."""

import torch
from torch import Tensor
from torch.nn import functional

from training.watching.finding import Finding
from training.watching.inspection.sample import Sample

_DIM = 48  # Features are projected to this width at random.
_MIN_IMAGES = 8
_SHARE = 0.02  # Share of the local structure that a shift has to explain beyond what none explains.
_STANDARD_ERRORS = 6.0
SHIFTS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]


def find_shifted_patches(sample: Sample) -> list[Finding]:
    """Return a finding if neighbouring patches explain latents better than their own patches do."""
    errors = [
        shift_errors(batch.x, batch.cond["patches"], batch.grid)
        for batch in sample.batches
        if batch.grid is not None and _can_tell(batch.x, batch.grid)
    ]
    if sum(map(len, errors)) < _MIN_IMAGES:
        return []
    error = torch.cat(errors)  #                                        [N, 9]
    own = SHIFTS.index((0, 0))
    gain = error[:, [own]] - error
    best = int(gain.mean(0).argmax())
    mean, spread = float(gain[:, best].mean()), float(gain[:, best].std() / len(gain) ** 0.5)
    if mean < max(_SHARE, _STANDARD_ERRORS * spread):
        return []
    where = " and ".join(
        f"{abs(by)} {names[by > 0]}"
        for by, names in zip(SHIFTS[best], (("up", "down"), ("left", "right")), strict=True)
        if by
    )
    shares = [1 - float(error[:, which].mean()) for which in (best, own)]
    return [
        Finding(
            name="patches_shifted",
            message=f"Patch features do not lie where they belong: the patch {where} explains "
            f"{shares[0]:.0%} of the local structure of a latent, its own {shares[1]:.0%} "
            f"({len(error)} images)",
            remedy="see that register tokens and the CLS token are left out of the patches, and "
            "that they are in the order of rows; prepare the features again",
        )
    ]


def _can_tell(x: Tensor, grid: tuple[int, int]) -> bool:
    """Return whether there are two images, a grid of 4x4 or more, and a latent for each patch."""
    is_fine = all(side >= count for side, count in zip(x.shape[-2:], grid, strict=True))
    return len(x) > 1 and min(grid) >= 4 and is_fine


def shift_errors(x: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the share of latents that patches leave unexplained at each of 9 shifts, [N, 9].

    For a shift (down, right), the latent at a place is predicted from the patch that lies so far
    down and right of it, by ridge regression on the other half of the images. Both are reduced to
    their local structure first: the mean of the 3x3 places around each is subtracted.

    Args:
        x: Latents [N, C, h, w], at least as large as the grid.
        patches: Patch features [N, rows * columns, D], row by row.
        grid: Rows and columns of the patches.
    """
    target = _without_surroundings(functional.adaptive_avg_pool2d(x, grid))
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(patches.shape[-1], _DIM, generator=generator)
    values = (patches - patches.mean((0, 1))) @ directions / patches.shape[-1] ** 0.5
    values = _without_surroundings(values.mT.unflatten(2, grid))
    target = target / target.square().mean().sqrt().clamp(min=1e-6)
    values = values / values.square().mean().sqrt().clamp(min=1e-6)
    rows, columns = grid
    edge = 2 if min(grid) > 6 else 1  # If possible, shifted places have all their neighbours too.
    inner = target[:, :, edge : rows - edge, edge : columns - edge]
    found = []
    for down, right in SHIFTS:
        top, left = edge + down, edge + right
        moved = values[:, :, top : top + inner.shape[2], left : left + inner.shape[3]]
        found.append(_held_out_error(moved, inner))
    return torch.stack(found, dim=1)


def _without_surroundings(values: Tensor) -> Tensor:
    return values - functional.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)


def _held_out_error(values: Tensor, target: Tensor) -> Tensor:
    """Return the relative squared error of targets [N, c, h, w] predicted from values, [N].

    ``values`` are [N, D, h, w]. Each half of the images is predicted by a fit to the other half.
    """
    given, wanted = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (values, target))
    errors = torch.empty(len(given))
    for half in range(2):
        test = torch.arange(len(given)) % 2 == half
        inputs, outputs = given[~test].flatten(0, 1), wanted[~test].flatten(0, 1)
        gram = inputs.T @ inputs
        gram += 0.1 * gram.diagonal().mean().clamp(min=1e-6) * torch.eye(len(gram))
        weights = torch.linalg.solve(gram, inputs.T @ outputs)
        error = (given[test] @ weights - wanted[test]).square().mean((1, 2))
        errors[test] = error / wanted[test].square().mean().clamp(min=1e-12)
    return errors
