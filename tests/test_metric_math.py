"""KID, CMMD, Inception Score, precision, recall, density, coverage: against independent truth."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from dnnlib.errors import NotFiniteError
from metrics import inception_score as inception_score_module
from metrics import manifold, mmd
from metrics.inception_score import inception_score
from metrics.manifold import density_coverage, nearest_neighbours, precision_recall
from metrics.mmd import kernel_distance, rbf_mmd


def two_sets(seed=0, num_real=90, num_fake=70, dim=6, shift=0.3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_real, dim)), shift + rng.standard_normal((num_fake, dim))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that do not divide the sets."""
    monkeypatch.setattr(manifold, "_ROWS", 7)
    monkeypatch.setattr(manifold, "_COLUMNS", 11)
    monkeypatch.setattr(mmd, "_BLOCK", 13)
    monkeypatch.setattr(inception_score_module, "_BLOCK", 3)


class TestKernelDistance:
    def test_of_one_whole_subset_is_the_unbiased_estimator(self):
        real, fake = two_sets(num_real=40, num_fake=40)

        def kernel(x, y):
            return (x @ y / len(x) + 1) ** 3

        within = np.mean([kernel(x, y) for i, x in enumerate(real) for y in np.delete(real, i, 0)])
        within += np.mean([kernel(x, y) for i, x in enumerate(fake) for y in np.delete(fake, i, 0)])
        between = np.mean([kernel(x, y) for x in real for y in fake])
        found, std = kernel_distance(real, fake, num_subsets=3, subset_size=1000)
        assert found == pytest.approx(within - 2 * between, rel=1e-10)
        assert std == pytest.approx(0, abs=1e-12)

    def test_is_zero_on_average_for_sets_of_one_distribution(self):
        rng = np.random.default_rng(0)
        real, fake = rng.standard_normal((2, 4000, 4))
        mean, std = kernel_distance(real, fake, num_subsets=400, subset_size=100)
        assert abs(mean) < 5 * std / 400**0.5
        shifted, _ = kernel_distance(real, fake + 0.5, num_subsets=400, subset_size=100)
        assert shifted > 20 * std / 400**0.5

    def test_agrees_with_the_closed_form_of_gaussians(self):
        """In one dimension E (xy + 1)^3 = m3 n3 + 3 m2 n2 + 3 m1 n1 + 1, with raw moments."""

        def kernel(mu1, mu2):
            moments = [(mu, 1 + mu**2, mu**3 + 3 * mu) for mu in (mu1, mu2)]
            (a1, a2, a3), (b1, b2, b3) = moments
            return a3 * b3 + 3 * a2 * b2 + 3 * a1 * b1 + 1

        expected = kernel(0, 0) + kernel(0.7, 0.7) - 2 * kernel(0, 0.7)
        rng = np.random.default_rng(1)
        real, fake = rng.standard_normal((100_000, 1)), 0.7 + rng.standard_normal((100_000, 1))
        mean, std = kernel_distance(real, fake, num_subsets=100, subset_size=1000)
        assert mean == pytest.approx(expected, abs=5 * std / 10)
        assert std / 10 < 0.1 * expected

    def test_gives_the_spread_over_subsets_and_repeats_itself(self):
        real, fake = two_sets(num_real=300, num_fake=200)
        mean, std = kernel_distance(real, fake, num_subsets=10, subset_size=50)
        assert std > 0
        assert kernel_distance(real, fake, num_subsets=10, subset_size=50) == (mean, std)
        other = kernel_distance(real, fake, num_subsets=10, subset_size=50, seed=1)
        assert other != (mean, std)

    def test_needs_two_vectors_of_one_width(self):
        real, fake = two_sets()
        with pytest.raises(ValueError, match=r"\[90, 6\] and \[1, 6\]; .* at least 2 rows"):
            kernel_distance(real, fake[:1])
        with pytest.raises(ValueError, match=r"\[90, 6\] .* \[70, 5\]"):
            kernel_distance(real, fake[:, :5])

    @pytest.mark.parametrize("num", [300, 700])
    def test_of_float32_is_that_of_float64_within_a_share_of_the_mean_kernel(
        self, num, small_blocks
    ):
        """In both ways to the sums: from all pairs, and subset by subset."""
        rng = np.random.default_rng(0)
        scales = rng.gamma(1, 0.3, 2048)  # Positive and skewed, as a detector's outputs are.
        real, fake = (
            np.abs(rng.standard_normal((num, 2048)) * scales * width).astype(np.float32)
            for width in (1, 1.01)
        )
        settings = dict(num_subsets=5, subset_size=150)
        found = kernel_distance(real, fake, **settings)
        real, fake = real.astype(np.float64), fake.astype(np.float64)
        expected = kernel_distance(real, fake, **settings)
        mean_kernel = ((fake @ real.T / 2048 + 1) ** 3).mean()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * mean_kernel)

    def test_is_the_same_from_all_pairs_and_subset_by_subset(self, small_blocks, monkeypatch):
        real, fake = two_sets()
        settings = dict(num_subsets=4, subset_size=50)
        expected = kernel_distance(real, fake, **settings)
        monkeypatch.setattr(mmd, "_sums_from_all", mmd._sums_one_by_one)
        np.testing.assert_allclose(kernel_distance(real, fake, **settings), expected, rtol=1e-10)


