"""The Fréchet distance, statistics of outputs, references, metrics and score rows."""

import dataclasses
import json
import os
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import on_ranks

from metrics import reference_cache
from metrics.detectors import DETECTORS, DetectorOutput, PixelDetector, get_detector
from metrics.frechet import frechet_distance, frechet_distance_of_samples
from metrics.inception_score import inception_score
from metrics.manifold import density_coverage, precision_recall
from metrics.metric import METRICS, get_metric, get_metrics, needed_outputs
from metrics.mmd import kernel_distance, rbf_mmd
from metrics.reference import Reference, load_references, read_references, save_references
from metrics.reference_cache import (
    cache_path,
    compute_references,
    references_for,
    vector_subset,
)
from metrics.rows import compare_rows, differing_fields, read_rows
from metrics.score import score
from metrics.statistics import OutputMoments, OutputVectors

SHAPE = (1, 3, 3)
PIXELS = DetectorOutput("pixels")
INCEPTION = DetectorOutput("inception")
BOTH = ("moments", "vectors")


def numbered(images, size, start=0):
    """Batches of images with their indices."""
    indices = torch.arange(start, start + len(images))
    return list(zip(indices.split(size), images.split(size), strict=True))


def random_covariance(rng, dim, scale=1.0):
    factor = rng.standard_normal((dim, 2 * dim))
    return scale * factor @ factor.T / (2 * dim)


def random_images(seed, num, low=0, high=256, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(low, high, (num, *shape)).astype(np.uint8))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))


class TestFrechetDistance:
    def test_agrees_with_the_closed_form_for_diagonal_covariances(self):
        rng = np.random.default_rng(0)
        mu1, mu2 = rng.standard_normal((2, 7))
        std1, std2 = rng.uniform(0.1, 3, (2, 7))
        expected = np.sum((mu1 - mu2) ** 2) + np.sum((std1 - std2) ** 2)
        found = frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2))
        assert found == pytest.approx(expected, rel=1e-12)

    def test_agrees_with_the_closed_form_for_commuting_covariances(self):
        rng = np.random.default_rng(1)
        basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
        std1, std2 = rng.uniform(0.1, 3, (2, 6))
        sigma1, sigma2 = (basis * std1**2) @ basis.T, (basis * std2**2) @ basis.T
        found = frechet_distance(np.zeros(6), sigma1, np.zeros(6), sigma2)
        assert found == pytest.approx(np.sum((std1 - std2) ** 2), rel=1e-12)

    def test_agrees_with_sqrtm_for_general_covariances(self):
        rng = np.random.default_rng(2)
        mu1, mu2 = rng.standard_normal((2, 12))
        sigma1, sigma2 = random_covariance(rng, 12), random_covariance(rng, 12, 2.0)
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
        expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root.real)
        assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-10)
        assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-10)

    def test_of_a_distribution_from_itself_is_zero(self):
        rng = np.random.default_rng(3)
        mu, sigma = rng.standard_normal(20), random_covariance(rng, 20)
        assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-12

    @pytest.mark.parametrize(("num1", "num2"), [(9, 9), (9, 13), (13, 9), (9, 200), (200, 9)])
    def test_is_exact_for_fewer_samples_than_dimensions(self, num1, num2):
        rng = np.random.default_rng(4)
        x, y = rng.standard_normal((num1, 40)), rng.standard_normal((num2, 40)) + 0.1
        centred1 = (x - x.mean(0)) / np.sqrt(num1 - 1)
        centred2 = (y - y.mean(0)) / np.sqrt(num2 - 1)
        # The singular values of the product of the data matrices need no covariance at all.
        overlap = np.linalg.svd(centred1 @ centred2.T, compute_uv=False).sum()
        expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(centred1**2) + np.sum(centred2**2)
        found = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert found == pytest.approx(expected - 2 * overlap, rel=1e-12)

    def test_of_disjoint_subspaces_and_of_points_has_no_overlap_term(self):
        sigma1, sigma2 = np.diag([4.0, 0.0]), np.diag([0.0, 9.0])
        zero, mu = np.zeros((2, 2)), np.zeros(2)
        assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(13)
        assert frechet_distance(mu, zero, mu + 1, sigma2) == pytest.approx(11)
        assert frechet_distance(mu, sigma1, mu + 1, zero) == pytest.approx(6)

    @pytest.mark.parametrize(("num1", "num2"), [(9, 13), (13, 300), (200, 300), (2, 2)])
    def test_of_samples_is_that_of_their_moments(self, num1, num2):
        rng = np.random.default_rng(5)
        x, y = rng.standard_normal((num1, 40)), 2 * rng.standard_normal((num2, 40)) + 0.1
        expected = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert frechet_distance_of_samples(x, y) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance_of_samples(x, x) == pytest.approx(0, abs=1e-10)
        with pytest.raises(ValueError, match=r"\[1, 40\] and .* at least 2 rows"):
            frechet_distance_of_samples(x[:1], y)
        x[0, 0] = np.nan
        for pair in ((x, y), (y, x)):
            with pytest.raises(ValueError, match=f"{num1} vectors have values that are not finite"):
                frechet_distance_of_samples(*pair)

    def test_refuses_mismatched_shapes_values_that_are_not_finite_and_non_covariances(self):
        mu, sigma = np.zeros(3), np.eye(3)
        with pytest.raises(ValueError, match="3 and 2 dimensions"):
            frechet_distance(mu, sigma, np.zeros(2), np.eye(2))
        with pytest.raises(ValueError, match=r"second distribution .* \[3, 2\]"):
            frechet_distance(mu, sigma, mu, np.ones((3, 2)))
        with pytest.raises(ValueError, match="first distribution has values that are not finite"):
            frechet_distance(mu * np.nan, sigma, mu, sigma)
        with pytest.raises(ValueError, match="Not a covariance"):
            frechet_distance(mu, -sigma, mu, sigma)


