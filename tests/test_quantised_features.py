"""Patch features in 8 bits: their error, their size, and folders of them for all readers."""

import json
import shutil

import numpy as np
import pytest
import torch
from feature_files import (
    BUCKETS,
    NUM_PICTURES,
    content,
    made,
    prepare,
    read_samples,
    tiny_encoders,
    tiny_features,
)
from helpers import call, fail, succeed

import dataset_tool
from data.features.dataset import FeatureDataset
from data.features.quantised import as_float16, bits_of, quantise
from data.features.record import PATCHES, read_feature_record
from data.features.shards import from_npy, to_npy

DIM = 1024
OPTIONS = ("--shard-size=2", "--batch=1")  # Of the folder in `feature_base`.


@pytest.fixture(scope="module")
def coarse(feature_base):
    """The features of ``feature_base`` with patches in 8 bits."""
    return tiny_features(feature_base, "--batch=1", "--feature-bits=8", name="features-8-bits")


def features(num=50, dim=DIM):
    """Return patch features [P, D], float16, of tokens whose sizes differ a thousandfold."""
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-2, 1, size=(num, 1))
    return (rng.standard_t(4, size=(num, dim)) * sizes).astype(np.float16)


# One array.


def test_no_value_is_off_by_more_than_half_a_step():
    x = features().astype(np.float64)
    stored = quantise(features())
    scale = stored["scale"].astype(np.float64)[:, None]
    np.testing.assert_allclose(scale[:, 0], np.abs(x).max(axis=1) / 127, rtol=1e-6)
    assert (np.abs(x - stored["values"] * scale) <= scale * (0.5 + 1e-4)).all()
    # What readers get is rounded to float16 once more.
    rounding = np.abs(x).max(axis=1, keepdims=True) * 2.0**-11
    assert (np.abs(x - as_float16(stored)) <= scale * (0.5 + 1e-4) + rounding).all()
    assert np.abs(stored["values"]).max(axis=1).tolist() == [127] * len(x)


def test_tokens_of_zeros_and_of_extreme_sizes_come_back():
    x = np.zeros((4, 8), np.float16)
    x[1] = np.finfo(np.float16).max
    x[2] = np.finfo(np.float16).smallest_subnormal
    x[3, 0] = -1
    found = as_float16(quantise(x))
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, x)


def test_an_array_keeps_its_form_in_a_file():
    stored = quantise(features())
    found = from_npy(to_npy(stored))
    assert (bits_of(found), bits_of(features())) == (8, 16)
    np.testing.assert_array_equal(as_float16(found), as_float16(stored))
    assert as_float16(features()).dtype == np.float16


def test_other_fields_are_refused():
    for dtype in (
        [("scale", "<f4")],
        [("values", "i1", (4,))],
        [("scale", "<f2"), ("values", "i1", (4,))],
    ):
        with pytest.raises(ValueError, match="its fields are"):
            bits_of(np.zeros(3, dtype))


def test_eight_bits_take_half_the_bytes_at_published_shapes():
    num = 64 * 64  # Patches of 16 in 1024x1024.
    coarse = len(to_npy(quantise(np.ones((num, DIM), np.float16))))
    assert coarse <= num * (DIM + 4) + 256
    assert coarse < 0.505 * len(to_npy(np.ones((num, DIM), np.float16)))


# A folder.


def test_only_the_patches_differ_from_those_in_16_bits(feature_base, coarse):
    fine, found = read_samples(feature_base / "features"), read_samples(coarse)
    assert fine.keys() == found.keys()
    for name, (_, arrays) in fine.items():
        others = found[name][1]
        for key, array in arrays.items():
            if key == PATCHES:
                assert bits_of(others[key]) == 8
                array, others[key] = as_float16(quantise(array)), as_float16(others[key])
            np.testing.assert_array_equal(others[key], array, key)


def test_the_record_says_it_and_earlier_versions_would_refuse_it(feature_base, coarse):
    facts = json.loads((coarse / "features.json").read_text())
    assert (facts["version"], facts["visual"]["bits"]) == (2, 8)
    assert read_feature_record(coarse).feature_bits == 8
    facts = json.loads((feature_base / "features" / "features.json").read_text())
    assert facts["version"] == 1
    assert "bits" not in facts["visual"]
    assert read_feature_record(feature_base / "features").feature_bits == 16
    assert "32 channels in 8 bits" in succeed(dataset_tool, "info", str(coarse)).output


def test_loaders_give_the_float16_that_was_stored(coarse):
    dataset, samples = FeatureDataset(coarse), read_samples(coarse)
    for index in range(len(dataset)):
        patches = dataset[index][1]["patches"]
        assert patches.dtype == torch.float16
        stored = samples[dataset.facts(index)["file"]][1][PATCHES]
        np.testing.assert_array_equal(patches.numpy(), as_float16(stored))


def test_statistics_are_those_of_what_loaders_give(coarse):
    data = FeatureDataset(coarse)
    rows = np.concatenate(
        [data[i][1]["patches"].numpy().astype(np.float64) for i in range(len(data))]
    )
    said = data.record.statistics["patches"]
    np.testing.assert_allclose(said["mean"], rows.mean(axis=0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(said["std"], rows.std(axis=0), rtol=1e-6)


def test_verification_passes_and_finds_damage(feature_base, coarse, tmp_path):
    options = (f"--source={feature_base / 'pictures'}", f"--visual={feature_base / 'visual'}")
    succeed(dataset_tool, "verify", str(coarse), *options)
    own = shutil.copytree(coarse, tmp_path / "own")
    file = own / "features.json"
    facts = json.loads(file.read_text())
    del facts["visual"]["bits"]
    file.write_text(json.dumps(facts))
    assert "visual feature(s) stale" in call(dataset_tool, "verify", str(own)).output
    with pytest.raises(ValueError, match="is in 8 bits, not the 16 of the record"):
        FeatureDataset(own)[0]


def test_a_second_start_makes_nothing_and_other_bits_are_refused(feature_base, coarse, tmp_path):
    own = shutil.copytree(coarse, tmp_path / "own")
    encoders, pictures = tiny_encoders(feature_base), feature_base / "pictures"
    before = content(own)
    assert made(prepare(pictures, own, encoders, *OPTIONS, "--feature-bits=8")) == (0,) * 4
    for dest, bits, there in ((own, 16, 8), (feature_base / "features", 8, 16)):
        command = ("features", f"--source={pictures}", f"--dest={dest}", f"--buckets={BUCKETS}")
        message = fail(dataset_tool, *command, *encoders, f"--feature-bits={bits}")
        assert (
            f"--feature-bits: got {bits}, but {dest} has patch features in {there} bits" in message
        )
    assert content(own) == before
    output = prepare(pictures, own, encoders, *OPTIONS, "--overwrite")
    assert made(output)[:3] == (NUM_PICTURES,) * 3
    assert content(own) == content(feature_base / "features")


def test_bits_of_a_folder_without_patches_are_refused(feature_base, tmp_path):
    command = ("features", f"--source={feature_base / 'pictures'}", f"--dest={tmp_path / 'new'}")
    text = tiny_encoders(feature_base)[2]
    message = fail(dataset_tool, *command, text, "--only=text", "--feature-bits=8")
    assert "--feature-bits: has no effect with --only=text" in message
