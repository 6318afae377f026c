"""EDM's augmentation pipeline: random flips and affine maps, reported to the network as labels.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM,
arXiv 2206.00364), Appendix F.2. The labels tell the network how each image was augmented; at
sampling, all-zero labels ask it for images without augmentation.
"""

import functools
import math

import numpy as np
import torch

from data.images.config import AugmentConfig

NUM_LABELS = 9

# Reconstruction low-pass filter of the sym6 wavelet, as in PyWavelets; its sum is sqrt(2).
SYM6 = (
    *(-0.007800708325034148, 0.0017677118642428036, 0.04472490177066578, -0.021060292512300564),
    *(-0.07263752278646252, 0.3379294217276218, 0.787641141030194, 0.4910559419267466),
    *(-0.048311742585633, -0.11799011114819057, 0.0034907120842174702, 0.015404109327027373),
)
# Centroid of the filter, in taps: the offset of an upsampled pixel among the fine samples.
_CENTROID = float(np.dot(np.arange(len(SYM6)), SYM6) / np.sum(SYM6))


# Multipliers of the probability p of each transformation; that of flip_x makes it certain.
_MULTIPLIERS = dict(flip_x=1e8, flip_y=1.0, scale=1.0, rotate=1.0, stretch=1.0, shift=1.0)


