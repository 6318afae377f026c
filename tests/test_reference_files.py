"""Files of reference statistics: every layout, with each of its parts replaced by wrong ones."""

import itertools
import json
import pickle

import numpy as np
import pytest
from helpers import CLASS_NAMES, toy_data

from data.images.dataset import open_images
from evaluation.scoring import dataset_references
from metrics.detectors import DetectorOutput, PixelDetector
from metrics.reference import Reference, read_references, save_references

INCEPTION, PIXELS = DetectorOutput("inception"), DetectorOutput("pixels")
GAUSSIAN = dict(mu=np.arange(3.0), sigma=np.eye(3))
TYPES = ("f2", "f4", ">f8", "i8", ">i4", "u1", "?", "c16", "U3", "S3", "M8[s]", "V4")
SHAPES = ((), (0,), (5,), (0, 3), (3, 0), (5, 3), (5, 4), (4, 4), (5, 3, 1))
VALUES = (None, True, 1, -1, 1.5, float("nan"), "", "x", [], [1], [None], ["x"], [[]], {})
HASHES = (7, [1], "", None)


def reference(**fields):
    known = dict(
        GAUSSIAN,
        vectors=np.ones((5, 3), np.float32),
        num_vectors=5,
        labels=np.arange(5) % 2,
        count=5,
        detector_hash="a" * 64,
        dataset_hash="b" * 64,
        class_names=("even", "odd"),
        images=(1, 1, 3, "png"),
    )
    return Reference(output=PIXELS, **{**known, **fields})


def replacements(array):
    """Arrays of other types and shapes, of objects, and of values that are not finite."""
    yield np.array([object()])
    for name in TYPES:
        yield np.ones(array.shape, "i8").astype(name)
    for shape, dtype in itertools.product(SHAPES, ("f8", "i8")):
        yield np.zeros(shape, dtype)
    if array.dtype.kind == "f":
        yield from (np.full(array.shape, value) for value in (np.nan, np.inf, 1e300))


def with_one_replaced(content, values):
    """The content without one of its parts, or with one of ``values(part)`` in its place."""
    for name, part in content.items():
        yield {key: value for key, value in content.items() if key != name}
        yield from ({**content, name: value} for value in values(part))


def own_files(folder):
    save_references(folder / "whole.npz", {PIXELS: reference()})
    arrays = dict(np.load(folder / "whole.npz"))
    text = str(arrays.pop("description"))
    yield from (dict(found, description=text) for found in with_one_replaced(arrays, replacements))
    hashes = [{str(PIXELS): value} for value in HASHES]
    changed = with_one_replaced(json.loads(text), lambda _: (*VALUES, *hashes))
    for description in (*changed, *VALUES):
        yield dict(arrays, description=json.dumps(description))
    yield from (dict(arrays, description=text) for text in ("", "{", "[" * 100_000))


def foreign_files(folder):
    spatial = dict(mu_s=np.arange(2.0), sigma_s=np.eye(2))
    yield from with_one_replaced({**GAUSSIAN, **spatial}, replacements)


def pickles(folder):
    def values(part):
        yield from VALUES
        if isinstance(part, dict):
            yield from with_one_replaced(part, lambda array: (*VALUES, *replacements(array)))

    yield from with_one_replaced(dict(num_images=5, fid=GAUSSIAN, fd_dinov2=GAUSSIAN), values)
    yield from VALUES


@pytest.mark.parametrize("contents", [own_files, foreign_files, pickles])
def test_a_file_is_refused_by_name_or_gives_statistics_of_the_documented_types(contents, tmp_path):
    num_read = num_refused = 0
    for content in contents(tmp_path):
        path = tmp_path / ("changed.pkl" if contents is pickles else "changed.npz")
        if contents is pickles:
            path.write_bytes(pickle.dumps(content))
        else:
            np.savez(path, **content)
        found, message = read(path)
        num_read, num_refused = num_read + bool(found), num_refused + bool(message)
        assert found or message.startswith(f"{path}: ")
        for one in found.values():
            check(one)
    assert min(num_read, num_refused) > 10


def read(path):
    """Return the references in a file, and the message of a refusal."""
    try:
        return read_references(path), ""
    except ValueError as error:
        return {}, str(error)


def check(found):
    """Assert that a reference is what its class says."""
    arrays = (found.mu, found.sigma, found.vectors, found.labels)
    types = (np.float64, np.float64, np.float32, np.int64)
    for array, dtype in zip(arrays, types, strict=True):
        assert array is None or (array.dtype == dtype and np.isfinite(array).all())
    assert (found.mu is None) == (found.sigma is None)
    assert found.mu is None or found.sigma.shape == found.mu.shape * 2
    assert found.mu is None or found.vectors is None or found.vectors.shape[1:] == found.mu.shape
    assert found.labels is None or len(found.labels) == len(found.vectors)
    assert found.count is None or found.count >= 2
    assert isinstance(found.detector_hash, str | None)
    assert all(isinstance(name, str) for name in found.class_names)


def test_detector_hashes_of_another_type_are_named(tmp_path):
    save_references(tmp_path / "whole.npz", {PIXELS: reference(detector_hash=7)})
    with pytest.raises(ValueError, match=r"whole\.npz: .*detector_hashes\.pixels/features is 7"):
        read_references(tmp_path / "whole.npz")


def test_a_mean_and_vectors_of_different_widths_are_refused(tmp_path):
    save_references(tmp_path / "whole.npz", {PIXELS: reference(vectors=np.ones((5, 4), "f4"))})
    with pytest.raises(ValueError, match=r"whole\.npz: .* mean of 3 values and vectors of 4"):
        read_references(tmp_path / "whole.npz")


@pytest.mark.parametrize("name", ["labels", "class_names", "dataset_hash"])
def test_references_of_other_images_are_not_written_into_one_file(name, tmp_path):
    other = dict(labels=np.arange(5) % 3, class_names=("a", "b"), dataset_hash="c" * 64)
    references = {PIXELS: reference(), INCEPTION: reference(**{name: other[name]})}
    with pytest.raises(AssertionError, match="other"):
        save_references(tmp_path / "whole.npz", references)


def test_class_names_are_kept_where_the_first_output_has_no_vectors(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    needs = {INCEPTION: ("moments",), PIXELS: ("vectors",)}
    detectors = dict.fromkeys(("inception", "pixels"), PixelDetector((3, 8, 8)))
    dataset = open_images(toy_data(tmp_path))
    save_references(tmp_path / "a.npz", dataset_references(dataset, needs, detectors, "cpu"))
    found = read_references(tmp_path / "a.npz")[PIXELS]
    assert found.class_names == tuple(CLASS_NAMES)
    np.testing.assert_array_equal(found.labels, dataset.labels)