class TestOutputMoments:
    def gather(self, vectors, splits):
        statistics = OutputMoments(vectors.shape[1])
        for part in torch.from_numpy(vectors).split(splits):
            statistics.append(part)
        return statistics

    def test_agree_with_numpy(self):
        vectors = np.random.default_rng(0).standard_normal((57, 5)) @ np.diag([1, 2, 3, 4, 5.0])
        statistics = self.gather(vectors, [10, 40, 7])
        assert statistics.count == 57
        np.testing.assert_allclose(statistics.mean(), vectors.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance(), np.cov(vectors.T), rtol=1e-12)

    def test_do_not_lose_a_small_spread_beside_a_large_mean(self):
        vectors = 1e6 + 1e-3 * np.random.default_rng(1).standard_normal((300, 3))
        expected = np.cov(vectors.T - 1e6)
        found = self.gather(vectors, [1, 99, 200]).covariance()
        np.testing.assert_allclose(np.diag(found), np.diag(expected), rtol=1e-5)

    def test_of_a_constant_value_have_no_variance(self):
        vectors = np.full((100, 2), np.float32(0.1), np.float32)
        np.testing.assert_allclose(self.gather(vectors, 7).covariance(), 0, atol=1e-30)

    def test_do_not_depend_on_the_batch_size(self):
        rng = np.random.default_rng(2)
        vectors = (rng.random((200, 24)) ** 2).astype(np.float32)
        other = random_covariance(rng, 24, 0.1)
        distances = []
        for size in (1, 7, 64, 200):
            statistics = self.gather(vectors, size)
            distances.append(
                frechet_distance(statistics.mean(), statistics.covariance(), np.zeros(24), other)
            )
        np.testing.assert_allclose(distances, distances[0], rtol=1e-10)

    def test_merge_into_those_of_all_images(self):
        vectors = np.random.default_rng(3).standard_normal((90, 4)) + np.arange(90)[:, None] / 10
        whole, first = self.gather(vectors, 90), self.gather(vectors[:20], 20)
        second, empty = self.gather(vectors[20:], 11), OutputMoments(4)
        for merged in (first.merged(second), empty.merged(whole), whole.merged(empty)):
            assert merged.count == 90
            np.testing.assert_allclose(merged.mean(), whole.mean(), rtol=1e-12)
            np.testing.assert_allclose(merged.covariance(), whole.covariance(), rtol=1e-12)

    def test_ignore_empty_batches_and_refuse_other_widths(self):
        statistics = OutputMoments(4)
        statistics.append(torch.zeros(0, 4))
        assert statistics.count == 0
        with pytest.raises(ValueError, match=r"\[2, 3\]; expected \[N, 4\]"):
            statistics.append(torch.zeros(2, 3))

    def test_need_images_and_finite_outputs(self):
        statistics = OutputMoments(2)
        with pytest.raises(ValueError, match="no images"):
            statistics.mean()
        statistics.append(torch.ones(1, 2))
        with pytest.raises(ValueError, match="at least 2 images; got 1"):
            statistics.covariance()
        statistics.append(torch.full([1, 2], torch.nan))
        with pytest.raises(ValueError, match="not finite"):
            statistics.mean()


class TestDetectors:
    def test_pixels_are_values_from_0_to_1_in_order(self):
        images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(1, 1, 2, 2)
        detector = get_detector("pixels", "cpu", image_shape=(1, 2, 2))
        assert detector.outputs == {"features": 4}
        pixels = detector(images)["features"]
        assert pixels.dtype == torch.float32
        np.testing.assert_allclose(pixels, [[0, 0.2, 1, 0.4]], rtol=1e-6)

    def test_pixels_of_another_shape_have_another_hash_and_are_refused(self):
        detector = PixelDetector((3, 4, 4))
        assert detector.hash != PixelDetector((1, 4, 4)).hash
        assert detector.hash == PixelDetector((3, 4, 4)).hash
        with pytest.raises(ValueError, match=r"\[1, 4, 4\]; expected uint8 of shape \[3, 4, 4\]"):
            detector(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"float32 .* expected uint8"):
            detector(torch.zeros(2, 3, 4, 4))

    def test_an_unknown_detector_suggests_the_nearest(self):
        with pytest.raises(ValueError, match="Did you mean 'inception'"):
            get_detector("inceptoin", "cpu")
        with pytest.raises(ValueError, match="no weights"):
            get_detector("pixels", "cpu", image_shape=SHAPE, location="file.pth")


class TestOutputVectors:
    def test_come_in_the_order_of_the_images_whatever_the_order_of_the_batches(self):
        vectors = torch.randn(20, 3)
        order = torch.randperm(20)
        found = OutputVectors(3)
        for part in order.split(6):
            found.append(part, vectors[part])
        found.gather()
        np.testing.assert_array_equal(found.array, vectors)
        np.testing.assert_array_equal(found.indices, np.arange(20))

    def test_are_kept_only_where_asked(self):
        keep = np.arange(20) % 3 == 0
        found = OutputVectors(1, keep)
        for indices in torch.arange(20).split(6):
            found.append(indices, indices[:, None].float())
        found.gather()
        np.testing.assert_array_equal(found.array[:, 0], np.flatnonzero(keep))

    def test_must_be_finite_and_unique(self):
        found = OutputVectors(1)
        found.append(torch.tensor([0]), torch.tensor([[torch.nan]]))
        with pytest.raises(ValueError, match="not finite"):
            found.gather()
        found = OutputVectors(1)
        found.append(torch.tensor([0, 0]), torch.ones(2, 1))
        with pytest.raises(AssertionError, match="twice"):
            found.gather()