class AugmentPipe:
    """Augmentation by transformations that occur independently of one another.

    Each transformation is applied to an image with probability ``p`` times its multiplier, at most
    1. A flip, where applied, mirrors the image with probability 1/2, so that ``flip_x`` mirrors
    half of all images, whatever ``p`` is.

    The parameters of N images are a tensor [N, 8], float32, zero where a transformation is absent:
    horizontal and vertical flip (0 or 1), log2(scale) / 0.2, rotation angle, log2(stretch) / 0.2,
    direction of the stretch, and shifts to the right and down in units of 0.125 image sizes. Angles
    are in radians, counter-clockwise as the image is seen.

    Deviations from EDM: positions are measured from the filter's centroid instead of its middle
    tap, 0.2 pixels away, so that rotations are about the exact centre. Reflection continues beyond
    one image size, where EDM's images are black.

    Args:
        p: Probability, in (0, 1].
        multipliers: Multipliers of ``p`` by transformation; by default 1, and 1e8 for ``flip_x``.
    """

    def __init__(self, p: float, **multipliers: float) -> None:
        assert 0 < p <= 1
        assert multipliers.keys() <= _MULTIPLIERS.keys()
        self.p = p
        self._multipliers = tuple({**_MULTIPLIERS, **multipliers}.values())

    def draw(
        self, num: int, generator: torch.Generator, device: torch.device | str
    ) -> torch.Tensor:
        """Return random parameters [num, 8] on ``device``, drawn on the generator's device."""
        kwargs = dict(generator=generator, device=generator.device)
        occurs = torch.rand(len(self._multipliers) + 1, num, **kwargs)
        uniform = torch.rand(4, num, **kwargs)
        normal = torch.randn(4, num, **kwargs)
        flips = (uniform[:2] < 0.5).float()
        angles = (uniform[2:] * 2 - 1) * math.pi
        turned = torch.where(occurs[-1] < 0.5, angles[1], 0.0)  # Otherwise along x.
        columns = [*flips, normal[0], angles[0], normal[1], turned, normal[2], normal[3]]
        transformation_of = [0, 1, 2, 3, 4, 4, 5, 5]
        values = [
            torch.where(occurs[index] < self._multipliers[index] * self.p, column, 0.0)
            for index, column in zip(transformation_of, columns, strict=True)
        ]
        return torch.stack(values, dim=1).to(device, non_blocking=True)

    def apply(
        self, images: torch.Tensor, params: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return augmented images [N, C, H, W] and their labels [N, 9], float32.

        Images, float32 in [-1, 1] with H and W of at least 8, are mirrored, then scaled, rotated,
        stretched and shifted about their centre, by the parameters ``params`` [N, 8]. An image to
        which none of the last four applies is not resampled and keeps its exact values. Resampling
        can overshoot the range slightly at edges.
        """
        params = params.to(images.device, non_blocking=True)
        flip_x, flip_y = params[:, :2].bool().reshape(-1, 2, 1, 1, 1).unbind(1)
        images = torch.where(flip_x, images.flip(3), images)
        images = torch.where(flip_y, images.flip(2), images)
        moved = (params[:, 2:] != 0).any(1).reshape(-1, 1, 1, 1)
        warped = warp(images, *_inverse_affine(params, *images.shape[2:]))
        return torch.where(moved, warped, images), augment_labels(params)


def augment_labels(params: torch.Tensor) -> torch.Tensor:
    """Return the network's augmentation labels [N, 9], float32, for parameters [N, 8].

    In EDM's order: flip x, flip y, scale, cos(rotation) - 1, sin(rotation), stretch times the
    cosine and sine of its direction, shift x, shift y.
    """
    flip_x, flip_y, scale, angle, stretch, direction, shift_x, shift_y = params.unbind(1)
    turn = (angle.cos() - 1, angle.sin())
    along = (stretch * direction.cos(), stretch * direction.sin())
    return torch.stack([flip_x, flip_y, scale, *turn, *along, shift_x, shift_y], dim=1)


def make_augment_pipe(config: AugmentConfig) -> AugmentPipe | None:
    """Return the augmentation that ``config`` describes, or None if there is none."""
    return AugmentPipe(config.augment) if config.augment > 0 else None


def warp(images: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Return images resampled under an affine map of positions, at twice the resolution.

    The output at position p (x, y in pixels from the image centre) is the input at ``matrix @ p +
    offset``; these are [N, 2, 2] and [N, 2]. Images [N, C, H, W], float32, H and W of at least 2,
    are extended by reflection about their outermost pixel centres, upsampled by the sym6 filter,
    interpolated linearly, and downsampled by the adjoint of the upsampling. That makes the identity
    map exact, because even shifts of the filter are orthonormal.
    """
    height, width = images.shape[2:]
    up_y, down_y, sites_y = _resampling(height, images.device)
    up_x, down_x, sites_x = _resampling(width, images.device)

    # Source of each fine output sample. These are sums of products, because a matrix product would
    # move the image by its reduced precision on some GPUs (TF32).
    x, y = sites_x, sites_y[:, None]
    matrix, offset = matrix[..., None, None], offset[..., None, None]
    source_x = matrix[:, 0, 0] * x + matrix[:, 0, 1] * y + offset[:, 0]
    source_y = matrix[:, 1, 0] * x + matrix[:, 1, 1] * y + offset[:, 1]
    grid = torch.stack([_grid_position(source_x, width), _grid_position(source_y, height)], -1)

    fine = up_y @ images @ up_x.T  # [N, C, 4H-3, 4W-3]
    fine = torch.nn.functional.grid_sample(
        fine, grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    return down_y @ fine @ down_x.T  # [N, C, H, W]


def _inverse_affine(
    values: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix [N, 2, 2] and offset [N, 2] from output to input positions in pixels.

    They invert the map p -> stretch(direction) rotate(angle) scale p + shift.
    """
    _, _, scale, angle, stretch, direction, shift_x, shift_y = values.unbind(1)
    scale, stretch = (0.2 * scale).exp2(), (0.2 * stretch).exp2()
    columns = torch.stack([1 / (scale * stretch), stretch / scale], dim=-1)
    left = _rotation(direction - angle) * columns[:, None, :]
    matrix = _product(left, _rotation(-direction))
    shift = 0.125 * torch.stack([shift_x * width, shift_y * height], dim=-1)
    return matrix, -_product(matrix, shift[:, :, None])[:, :, 0]


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    # Counter-clockwise as seen, with y pointing down: [N, 2, 2].
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -sin, cos], dim=-1).reshape(-1, 2, 2)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # Matrix product [N, I, K] x [N, K, J] -> [N, I, J] in full precision.
    return (left[:, :, :, None] * right[:, None, :, :]).sum(2)


def _grid_position(position: torch.Tensor, size: int) -> torch.Tensor:
    # Pixels from the centre -> [-1, 1] over one period of the reflected fine image.
    index = 2 * (position + (size - 1) / 2) + _CENTROID
    return (index / (4 * (size - 1))).remainder(1) * 2 - 1


@functools.lru_cache(maxsize=16)
def _resampling(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return matrices up [4 size - 3, size] and down [size, 2 size + 10] of one axis, and sites.

    ``up`` reflects and upsamples to one period of 4 (size - 1) fine samples, and repeats the first
    of them at the end. ``down`` filters and decimates the fine output samples, which lie at
    ``sites`` [2 size + 10], in pixels from the image centre. All are float32.
    """
    period = 2 * (size - 1)
    up = np.zeros([2 * period + 1, size])
    for row in range(2 * period + 1):
        for tap in range(row % 2, len(SYM6), 2):
            pixel = ((row - tap) // 2) % period
            up[row, min(pixel, period - pixel)] += SYM6[tap] * math.sqrt(2)
    down = np.zeros([size, 2 * size + len(SYM6) - 2])
    for row in range(size):
        down[row, 2 * row : 2 * row + len(SYM6)] = np.divide(SYM6, math.sqrt(2))
    sites = (np.arange(down.shape[1]) - _CENTROID) / 2 - (size - 1) / 2
    return tuple(torch.tensor(a, dtype=torch.float32, device=device) for a in (up, down, sites))
