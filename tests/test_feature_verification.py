"""dataset_tool.py verify and info on feature folders: damage, staleness and misalignment."""

import json
import shutil

import numpy as np
import pytest
import torch
from feature_files import prepare, rewrite_shards, sample_arrays, tiny_encoders, tiny_text
from helpers import fail, succeed
from image_files import run_tool
from PIL import Image

import dataset_tool
from data.features.manifests import read_manifest
from data.features.preparation.verify import misalignment
from data.features.record import read_feature_record
from data.features.shards import from_npy, to_npy

NAME = "128x128"  # The bucket that is damaged: seven samples to train, one to validate.


@pytest.fixture
def features(feature_base, tmp_path):
    return shutil.copytree(feature_base / "features", tmp_path / "features")


def verify(*args):
    """Return the exit code, rows of the table by (split, bucket, feature), and all output."""
    code, output = run_tool("verify", *args, "--workers=2")
    rows = {}
    for line in output.splitlines():
        parts = line.split()
        if len(parts) == 7 and parts[3].isdigit():
            rows[parts[1], parts[0], parts[2]] = tuple(map(int, parts[3:]))
    return code, rows, output


def patches_changed(folder, function):
    """Write all shards anew with other patches, with manifests and checksums to match."""

    def change(description, members):
        patches = function(from_npy(members["dinov3_patches.npy"]))
        members["dinov3_patches.npy"] = to_npy(patches.astype(np.float16))

    rewrite_shards(folder, change)


def test_a_sound_folder_is_found_sound(feature_base, features):
    code, rows, output = verify(
        features, f"--source={feature_base / 'pictures'}", f"--visual={feature_base / 'visual'}"
    )
    assert code == 0, output
    assert "no problems found" in output
    assert len(rows) == 18
    assert rows["train", NAME, "text"] == (7, 0, 0, 0)
    assert rows["validation", NAME, "vae"] == (1, 0, 0, 0)
    assert "128x128     patches: 64 in 8 sample(s)" in output


@pytest.mark.parametrize(
    ("key", "feature"),
    [
        ("vae.npy", "vae"),
        ("dinov3.npy", "visual"),
        ("dinov3_patches.npy", "visual"),
        ("t5h.npy", "text"),
        ("t5m.npy", "text"),
        ("json", None),
    ],
)
def test_one_damaged_byte_is_found_where_it_is(features, key, feature):
    manifest = read_manifest(features, "train", NAME)
    path = manifest.files[1]
    row = int(np.flatnonzero(manifest.shard == 1)[0])
    data = bytearray(path.read_bytes())
    data[manifest.offset[key][row] + manifest.size[key][row] - 1] ^= 1
    path.write_bytes(data)
    code, rows, output = verify(features)
    assert code == 1
    assert f"{path}: {manifest.ids[row]}, {feature or 'json'}: {key} differs" in output
    for place, counts in rows.items():
        is_it = place == ("train", NAME, feature)
        total = sum(counts)
        assert counts == ((total - 1, 0, 0, 1) if is_it else (total, 0, 0, 0))