class TestReferences:
    def make(self, output=PIXELS, **kwargs):
        rng = np.random.default_rng(0)
        fields = dict(
            output=output,
            mu=rng.standard_normal(9),
            sigma=random_covariance(rng, 9),
            count=100,
            detector_hash=PixelDetector(SHAPE).hash,
            dataset_hash="d" * 64,
        )
        return Reference(**{**fields, **kwargs})

    def compute(self, images, needs, size=8, **kwargs):
        detectors = {"pixels": PixelDetector(SHAPE)}
        kwargs = {"num_images": len(images), **kwargs}
        return compute_references(needs, detectors, numbered(images, size), "cpu", **kwargs)

    def test_survive_a_round_trip_through_a_file(self, tmp_path):
        path = tmp_path / "folder" / "reference.npz"
        vectors = np.random.default_rng(1).standard_normal((100, 9)).astype(np.float32)
        labels = np.arange(100) % 3
        known = dict(class_names=("a", "b", "c"))
        written = {
            PIXELS: self.make(vectors=vectors, num_vectors=100, labels=labels, **known),
            INCEPTION: self.make(INCEPTION, **known),
            DetectorOutput("inception", "spatial"): self.make(
                DetectorOutput("inception", "spatial"), **known
            ),
        }
        save_references(path, written)
        found = read_references(path)
        assert found.keys() == written.keys()
        for output, reference in written.items():
            for name in ("mu", "sigma", "vectors", "labels"):
                value, expected = getattr(found[output], name), getattr(reference, name)
                assert (value is None) == (expected is None)
                if expected is not None:
                    np.testing.assert_array_equal(value, expected)
            for name in ("count", "detector_hash", "dataset_hash", "hash", "class_names"):
                assert getattr(found[output], name) == getattr(reference, name)
            assert found[output].source == str(path)
        assert found[PIXELS].knows == {"moments", "vectors"}
        assert os.listdir(path.parent) == ["reference.npz"]
        assert found[PIXELS].check_detector(PixelDetector(SHAPE)) == []
        # Programs of EDM and ADM find their arrays.
        with np.load(path) as file:
            assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)

    def test_of_edm_and_adm_load_without_count_and_detector(self, tmp_path):
        path = tmp_path / "cifar10-32x32.npz"
        written = self.make()
        np.savez(path, mu=written.mu, sigma=written.sigma)
        found = load_references(str(path))
        assert found.keys() == {INCEPTION}
        np.testing.assert_array_equal(found[INCEPTION].sigma, written.sigma)
        assert found[INCEPTION].count is None
        assert found[INCEPTION].detector_hash is None
        detector = types.SimpleNamespace(outputs={"features": 9})
        (warning,) = found[INCEPTION].check_detector(detector)
        assert "does not record which detector" in warning

        path = tmp_path / "VIRTUAL_imagenet64_labeled.npz"
        images = np.zeros((4, 8, 8, 3), np.uint8)
        arrays = dict(mu_s=written.mu[:5], sigma_s=written.sigma[:5, :5], arr_0=images)
        np.savez(path, mu=written.mu, sigma=written.sigma, **arrays)
        found = read_references(path)
        assert found.keys() == {INCEPTION, DetectorOutput("inception", "spatial")}
        np.testing.assert_array_equal(
            found[DetectorOutput("inception", "spatial")].mu, written.mu[:5]
        )

    def test_of_edm2_load_from_a_pickle_as_data(self, tmp_path):
        path = tmp_path / "img512.pkl"
        written = self.make()
        moments = dict(mu=written.mu, sigma=written.sigma)
        content = dict(num_images=1281167, fid=moments, fd_dinov2=dict(moments, mu=-written.mu))
        path.write_bytes(pickle.dumps(content))
        found = read_references(path)
        assert found.keys() == {INCEPTION, DetectorOutput("dinov2")}
        np.testing.assert_array_equal(found[INCEPTION].sigma, written.sigma)
        np.testing.assert_array_equal(found[DetectorOutput("dinov2")].mu, -written.mu)
        assert found[INCEPTION].count == 1281167
        path.write_bytes(pickle.dumps(dict(other=moments)))
        with pytest.raises(ValueError, match=r"img512\.pkl: .*neither 'fid' nor 'fd_dinov2'"):
            read_references(path)
        mark = tmp_path / "executed"
        path.write_bytes(pickle.dumps(dict(content, extra=Executes(mark))))
        with pytest.raises(ValueError, match=r"img512\.pkl: .*would run"):
            read_references(path)
        assert not mark.exists()

    def test_are_identified_by_images_and_detector_or_else_by_their_numbers(self):
        reference = self.make()
        assert reference.hash == self.make(mu=reference.mu + 1e-15).hash
        assert reference.hash != self.make(dataset_hash="e" * 64).hash
        assert reference.hash != self.make(detector_hash="e" * 64).hash
        assert reference.hash != self.make(DetectorOutput("pixels", "other")).hash
        foreign = self.make(dataset_hash=None)
        assert foreign.hash != self.make(dataset_hash=None, mu=reference.mu + 1).hash

    def test_of_another_detector_are_refused(self):
        with pytest.raises(ValueError, match=r"another detector 'pixels' \(ffffffffffff\)"):
            self.make(detector_hash="f" * 64).check_detector(PixelDetector(SHAPE))
        with pytest.raises(ValueError, match=r"have 9 values for pixels/features, .* has 16"):
            self.make(detector_hash=None).check_detector(PixelDetector((1, 4, 4)))
        wide = self.make(vectors=np.zeros((5, 16), np.float32), num_vectors=5)
        with pytest.raises(ValueError, match=r"have 16 values for pixels/features, .* has 9"):
            wide.check_detector(PixelDetector(SHAPE))

    def test_in_unusable_files_are_refused_by_name(self, tmp_path):
        path = tmp_path / "reference.npz"
        with pytest.raises(ValueError, match=r"reference\.npz: no such file"):
            read_references(path)
        good = self.make()
        save_references(path, {PIXELS: good})
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"reference\.npz: damaged"):
            read_references(path)
        np.savez(path, mu=good.mu)
        with pytest.raises(ValueError, match=r"covariance of shape None"):
            read_references(path)
        np.savez(path, mean=good.mu)
        with pytest.raises(ValueError, match="no arrays 'mu' and 'sigma'"):
            read_references(path)
        np.savez(path, mu=good.mu, sigma=good.sigma[:4])
        with pytest.raises(ValueError, match=r"covariance of shape \[4, 9\]"):
            read_references(path)
        np.savez(path, mu=good.mu * np.nan, sigma=good.sigma)
        with pytest.raises(ValueError, match="not finite"):
            read_references(path)

    def test_with_labels_that_do_not_fit_are_refused(self, tmp_path):
        path = tmp_path / "reference.npz"
        vectors = np.zeros((5, 9), np.float32)
        four, letters = "has labels of shape .* for 5 vectors", "labels of .* has the type <U1"
        for labels, message in ((np.zeros(4, int), four), (np.array(list("abcde")), letters)):
            save_references(
                path, {PIXELS: self.make(vectors=vectors, num_vectors=5, labels=labels)}
            )
            with pytest.raises(ValueError, match=message):
                read_references(path)
        for wrong in (dict(count=True), dict(dataset_hash=7)):
            save_references(path, {PIXELS: self.make(**wrong)})
            with pytest.raises(ValueError, match=r"reference\.npz: damaged.* is (True|7)"):
                read_references(path)

    def test_need_two_images_and_outputs_whose_covariance_fits_in_memory(self):
        with pytest.raises(ValueError, match="data: has 1 image; a reference needs at least 2"):
            self.compute(random_images(0, 1), {PIXELS: BOTH}, source="data")
        with pytest.raises(ValueError, match=r"12,288 values would take 1.2 GB.* kid_pixels"):
            OutputMoments(64 * 64 * 3)
        OutputMoments(32 * 32 * 3)

    def test_in_files_that_hold_objects_are_refused_unexecuted(self, tmp_path):
        path, mark = tmp_path / "reference.npz", tmp_path / "executed"
        np.savez(path, mu=np.array([Executes(mark)], dtype=object), sigma=np.eye(1))
        np.load(path, allow_pickle=True)["mu"]
        assert mark.exists()
        mark.unlink()
        with pytest.raises(ValueError, match="damaged, or no"):
            read_references(path)
        assert not mark.exists()

    def test_are_computed_from_batches_and_count_the_images(self):
        images = random_images(0, 50)
        found = self.compute(images, {PIXELS: BOTH})[PIXELS]
        values = images.flatten(1).double().numpy() / 255
        np.testing.assert_allclose(found.sigma, np.cov(values.T), rtol=1e-5)
        np.testing.assert_allclose(found.vectors, values, rtol=1e-6)
        assert (found.count, found.num_vectors) == (50, 50)
        for need in BOTH:
            with pytest.raises(ValueError, match=r"gave 50 images .* expected 51"):
                self.compute(images, {PIXELS: (need,)}, num_images=51)

    def test_keep_the_vectors_of_a_fixed_choice_of_many_images(self, monkeypatch):
        monkeypatch.setattr(reference_cache, "MAX_VECTORS", 20)
        images = random_images(0, 50)
        found = self.compute(images, {PIXELS: BOTH})[PIXELS]
        keep = vector_subset(50)
        assert keep.sum() == 20
        assert not keep[:20].all()
        expected = images.flatten(1).numpy()[keep] / np.float32(255)
        np.testing.assert_allclose(found.vectors, expected, rtol=1e-6)
        assert (found.count, found.num_vectors) == (50, 20)
        assert vector_subset(20).all()

    def cached(self, batches, name="a", needs=None, detector=None, **kwargs):
        detectors = {"pixels": detector or PixelDetector(SHAPE)}
        needs = needs or {PIXELS: BOTH}
        return references_for(
            needs, detectors, batches, name * 64, "cpu", **{"num_images": 20, **kwargs}
        )[PIXELS]

    def test_are_cached_by_content_and_detector(self):
        images = random_images(0, 20)
        first = self.cached(lambda indices: numbered(images, 8), source="data")

        def untouchable(indices):
            raise AssertionError("the images were read again")

        second = self.cached(untouchable, source="data")
        np.testing.assert_array_equal(second.sigma, first.sigma)
        np.testing.assert_array_equal(second.vectors, first.vectors)
        assert second.hash == first.hash
        assert second.source == "data"
        assert self.cached(untouchable, needs={PIXELS: ("moments",)}).vectors is None
        with pytest.raises(AssertionError, match="read again"):
            self.cached(untouchable, "b")
        with pytest.raises(AssertionError, match="read again"):
            self.cached(untouchable, detector=PixelDetector((3, 1, 3)))

    def test_of_vectors_alone_need_no_other_images(self, monkeypatch):
        monkeypatch.setattr(reference_cache, "MAX_VECTORS", 7)
        images = random_images(0, 20)
        asked = []

        def batches(indices):
            asked.extend(indices)
            return [(torch.tensor(indices), images[indices])]

        found = self.cached(batches, needs={PIXELS: ("vectors",)})
        assert asked == np.flatnonzero(vector_subset(20)).tolist()
        expected = images.flatten(1).numpy()[asked] / np.float32(255)
        np.testing.assert_allclose(found.vectors, expected, rtol=1e-6)
        assert (found.count, found.num_vectors) == (20, 7)

    def test_are_completed_when_more_is_asked_for(self):
        images = random_images(0, 20)
        only = self.cached(lambda indices: numbered(images, 8), needs={PIXELS: ("moments",)})
        assert only.knows == {"moments"}
        found = self.cached(lambda indices: numbered(images, 8))
        assert found.knows == {"moments", "vectors"}
        np.testing.assert_array_equal(found.sigma, only.sigma)

    @pytest.mark.parametrize("kind", BOTH)
    def test_in_a_corrupt_cache_are_reported_and_made_anew(self, kind, capsys):
        images, detector = random_images(0, 20), PixelDetector(SHAPE)
        first = self.cached(lambda indices: numbered(images, 8))
        path = cache_path("a" * 64, PIXELS, detector.hash, kind)
        path.write_bytes(b"not a zip file")
        second = self.cached(lambda indices: numbered(images, 8))
        np.testing.assert_array_equal(second.sigma, first.sigma)
        np.testing.assert_array_equal(second.vectors, first.vectors)
        assert str(path) in capsys.readouterr().out
        assert read_references(path)[PIXELS].count == 20

    def test_of_other_images_under_the_same_cache_name_are_made_anew(self, capsys):
        images, detector = random_images(0, 20), PixelDetector(SHAPE)
        path = cache_path("a" * 64, PIXELS, detector.hash, "moments")
        save_references(path, {PIXELS: self.make(count=7)})
        assert self.cached(lambda indices: numbered(images, 8)).count == 20
        assert "made from other images" in capsys.readouterr().out


