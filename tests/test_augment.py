"""The augmentation pipeline: labels, geometry and randomness."""

import math

import numpy as np
import pytest
import pywt
import torch

from data.images.augment import (
    NUM_LABELS,
    SYM6,
    AugmentPipe,
    augment_labels,
    make_augment_pipe,
    warp,
)
from data.images.config import AugmentConfig

COLUMNS = ["flip_x", "flip_y", "scale", "angle", "stretch", "direction", "shift_x", "shift_y"]
OFF = dict(flip_x=0, flip_y=0, scale=0, rotate=0, stretch=0, shift=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def params(**values):
    row = torch.tensor([[float(values.pop(name, 0)) for name in COLUMNS]])
    assert not values
    return row


def blob(center_x, center_y, width_x=3.0, width_y=3.0, size=32):
    """Return an image [1, 1, size, size] of a Gaussian; the centre is in pixels from the middle."""
    axis = torch.arange(size) - (size - 1) / 2
    x, y = axis - center_x, (axis - center_y)[:, None]
    return torch.exp(-0.5 * ((x / width_x) ** 2 + (y / width_y) ** 2))[None, None]


def moments(image):
    """Return the centre (x, y) of an image's mass and its widths along x and y."""
    mass = (image[0, 0] / image.sum()).double()
    axis = torch.arange(len(mass)) - (len(mass) - 1) / 2
    x, y = (mass.sum(0) * axis).sum(), (mass.sum(1) * axis).sum()
    width_x = (mass.sum(0) * (axis - x) ** 2).sum().sqrt()
    width_y = (mass.sum(1) * (axis - y) ** 2).sum().sqrt()
    return x.item(), y.item(), width_x.item(), width_y.item()


def apply(image, **values):
    images, labels = AugmentPipe(1.0).apply(image, params(**values))
    return images, labels[0].tolist()


def test_filter_is_the_sym6_wavelet():
    assert pywt.Wavelet("sym6").rec_lo == pytest.approx(SYM6, abs=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (16, 24)])
def test_the_identity_map_returns_the_image(shape):
    images = torch.rand(2, 3, *shape, generator=generator()) * 2 - 1
    identity = torch.eye(2).expand(2, 2, 2)
    assert torch.allclose(warp(images, identity, torch.zeros(2, 2)), images, atol=1e-5)


def test_warp_equals_a_direct_computation_over_a_wide_reflected_margin():
    size, margin = 8, 40
    image = np.random.default_rng(0).standard_normal([size, size])
    matrix = np.array([[0.8, -0.5], [0.6, 1.1]])
    offset = np.array([1.3, -2.1])
    taps = np.arange(12)
    centroid = (taps * SYM6).sum() / np.sum(SYM6)

    wide = np.pad(image, margin, mode="reflect")
    fine = np.zeros([2 * len(wide)] * 2)
    fine[::2, ::2] = wide
    for axis in (0, 1):
        fine = np.apply_along_axis(np.convolve, axis, fine, np.array(SYM6) * math.sqrt(2))

    def fine_value(x, y):  # position in pixels from the image centre
        column, row = (2 * (p + (size - 1) / 2 + margin) + centroid for p in (x, y))
        i, j = math.floor(row), math.floor(column)
        v, u = row - i, column - j
        top = (1 - u) * fine[i, j] + u * fine[i, j + 1]
        return (1 - v) * top + v * ((1 - u) * fine[i + 1, j] + u * fine[i + 1, j + 1])

    expected = np.zeros([size, size])
    for row, column in np.ndindex(size, size):
        for a, b in np.ndindex(12, 12):
            position = (np.array([2 * column + b, 2 * row + a]) - centroid) / 2 - (size - 1) / 2
            expected[row, column] += (
                SYM6[a] * SYM6[b] / 2 * fine_value(*(matrix @ position + offset))
            )
    got = warp(
        torch.tensor(image, dtype=torch.float32)[None, None],
        torch.tensor(matrix, dtype=torch.float32)[None],
        torch.tensor(offset, dtype=torch.float32)[None],
    )
    assert got[0, 0].numpy() == pytest.approx(expected, abs=2e-5)


