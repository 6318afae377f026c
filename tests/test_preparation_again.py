"""dataset_tool.py features started again: what is made again, what is not, and stops."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from feature_files import (
    BUCKETS,
    NUM_PICTURES,
    content,
    flip_byte,
    made,
    place_of,
    prepare,
    read_samples,
    rewrite_shards,
    tiny_encoders,
    tiny_text,
    tiny_visual,
)
from helpers import call, fail
from latent_files import tiny_autoencoder
from PIL import Image

import dataset_tool
from data.features import shards as feature_shards
from data.features.buckets import parse_buckets
from data.features.manifests import read_manifest
from data.features.preparation import pack
from data.features.preparation.encode import FeatureEncoder
from data.features.preparation.stage import Stage
from data.features.record import FEATURES, is_complete
from encoders.autoencoder import Autoencoder

NUM = NUM_PICTURES
NAMES = [bucket.name for bucket in parse_buckets(BUCKETS)]
OPTIONS = ("--shard-size=2", "--batch=1")  # Of the folder in `feature_base`.


@pytest.fixture
def encoders(feature_base):
    return tiny_encoders(feature_base)


@pytest.fixture
def pictures(feature_base, tmp_path):
    """A copy of the pictures, to be changed."""
    return shutil.copytree(feature_base / "pictures", tmp_path / "pictures")


@pytest.fixture
def features(feature_base, tmp_path):
    """A copy of the features, to be changed."""
    return shutil.copytree(feature_base / "features", tmp_path / "features")


def refusal(source, dest, encoders, *options):
    command = ("features", f"--source={source}", f"--dest={dest}", f"--buckets={BUCKETS}")
    return fail(dataset_tool, *command, *encoders, *options)


# What is made again, and what is not.


def test_a_complete_folder_is_left_alone(feature_base, features, encoders):
    times = {
        p: p.stat().st_mtime_ns for p in features.rglob("*.*") if p.suffix in (".tar", ".json")
    }
    output = prepare(feature_base / "pictures", features, encoders, *OPTIONS, "--batch=5")
    assert "complete already" in output
    assert {path: path.stat().st_mtime_ns for path in times} == {
        **times,
        features / "preparing.json": (features / "preparing.json").stat().st_mtime_ns,
    }
    assert content(features) == content(feature_base / "features")


def test_an_edited_caption_makes_its_text_again_and_nothing_else(
    feature_base, pictures, features, encoders
):
    (pictures / "wide/sky.txt").write_text("the pink sky")
    assert made(prepare(pictures, features, encoders, *OPTIONS)) == (0, 0, 1, 1)
    before, after = content(feature_base / "features"), content(features)
    changed = {name for name in before if before[name] != after[name]}
    (shard,) = [name for name in changed if name.endswith(".tar")]
    assert changed == {shard, f"{shard.rpartition('/')[0]}/manifest.json", "features.json"}
    assert before.keys() == after.keys()
    found = read_samples(features)["wide/sky.png"]
    assert found[0]["caption"] == "the pink sky"
    assert len(found[1]["t5m.npy"]) == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tmp: f"--text={tiny_text(tmp / 'new', seed=1)}", (0, 0, NUM)),
        (lambda tmp: f"--visual={tiny_visual(tmp / 'new', seed=1)}", (0, NUM, 0)),
        (lambda tmp: f"--visual={tiny_visual(tmp / 'new', patch_size=14)}", (0, NUM, 0)),
        (lambda tmp: f"--visual={tiny_visual(tmp / 'new', num_registers=2)}", (0, NUM, 0)),
        (
            lambda tmp: (
                "--vae=" + str(tiny_autoencoder(tmp / "new", latent_channels=4, num_stages=4))
            ),
            (NUM, 0, 0),
        ),
        (lambda tmp: "--precision=bf16", (NUM, NUM, NUM)),
        (lambda tmp: "--shard-size=3", (0, 0, 0)),
        (lambda tmp: "--buckets=128x128,160x96,112x160", (4, 4, 0)),
        (lambda tmp: "--overwrite", (NUM, NUM, NUM)),
    ],
    ids=[
        "text",
        "visual",
        "patches",
        "registers",
        "vae",
        "precision",
        "shards",
        "buckets",
        "overwrite",
    ],
)
def test_another_setting_makes_what_depends_on_it_again(
    feature_base, features, encoders, tmp_path, change, expected
):
    option = change(tmp_path)
    source = feature_base / "pictures"
    output = prepare(source, features, encoders, *OPTIONS, option)
    assert made(output)[:3] == expected
    fresh = tmp_path / "fresh"
    prepare(source, fresh, encoders, *OPTIONS, option)
    assert content(features) == content(fresh)
    assert {path.name for path in features.iterdir()} == {path.name for path in fresh.iterdir()}


def test_added_and_removed_images_cost_what_is_new_alone(
    feature_base, pictures, features, encoders, tmp_path
):
    for name in ("square/a", "square/b", "wide/c"):
        original = pictures / ("wide/sky.png" if "c" in name else "square/wall.png")
        (pictures / f"{name}.png").write_bytes(original.read_bytes())
        (pictures / f"{name}.txt").write_text("detail")
    (pictures / "tall/roof.png").unlink()
    (pictures / "square/sky.jpg").unlink()
    assert made(prepare(pictures, features, encoders, *OPTIONS))[:3] == (3, 3, 3)
    prepare(pictures, tmp_path / "fresh", encoders, *OPTIONS)
    assert content(features) == content(tmp_path / "fresh")
    assert len(read_samples(features)) == NUM + 1


def test_a_changed_image_keeps_its_text(feature_base, pictures, features, encoders):
    image = Image.open(pictures / "tall/roof.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pictures / "tall/roof.png")
    assert made(prepare(pictures, features, encoders, *OPTIONS)) == (1, 1, 0, 1)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("json", (0, 0, 0, 1)),
        ("vae.npy", (1, 0, 0, 1)),
        ("dinov3.npy", (0, 1, 0, 1)),
        ("dinov3_patches.npy", (0, 1, 0, 1)),
        ("t5h.npy", (0, 0, 1, 1)),
        ("t5m.npy", (0, 0, 1, 1)),
    ],
)
def test_a_damaged_member_is_made_again_and_nothing_else(
    feature_base, features, encoders, key, expected
):
    flip_byte(features, "wide/roof.png", key)
    assert made(prepare(feature_base / "pictures", features, encoders, *OPTIONS)) == expected
    assert content(features) == content(feature_base / "features")


def _infinite(description, members):
    array = feature_shards.from_npy(members["vae.npy"]).copy()
    array[0, 0, 0] = np.inf
    members["vae.npy"] = feature_shards.to_npy(array)


def _small_grid(description, members):
    members["dinov3_patches.npy"] = feature_shards.to_npy(np.ones((49, 32), np.float16))


def _padded_text(description, members):
    members["t5h.npy"] = feature_shards.to_npy(np.ones((77, 32), np.float16))
    members["t5m.npy"] = feature_shards.to_npy(np.arange(77) < 5)


def _other_fingerprint(description, members):
    description["fingerprint"]["text"] = "0" * 32


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_infinite, (NUM, 0, 0, 11)),
        (_small_grid, (0, NUM, 0, 11)),
        (_padded_text, (0, 0, NUM, 11)),
        (_other_fingerprint, (0, 0, NUM, 11)),
    ],
)
def test_that_something_exists_with_its_checksum_proves_nothing(
    feature_base, features, encoders, change, expected
):
    rewrite_shards(features, change)
    assert made(prepare(feature_base / "pictures", features, encoders, *OPTIONS)) == expected
    assert content(features) == content(feature_base / "features")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda shard: shard.unlink(), (2, 2, 2)),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-600]), (0, 0, 0)),
        (lambda shard: shard.write_bytes(shard.read_bytes() + b"x"), (0, 0, 0)),
        (lambda shard: shard.write_bytes(b""), (2, 2, 2)),
        (lambda shard: shard.rename(shard.with_name("shard-000009.tar")), (0, 0, 0)),
        (lambda shard: (shard.parent / "manifest.json").unlink(), (0, 0, 0)),
        (lambda shard: (shard.parent / "manifest.json").write_text("{"), (0, 0, 0)),
        (lambda shard: (shard.parents[2] / "features.json").write_text("{"), (0, 0, 0)),
        (lambda shard: (shard.parents[2] / "features.json").unlink(), (0, 0, 0)),
        (lambda shard: (shard.parents[2] / "images.jsonl").write_text("{"), (0, 0, 0)),
    ],
)
def test_damaged_files_are_written_again_from_what_is_left(
    feature_base, features, encoders, damage, expected
):
    damage(read_manifest(features, "train", NAMES[0]).files[0])
    output = prepare(feature_base / "pictures", features, encoders, *OPTIONS)
    assert made(output)[:3] == expected
    assert content(features) == content(feature_base / "features")


# One feature at a time.


def test_features_prepared_one_at_a_time_are_put_together_at_the_end(
    feature_base, encoders, tmp_path
):
    source, out = feature_base / "pictures", tmp_path / "out"
    for feature, option in zip(FEATURES, encoders, strict=True):
        output = prepare(source, out, [option], *OPTIONS, f"--only={feature}")
        assert f"{NUM} of {NUM} {feature} features made" in output
        assert not is_complete(out)
        again = prepare(source, out, [option], *OPTIONS, f"--only={feature}")
        assert f"0 of {NUM} {feature} features made" in again
    assert "is not finished" in fail(dataset_tool, "info", out)
    assert made(prepare(source, out, encoders, *OPTIONS))[:3] == (0, 0, 0)
    assert content(out) == content(feature_base / "features")


def test_latents_need_no_captions_yet(pictures, encoders, tmp_path):
    for path in pictures.rglob("*.txt"):
        path.unlink()
    prepare(pictures, tmp_path / "out", encoders[:1], "--only=vae")
    assert "17 of 17 images of" in refusal(pictures, tmp_path / "out", encoders)


def test_one_feature_prepared_for_a_complete_folder_leaves_that_in_use(
    feature_base, features, encoders, tmp_path
):
    source = feature_base / "pictures"
    text = f"--text={tiny_text(tmp_path / 'text', seed=1)}"
    before = content(features)
    prepare(source, features, [text], *OPTIONS, "--only=text")
    after = content(features)
    assert {name: after[name] for name in before} == before
    assert made(prepare(source, features, [*encoders[:2], text], *OPTIONS))[:3] == (0, 0, 0)
    prepare(source, tmp_path / "fresh", [*encoders[:2], text], *OPTIONS)
    assert content(features) == content(tmp_path / "fresh")


def test_a_complete_folder_is_read_whole_whatever_was_found_in_it_before(
    feature_base, features, encoders
):
    source = feature_base / "pictures"
    prepare(source, features, encoders[2:], *OPTIONS, "--only=text")
    path = place_of(features, "wide/roof.png", "vae.npy")[0]
    stat = path.stat()
    flip_byte(features, "wide/roof.png", "vae.npy")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert made(prepare(source, features, encoders, *OPTIONS)) == (1, 0, 0, 1)
    assert content(features) == content(feature_base / "features")


@pytest.mark.parametrize("damage", ["bytes", "fingerprint", "shape", "nan"])
def test_a_staged_feature_that_is_not_right_is_made_again(feature_base, encoders, tmp_path, damage):
    source, out = feature_base / "pictures", tmp_path / "out"
    prepare(source, out, encoders[:1], *OPTIONS, "--only=vae")
    path = sorted((out / ".staged").rglob("*.zip"))[3]
    name, _, fingerprint = path.stem.partition("-")
    if damage == "bytes":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path) as archive:
            latent = feature_shards.from_npy(archive.read("vae.npy")).copy()
        if damage == "shape":
            latent = latent[:, 1:]
        if damage == "nan":
            latent[0, 0, 0] = np.nan
        if damage == "fingerprint":
            path.unlink()
            fingerprint = "0" * 32
        members = {"vae.npy": feature_shards.to_npy(latent)}
        Stage(out).put(name, "vae", fingerprint, members)
    assert made(prepare(source, out, encoders, *OPTIONS))[:3] == (1, NUM, NUM)
    assert content(out) == content(feature_base / "features")


# Stops.


def test_batches_after_a_stop_are_those_without_one(pictures, encoders, tmp_path, monkeypatch):
    """The last digits of what encoders make of a sample depend on its batch."""
    options = encoders, "--batch=4", "--shard-size=5", "--workers=1"
    prepare(pictures, tmp_path / "whole", *options)
    expected, put, seen = content(tmp_path / "whole"), FeatureEncoder._put, []
    batches = []
    encode = Autoencoder.moments

    def noted(self, images):
        batches.append(images.numpy().tobytes())
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "moments", noted)
    prepare(pictures, tmp_path / "again", *options)
    usual = {*batches}
    for stop in (2, 9, 26, 40):

        def stopped(self, *args, last=stop):
            seen.append(None)
            if len(seen) > last:
                raise KeyboardInterrupt
            put(self, *args)

        out = tmp_path / f"stopped-{stop}"
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(FeatureEncoder, "_put", stopped)
            command = ("features", f"--source={pictures}", f"--dest={out}", f"--buckets={BUCKETS}")
            assert call(dataset_tool, *command, *encoders, *options[1:]).code == 130
        batches.clear()
        prepare(pictures, out, *options)
        assert {*batches} <= usual
        assert content(out) == expected


def test_a_stop_at_any_write_loses_nothing_that_was_finished(
    feature_base, pictures, features, encoders, tmp_path, monkeypatch
):
    """Images added and removed, a caption edited, another text encoder, shards of another size."""
    for name in ("a", "b", "c"):
        (pictures / f"{name}.png").write_bytes((pictures / "wide/sky.png").read_bytes())
        (pictures / f"{name}.txt").write_text("detail")
    (pictures / "tall/roof.png").unlink()
    (pictures / "tall/temple.txt").write_text("the temple")
    text = f"--text={tiny_text(tmp_path / 'text', seed=1)}"
    options = (*encoders[:2], text), "--batch=1", "--shard-size=3", "--workers=1"
    prepare(pictures, tmp_path / "fresh", *options)
    expected = content(tmp_path / "fresh")

    replace, put, state = os.replace, FeatureEncoder._put, dict(left=0)

    def stopped_replace(source, target):
        state["left"] -= 1
        if state["left"] < 0:
            raise KeyboardInterrupt
        replace(source, target)
        state["writes"] += 1
        state["made"] += Path(target) in state["encoded"]

    def noted_put(self, image, feature, arrays, *facts):
        key = image.id, feature, self.plan.fingerprints[image.id][feature]
        state["encoded"].add(self.stage.file(*key))
        put(self, image, feature, arrays, *facts)

    def start(left):
        state.update(left=left, made=0, writes=0, encoded=set())

    monkeypatch.setattr("os.replace", stopped_replace)
    monkeypatch.setattr(FeatureEncoder, "_put", noted_put)
    start(10_000)
    prepare(pictures, shutil.copytree(features, tmp_path / "whole"), *options)
    num_writes, num_made = state["writes"], state["made"]
    assert num_made == 3 + 3 + 19
    for stop in [*range(1, num_writes, 9), num_writes - 2, num_writes - 1]:
        out = shutil.copytree(features, tmp_path / f"stopped-{stop}")
        start(stop)
        command = ("features", f"--source={pictures}", f"--dest={out}", f"--buckets={BUCKETS}")
        assert call(dataset_tool, *command, *options[0], *options[1:]).code == 130
        first = state["made"]
        if is_complete(out):  # Then it can be trained on: all is as it was, or as it will be.
            visible = {
                name: data for name, data in content(out).items() if not re.search(r"(^|/)\.", name)
            }
            assert visible in (content(features), expected), f"stopped after {stop} writes"
        start(10_000)
        output = prepare(pictures, out, *options)
        assert first + sum(made(output)[:3]) == num_made, f"stopped after {stop} writes"
        assert content(out) == expected


def test_shards_that_are_finished_are_not_read_again(feature_base, encoders, tmp_path, monkeypatch):
    source, out = feature_base / "pictures", tmp_path / "out"
    command = ("features", f"--source={source}", f"--dest={out}", f"--buckets={BUCKETS}")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack, "finish", stop)
        assert call(dataset_tool, *command, *encoders, *OPTIONS).code == 130
    monkeypatch.setattr(pack, "check_shard", None)
    assert made(prepare(source, out, encoders, *OPTIONS)) == (0, 0, 0, 0)
    assert content(out) == content(feature_base / "features")


def test_what_is_damaged_after_it_was_looked_at_is_made_again(
    feature_base, features, encoders, monkeypatch
):
    read = pack.read_member

    def damaged(descriptor, index, row, key):
        if key == "vae.npy":
            raise ValueError("differs")
        return read(descriptor, index, row, key)

    options = (*OPTIONS, "--shard-size=3")
    source = feature_base / "pictures"
    with monkeypatch.context() as patch:
        patch.setattr(pack, "read_member", damaged)
        # The last three shards, of one sample each, are right as they are.
        assert made(prepare(source, features, encoders, *options))[:3] == (NUM - 3, 0, 0)
    assert made(prepare(source, features, encoders, *OPTIONS))[:3] == (0, 0, 0)
    assert content(features) == content(feature_base / "features")


def test_what_is_damaged_on_the_stage_before_it_is_packed_is_one_sentence(
    feature_base, encoders, tmp_path, monkeypatch
):
    source, out = feature_base / "pictures", tmp_path / "out"
    real = pack.pack

    def damaged(path, plan, images, stage):
        staged = stage.file(*plan.keys(images[-1])[0])
        staged.write_bytes(staged.read_bytes()[:-7])
        real(path, plan, images, stage)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "pack", damaged)
        message = refusal(source, out, encoders, *OPTIONS)
    assert ".zip: was altered while it was in use; start the same command again." in message
    num_made = made(prepare(source, out, encoders, *OPTIONS))[:3]
    assert 1 <= num_made[0] <= 11
    assert num_made[1:] == (0, 0)
    assert content(out) == content(feature_base / "features")


def test_a_change_of_all_shards_takes_little_more_space_than_the_features(
    feature_base, features, encoders, monkeypatch
):
    sizes, real = [], os.replace

    def noted(source, target):
        real(source, target)
        files = [*features.rglob("*.zip"), *features.rglob("*.tar")]
        sizes.append(sum(path.stat().st_size for path in files))

    before = sum(path.stat().st_size for path in features.rglob("*.tar"))
    largest = max(path.stat().st_size for path in features.rglob("*.tar"))
    monkeypatch.setattr("os.replace", noted)
    options = (*OPTIONS, "--shard-size=3", "--validation-share=0", "--workers=1")
    assert made(prepare(feature_base / "pictures", features, encoders, *options))[:3] == (0, 0, 0)
    assert max(sizes) < before + 2.5 * largest < 1.5 * before


# What earlier versions left.


def test_an_unfinished_folder_of_an_earlier_version_goes_on(feature_base, encoders, tmp_path):
    """Staged files without fingerprints in their names, and shards that were set aside."""
    source, out = feature_base / "pictures", tmp_path / "out"
    prepare(source, out, encoders[:1], *OPTIONS, "--only=vae")
    staged = sorted((out / ".staged").rglob("*.zip"))
    assert len(staged) == NUM
    for path in staged:
        path.rename(path.with_stem(path.stem.partition("-")[0]))
    (out / ".old").mkdir()
    shard = read_manifest(feature_base / "features", "train", NAMES[0]).files[1]
    shutil.copy(shard, out / ".old/000000.tar")
    assert made(prepare(source, out, encoders, *OPTIONS)) == (0, NUM - 2, NUM - 2, 11)
    assert content(out) == content(feature_base / "features")
    assert not (out / ".old").exists()