class Executes:
    """An object whose unpickling creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


class CountingDetector(PixelDetector):
    """The pixel detector under another name, with a count of the images it saw."""

    name = "counting"

    def __init__(self):
        super().__init__(SHAPE)
        self.num_seen = 0

    def __call__(self, images, outputs=("features",)):
        self.num_seen += len(images)
        return super().__call__(images, outputs)


def spec(name, num_images, detector="pixels", like="fd_pixels", **kwargs):
    fields = dict(output=DetectorOutput(detector), num_images=num_images, at_most_dataset=False)
    return dataclasses.replace(METRICS[like], name=name, **{**fields, **kwargs})


class TestScore:
    detector = PixelDetector(SHAPE)
    reals = random_images(0, 80)
    fakes = random_images(1, 60, 20, 200)

    def reference(self, **kwargs):
        made = compute_references(
            {PIXELS: BOTH},
            {"pixels": self.detector},
            numbered(self.reals, 80),
            "cpu",
            num_images=80,
            source="data",
            dataset_hash="a",
        )[PIXELS]
        return dataclasses.replace(made, **kwargs)

    def score(self, metrics, *, batch=7, images=None, reference=None, **kwargs):
        images = self.fakes if images is None else images
        return score(
            metrics,
            lambda i: numbered(images[i.start : i.stop], batch, i.start),
            {PIXELS: reference or self.reference()},
            {"pixels": self.detector},
            "cpu",
            **kwargs,
        )

    def test_equals_an_independent_computation(self):
        (row,) = self.score([spec("fd", 60)])
        x = self.fakes.flatten(1).double().numpy() / 255
        y = self.reals.flatten(1).double().numpy() / 255
        root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
        expected = np.sum((x.mean(0) - y.mean(0)) ** 2)
        expected += np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
        assert row["value"] == pytest.approx(expected, rel=1e-6)

    def test_gives_every_metric_its_outputs(self):
        metrics = [spec(name, 60, like=name) for name in ("kid_pixels", "pr_pixels", "dc_pixels")]
        metrics.append(spec("is", 60, like="is50k"))
        metrics.append(spec("cmmd", 60, like="cmmd50k_full"))
        x = self.fakes.flatten(1).float() / 255
        y = self.reals.flatten(1).float() / 255
        rows = self.score(metrics)
        expected = [
            kernel_distance(y, x),
            precision_recall(y, x),
            density_coverage(y, x),
            inception_score(x),
            (rbf_mmd(y, x),),
        ]
        for row, values in zip(rows, expected, strict=True):
            assert list(row["values"].values()) == pytest.approx(list(values), rel=1e-9)
            assert row["value"] == next(iter(row["values"].values()))
        assert [list(row["values"]) for row in rows] == [
            ["kid", "kid_std"],
            ["precision", "recall"],
            ["density", "coverage"],
            ["is", "is_std"],
            ["cmmd"],
        ]
        assert "reference_hash" not in rows[3]
        assert rows[0]["reference_vectors"] == 80

    def test_rows_say_what_was_measured_against_what(self):
        (row,) = self.score([spec("fd", 60)])
        assert json.loads(json.dumps(row)) == row
        assert row["metric"] == "fd"
        assert row["num_images"] == 60
        assert row["reference_count"] == 80
        assert row["reference"] == "data"
        assert row["detector"] == "pixels/features"
        assert row["detector_hash"] == self.detector.hash
        assert row["preprocessing"] == self.detector.preprocessing
        assert row["detector_precision"] == "float32"
        assert len(row["reference_hash"]) == 64
        assert row["seconds"] >= 0
        assert row["warnings"] == []

    @pytest.mark.parametrize("batch", [1, 13, 60])
    @pytest.mark.parametrize("like", ["fd_pixels", "kid_pixels", "pr_pixels", "dc_pixels"])
    def test_does_not_depend_on_the_batch_size(self, batch, like):
        metric = spec("any", 60, like=like)
        (expected,), (found,) = self.score([metric]), self.score([metric], batch=batch)
        assert found["values"] == pytest.approx(expected["values"], rel=1e-10)

    @pytest.mark.parametrize("like", ["fd_pixels", "kid_pixels", "is50k"])
    def test_does_not_depend_on_the_order_in_which_images_come(self, like):
        metric = spec("any", 60, like=like, output=PIXELS)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
        (expected,) = self.score([metric])
        (found,) = score(
            [metric],
            lambda indices: [(part, self.fakes[part]) for part in order.split(7)],
            {PIXELS: self.reference()},
            {"pixels": self.detector},
            "cpu",
        )
        assert found["values"] == pytest.approx(expected["values"], rel=1e-10)

    def test_of_several_metrics_sees_each_image_once_and_equals_each_alone(self):
        counting = CountingDetector()
        reference = self.reference()
        asked = []

        def generate(indices):
            asked.extend(indices)
            return numbered(self.fakes[indices.start : indices.stop], 7, indices.start)

        metrics = [
            spec("b", 60),
            spec("a", 25),
            spec("c", 40, "counting"),
            spec("d", 50, "counting", like="kid_pixels"),
        ]
        rows = score(
            metrics,
            generate,
            {PIXELS: reference, DetectorOutput("counting"): reference},
            dict(pixels=self.detector, counting=counting),
            "cpu",
        )
        assert asked == list(range(60))
        assert counting.num_seen == 50
        assert [row["metric"] for row in rows] == ["b", "a", "c", "d"]
        assert [row["num_images"] for row in rows] == [60, 25, 40, 50]
        for metric, row in zip(metrics, rows, strict=True):
            (alone,) = self.score([dataclasses.replace(metric, output=PIXELS)])
            assert row["values"] == pytest.approx(alone["values"], rel=1e-10)

    def test_with_few_images_is_finite_and_warns_of_the_low_count(self):
        (row,) = self.score([spec("fd", 9)])
        assert np.isfinite(row["value"])
        assert "low count: 9 images for 9 dimensions" in row["warnings"][0]
        (row,) = self.score([spec("fd", 10)])
        assert row["warnings"] == []

    def test_of_subsets_larger_than_the_sets_warns_of_the_low_count(self):
        (row,) = self.score([spec("kid", 60, like="kid_pixels")])
        assert "low count: subsets of 60 images instead of 1,000" in row["warnings"][0]

    def test_takes_moments_and_vectors_of_other_images_each_from_its_own(self):
        """As with ADM's files: moments of all images, vectors of a sample."""
        sample = self.reference(mu=None, sigma=None, count=30, dataset_hash="sample")
        reference = self.reference(vectors=None, num_vectors=0, detector_hash=None, sample=sample)
        metrics = [spec("fd", 60), spec("pr", 60, like="pr_pixels")]
        moments_row, vectors_row = self.score(metrics, reference=reference)
        (alone,) = self.score(
            [spec("fd", 60)], reference=dataclasses.replace(reference, sample=None)
        )
        assert moments_row["reference_hash"] == alone["reference_hash"]
        assert vectors_row["reference_hash"] == sample.hash
        assert (moments_row["reference_count"], vectors_row["reference_count"]) == (80, 30)
        assert "does not record which detector" in moments_row["warnings"][0]
        assert vectors_row["warnings"] == []

    def test_names_metric_and_reference_where_a_computation_fails(self):
        broken = self.reference(sigma=-np.eye(9))
        with pytest.raises(ValueError, match=r"fd against data: Not a covariance"):
            self.score([spec("fd", 60)], reference=broken)

    def test_of_the_data_itself_is_zero(self):
        (row,) = self.score([spec("fd", 80)], images=self.reals)
        assert row["value"] < 1e-12

    def test_counts_at_most_the_dataset_where_the_metric_says_so(self):
        rows = self.score([spec("fd", 100, at_most_dataset=True)], images=random_images(1, 80))
        assert rows[0]["num_images"] == 80
        assert self.score([spec("fd", 100)], num_images=33)[0]["num_images"] == 33

    def test_gives_the_numbers_of_each_class(self):
        reals, fakes = np.arange(80) % 4, np.arange(60) % 3
        metrics = [spec("fd", 60), spec("pr", 60, like="pr_pixels")]
        rows = self.score(
            metrics,
            reference=self.reference(labels=reals),
            labels=lambda count: fakes[:count],
            class_names=["ant", "bee", "cat", "dog"],
        )
        x = self.fakes.flatten(1).double() / 255
        y = self.reals.flatten(1).double() / 255
        for label, name in enumerate(["ant", "bee", "cat"]):
            mine, theirs = x[fakes == label].numpy(), y[reals == label].numpy()
            expected = frechet_distance(
                mine.mean(0), np.cov(mine.T), theirs.mean(0), np.cov(theirs.T)
            )
            found = rows[0]["per_class"][name]
            assert found["fd_pixels"] == pytest.approx(expected, rel=1e-5)
            assert (found["num_images"], found["reference_count"]) == (20, 20)
            pair = precision_recall(
                torch.from_numpy(theirs).float(), torch.from_numpy(mine).float()
            )
            found = rows[1]["per_class"][name]
            assert (found["precision"], found["recall"]) == pytest.approx(pair)
        assert "dog" not in rows[0]["per_class"]
        (row,) = self.score([spec("fd", 60)], labels=lambda count: fakes[:count])
        assert "per_class" not in row

    def test_keeps_classes_of_one_name_apart(self):
        (row,) = self.score(
            [spec("fd", 60)],
            reference=self.reference(labels=np.arange(80) % 2),
            labels=lambda count: np.arange(count) % 2,
            class_names=["crane", "crane"],
        )
        assert list(row["per_class"]) == ["crane (0)", "crane (1)"]

    def test_leaves_out_classes_with_too_few_images(self):
        labels = np.r_[np.zeros(57, int), np.ones(3, int)]
        (row,) = self.score(
            [spec("pr", 60, like="pr_pixels")],
            reference=self.reference(labels=np.arange(80) % 2),
            labels=lambda count: labels[:count],
        )
        assert list(row["per_class"]) == ["0"]

    def test_refuses_too_few_images_and_a_reference_of_another_detector(self):
        with pytest.raises(ValueError, match="fd: needs 100 images, but got 60"):
            self.score([spec("fd", 100)])
        with pytest.raises(ValueError, match="pr: needs 100 images, but got 60"):
            self.score([spec("pr", 100, like="pr_pixels")])
        with pytest.raises(ValueError, match="fd: needs at least 2 images; got 1"):
            self.score([spec("fd", 60)], num_images=1)
        with pytest.raises(ValueError, match="is: needs at least 10 images; got 9"):
            self.score([spec("is", 60, like="is50k")], num_images=9)
        with pytest.raises(ValueError, match="at least 4 real images; data has 3"):
            self.score([spec("pr", 60, like="pr_pixels")], reference=self.reference(num_vectors=3))
        other = self.reference(detector_hash="f" * 64)
        with pytest.raises(ValueError, match="made by another detector 'pixels'"):
            self.score([spec("fd", 60)], reference=other)

    def test_refuses_a_reference_that_lacks_what_the_metric_needs(self):
        moments_only = self.reference(vectors=None, num_vectors=0)
        with pytest.raises(ValueError, match=r"kid: data holds no vectors of pixels/features"):
            self.score([spec("kid", 60, like="kid_pixels")], reference=moments_only)
        vectors_only = self.reference(mu=None, sigma=None)
        with pytest.raises(ValueError, match=r"fid\.py ref --metrics=fd`"):
            self.score([spec("fd", 60)], reference=vectors_only)

    def test_does_not_run_the_generator_in_inference_mode(self):
        def generate(indices):
            assert not torch.is_inference_mode_enabled()
            yield from numbered(random_images(1, len(indices)), 9)

        references = {PIXELS: self.reference()}
        score([spec("fd", 9)], generate, references, {"pixels": self.detector}, "cpu")