def test_flips_are_exact():
    image = torch.rand(1, 3, 9, 12, generator=generator())
    mirrored, labels = apply(image, flip_x=1)
    assert torch.equal(mirrored, image.flip(3))
    assert labels == [1, 0, 0, 0, 0, 0, 0, 0, 0]
    mirrored, labels = apply(image, flip_y=1)
    assert torch.equal(mirrored, image.flip(2))
    assert labels == [0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_untouched_images_keep_their_values_beside_moved_ones():
    images = torch.rand(2, 1, 16, 16, generator=generator())
    rows = torch.cat([params(), params(angle=1.0)])
    result, labels = AugmentPipe(1.0).apply(images, rows)
    assert torch.equal(result[0], images[0])
    assert not torch.allclose(result[1], images[1], atol=0.1)
    assert (labels[0] == 0).all()


def test_shift_labels_say_how_far_the_image_moved():
    image, labels = apply(blob(-2, 1), shift_x=0.75, shift_y=-0.5)
    x, y, *_ = moments(image)
    assert labels == [0, 0, 0, 0, 0, 0, 0, 0.75, -0.5]
    assert (x, y) == pytest.approx((-2 + 0.125 * 32 * 0.75, 1 - 0.125 * 32 * 0.5), abs=0.03)


def test_whole_pixel_shifts_reflect_at_the_border():
    image = torch.rand(1, 1, 16, 24, generator=generator())
    moved, _ = apply(image, shift_x=1, shift_y=-0.5)  # 3 pixels right, 1 pixel up
    expected = torch.nn.functional.pad(image, (3, 0, 0, 1), mode="reflect")[..., 1:, :24]
    assert torch.allclose(moved, expected, atol=1e-5)


@pytest.mark.parametrize("angle", [0.4, -2.0, math.pi / 2])
def test_rotation_labels_say_how_far_the_image_turned(angle):
    image, labels = apply(blob(6, 0, 2, 2), angle=angle)
    x, y, *_ = moments(image)
    cos, sin = labels[3] + 1, labels[4]
    assert (cos, sin) == pytest.approx((math.cos(angle), math.sin(angle)), abs=1e-6)
    assert (x, y) == pytest.approx((6 * cos, -6 * sin), abs=0.03)  # y points down
    assert labels[:3] + labels[5:] == [0] * 7


def test_half_turn_is_about_the_exact_centre():
    image = blob(3, -4, 3.0, 2.5)
    turned, _ = apply(image, angle=math.pi)
    assert torch.allclose(turned, image.flip(2, 3), atol=0.01)


def test_scale_labels_say_how_much_the_image_grew():
    image, labels = apply(blob(4, -2), scale=1.5)
    factor = 2 ** (0.2 * labels[2])
    assert labels == [0, 0, 1.5, 0, 0, 0, 0, 0, 0]
    expected = (4 * factor, -2 * factor, 3 * factor, 3 * factor)
    assert moments(image) == pytest.approx(expected, abs=0.1)


def test_stretch_labels_say_how_much_and_along_which_direction():
    factor = 2 ** (0.2 * 2)
    image, labels = apply(blob(3, 0, 2, 2), stretch=2, direction=0)
    assert labels == pytest.approx([0, 0, 0, 0, 0, 2, 0, 0, 0])
    assert moments(image) == pytest.approx((3 * factor, 0, 2 * factor, 2 / factor), abs=0.1)
    image, labels = apply(blob(3, 0, 2, 2), stretch=2, direction=math.pi / 2)
    assert labels == pytest.approx([0, 0, 0, 0, 0, 0, 2, 0, 0], abs=1e-6)
    assert moments(image) == pytest.approx((3 / factor, 0, 2 / factor, 2 * factor), abs=0.1)
    # A blob on the diagonal that the stretch follows moves along it, one across is pulled in.
    for center, expected in (((3, -3), 3 * factor), ((3, 3), 3 / factor)):
        image, _ = apply(blob(*center, 2, 2), stretch=2, direction=math.pi / 4)
        assert moments(image)[0] == pytest.approx(expected, abs=0.1)


def test_transformations_are_applied_in_the_order_of_their_labels():
    image, _ = apply(
        blob(5, 1, 2, 2), flip_x=1, scale=-1, angle=math.pi / 2, stretch=1, shift_x=0.5
    )
    # Mirror: (-5, 1). Scale by 2^-0.2. Quarter turn: (x, y) -> (y, -x). Stretch x. Shift 2 right.
    shrink, stretch = 2**-0.2, 2**0.2
    x, y, *_ = moments(image)
    assert (x, y) == pytest.approx((1 * shrink * stretch + 2, 5 * shrink / stretch), abs=0.1)


def test_a_vanishing_probability_leaves_only_horizontal_flips():
    labels = augment_labels(AugmentPipe(1e-7).draw(2000, generator(), "cpu"))
    assert labels.shape == (2000, NUM_LABELS)
    assert set(labels[:, 0].tolist()) == {0, 1}
    assert labels[:, 0].mean().item() == pytest.approx(0.5, abs=0.05)
    assert (labels[:, 1:] == 0).all()


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("flip_x", [0]),
        ("flip_y", [1]),
        ("scale", [2]),
        ("rotate", [3, 4]),
        ("stretch", [5, 6]),
        ("shift", [7, 8]),
    ],
)
def test_each_transformation_has_its_own_label_slots(name, slots):
    pipe = AugmentPipe(1.0, **{**OFF, name: 1.0})
    used = (augment_labels(pipe.draw(500, generator(), "cpu")) != 0).any(0)
    assert used.nonzero().flatten().tolist() == slots


