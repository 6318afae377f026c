"""Autoencoders, latent archives as training reads them, and mirror images."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import forget_frames
from latent_files import encode, tiny_autoencoder, tiny_images, tiny_latents
from safetensors.torch import load_file, save_file

from data.images.dataset import ImageDataset, MirroredImages
from data.images.decode import ImageError
from data.latents.dataset import LatentDataset
from data.latents.record import is_latent_archive, verify_latents
from data.loader import make_loader
from data.samplers import PositionSampler
from encoders import autoencoder as autoencoder_module
from encoders.autoencoder import AUTOENCODER, Autoencoder, load_autoencoder, normalise

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with images.npz (labelled), vae, and latents: mirrored, in shards of 10."""
    folder = tmp_path_factory.mktemp("latents")
    tiny_latents(folder, "--hflip")
    return folder


@pytest.fixture
def vae(base):
    return load_autoencoder(base / "vae", "cpu")


@pytest.fixture
def copied(base, tmp_path):
    """A copy of the archive, to be damaged."""
    return shutil.copytree(base / "latents", tmp_path / "latents")


def images(num=3, size=8, channels=3):
    return torch.randint(0, 256, (num, channels, size, size), dtype=torch.uint8)


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


# Autoencoders.


@pytest.mark.parametrize("channels", [1, 3])
def test_moments_are_those_of_diffusers(tmp_path, channels):
    import diffusers

    folder = tiny_autoencoder(tmp_path, img_channels=channels, latent_channels=2)
    vae = load_autoencoder(str(folder), "cpu")
    assert (vae.img_channels, vae.latent_channels, vae.downsampling) == (channels, 2, 2)
    assert vae.location == str(folder)
    x = images(channels=channels)
    network = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        expected = network.encode(x.to(torch.float32) / 127.5 - 1).latent_dist
    found = vae.moments(x)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found[:, :2], expected.mean)
    torch.testing.assert_close(found[:, 2:], expected.std)