class TestMetricNames:
    def test_stand_for_the_documented_protocols(self):
        reference = Reference(output=PIXELS, count=1797)
        for name, output, count in [
            ("fid10k_full", "inception/features", 10_000),
            ("fid50k_full", "inception/features", 50_000),
            ("sfid50k_full", "inception/spatial", 50_000),
            ("kid50k_full", "inception/features", 50_000),
            ("is50k", "inception/logits", 50_000),
            ("pr50k3_full", "inception/features", 50_000),
            ("dc50k5_full", "inception/features", 50_000),
            ("fd_dinov2_50k_full", "dinov2/features", 50_000),
            ("cmmd30k_full", "clip/features", 30_000),
            ("fd_pixels", "pixels/features", 1797),
        ]:
            metric = get_metric(name)
            assert (str(metric.output), metric.image_count(reference)) == (output, count)
        assert get_metric("fd_pixels").image_count(Reference(output=PIXELS, count=50_000)) == 2_000
        assert get_metric("fd_pixels").image_count(Reference(output=PIXELS)) == 2_000
        assert not get_metric("is50k").has_reference

    def test_refer_to_registered_detectors_and_name_themselves(self):
        for name, metric in METRICS.items():
            assert metric.name == name
            assert metric.output.detector in DETECTORS

    def test_say_what_is_to_be_kept_of_each_output_once(self):
        metrics = get_metrics(["fid10k_full", "kid50k_full", "fid50k_full", "is50k"])
        assert needed_outputs(metrics) == {
            INCEPTION: ("moments", "vectors"),
            DetectorOutput("inception", "logits"): ("vectors",),
        }
        assert needed_outputs(metrics, of_reference=True) == {INCEPTION: ("moments", "vectors")}
        fid = get_metrics(["fid50k_full"])
        assert needed_outputs(fid) == {INCEPTION: ("moments",)}
        assert needed_outputs(fid, per_class=True) == {INCEPTION: ("moments", "vectors")}

    def test_misspelled_suggest_the_nearest(self):
        with pytest.raises(ValueError, match="Did you mean 'fid50k_full'"):
            get_metric("fid50kfull")

    def test_given_twice_are_computed_once(self):
        names = ["fd_pixels", "fid10k_full", "fd_pixels"]
        assert [metric.name for metric in get_metrics(names)] == ["fd_pixels", "fid10k_full"]


