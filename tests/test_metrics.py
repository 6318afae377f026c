"""The Fréchet distance, feature statistics, references, metrics and score rows."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics.features import DETECTORS, PixelDetector, get_detector
from metrics.frechet import frechet_distance
from metrics.metric import METRICS, MetricSpec, get_metric, get_metrics, score
from metrics.reference import (
    Reference,
    cache_path,
    compute_reference,
    load_reference,
    read_reference,
    reference_for,
)
from metrics.rows import compare_rows, differing_fields, read_rows
from metrics.statistics import FeatureStatistics

SHAPE = (1, 3, 3)


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


class TestFeatureStatistics:
    def gather(self, features, splits):
        statistics = FeatureStatistics(features.shape[1])
        for part in torch.from_numpy(features).split(splits):
            statistics.append(part)
        return statistics

    def test_agree_with_numpy(self):
        features = np.random.default_rng(0).standard_normal((57, 5)) @ np.diag([1, 2, 3, 4, 5.0])
        statistics = self.gather(features, [10, 40, 7])
        assert statistics.count == 57
        np.testing.assert_allclose(statistics.mean(), features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance(), np.cov(features.T), rtol=1e-12)

    def test_do_not_lose_a_small_spread_beside_a_large_mean(self):
        features = 1e6 + 1e-3 * np.random.default_rng(1).standard_normal((300, 3))
        expected = np.cov(features.T - 1e6)
        found = self.gather(features, [1, 99, 200]).covariance()
        np.testing.assert_allclose(np.diag(found), np.diag(expected), rtol=1e-5)

    def test_of_a_constant_feature_have_no_variance(self):
        features = np.full((100, 2), np.float32(0.1), np.float32)
        np.testing.assert_allclose(self.gather(features, 7).covariance(), 0, atol=1e-30)

    def test_do_not_depend_on_the_batch_size(self):
        rng = np.random.default_rng(2)
        features = (rng.random((200, 24)) ** 2).astype(np.float32)
        other = random_covariance(rng, 24, 0.1)
        distances = []
        for size in (1, 7, 64, 200):
            statistics = self.gather(features, size)
            distances.append(
                frechet_distance(statistics.mean(), statistics.covariance(), np.zeros(24), other)
            )
        np.testing.assert_allclose(distances, distances[0], rtol=1e-10)

    def test_merge_into_those_of_all_images(self):
        features = np.random.default_rng(3).standard_normal((90, 4)) + np.arange(90)[:, None] / 10
        whole, first = self.gather(features, 90), self.gather(features[:20], 20)
        second, empty = self.gather(features[20:], 11), FeatureStatistics(4)
        for merged in (first.merged(second), empty.merged(whole), whole.merged(empty)):
            assert merged.count == 90
            np.testing.assert_allclose(merged.mean(), whole.mean(), rtol=1e-12)
            np.testing.assert_allclose(merged.covariance(), whole.covariance(), rtol=1e-12)

    def test_ignore_empty_batches_and_refuse_other_widths(self):
        statistics = FeatureStatistics(4)
        statistics.append(torch.zeros(0, 4))
        assert statistics.count == 0
        with pytest.raises(ValueError, match=r"\[2, 3\]; expected \[N, 4\]"):
            statistics.append(torch.zeros(2, 3))

    def test_need_images_and_finite_features(self):
        statistics = FeatureStatistics(2)
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
        assert detector.num_features == 4
        features = detector(images)
        assert features.dtype == torch.float32
        np.testing.assert_allclose(features, [[0, 0.2, 1, 0.4]], rtol=1e-6)

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
            get_detector("pixels", "cpu", image_shape=SHAPE, weights="file.pth")


class TestReferences:
    def make(self, **kwargs):
        rng = np.random.default_rng(0)
        fields = dict(
            mu=rng.standard_normal(9),
            sigma=random_covariance(rng, 9),
            count=100,
            detector="pixels",
            detector_hash=PixelDetector(SHAPE).hash,
            dataset_hash="d" * 64,
            metadata={"resolution": 3, "name": "tiny"},
        )
        return Reference(**{**fields, **kwargs})

    def test_survive_a_round_trip_through_a_file(self, tmp_path):
        path = tmp_path / "folder" / "reference.npz"
        written = self.make()
        written.save(path)
        found = read_reference(path)
        np.testing.assert_array_equal(found.mu, written.mu)
        np.testing.assert_array_equal(found.sigma, written.sigma)
        for name in ("count", "detector", "detector_hash", "dataset_hash", "metadata", "hash"):
            assert getattr(found, name) == getattr(written, name)
        assert found.source == str(path)
        assert os.listdir(path.parent) == ["reference.npz"]
        assert found.check_detector(PixelDetector(SHAPE)) == []

    def test_of_edm_load_without_count_and_detector(self, tmp_path):
        path = tmp_path / "cifar10-32x32.npz"
        written = self.make()
        np.savez(path, mu=written.mu, sigma=written.sigma)
        found = load_reference(str(path))
        np.testing.assert_array_equal(found.sigma, written.sigma)
        assert found.count is None
        assert found.detector is None
        (warning,) = found.check_detector(PixelDetector(SHAPE))
        assert "does not tell which detector" in warning

    def test_are_identified_by_images_and_detector_or_else_by_their_numbers(self):
        reference = self.make()
        assert reference.hash == self.make(mu=reference.mu + 1e-15).hash
        assert reference.hash != self.make(dataset_hash="e" * 64).hash
        assert reference.hash != self.make(detector_hash="e" * 64).hash
        foreign = self.make(dataset_hash=None)
        assert foreign.hash != self.make(dataset_hash=None, mu=reference.mu + 1).hash

    def test_of_another_detector_are_refused(self):
        with pytest.raises(ValueError, match=r"detector 'inception' \(ffffffffffff\)"):
            self.make(detector="inception", detector_hash="f" * 64).check_detector(
                PixelDetector(SHAPE)
            )
        with pytest.raises(ValueError, match="have 9 features, but the detector 'pixels' has 16"):
            self.make(detector_hash=None).check_detector(PixelDetector((1, 4, 4)))

    def test_in_unusable_files_are_refused_by_name(self, tmp_path):
        path = tmp_path / "reference.npz"
        with pytest.raises(ValueError, match=r"reference\.npz: no such file"):
            read_reference(path)
        good = self.make()
        good.save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"reference\.npz: damaged"):
            read_reference(path)
        np.savez(path, mu=good.mu)
        with pytest.raises(ValueError, match="sigma"):
            read_reference(path)
        np.savez(path, mu=good.mu, sigma=good.sigma[:4])
        with pytest.raises(ValueError, match=r"sigma \[4, 9\]"):
            read_reference(path)
        np.savez(path, mu=good.mu * np.nan, sigma=good.sigma)
        with pytest.raises(ValueError, match="not finite"):
            read_reference(path)

    def test_in_files_that_hold_objects_are_refused_unexecuted(self, tmp_path):
        path, mark = tmp_path / "reference.npz", tmp_path / "executed"
        np.savez(path, mu=np.array([Executes(mark)], dtype=object), sigma=np.eye(1))
        np.load(path, allow_pickle=True)["mu"]
        assert mark.exists()
        mark.unlink()
        with pytest.raises(ValueError, match="damaged, or no"):
            read_reference(path)
        assert not mark.exists()

    def test_are_computed_from_batches_and_count_the_images(self):
        images = random_images(0, 50)
        detector = PixelDetector(SHAPE)
        found = compute_reference(images.split(8), detector, "cpu", num_images=50)
        np.testing.assert_allclose(
            found.sigma, np.cov(images.flatten(1).double().numpy().T / 255), rtol=1e-5
        )
        assert (found.count, found.detector) == (50, "pixels")
        with pytest.raises(ValueError, match=r"gave 50 images .* expected 51"):
            compute_reference(images.split(8), detector, "cpu", num_images=51)

    def test_are_cached_by_content_and_detector(self):
        images, detector = random_images(0, 20), PixelDetector(SHAPE)
        first = reference_for(lambda: images.split(8), "a" * 64, detector, "cpu", source="data")

        def untouchable():
            raise AssertionError("the images were read again")

        second = reference_for(untouchable, "a" * 64, detector, "cpu", source="data")
        np.testing.assert_array_equal(second.sigma, first.sigma)
        assert second.hash == first.hash
        assert second.source == "data"
        with pytest.raises(AssertionError, match="read again"):
            reference_for(untouchable, "b" * 64, detector, "cpu")
        with pytest.raises(AssertionError, match="read again"):
            reference_for(untouchable, "a" * 64, PixelDetector((3, 1, 3)), "cpu")

    def test_in_a_corrupt_cache_are_reported_and_made_anew(self, capsys):
        images, detector = random_images(0, 20), PixelDetector(SHAPE)
        first = reference_for(lambda: [images], "a" * 64, detector, "cpu")
        path = cache_path("a" * 64, detector)
        path.write_bytes(b"not a zip file")
        second = reference_for(lambda: [images], "a" * 64, detector, "cpu")
        np.testing.assert_array_equal(second.sigma, first.sigma)
        assert str(path) in capsys.readouterr().out
        assert read_reference(path).count == 20

    def test_of_other_images_under_the_same_cache_name_are_made_anew(self, capsys):
        images, detector = random_images(0, 20), PixelDetector(SHAPE)
        path = cache_path("a" * 64, detector)
        self.make(count=7).save(path)
        assert reference_for(lambda: [images], "a" * 64, detector, "cpu").count == 20
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

    def __call__(self, images):
        self.num_seen += len(images)
        return super().__call__(images)


def spec(name, num_images, detector="pixels", **kwargs):
    return MetricSpec(name=name, detector=detector, num_images=num_images, description="", **kwargs)


class TestScore:
    detector = PixelDetector(SHAPE)

    def score(self, metrics, *, batch=7, images=None, reference=None, **kwargs):
        images = random_images(1, 60, 20, 200) if images is None else images
        reference = reference or compute_reference(
            [random_images(0, 80)], self.detector, "cpu", source="data", dataset_hash="a"
        )
        return score(
            metrics,
            lambda indices: images[indices.start : indices.stop].split(batch),
            {"pixels": reference},
            {"pixels": self.detector},
            "cpu",
            **kwargs,
        )

    def test_equals_an_independent_computation(self):
        (row,) = self.score([spec("fd", 60)])
        x = random_images(1, 60, 20, 200).flatten(1).double().numpy() / 255
        y = random_images(0, 80).flatten(1).double().numpy() / 255
        root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
        expected = np.sum((x.mean(0) - y.mean(0)) ** 2)
        expected += np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
        assert row["value"] == pytest.approx(expected, rel=1e-6)

    def test_rows_say_what_was_measured_against_what(self):
        (row,) = self.score([spec("fd", 60)])
        assert json.loads(json.dumps(row)) == row
        assert row["metric"] == "fd"
        assert row["num_images"] == 60
        assert row["reference_count"] == 80
        assert row["reference"] == "data"
        assert row["detector"] == "pixels"
        assert row["detector_hash"] == self.detector.hash
        assert len(row["reference_hash"]) == 64
        assert row["seconds"] >= 0
        assert row["warnings"] == []

    @pytest.mark.parametrize("batch", [1, 13, 60])
    def test_does_not_depend_on_the_batch_size(self, batch):
        (expected,), (found,) = (
            self.score([spec("fd", 60)]),
            self.score([spec("fd", 60)], batch=batch),
        )
        assert found["value"] == pytest.approx(expected["value"], rel=1e-10)

    def test_of_several_metrics_sees_each_image_once_and_equals_each_alone(self):
        images, counting = random_images(1, 60, 20, 200), CountingDetector()
        reference = compute_reference([random_images(0, 80)], self.detector, "cpu")
        asked = []

        def generate(indices):
            asked.extend(indices)
            return images[indices.start : indices.stop].split(7)

        metrics = [spec("b", 60), spec("a", 25), spec("c", 40, "counting")]
        rows = score(
            metrics,
            generate,
            dict(pixels=reference, counting=reference),
            dict(pixels=self.detector, counting=counting),
            "cpu",
        )
        assert asked == list(range(60))
        assert counting.num_seen == 40
        assert [row["metric"] for row in rows] == ["b", "a", "c"]
        assert [row["num_images"] for row in rows] == [60, 25, 40]
        for row in rows:
            (alone,) = self.score([spec(row["metric"], row["num_images"])], reference=reference)
            assert row["value"] == pytest.approx(alone["value"], rel=1e-10)

    def test_with_few_images_is_finite_and_warns_of_the_low_count(self):
        (row,) = self.score([spec("fd", 9)])
        assert np.isfinite(row["value"])
        assert "low count: 9 images for 9 features" in row["warnings"][0]
        (row,) = self.score([spec("fd", 10)])
        assert row["warnings"] == []

    def test_of_the_data_itself_is_zero(self):
        images = random_images(0, 80)
        (row,) = self.score([spec("fd", 80)], images=images)
        assert row["value"] < 1e-12

    def test_counts_at_most_the_dataset_where_the_metric_says_so(self):
        rows = self.score([spec("fd", 100, at_most_dataset=True)], images=random_images(1, 80))
        assert rows[0]["num_images"] == 80
        assert self.score([spec("fd", 100)], num_images=33)[0]["num_images"] == 33

    def test_refuses_too_few_images_and_a_reference_of_another_detector(self):
        with pytest.raises(ValueError, match="fd: needs 100 images, but got 60"):
            self.score([spec("fd", 100)])
        with pytest.raises(ValueError, match="at least 2 images; got 1"):
            self.score([spec("fd", 60)], num_images=1)
        other = Reference(mu=np.zeros(9), sigma=np.eye(9), detector="x", detector_hash="f" * 64)
        with pytest.raises(ValueError, match="made by the detector 'x'"):
            self.score([spec("fd", 60)], reference=other)

    def test_does_not_run_the_generator_in_inference_mode(self):
        def generate(indices):
            assert not torch.is_inference_mode_enabled()
            yield random_images(1, len(indices))

        reference = compute_reference([random_images(0, 80)], self.detector, "cpu")
        score([spec("fd", 9)], generate, {"pixels": reference}, {"pixels": self.detector}, "cpu")


class TestMetricNames:
    def test_stand_for_the_documented_protocols(self):
        reference = Reference(mu=np.zeros(9), sigma=np.eye(9), count=1797)
        for name, detector, count in [
            ("fid10k_full", "inception", 10_000),
            ("fid50k_full", "inception", 50_000),
            ("fd_pixels", "pixels", 1797),
        ]:
            metric = get_metric(name)
            assert (metric.detector, metric.image_count(reference)) == (detector, count)
        big = Reference(mu=np.zeros(9), sigma=np.eye(9), count=50_000)
        assert get_metric("fd_pixels").image_count(big) == 2_000
        assert get_metric("fd_pixels").image_count(Reference(mu=big.mu, sigma=big.sigma)) == 2_000

    def test_refer_to_registered_detectors_and_name_themselves(self):
        for name, metric in METRICS.items():
            assert metric.name == name
            assert metric.detector in DETECTORS

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
        table = compare_rows([self.row, other])
        assert "2.25" in table
        assert "sampling.steps=18" in table
        assert "not comparable" not in table

    def test_with_another_protocol_are_marked(self):
        other = dict(self.row, sampling=dict(sampler="heun", steps=32), num_images=10_000)
        del other["detector_hash"]
        table = compare_rows([self.row, other])
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
        with pytest.raises(ValueError, match="cannot be read"):
            read_rows(tmp_path / "absent.jsonl")


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from metrics.features import PixelDetector
from metrics.metric import MetricSpec, score
from metrics.reference import compute_reference, load_reference, reference_for
from torch_utils import distributed

folder = Path(sys.argv[1])
device = distributed.init()
rank = distributed.rank()
reals, fakes = (torch.from_numpy(array) for array in np.load(folder / "images.npz").values())
detector = PixelDetector(tuple(reals.shape[1:]))


def share(images, num_first):
    mine = images[:num_first] if rank == 0 else images[num_first:]
    return mine.split(6) if len(mine) else []


def batches():
    with open(folder / f"read-{rank}", "a") as file:
        file.write("x")
    return share(reals, len(reals))


for _ in range(2):
    reference = reference_for(batches, "a" * 64, detector, device, num_images=len(reals))
metrics = [
    MetricSpec(name=f"fd{num}", detector="pixels", num_images=num, description="")
    for num in (40, 90)
]


def generate(indices):
    images = fakes[indices.start : indices.stop]
    return share(images, len(images) - 5)


rows = score(metrics, generate, {"pixels": reference}, {"pixels": detector}, device)
try:
    load_reference(str(folder / "absent.npz"))
    error = ""
except ValueError as caught:
    error = str(caught)
loaded = load_reference(str(folder / "images-reference.npz"))
results = dict(rows=rows, sigma=reference.sigma.tolist(), error=error, loaded=loaded.mu.tolist())
(folder / f"result-{rank}.json").write_text(json.dumps(results))
distributed.shutdown()
"""


