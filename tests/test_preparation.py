"""dataset_tool.py features: what it writes, and what it refuses."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from feature_files import (
    BUCKETS,
    NUM_PICTURES,
    content,
    made,
    prepare,
    read_manifests,
    read_samples,
    tiny_encoders,
)
from helpers import fail
from image_files import make_zip
from latent_files import tiny_autoencoder
from PIL import Image
from safetensors.torch import load_file, save_file

import dataset_tool
from data.features import shards as feature_shards
from data.features.buckets import fit_image, parse_buckets
from data.features.config import SPLITS
from data.features.manifests import read_manifest
from data.features.preparation.encode import FeatureEncoder
from data.features.record import KEYS, read_feature_record
from data.images.decode import decode_image
from encoders.autoencoder import load_autoencoder
from encoders.text import load_text_encoder
from encoders.visual import load_visual_encoder

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


# What it writes.


def test_features_are_those_of_one_crop_of_each_image(feature_base):
    vae = load_autoencoder(feature_base / "vae", "cpu")
    visual = load_visual_encoder(feature_base / "visual", "cpu")
    text = load_text_encoder(feature_base / "text", "cpu")
    found = read_samples(feature_base / "features")
    assert len(found) == NUM
    for file, (description, arrays) in found.items():
        path = feature_base / "pictures" / file
        bucket = parse_buckets(description["bucket"])[0]
        image, crop = fit_image(decode_image(path.read_bytes()), bucket)
        assert description["crop"] == json.loads(json.dumps(crop.to_dict()))
        assert description["size"] == list(Image.open(path).size)
        assert description["caption"] == path.with_suffix(".txt").read_text().strip()
        assert description["source_hash"] == hashlib.sha256(path.read_bytes()).hexdigest()
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None]
        cls, patches = visual.encode(pixels)
        hidden, _, _ = text.encode([description["caption"]])
        expected = {
            "vae.npy": vae.moments(pixels)[0, :16],
            "dinov3.npy": cls[0],
            "dinov3_patches.npy": patches[0],
            "t5h.npy": hidden[0],
        }
        for key, value in expected.items():
            np.testing.assert_array_equal(arrays[key], value.to(torch.float16).numpy(), key)
        assert arrays["vae.npy"].shape == (16, *bucket.latent_size(8))
        assert arrays["dinov3_patches.npy"].shape == (np.prod(bucket.grid(16)), 32)
        assert arrays["t5m.npy"].dtype == bool
        assert arrays["t5m.npy"].all()
        assert len(arrays["t5m.npy"]) == len(description["caption"].split()) + 1


def test_shards_are_tars_of_adjacent_samples_without_dates(feature_base):
    record = read_feature_record(feature_base / "features")
    for manifest in read_manifests(feature_base / "features"):
        assert manifest.ids == sorted(manifest.ids)
        assert [shard["num_samples"] for shard in manifest.shards[:-1]] == [2] * (
            len(manifest.shards) - 1
        )
        row = 0
        for path, shard in zip(manifest.files, manifest.shards, strict=True):
            data = path.read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (
                shard["num_bytes"],
                shard["sha256"],
            )
            with tarfile.open(path) as tar:
                members = list(tar)
            for start in range(0, len(members), len(KEYS)):
                for key, member in zip(KEYS, members[start:], strict=False):
                    assert member.name == f"{manifest.ids[row]}.{key}"
                    assert member.offset_data == manifest.offset[key][row]
                    assert member.size == manifest.size[key][row]
                    assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                row += 1
        assert row == len(manifest)
    assert record.num_samples("train") + record.num_samples("validation") == NUM


def test_webdataset_reads_the_shards(feature_base):
    webdataset = pytest.importorskip("webdataset")
    manifest = read_manifest(feature_base / "features", "train", NAMES[0])
    urls = [str(path) for path in manifest.files]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == manifest.ids
    assert found[0]["vae.npy"].shape == (16, 16, 16)


def test_the_record_names_encoders_buckets_and_counts(feature_base):
    record = read_feature_record(feature_base / "features")
    assert [bucket.name for bucket in record.buckets] == NAMES
    assert [sum(bucket.num.values()) for bucket in record.buckets] == [8, 5, 4]
    assert record.buckets[1].latent_shape == (16, 12, 20)
    assert record.buckets[1].patch_grid == (6, 10)
    assert record.buckets[1].bucket.size == (160, 96)
    for feature, values in dict(
        vae=dict(channels=16, downsampling=8, scale=0.3611, shift=0.1159),
        visual=dict(patch_size=16, num_registers=4, dim=32),
        text=dict(dim=32, max_tokens=512),
    ).items():
        facts = getattr(record, feature)
        assert facts["location"] == str(feature_base / feature)
        assert len(facts["hash"]) == 64
        assert {name: facts[name] for name in values} == values
    assert {"torch", "transformers", "diffusers"} <= set(record.packages)
    assert record.captions["num_truncated"] == 0


def test_every_bucket_validates_the_samples_with_the_lowest_names(feature_base):
    for name in NAMES:
        train, validation = (
            read_manifest(feature_base / "features", split, name) for split in SPLITS
        )
        assert len(validation) == 1
        assert validation.ids[0] < min(train.ids)


def test_the_share_that_validates_is_rounded_and_never_all_of_a_bucket(
    feature_base, features, encoders
):
    for share, expected in ((0, [0, 0, 0]), (0.3, [2, 2, 1]), (0.99, [7, 4, 3])):
        output = prepare(
            feature_base / "pictures", features, encoders, *OPTIONS, f"--validation-share={share}"
        )
        assert made(output)[:3] == (0, 0, 0)
        record = read_feature_record(features)
        assert [bucket.num["validation"] for bucket in record.buckets] == expected


def test_statistics_are_those_of_all_values_of_the_training_split(feature_base):
    record = read_feature_record(feature_base / "features")
    rows = dict(vae=[], cls=[], patches=[])
    for description, arrays in read_samples(feature_base / "features").values():
        if description["split"] == "train":
            arrays = {key: value.astype(np.float64) for key, value in arrays.items()}
            rows["vae"].append(arrays["vae.npy"].reshape(16, -1).T)
            rows["cls"].append(arrays["dinov3.npy"][None])
            rows["patches"].append(arrays["dinov3_patches.npy"])
    for name, values in rows.items():
        values = np.concatenate(values)
        found = record.statistics[name]
        assert found["count"] == len(values)
        np.testing.assert_allclose(found["mean"], values.mean(axis=0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found["std"], values.std(axis=0), rtol=1e-12)


def test_merged_moments_keep_their_digits_far_from_zero_and_in_skewed_parts():
    rng = np.random.default_rng(0)
    values = 1e6 + rng.normal(size=(1000, 3)) * [1, 10, 1e-3]
    total = dict(count=0)
    for first, last in ((0, 1), (1, 3), (3, 900), (900, 1000)):
        total = feature_shards.merge_moments(total, feature_shards.moments_of(values[first:last]))
    np.testing.assert_allclose(total["mean"], values.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(total["m2"] / 1000, values.var(axis=0), rtol=1e-6)


def test_a_turned_photograph_is_cropped_upright(feature_base, tmp_path, encoders):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    image = Image.open(feature_base / "pictures/wide/temple.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by a quarter.
    image.save(pictures / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(pictures / "upright.png")
    for name in ("turned", "upright"):
        (pictures / f"{name}.txt").write_text("the flower")
    prepare(pictures, tmp_path / "out", encoders)
    found = read_samples(tmp_path / "out")
    for key, value in found["upright.png"][1].items():
        np.testing.assert_array_equal(found["turned.png"][1][key], value)
    assert found["turned.png"][0]["bucket"] == "96x160"


def test_cut_captions_are_counted_also_when_they_are_used_again(tmp_path, pictures, encoders):
    for name in ("square/temple", "tall/roof"):
        (pictures / f"{name}.txt").write_text("the old temple " * 200)
    out = tmp_path / "out"
    prepare(pictures, out, encoders, *OPTIONS)
    assert read_feature_record(out).captions["num_truncated"] == 2
    assert len(read_samples(out)["tall/roof.png"][1]["t5m.npy"]) == 512
    (pictures / "wide/sky.txt").write_text("another sky")
    output = prepare(pictures, out, encoders, *OPTIONS, "--shard-size=3")
    assert made(output)[:3] == (0, 0, 1)
    assert read_feature_record(out).captions["num_truncated"] == 2
    assert sum(d["truncated"] for d, _ in read_samples(out).values()) == 2


def test_a_zip_of_the_images_gives_the_same_samples(feature_base, pictures, tmp_path, encoders):
    source = make_zip(tmp_path / "pictures.zip", pictures)
    prepare(source, tmp_path / "out", encoders, *OPTIONS)
    assert content(tmp_path / "out") == content(feature_base / "features")


# Refusals.


def test_broken_and_small_images_are_listed_or_left_out(pictures, encoders, tmp_path):
    path = pictures / "wide/flower.jpg"
    path.write_bytes(path.read_bytes()[:3000])
    Image.new("RGB", (60, 60)).save(pictures / "small.png")
    (pictures / "small.txt").write_text("detail")
    message = refusal(pictures, tmp_path / "out", encoders)
    assert "2 of 18 images cannot be used" in message
    assert f"{path}: image file is truncated" in message
    assert "small.png: is 60x60, which would be enlarged more than 2 times" in message
    output = prepare(pictures, tmp_path / "out", encoders, *OPTIONS, "--skip-broken")
    assert "Skipped 2 broken image(s)." in output
    assert len(read_samples(tmp_path / "out")) == NUM - 1


def test_the_first_images_alone_can_be_used(feature_base, encoders, tmp_path):
    prepare(feature_base / "pictures", tmp_path / "out", encoders, "--max-images=5")
    found = sorted(read_samples(tmp_path / "out"))
    assert (
        found
        == sorted(
            p.relative_to(feature_base / "pictures").as_posix()
            for p in (feature_base / "pictures/square").iterdir()
            if p.suffix != ".txt"
        )[:5]
    )


def test_missing_captions_are_counted_before_work_starts(pictures, encoders, tmp_path):
    (pictures / "tall/roof.txt").unlink()
    message = refusal(pictures, tmp_path / "out", encoders)
    assert "--captions: 1 of 17 images of" in message
    assert "tall/roof.png; write one for each" in message
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_refused_before_work_starts(feature_base, encoders, tmp_path):
    source, out = feature_base / "pictures", tmp_path / "out"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    vae, visual, _ = encoders
    for message, args in [
        ("--text: is needed", (source, out, [vae, visual])),
        ("--vae: has no effect with --only=text", (source, out, encoders, "--only=text")),
        ("leave out --only", (source, out, [vae], "--only=vae", "--overwrite")),
        ("holds other files and no features", (source, tmp_path / "other", encoders)),
        ("features are written to a folder", (source, tmp_path / "out.tar", encoders)),
        ("holds images of one size without", (tmp_path / "images.npz", out, encoders)),
        ("holds features already", (feature_base / "features", out, encoders)),
        ("is neither a folder nor a Hugging", (source, out, [vae, visual, "--text=nothing"])),
        ("no such file or folder", (tmp_path / "nothing", out, encoders)),
        ("--buckets: got 100x100", (source, out, encoders, "--buckets=100x100")),
        ("0<=x<1", (source, out, encoders, "--validation-share=1")),
    ]:
        assert message in refusal(*args)
    assert not out.exists()
    gray = tiny_autoencoder(tmp_path / "gray", img_channels=1, num_stages=4)
    assert "but features are made of RGB images" in refusal(
        source, out, [f"--vae={gray}"], "--only=vae"
    )


def test_two_preparations_of_one_folder_do_not_meet(feature_base, features, encoders):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, features / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        holder.stdout.readline()
        message = refusal(feature_base / "pictures", features, encoders)
        holder.communicate(b"\n")
    assert "another process is preparing" in message
    assert (features / "features.json").exists()


@pytest.mark.parametrize(
    ("option", "weight", "feature"),
    [
        (0, "quant_conv.bias", "vae"),
        (1, "norm.bias", "visual"),
        (2, "encoder.final_layer_norm.weight", "text"),
    ],
)
@pytest.mark.parametrize("value", [1e7, float("nan")])
def test_values_that_float16_cannot_hold_are_one_sentence_with_image_and_feature(
    feature_base, encoders, tmp_path, option, weight, feature, value
):
    name, _, location = encoders[option].partition("=")
    broken = shutil.copytree(location, tmp_path / "broken")
    (path,) = broken.glob("*.safetensors")
    weights = load_file(path)
    weights[weight] = torch.full_like(weights[weight], value)
    save_file(weights, path, metadata={"format": "pt"})
    message = refusal(
        feature_base / "pictures", tmp_path / "out", [f"{name}={broken}"], f"--only={feature}"
    )
    assert re.search(
        rf"pictures/\w+/\w+\.(png|jpg): its {feature} features have values that are not", message
    )
    assert not list((tmp_path / "out").rglob("*.zip"))


def test_want_of_memory_is_one_sentence(feature_base, encoders, tmp_path, monkeypatch):
    def no_memory(self, images):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("encoders.autoencoder.Autoencoder.moments", no_memory)
    message = refusal(feature_base / "pictures", tmp_path / "out", encoders[:1], "--only=vae")
    assert "--batch: no memory for" in message


def test_an_image_that_changes_under_way_is_noticed(pictures, encoders, tmp_path, monkeypatch):
    encode_images = FeatureEncoder.encode_images

    def changed(self, batches, on_done):
        shutil.copy(pictures / "tall/roof.png", pictures / "square/wall.png")
        encode_images(self, batches, on_done)

    monkeypatch.setattr(FeatureEncoder, "encode_images", changed)
    message = refusal(pictures, tmp_path / "out", encoders)
    assert "square/wall.png: was changed while features were made" in message