class TestRows:
    row = types.MappingProxyType(
        dict(
            metric="fid50k_full",
            value=2.25,
            num_images=50_000,
            detector_hash="a" * 64,
            sampling=dict(sampler="heun", steps=18),
            seconds=1.0,
            warnings=[],
        )
    )

    def test_with_the_same_protocol_differ_in_no_field(self):
        other = dict(self.row, value=3.0, seconds=2.0, kimg=7.0)
        assert differing_fields([self.row, other]) == []
        table = compare_rows([self.row, dict(other, packages={"torch": "9"})])
        assert "2.25" in table
        assert "sampling.steps=18" in table
        assert "not comparable" not in table

    def test_with_another_protocol_are_marked(self):
        other = dict(self.row, sampling=dict(sampler="heun", steps=32), num_images=10_000)
        del other["detector_hash"]
        with pytest.raises(
            ValueError, match=r"fid50k_full: .*num_images \(50000 \| 10000\)"
        ) as caught:
            compare_rows([self.row, other])
        assert "sampling.steps (18 | 32)" in str(caught.value)
        assert "detector_hash (aaaaaaaaaaaa | unknown)" in str(caught.value)
        assert "sampling.sampler" not in str(caught.value)
        table = compare_rows([self.row, other], anyway=True)
        expected = ["num_images", "detector_hash", "sampling.steps"]
        assert differing_fields([self.row, other]) == expected
        assert all(f"*{name}" in table for name in expected)
        assert "*sampling.sampler" not in table
        assert "not comparable: the rows differ in num_images" in table

    def test_of_several_metrics_have_a_table_each(self):
        other = dict(self.row, metric="fd_pixels", num_images=1797, warnings=["low count: few"])
        table = compare_rows([self.row, other])
        assert "not comparable" not in table
        assert "fd_pixels\n" in table
        assert "low count: few" in table

    def test_with_several_values_show_them_all(self):
        band = dict(recall=dict(mean=2.5, std=0.25, min=2.25, max=2.75), seeds=["0-1", "2-3"])
        row = dict(self.row, values=dict(precision=0.5, recall=0.25), noise_band=band)
        heading, line = compare_rows([row]).splitlines()[1:3]
        assert heading.split() == [
            "values.precision",
            "values.recall",
            "noise_band.recall.mean",
            "noise_band.recall.std",
            "noise_band.recall.min",
        ]
        assert line.split() == ["0.5", "0.25", "2.5", "0.25", "2.25"]

    def test_with_a_warning_in_words_of_another_program_show_it(self):
        assert "odd: text" in compare_rows([dict(self.row, warnings="odd: text")])

    def test_are_read_with_file_and_line(self, tmp_path):
        path = tmp_path / "metric-fid50k_full.jsonl"
        path.write_text(json.dumps(dict(self.row)) + "\n\n" + json.dumps(dict(self.row)) + "\n")
        assert [row["source"] for row in read_rows(path)] == [f"{path}:1", f"{path}:3"]
        path.write_text(json.dumps(dict(self.row)) + "\n" + json.dumps(dict(self.row))[:20])
        with pytest.raises(ValueError, match=r"jsonl:2: not a score row"):
            read_rows(path)
        path.write_text('{"metric": "x"}\n')
        with pytest.raises(ValueError, match=r"jsonl:1: not a score row"):
            read_rows(path)
        with pytest.raises(ValueError, match="no such file"):
            read_rows(tmp_path / "absent.jsonl")
        path.write_text("\n")
        with pytest.raises(ValueError, match=r"jsonl: holds no score rows"):
            read_rows(path)