class TestRbfMmd:
    def test_is_its_definition(self, small_blocks):
        real, fake = two_sets()

        def mean_kernel(x, y):
            return np.exp(-cdist(x, y, "sqeuclidean") / (2 * 1.5**2)).mean()

        expected = mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake)
        assert rbf_mmd(real, fake, sigma=1.5, scale=7) == pytest.approx(7 * expected, rel=1e-9)

    def test_agrees_with_the_closed_form_of_gaussians(self):
        """Of unit Gaussians m apart, E k = (1 + 2 / s^2)^(-1/2) exp(-m^2 / (2 s^2 + 4))."""
        rng = np.random.default_rng(0)
        real, fake = rng.standard_normal((5000, 1)), 1 + rng.standard_normal((5000, 1))
        sigma = 2.0
        scale = (1 + 2 / sigma**2) ** -0.5
        expected = 2 * scale * (1 - np.exp(-1 / (2 * sigma**2 + 4)))
        assert rbf_mmd(real, fake, sigma=sigma, scale=1) == pytest.approx(expected, rel=0.1)

    def test_keeps_its_digits_where_all_kernels_are_near_one(self):
        """Two points a distance e apart: 2 (1 - exp(-e^2 / (2 sigma^2))), about e^2 / sigma^2."""
        x, y = np.array([[1.0, 0.0]]), np.array([[1.0, 1e-5]])
        assert rbf_mmd(x, y, scale=1) == pytest.approx(1e-12, rel=1e-5, abs=0)
        for distance in (1.0, 2.0, 3.0):  # Exact, so that only the kernel could lose digits.
            found = rbf_mmd(np.zeros((1, 1)), np.full((1, 1), distance), sigma=1e6, scale=1)
            assert found == pytest.approx(distance**2 * 1e-12, rel=1e-10, abs=0)
        assert rbf_mmd(x, x) == 0

    def test_does_not_depend_on_the_order(self):
        real, fake = two_sets()
        expected = rbf_mmd(real, fake)
        assert rbf_mmd(real[::-1].copy(), fake[::-1].copy()) == pytest.approx(expected, rel=1e-12)


class TestInceptionScore:
    def test_is_its_definition(self, small_blocks):
        logits = np.random.default_rng(0).standard_normal((50, 7)) * 3
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        scores = []
        for part in np.split(probabilities, 5):
            marginal = part.mean(0, keepdims=True)
            scores.append(np.exp((part * np.log(part / marginal)).sum(1).mean()))
        mean, std = inception_score(logits, num_splits=5)
        assert mean == pytest.approx(np.mean(scores), rel=1e-10)
        assert std == pytest.approx(np.std(scores), rel=1e-9)

    def test_is_the_number_of_classes_for_sure_and_even_predictions_and_one_for_constant_ones(self):
        logits = np.tile(1000 * np.eye(5, dtype=np.float32), (10, 1))
        assert inception_score(logits) == pytest.approx((5, 0))
        assert inception_score(np.ones((20, 5))) == pytest.approx((1, 0))

    def test_cuts_any_number_of_images_into_consecutive_splits(self):
        logits = np.zeros((23, 2))
        logits[:2] = [[50, 0], [0, 50]]  # The first of ten splits, alone, has two sure classes.
        mean, _ = inception_score(logits)
        assert mean == pytest.approx((2 + 9) / 10)
        with pytest.raises(ValueError, match=r"\[9, 2\]; expected .* at least 10 images"):
            inception_score(logits[:9])


def true_radii(x, k):
    distances = cdist(x, x)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, k - 1]


