"""Record and manifests of feature folders: what is read back, and damage in one sentence."""

import json
import shutil

import numpy as np
import pytest
from feature_files import read_manifests

from data.features.manifests import read_manifest
from data.features.record import is_complete, is_feature_folder, read_feature_record
from data.features.shards import from_npy, to_npy


@pytest.fixture
def features(feature_base, tmp_path):
    return shutil.copytree(feature_base / "features", tmp_path / "features")


def edit(path, *keys, value):
    """Set a value in a JSON file; ``value`` may be a function of the old one."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value(inner[keys[-1]]) if callable(value) else value
    path.write_text(json.dumps(content))


def test_what_is_written_is_what_was_read(features):
    record = read_feature_record(features)
    assert json.loads((features / "features.json").read_text()) == json.loads(
        json.dumps(record.to_dict())
    )
    for manifest in read_manifests(features):
        assert json.loads((manifest.folder / "manifest.json").read_text()) == manifest.to_dict()
    assert is_feature_folder(features)
    assert is_complete(features)


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (("format",), "other", "not written by dataset_tool.py features"),
        (("version",), 3, "has format version 3"),
        (("statistics", "cls"), None, "statistics.cls is missing"),
        (("statistics", "vae", "std", 3), -1.0, "statistics of vae are not those of 16 channels"),
        (("statistics", "vae", "mean", 0), float("nan"), "statistics.vae.mean[0] is nan"),
        (("statistics", "patches", "mean"), [1.0], "statistics of patches are not those of 32"),
        (("buckets", 1, "num", "train"), "4", "buckets[1].num.train is '4'"),
        (("buckets", 1, "num", "train"), -4, "has {'train': -4"),
        (("buckets", 1, "name"), "1x1", "bucket 1x1 is 160x96"),
        (("buckets", 0, "latent_shape"), [4, 16, 16], "latent_shape is [4, 16, 16]"),
        (("buckets", 0, "patch_grid"), [8], "patch_grid is [8]"),
        (("buckets",), [], "0 buckets"),
        (("vae", "scale"), 0, "the scale of vae is 0"),
        (("visual", "patch_size"), True, "visual.patch_size is True"),
        (("text",), [], "text is []"),
    ],
)
def test_a_damaged_record_is_one_sentence(features, keys, value, problem):
    edit(features / "features.json", *keys, value=value)
    with pytest.raises(ValueError) as error:
        read_feature_record(features)
    assert problem in str(error.value)
    assert str(error.value).startswith(f"{features / 'features.json'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (("columns", "id", 1), lambda _: 5, "columns.id[1] is 5"),
        (("columns", "id"), lambda ids: [ids[0], *ids[:-1]], "an id appears twice"),
        (("columns", "shard"), lambda rows: rows[::-1], "rows are not those of the shards"),
        (("columns", "size", "vae.npy"), lambda rows: rows[1:], "vae.npy has 6 rows, not 7"),
        (("columns", "offset", "json", 2), lambda _: 10**9, "a member json lies outside its shard"),
        (("columns", "offset", "json", 2), lambda _: 10**30, "int too large"),
        (("columns", "offset", "t5m.npy"), None, "columns.offset.t5m.npy is missing"),
        (("shards", 1, "file"), "../../other.tar", "shard 1 is ../../other.tar"),
        (("shards", 1, "moments", "cls"), None, "moments.cls is missing"),
        (("split",), "validation", "it is of validation and bucket 128x128"),
    ],
)
def test_a_damaged_manifest_is_one_sentence(features, keys, value, problem):
    path = features / "train/bucket_128x128/manifest.json"
    edit(path, *keys, value=value)
    with pytest.raises(ValueError) as error:
        read_manifest(features, "train", "128x128")
    assert problem in str(error.value)
    assert str(error.value).startswith(f"{path}: damaged")


def test_what_is_missing_or_no_json_is_one_sentence(features, tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json: is missing"):
        read_manifest(features, "train", "64x64")
    (features / "features.json").write_text("{")
    with pytest.raises(ValueError, match="damaged, not valid JSON"):
        read_feature_record(features)
    (features / "features.json").unlink()
    with pytest.raises(ValueError, match="its preparation is not finished"):
        read_feature_record(features)
    with pytest.raises(ValueError, match="not a folder of features"):
        read_feature_record(tmp_path)


def test_an_array_is_read_although_another_thread_disturbs_the_parser(monkeypatch):
    array, read, failures = np.arange(6, dtype=np.float16), np.lib.format.read_array, [1, 2]

    def disturbed(*args, **kwargs):
        if failures:
            failures.pop()
            raise SystemError("AST constructor recursion depth mismatch")
        return read(*args, **kwargs)

    monkeypatch.setattr(np.lib.format, "read_array", disturbed)
    assert np.array_equal(from_npy(to_npy(array)), array)
    assert not failures