TWO_PROCESSES = """
import dataclasses, json, sys
from pathlib import Path
import numpy as np
import torch
from metrics.detectors import DetectorOutput, PixelDetector
from metrics.metric import METRICS
from metrics.score import score
from metrics.reference import load_references
from metrics.reference_cache import references_for
from torch_utils import distributed

folder = Path(sys.argv[1])
device = distributed.init()
rank = distributed.rank()
reals, fakes = (torch.from_numpy(array) for array in np.load(folder / "images.npz").values())
detector = PixelDetector(tuple(reals.shape[1:]))
detectors = {"pixels": detector}


def share(images, num_first, start=0):
    indices = torch.arange(start, start + len(images))
    part = slice(num_first) if rank == 0 else slice(num_first, None)
    mine = images[part]
    return zip(indices[part].split(6), mine.split(6)) if len(mine) else []


def batches(indices):
    assert list(indices) == list(range(len(reals)))
    with open(folder / f"read-{rank}", "a") as file:
        file.write("x")
    return share(reals, len(reals))


for _ in range(2):
    needs = {DetectorOutput("pixels"): ("moments", "vectors")}
    references = references_for(
        needs, detectors, batches, "a" * 64, device, num_images=len(reals)
    )
metrics = [
    dataclasses.replace(METRICS[name], name=f"{name}{num}", num_images=num, at_most_dataset=False)
    for name, num in (("fd_pixels", 40), ("fd_pixels", 90), ("kid_pixels", 60), ("pr_pixels", 90))
]


def generate(indices):
    images = fakes[indices.start : indices.stop]
    return share(images, len(images) - 5, indices.start)


rows = score(metrics, generate, references, detectors, device)
try:
    load_references(str(folder / "absent.npz"))
    error = ""
except ValueError as caught:
    error = str(caught)
loaded = load_references(str(folder / "images-reference.npz"))[DetectorOutput("inception")]
sigma = references[DetectorOutput("pixels")].sigma
results = dict(rows=rows, sigma=sigma.tolist(), error=error, loaded=loaded.mu.tolist())
(folder / f"result-{rank}.json").write_text(json.dumps(results))
distributed.shutdown()
"""