class TestNeighbours:
    @pytest.mark.parametrize("blocks", [False, True])
    def test_are_those_of_all_pairwise_distances(self, blocks, request):
        if blocks:
            request.getfixturevalue("small_blocks")
        points, queries = two_sets()
        distances, indices = nearest_neighbours(queries, points, 4)
        pairs = cdist(queries, points)
        np.testing.assert_array_equal(indices, np.argsort(pairs, axis=1)[:, :4])
        np.testing.assert_allclose(distances, np.sort(pairs, axis=1)[:, :4], rtol=1e-9)
        own, _ = nearest_neighbours(points, points, 3, own=np.arange(len(points)))
        np.testing.assert_allclose(own[:, 2], true_radii(points, 3), rtol=1e-9)

    @pytest.mark.parametrize("dim", [6, 513])
    def test_of_duplicates_are_at_distance_zero_and_not_themselves(self, small_blocks, dim):
        points = two_sets(dim=dim)[0] + 1000
        points[20] = points[3]
        distances, indices = nearest_neighbours(points, points, 1, own=np.arange(len(points)))
        assert (indices[20, 0], indices[3, 0]) == (3, 20)
        assert distances[20, 0] == distances[3, 0] == 0
        assert (distances > 0).sum() == 88
        twice = np.concatenate([points, points])
        distances, _ = nearest_neighbours(twice, twice, 1, own=np.arange(len(twice)))
        np.testing.assert_array_equal(distances, 0)

    @pytest.mark.parametrize("blocks", [False, True])
    def test_of_equal_distance_are_the_first_ones(self, blocks, request):
        if blocks:
            request.getfixturevalue("small_blocks")
        points = np.tile([[0.0, 0.0], [3.0, 4.0], [8.0, 1.0]], (30, 1))
        distances, indices = nearest_neighbours(points[:3], points, 40)
        expected = np.argsort(cdist(points[:3], points), axis=1, kind="stable")[:, :40]
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_array_equal(distances[:, :30], 0)

    def test_far_from_the_origin_keep_their_digits(self):
        points, queries = two_sets()
        expected, _ = nearest_neighbours(queries, points, 1)
        found, _ = nearest_neighbours(queries + 1e4, points + 1e4, 1)
        np.testing.assert_allclose(found, expected, rtol=1e-7)

    def test_are_too_few(self):
        points, queries = two_sets()
        with pytest.raises(ValueError, match=r"90 nearest neighbours .* more than the 90 vectors"):
            nearest_neighbours(points, points, 90, own=np.arange(len(points)))
        assert nearest_neighbours(queries, points, 90)[0].shape == (70, 90)


def integer_grids(num_real=150, num_fake=100):
    """Two sets with many equal distances, and the squared ones [fake, real], exact."""
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 12, (num_real, 5)), rng.integers(3, 15, (num_fake, 5))
    return real.astype(float), fake.astype(float), ((fake[:, None] - real) ** 2).sum(-1)


def squared_radii_of_integers(x, k):
    return np.sort(((x[:, None] - x) ** 2).sum(-1), axis=1)[:, k]


class TestPrecisionRecall:
    def test_is_its_definition(self, small_blocks):
        real, fake = two_sets(shift=0.8)
        pairs = cdist(fake, real)
        precision = (pairs <= true_radii(real, 3)).any(1).mean()
        recall = (pairs <= true_radii(fake, 3)[:, None]).any(0).mean()
        assert 0.1 < min(precision, recall) < 0.9
        assert precision_recall(real, fake) == (precision, recall)
        assert precision_recall(real.astype(np.float32), torch.from_numpy(fake)) == pytest.approx(
            (precision, recall), abs=0.02
        )

    def test_of_a_set_with_itself_is_one_even_with_duplicates(self):
        real, _ = two_sets()
        real = np.concatenate([real, real[:1], real[:1], real[:1], real[:1]])
        assert precision_recall(real + 100, real + 100) == (1, 1)

    def test_counts_images_on_the_rim_as_within(self, small_blocks):
        real, fake, squared = integer_grids()
        precision = (squared <= squared_radii_of_integers(real, 3)).any(1).mean()
        recall = (squared <= squared_radii_of_integers(fake, 3)[:, None]).any(0).mean()
        assert 0.1 < min(precision, recall) < 0.9
        assert precision_recall(real, fake) == (precision, recall)

    def test_tells_narrow_from_scattered_sets(self):
        real, _ = two_sets(num_real=500, dim=2)
        assert precision_recall(real, real[:40] * 0.01) == (1, pytest.approx(0, abs=0.02))
        assert precision_recall(real, real + 100) == (0, 0)

    def test_does_not_depend_on_the_order(self):
        real, fake = two_sets()
        expected = precision_recall(real, fake)
        assert precision_recall(real[::-1].copy(), fake[::-1].copy()) == expected

    def test_needs_more_images_than_neighbours(self):
        real, fake = two_sets()
        with pytest.raises(ValueError, match="more than 3 images of either kind; got 3"):
            precision_recall(real, fake[:3])

    @pytest.mark.parametrize("dim", [64, 5000])
    def test_of_float32_are_those_of_float64(self, dim, small_blocks, monkeypatch):
        """Also where the bound on float32 leaves almost everything open."""
        rng = np.random.default_rng(3)
        basis = rng.standard_normal((4, dim))
        real, fake = (
            (rng.standard_normal((num, 4)) @ basis + 50).astype(np.float32) for num in (90, 70)
        )
        for more in (0, 1e-2, 10.0):
            monkeypatch.setattr(manifold, "_TINY", more)
            for function in (precision_recall, density_coverage):
                expected = function(real.astype(np.float64), fake.astype(np.float64))
                assert function(real, fake) == expected
                assert 0 < min(expected) < 1