def test_decoding_undoes_normalisation(tmp_path):
    import diffusers

    folder = tiny_autoencoder(tmp_path, scaling_factor=0.3, shift_factor=0.7)
    vae = load_autoencoder(folder, "cpu")
    assert (vae.scale, vae.shift) == (0.3, 0.7)
    moments, noise = vae.moments(images()), torch.randn(3, 4, 4, 4)
    mean, std = moments.chunk(2, dim=1)
    z = normalise(moments, noise, vae.scale, vae.shift, 4)
    torch.testing.assert_close(z, (mean + std * noise - 0.7) * 0.3)
    torch.testing.assert_close(normalise(moments, None, 0.3, 0.7, 4), (mean - 0.7) * 0.3)
    torch.testing.assert_close(normalise(mean.half(), None, 1, 0, 4), mean.half().float())
    with pytest.raises(AssertionError):
        normalise(mean, noise, 0.3, 0.7, 4)
    network = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        expected = network.decode(mean + std * noise).sample
    torch.testing.assert_close(vae.decode(z), expected, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing_but_rounding(vae, monkeypatch):
    x = images(7)
    moments = vae.moments(x)
    whole = vae.decode(moments[:, :4])
    seen = []
    vae._network.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    vae._network.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(autoencoder_module, "_MAX_PIXELS", 3 * 64)
    with torch.inference_mode():
        torch.testing.assert_close(vae.moments(x), moments)
        torch.testing.assert_close(vae.decode(moments[:, :4]), whole)
    assert seen == [3, 3, 1, 3, 3, 1]
    monkeypatch.setattr(autoencoder_module, "_MAX_PIXELS", 1)  # An image is never cut.
    torch.testing.assert_close(vae.decode(moments[:, :4]), whole)
    assert vae.decode(torch.zeros(0, 4, 4, 4)).shape == (0, 3, 8, 8)


def test_precision_is_the_autoencoders_not_the_callers(base, vae):
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        inside = vae.moments(x)
    assert torch.equal(inside, vae.moments(x))
    rounded = load_autoencoder(base / "vae", "cpu", precision="bf16").moments(x)
    assert 1e-4 < (rounded - inside).abs().max() < 0.1
    with pytest.raises(ValueError, match="accepted: fp32, bf16"):
        load_autoencoder(base / "vae", "cpu", precision="fp8")


def test_identity_follows_weights_and_settings_not_files(base, vae, tmp_path):
    same = shutil.copytree(base / "vae", tmp_path / "same")
    save_file(load_file(same / WEIGHTS), same / WEIGHTS, metadata={"format": "pt", "x": "y"})
    edit_json(same / "config.json", sample_size=999, _name_or_path="elsewhere")
    assert load_autoencoder(same, "cpu", expected_hash=vae.sha256).sha256 == vae.sha256
    edit_json(same / "config.json", scaling_factor=0.25)
    assert load_autoencoder(same, "cpu").sha256 != vae.sha256
    other = shutil.copytree(base / "vae", tmp_path / "other")
    weights = load_file(other / WEIGHTS)
    weights["quant_conv.bias"] += 1e-3
    save_file(weights, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other is another autoencoder .* than the one whose"):
        load_autoencoder(other, "cpu", expected_hash=vae.sha256)


def test_weights_with_the_names_of_old_versions_are_read(base, vae, tmp_path):
    old = shutil.copytree(base / "vae", tmp_path / "old")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in load_file(old / WEIGHTS).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = value
    assert any("proj_attn" in name for name in weights)
    save_file(weights, old / WEIGHTS, metadata={"format": "pt"})
    assert load_autoencoder(old, "cpu").sha256 == vae.sha256


def _break_config(folder):
    (folder / "config.json").write_text("{")


def _pickle_weights(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no autoencoder .no config.json"),
        (_break_config, "not a valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not AutoencoderKL"),
        (
            lambda f: edit_json(f / "config.json", _class_name="VQModel"),
            "'VQModel', not AutoencoderKL",
        ),
        (lambda f: edit_json(f / "config.json", layers_per_block=2), "32 weights are missing"),
        (lambda f: edit_json(f / "config.json", latent_channels=5), "size mismatch"),
        (lambda f: edit_json(f / "config.json", latents_mean=[0] * 4), "by channel"),
        (lambda f: (f / WEIGHTS).unlink(), "no file named diffusion_pytorch_model.safetensors"),
        (_pickle_weights, "no file named diffusion_pytorch_model.safetensors"),
        (
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
            "Unable to load weights",
        ),
    ],
)
def test_an_unfit_folder_is_one_sentence(base, tmp_path, capfd, change, message):
    folder = shutil.copytree(base / "vae", tmp_path / "vae")
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_autoencoder(folder, "cpu")
    assert str(caught.value).startswith(f"--vae: {folder} ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_folder_around_the_autoencoder_is_named(base, tmp_path):
    shutil.copytree(base / "vae", tmp_path / "pipeline" / "vae")
    with pytest.raises(ValueError, match=r"a whole pipeline; give --vae=.*pipeline/vae"):
        load_autoencoder(tmp_path / "pipeline", "cpu")


def test_what_is_neither_folder_nor_id_or_cannot_be_fetched_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing is neither a folder nor a Hugging Face id"):
        load_autoencoder(tmp_path / "nothing", "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="nobody/nothing is not a folder, and cannot be fetched"):
        load_autoencoder("nobody/nothing", "cpu")


def test_a_missing_package_is_named_with_its_installation(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"package diffusers, .* pip install diffusers"):
        load_autoencoder(base / "vae", "cpu")


def test_loading_leaves_random_numbers_as_they_are(base, vae):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_autoencoder(base / "vae", "cpu")
    # What ranks other than the first do with what that one sends them.
    config, state = dict(vae._network.config), vae._network.state_dict()
    network = AUTOENCODER.rebuild(config, state)
    assert torch.equal(torch.rand(3), expected)
    assert Autoencoder(network, "elsewhere", "cpu").sha256 == vae.sha256


def test_images_that_do_not_fit_are_told_apart(vae):
    vae.check_images("data", 8, 3)
    with pytest.raises(ValueError, match=r"data: holds images of 1 channel.*takes 3"):
        vae.check_images("data", 8, 1)
    with pytest.raises(ValueError, match=r"data: holds images of 9x9.*multiples of 2"):
        vae.check_images("data", 9, 3)


# Reading archives.


def test_latents_have_the_surface_of_the_images(base, vae):
    data, pixels = LatentDataset(base / "latents"), ImageDataset(base / "images.npz", use_labels=1)
    assert is_latent_archive(base / "latents")
    assert not is_latent_archive(base / "images.npz")
    assert not is_latent_archive(base)
    assert len(data) == data.num_images == len(pixels) == 37
    assert (data.resolution, data.img_channels, data.latent_shape) == (8, 3, (4, 4, 4))
    assert (data.scale, data.shift) == (vae.scale, vae.shift) == (0.5, 0)
    assert (data.vae, data.vae_hash) == (str(base / "vae"), vae.sha256)
    assert (data.name, data.num_classes) == ("latents", 3)
    assert data.class_names == pixels.class_names
    np.testing.assert_array_equal(data.labels, pixels.labels)
    assert data.record.source_hash == pixels.content_hash
    assert data.file_label(25) == f"{base / 'latents'}/shard-00002.npy, row 5"
    assert (data.class_counts, data.summary()) == (pixels.class_counts, None)
    rows = data.preview(10).rows
    assert [len(row) for row in rows] == [8, 2]
    order = np.argsort(data.labels, kind="stable")
    assert torch.equal(rows[0][0], data[order[0]][0])
    assert torch.equal(rows[1][1], data[order[-1]][0])


def test_any_order_of_indices_gives_each_image_its_own_latent_and_label(base, vae):
    data = LatentDataset(base / "latents", hflip=True)
    pixels = ImageDataset(base / "images.npz", use_labels=True)
    assert len(data) == 74
    order = [36, 73, 0, 12, 37, 12, 9, 10, 49]
    latents, cond = data.__getitems__(order)
    assert latents.dtype == torch.float16
    x, labels = pixels.__getitems__([index % 37 for index in order])
    assert torch.equal(cond["label"], labels["label"])
    flipped = torch.tensor(order) >= 37
    x[flipped] = x[flipped].flip(-1)
    torch.testing.assert_close(latents.float(), vae.moments(x), rtol=2e-3, atol=1e-3)
    assert (vae.moments(x) - vae.moments(x.flip(-1))).abs().max() > 0.1
    latent, cond = data[49]
    assert torch.equal(latent, latents[8])
    assert cond["label"].shape == ()


def test_labels_can_be_required_and_left_out(base, tmp_path):
    data = LatentDataset(base / "latents", use_labels=False)
    assert (data.labels, data.num_classes, data.class_names) == (None, 0, [])
    assert data.__getitems__([1])[1] == {}
    source = tiny_images(tmp_path / "plain.npz", num_classes=0, num_images=3)
    encode(source, tmp_path / "plain", base / "vae")
    assert LatentDataset(tmp_path / "plain").labels is None
    with pytest.raises(ValueError, match="plain: has no class labels, which --cond needs"):
        LatentDataset(tmp_path / "plain", use_labels=True)


def test_a_subset_is_that_of_the_images(base):
    data = LatentDataset(base / "latents", max_size=5, seed=3, hflip=True)
    pixels = ImageDataset(base / "images.npz", max_size=5, seed=3, use_labels=True)
    whole = LatentDataset(base / "latents", hflip=True)
    assert (len(data), data.num_images) == (10, 5)
    np.testing.assert_array_equal(data.labels, pixels.labels)
    for index in (2, 7):
        there = int(pixels._indices[index % 5]) + 37 * (index >= 5)
        assert torch.equal(data[index][0], whole[there][0])
        assert data.file_label(index) == whole.file_label(there)


def test_the_content_hash_follows_all_that_training_sees(base, copied, tmp_path):
    archive = base / "latents"

    def digest(path=archive, **options):
        return LatentDataset(path, **options).content_hash

    assert digest(copied) == digest(max_size=37) == digest(use_labels=False) == digest()
    encode(base / "images.npz", tmp_path / "mean", base / "vae", "--mean-only", "--hflip")
    hashes = {
        digest(),
        digest(hflip=True),
        digest(max_size=5),
        digest(max_size=5, seed=1),
        digest(tmp_path / "mean"),
    }
    edit_json(copied / "latents.json", class_names=["x", "y", "z"])
    hashes.add(digest(copied))
    edit_json(copied / "latents.json", scale=0.75)
    hashes.add(digest(copied))
    assert len(hashes) == 7


def test_latents_of_the_mean_alone_have_half_the_channels(base, tmp_path):
    encode(base / "images.npz", tmp_path / "mean", base / "vae", "--mean-only")
    data, whole = LatentDataset(tmp_path / "mean"), LatentDataset(base / "latents")
    order = [3, 30]
    latents = data.__getitems__(order)[0]
    assert torch.equal(latents, whole.__getitems__(order)[0][:, :4])
    with pytest.raises(ValueError, match=r"no mirror images, .*dataset_tool.py encode --hflip"):
        LatentDataset(tmp_path / "mean", hflip=True)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_read_what_this_one_reads(base, context, monkeypatch):
    data = LatentDataset(base / "latents", hflip=True)
    data.__getitems__([0])  # A file is open when the processes start.
    sampler = PositionSampler(
        len(data), seed=0, start_nimg=0, batch_size=8, batch_gpu=8, rank=0, world_size=1
    )
    loader = make_loader(data, sampler, num_workers=2, device=torch.device("cpu"))
    loader.multiprocessing_context = context
    for _, keys, (latents, cond) in zip(range(12), sampler, loader, strict=False):
        expected, labels = data.__getitems__(keys)
        assert torch.equal(latents, expected)
        assert torch.equal(cond["label"], labels["label"])
    assert torch.equal(pickle.loads(pickle.dumps(data))[40][0], data[40][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(version=2), "format version 2, but .* reads up to 1; update"),
        (dict(version=0), "format version 0, but .* reads up to 1"),
        (dict(format="else"), "not written by dataset_tool.py encode"),
        (dict(num_images="many"), "damaged .num_images is 'many'"),
        (dict(num_images=38), "num_images is 38, but the shards hold 37"),
        (dict(latent_shape=[4, 4]), r"latent_shape is \[4, 4\]"),
        (dict(kind="median"), "kind is 'median'"),
        (dict(mirrored=1), "mirrored is 1"),
        (dict(scale=0), "scale is 0"),
        (dict(scale=float("nan")), "scale is nan"),
        (dict(shards=[{}]), r"shards\[0\].file is missing"),
        (
            dict(shards=[dict(file="../x", num_images=37, sha256="")]),
            "shard 0 is {'file': '../x'",
        ),
        (dict(labels_sha256=None), "class_names and labels_sha256 do not agree"),
        (dict(resolution=0), "resolution is 0"),
        (dict(latent_shape=[4, 4, 2]), r"holds float16 of shape \[10, 2, 8, 4, 4\], but"),
        (dict(class_names=["one"]), "labels from 0 to 2, but the record names 1 classes"),
    ],
)
def test_a_record_that_is_wrong_is_one_sentence(copied, changes, message):
    edit_json(copied / "latents.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        LatentDataset(copied)
    assert str(caught.value).startswith(str(copied))
    assert "\n" not in str(caught.value)


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "latents.json").write_text("{"), "latents.json: damaged, not valid JSON"),
        (lambda f: (f / "latents.json").unlink(), "its encoding is not finished"),
        (lambda f: (f / "shard-00001.npy").unlink(), "shard-00001.npy: is missing"),
        (
            lambda f: _shorten(f / "shard-00003.npy"),
            "bytes instead of",
        ),
        (lambda f: (f / "shard-00003.npy").write_bytes(b"x" * 99), "shard-00003.npy: damaged"),
        (
            lambda f: np.save(f / "shard-00000.npy", np.zeros((10, 2, 8, 4, 4))),
            "shard-00000.npy: holds float64",
        ),
        (lambda f: (f / "labels.npy").unlink(), "labels.npy: cannot be read .No such file"),
        (lambda f: _shorten(f / "labels.npy"), "labels.npy: cannot be read"),
        (
            lambda f: np.save(f / "labels.npy", np.zeros(37, np.int64)),
            "labels.npy: damaged, not the labels",
        ),
        (lambda f: (f / "crc32.npy").unlink(), "crc32.npy: cannot be read .No such file"),
        (
            lambda f: np.save(f / "crc32.npy", np.zeros((37, 2), np.uint32)),
            "crc32.npy: damaged, not the checksums",
        ),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(copied, change, message):
    change(copied)
    with pytest.raises(ValueError, match=message) as caught:
        LatentDataset(copied)
    assert str(caught.value).startswith(str(copied))
    assert "\n" not in str(caught.value)


def test_other_folders_are_no_latents(tmp_path):
    with pytest.raises(ValueError, match="not a folder of latents"):
        LatentDataset(tmp_path)


def test_a_file_that_is_cut_short_while_in_use_is_one_sentence(copied):
    data = LatentDataset(copied, hflip=True)
    _shorten(copied / "shard-00000.npy")
    data.__getitems__([9])
    # The mirror image of the shard's last is what its file ends with.
    loader = make_loader(data, [[37 + 9]], num_workers=1, device=torch.device("cpu"))
    told = r"^\S+shard-00000.npy: ends in the middle of row 9; .*$"
    with pytest.raises(ValueError, match=told) as caught:
        next(iter(loader))
    forget_frames(caught)


def test_a_flipped_byte_is_an_error_in_the_batch_that_has_it(copied):
    data, shard = LatentDataset(copied, hflip=True), copied / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    data.__getitems__([8, 9])
    with pytest.raises(ImageError, match=r"shard-00000.npy: row 9 differs from its checksum"):
        data.__getitems__([37 + 9])


def test_latents_of_earlier_versions_have_no_checksums_of_rows_and_are_read(copied):
    record = json.loads((copied / "latents.json").read_text())
    del record["checksums_sha256"]
    (copied / "latents.json").write_text(json.dumps(record))
    (copied / "crc32.npy").unlink()
    data = LatentDataset(copied)
    assert len(data.__getitems__([0, 36])[0]) == 2
    assert verify_latents(copied) == []


# Mirror images of pixels.


def test_mirrored_images_follow_the_images_themselves(base):
    pixels = ImageDataset(base / "images.npz", use_labels=True, cache=True)
    data = MirroredImages(pixels)
    assert (len(data), data.num_images) == (74, 37)
    order = [0, 37, 36, 73, 1]
    x, cond = data.__getitems__(order)
    own, labels = pixels.__getitems__([0, 0, 36, 36, 1])
    assert torch.equal(x[[0, 2, 4]], own[[0, 2, 4]])
    assert torch.equal(x[[1, 3]], own[[1, 3]].flip(-1))
    assert not torch.equal(x[1], own[1])
    assert torch.equal(cond["label"], labels["label"])
    assert torch.equal(data[37][0], x[1])
    assert torch.equal(data[0][0], x[0])  # The cache still holds it unflipped.
    assert data.resolution == 8
    assert data.content_hash == pixels.content_hash
    assert data.file_label(38) == pixels.file_label(1)
    assert torch.equal(pickle.loads(pickle.dumps(data))[73][0], x[3])
    with pytest.raises(AttributeError):
        data.nothing  # noqa: B018