def test_a_damaged_byte_outside_all_members_is_found_too(features):
    path = read_manifest(features, "train", NAME).files[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, output = verify(features)
    assert code == 1
    assert f"{path}: its bytes differ from the checksum" in output


def test_missing_shards_manifests_and_strangers_are_found(features):
    manifest = read_manifest(features, "train", NAME)
    manifest.files[0].unlink()
    shutil.copy(manifest.files[1], manifest.folder / "shard-000009.tar")
    (features / "validation/bucket_160x96/manifest.json").unlink()
    code, rows, output = verify(features)
    assert code == 1
    assert rows["train", NAME, "vae"] == (5, 2, 0, 0)
    assert f"{manifest.files[0]}: is missing" in output
    assert "shard-000009.tar: is in no manifest" in output
    assert "appears twice, in train/bucket_128x128 and train/bucket_128x128" in output
    assert "validation/bucket_160x96/manifest.json: is missing" in output


def test_samples_of_two_splits_or_of_no_image_are_found(features):
    validation = read_manifest(features, "validation", NAME)
    folder = features / "train/bucket_128x128"
    shutil.copytree(validation.folder, folder, dirs_exist_ok=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(dict(manifest, split="train")))
    code, rows, output = verify(features)
    assert code == 1
    assert f"{validation.ids[0]} appears twice, in train/bucket_128x128 and validation/" in output
    assert rows["train", NAME, "vae"][1] == 7
    assert "says 7 samples of train in bucket 128x128, but there are 1" in output
    lines = (features / "images.jsonl").read_text().splitlines(keepends=True)
    (features / "images.jsonl").write_text("".join(lines[1:]))
    assert "1 sample(s) belong to no requested image" in verify(features)[2]


def test_what_another_encoder_or_caption_made_is_stale(feature_base, features):
    record = json.loads((features / "features.json").read_text())
    record["text"]["hash"] = "0" * 64
    (features / "features.json").write_text(json.dumps(record))
    path = features / "images.jsonl"
    code, rows, output = verify(features)
    assert code == 1
    assert rows["train", NAME, "text"] == (0, 0, 7, 0)
    assert rows["train", NAME, "visual"] == (7, 0, 0, 0)
    assert "train, bucket 128x128: 7 text feature(s) stale" in output
    shutil.copy(feature_base / "features/features.json", features)
    path.write_text(path.read_text().replace("tall pink flower", "tall red flower"))
    code, rows, output = verify(features)
    assert code == 1
    assert output.count("1 text feature(s) stale") == 1
    assert "2 problem" not in output


def test_images_that_are_others_now_make_features_stale(feature_base, features, tmp_path):
    pictures = shutil.copytree(feature_base / "pictures", tmp_path / "pictures")
    image = Image.open(pictures / "square/wall.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pictures / "square/wall.png")
    (pictures / "square/roof.png").unlink()
    code, rows, output = verify(features, f"--source={pictures}")
    assert code == 1
    assert sum(rows[s, NAME, "vae"][2] for s in ("train", "validation")) == 2
    assert sum(rows[s, NAME, "text"][2] for s in ("train", "validation")) == 0
    assert "square/wall.png: has changed since the features were made" in output


@pytest.mark.parametrize("shift", [4, -1, 8])
def test_patches_that_are_shifted_by_some_rows_are_found(feature_base, features, shift):
    patches_changed(features, lambda patches: np.roll(patches, shift, axis=0))
    assert verify(features)[0] == 1  # The record is not of these shards.
    code, _, output = verify(
        features,
        f"--source={feature_base / 'pictures'}",
        f"--visual={feature_base / 'visual'}",
        "--samples=2",
    )
    assert code == 1
    assert f"patches are misaligned, shifted by {shift} rows" in output
    assert output.count("patches are misaligned") == 2 * 3


def test_patches_of_mirror_images_are_found(feature_base, features):
    patches_changed(features, lambda patches: patches[::-1])
    output = verify(
        features, f"--source={feature_base / 'pictures'}", f"--visual={feature_base / 'visual'}"
    )[2]
    assert "patches are misaligned, " in output


@pytest.mark.parametrize(
    ("num", "reason"),
    [
        (196, "the grid of a square of 224 with patches of 16"),
        (81, "the grid of patches of 14, but this encoder's are 16"),
        (68, "as if the 4 registers were patches"),
        (63, "has 8 sample(s) of 63 patches, not 64;"),
    ],
)
def test_a_wrong_number_of_patches_is_explained(features, num, reason):
    patches_changed(features, lambda patches: np.resize(patches, (num, 32)))
    code, rows, output = verify(features)
    assert code == 1
    assert reason in output
    assert rows["train", NAME, "visual"] == (0, 0, 0, 7)
    assert f"128x128     patches: {num} in 8 sample(s)" in output


def test_values_that_are_not_finite_are_corrupt_whatever_the_checksum(features):
    def change(description, members):
        hidden = from_npy(members["t5h.npy"]).copy()
        hidden[0, 0] = np.nan
        members["t5h.npy"] = to_npy(hidden)

    rewrite_shards(features, change)
    code, rows, output = verify(features)
    assert code == 1
    assert rows["train", NAME, "text"] == (0, 0, 0, 7)
    assert "text: t5h.npy has values that are not finite" in output


@pytest.mark.parametrize("name", ["vae", "cls", "patches"])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_statistics_of_other_data_are_found(features, name, key):
    record = json.loads((features / "features.json").read_text())
    record["statistics"][name][key][3] += 1e-3
    (features / "features.json").write_text(json.dumps(record))
    code, _, output = verify(features)
    assert code == 1
    assert f"its statistics of {name} are not those of the training split" in output
    assert "1 problem(s) found" in output


def test_a_record_of_other_shards_is_found(features):
    record = json.loads((features / "features.json").read_text())
    record["content_hash"] = "0" * 64
    (features / "features.json").write_text(json.dumps(record))
    assert "does not match these shards (content_hash)" in verify(features)[2]


@pytest.mark.parametrize("name", ["features.json", "images.jsonl"])
def test_a_damaged_description_is_a_problem_and_no_traceback(features, name):
    (features / name).write_text("{")
    code, _, output = verify(features)
    assert code == 1
    assert f"{features / name}: damaged" in output


def test_a_preparation_under_way_tells_how_far_it_is(feature_base, tmp_path):
    out = tmp_path / "out"
    prepare(feature_base / "pictures", out, tiny_encoders(feature_base)[:1], "--only=vae")
    code, rows, output = verify(out)
    assert code == 1
    assert "its preparation is not finished" in output
    assert rows["train", NAME, "vae"] == (7, 0, 0, 0)
    assert rows["train", NAME, "visual"] == (0, 7, 0, 0)


def test_verify_refuses_what_has_no_effect(feature_base, features, digits_zip, tmp_path):
    source, visual = feature_base / "pictures", feature_base / "visual"
    for message, args in [
        ("--visual: needs --source", (features, f"--visual={visual}")),
        ("--samples: has an effect only with", (features, f"--source={source}", "--samples=2")),
        ("are for folders of features", (digits_zip, f"--source={source}")),
        ("no such file", (features, "--source=nothing")),
    ]:
        assert message in fail(dataset_tool, "verify", *args)
    other = shutil.copytree(visual, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(dict(config, rope_theta=50.0)))
    message = fail(dataset_tool, "verify", features, f"--source={source}", f"--visual={other}")
    assert "is another encoder" in message


def test_misalignment_is_measured_over_shifts():
    patches = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    assert misalignment(patches, patches + 0.01 * noise) is None
    assert misalignment(torch.ones(60, 8), torch.ones(60, 8)) is None
    assert "mean cosine of 0.9" in misalignment(patches, patches + 0.3 * noise)
    assert misalignment(patches, patches[:-1]) == "[60, 8] instead of [59, 8]"
    for shift in (-8, -1, 1, 5):
        assert f"shifted by {shift} rows" in misalignment(patches.roll(shift, 0), patches)


def test_info_prints_encoders_statistics_and_the_report_of_buckets(feature_base):
    folder = feature_base / "features"
    record = read_feature_record(folder)
    output = succeed(dataset_tool, "info", folder).output
    for text in (
        "samples       14 train, 3 validation",
        f"source        pictures, hash {record.source_hash}",
        f"autoencoder   {feature_base / 'vae'}, hash {record.vae['hash']}: 16 channels, "
        "(latent - 0.1159) * 0.3611",
        "patches of 16, 4 registers, 32 channels",
        "32 channels, at most 512 tokens",
        f"content hash  {record.content_hash}",
        "128x128     16x16x16    8x8             7           1   47.1%",
        "96x160      16x20x12    10x6            3           1   23.5%",
    ):
        assert text in output, text


def test_another_text_encoder_is_seen_by_verify_until_shards_are_made(
    feature_base, features, tmp_path
):
    text = f"--text={tiny_text(tmp_path / 'text', seed=1)}"
    prepare(feature_base / "pictures", features, [text], "--only=text")
    assert verify(features)[0] == 0  # The folder in use is as it was.
    manifest = read_manifest(features, "train", NAME)
    assert sample_arrays(features, manifest, 0)["t5h.npy"].shape[1] == 32