class TestDensityCoverage:
    def test_is_its_definition(self, small_blocks):
        real, fake = two_sets(shift=0.8)
        inside = cdist(real, fake) < true_radii(real, 5)[:, None]
        density, coverage = inside.sum() / (5 * len(fake)), inside.any(1).mean()
        assert 0.1 < coverage < 0.95
        assert density_coverage(real, fake) == (pytest.approx(density), pytest.approx(coverage))

    @pytest.mark.parametrize(("num", "dim"), [(7, 513), (333, 2), (333, 64), (1030, 2048)])
    def test_of_a_set_with_itself_are_one(self, num, dim):
        """Each open ball holds its own vector and k - 1 others; the k-th is on its rim."""
        real = 3 + np.random.default_rng(0).standard_normal((num, dim)).astype(np.float32)
        assert density_coverage(real, real) == (1, 1)
        assert precision_recall(real, real) == (1, 1)

    def test_leave_out_images_on_the_rim(self, small_blocks):
        real, fake, squared = integer_grids()
        inside = squared < squared_radii_of_integers(real, 5)
        assert 0.1 < inside.any(0).mean() < 0.95
        expected = inside.sum() / (5 * len(fake)), inside.any(0).mean()
        assert density_coverage(real, fake) == expected

    def test_of_points_in_a_row_can_be_counted_by_hand(self):
        """Reals at 0, 1, ..., 9, k = 1: balls of radius 1; a fake at 4.5 is in those of 4 and 5."""
        real = np.arange(10.0)[:, None]
        density, coverage = density_coverage(real, np.array([[4.5], [4.5]]), k=1)
        assert (density, coverage) == (2.0, 0.2)
        # The balls are open: a fake on 4 is in that of 4 alone.
        assert density_coverage(real, np.array([[4.0]]), k=1) == (1.0, 0.1)

    def test_does_not_depend_on_the_order(self):
        real, _ = two_sets(num_real=200, dim=64)
        fake = real[50:170]  # Copies: many are on the rim of a ball.
        expected = density_coverage(real, fake)
        rng = np.random.default_rng(1)
        for _ in range(5):
            assert density_coverage(rng.permutation(real), rng.permutation(fake)) == expected

    def test_needs_more_reals_than_neighbours(self):
        real, fake = two_sets()
        with pytest.raises(ValueError, match=r"more than 5 images .*; got 5"):
            density_coverage(real[:5], fake)
        assert density_coverage(real, fake[:1])[0] >= 0
        with pytest.raises(ValueError, match=r"\[90, 6\] and \[0, 6\]; .* at least 1 rows"):
            density_coverage(real, fake[:0])


ALL = {
    "kernel_distance": lambda x, y, **where: kernel_distance(x, y, num_subsets=3, **where),
    "rbf_mmd": rbf_mmd,
    "inception_score": lambda x, y, **where: inception_score(x),
    "nearest_neighbours": lambda x, y, **where: nearest_neighbours(x, y, 4, **where),
    "precision_recall": precision_recall,
    "density_coverage": density_coverage,
}


@pytest.mark.parametrize("function", ALL.values(), ids=ALL)
class TestInputs:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_of_equal_values_give_equal_results(self, function, dtype):
        """Arrays or tensors, float32 or its values in float64.

        Means of kernels of float32 are those of float64 but for their last digits; whatever counts
        and compares is equal.
        """
        real, fake = (x.astype(np.float32) for x in two_sets(shift=0.8))
        expected = function(real.astype(np.float64), fake.astype(np.float64), device="cpu")
        arrays = real.astype(dtype), fake.astype(dtype)
        found = function(*arrays)
        is_mean = function in (ALL["kernel_distance"], rbf_mmd)
        np.testing.assert_allclose(found, expected, rtol=1e-7 if is_mean else 0)
        np.testing.assert_array_equal(function(*map(torch.from_numpy, arrays)), found)

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_must_be_finite(self, function, value):
        real, fake = two_sets()
        real[-1, -1] = value
        with pytest.raises(NotFiniteError, match="90 vectors have values that are not finite"):
            function(real, fake)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_may_be_on_either_device(self, function, device):
        real, fake = map(torch.from_numpy, two_sets(shift=0.8))
        expected = function(real, fake)
        np.testing.assert_allclose(function(real, fake, device=device), expected, rtol=1e-9)
        moved = function(real.cuda(), fake.cuda(), device=device)
        np.testing.assert_allclose(moved, expected, rtol=1e-9)