def test_two_processes_one_of_them_without_images_agree_with_one(tmp_path, monkeypatch):
    reals, fakes = random_images(0, 70), random_images(1, 90, 20, 200)
    np.savez(tmp_path / "images.npz", reals=reals.numpy(), fakes=fakes.numpy())
    np.savez(tmp_path / "images-reference.npz", mu=np.arange(9.0), sigma=np.eye(9))
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    with monkeypatch.context() as patch:
        patch.setenv("SETDIFFIT_CACHE", str(tmp_path / "shared-cache"))
        on_ranks(2, tmp_path / "script.py", tmp_path)
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert "absent.npz: no such file" in first["error"]
    assert first["loaded"] == list(range(9))
    # The second call found the statistics in the cache.
    assert [(tmp_path / f"read-{rank}").read_text() for rank in (0, 1)] == ["x", "x"]

    detectors = {"pixels": PixelDetector(SHAPE)}
    references = compute_references(
        {PIXELS: BOTH}, detectors, numbered(reals, 70), "cpu", num_images=70
    )
    np.testing.assert_allclose(first["sigma"], references[PIXELS].sigma, rtol=1e-10)
    likes = [("fd_pixels", 40), ("fd_pixels", 90), ("kid_pixels", 60), ("pr_pixels", 90)]
    rows = score(
        [spec(f"{like}{num}", num, like=like) for like, num in likes],
        lambda i: numbered(fakes[i.start : i.stop], 90, i.start),
        references,
        detectors,
        "cpu",
    )
    for found, expected in zip(first["rows"], rows, strict=True):
        assert found["metric"] == expected["metric"]
        assert found["num_images"] == expected["num_images"]
        assert found["values"] == pytest.approx(expected["values"], rel=1e-10)