def test_transformations_occur_with_their_probability_and_spread():
    values = AugmentPipe(0.25).draw(40_000, generator(), "cpu")
    shares = (values != 0).float().mean(0)
    assert shares.tolist() == pytest.approx(
        [0.5, 0.125, 0.25, 0.25, 0.25, 0.125, 0.25, 0.25], abs=0.01
    )
    for column in (2, 4, 6, 7):
        present = values[values[:, column] != 0, column]
        assert present.mean().item() == pytest.approx(0, abs=0.05)
        assert present.std().item() == pytest.approx(1, abs=0.05)
    for column in (3, 5):
        present = values[values[:, column] != 0, column]
        assert present.abs().max() <= math.pi
        assert present.std().item() == pytest.approx(math.pi / math.sqrt(3), abs=0.05)


def test_rows_can_be_augmented_apart_from_the_batch():
    pipe = AugmentPipe(0.8)
    images = torch.rand(6, 3, 16, 16, generator=generator(1)) * 2 - 1
    drawn = pipe.draw(6, generator(2), "cpu")
    together, labels = pipe.apply(images, drawn)
    for rows in (slice(0, 2), slice(2, 6)):
        part, part_labels = pipe.apply(images[rows], drawn[rows])
        assert torch.allclose(part, together[rows], atol=1e-6)
        assert torch.equal(part_labels, labels[rows])


def test_the_draw_is_a_function_of_the_generator():
    draws = [AugmentPipe(0.5).draw(8, generator(seed), "cpu") for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("size", [8, 13, 64])
def test_extreme_maps_stay_finite_and_in_range(size):
    image = torch.ones(1, 1, size, size)
    image, _ = apply(image, scale=-12, angle=0.7, stretch=8, direction=1.0, shift_x=30, shift_y=-9)
    assert torch.allclose(image, torch.ones_like(image), atol=2e-3)


def test_applying_does_not_wait_for_the_device():
    # Tensors of the meta device have no values, so that reading one on the host fails.
    pipe = AugmentPipe(0.5)
    images, labels = pipe.apply(
        torch.zeros(2, 3, 8, 8, device="meta"), pipe.draw(2, generator(), "meta")
    )
    assert images.shape == (2, 3, 8, 8)
    assert labels.is_meta


def test_probability_zero_removes_the_pipe_with_its_flips():
    assert make_augment_pipe(AugmentConfig(augment=0.0)) is None
    assert make_augment_pipe(AugmentConfig()).p == 0.12
    with pytest.raises(ValueError, match=r"--augment: got 1\.5; accepted: a number from 0 to 1"):
        AugmentConfig(augment=1.5)