def test_two_processes_one_of_them_without_images_agree_with_one(tmp_path):
    reals, fakes = random_images(0, 70), random_images(1, 90, 20, 200)
    np.savez(tmp_path / "images.npz", reals=reals.numpy(), fakes=fakes.numpy())
    np.savez(tmp_path / "images-reference.npz", mu=np.arange(9.0), sigma=np.eye(9))
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    environment = dict(
        os.environ,
        PYTHONPATH=str(Path(__file__).resolve().parents[1]),
        OMP_NUM_THREADS="1",
        SETDIFFIT_CACHE=str(tmp_path / "shared-cache"),
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment,
        check=True,
        timeout=120,
    )
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert "absent.npz: no such file" in first["error"]
    assert first["loaded"] == list(range(9))
    # The second call found the statistics in the cache.
    assert [(tmp_path / f"read-{rank}").read_text() for rank in (0, 1)] == ["x", "x"]

    detector = PixelDetector(SHAPE)
    reference = compute_reference([reals], detector, "cpu")
    np.testing.assert_allclose(first["sigma"], reference.sigma, rtol=1e-10)
    rows = score(
        [spec("fd40", 40), spec("fd90", 90)],
        lambda indices: fakes[indices.start : indices.stop].split(90),
        {"pixels": reference},
        {"pixels": detector},
        "cpu",
    )
    for found, expected in zip(first["rows"], rows, strict=True):
        assert found["num_images"] == expected["num_images"]
        assert found["value"] == pytest.approx(expected["value"], rel=1e-10)
