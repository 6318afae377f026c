"""dataset_tool.py encode: what it writes, kills and repairs, ranks, refusals, info and verify."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, call, fail, on_ranks, run_warm, succeed
from image_files import make_folder, run_tool
from latent_files import encode, tiny_autoencoder, tiny_images, tiny_latents
from safetensors.torch import load_file, save_file

import dataset_tool
from data.images.dataset import ImageDataset
from data.latents import encode as encoding
from data.latents.dataset import LatentDataset
from encoders.autoencoder import Autoencoder, load_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = ("--hflip", "--shard-size=10")  # Of the archive in `base`.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with images.npz (37, labelled), vae, and latents made with OPTIONS."""
    folder = tmp_path_factory.mktemp("encode")
    tiny_latents(folder, "--hflip")
    return folder


@pytest.fixture
def copied(base, tmp_path):
    """A copy of the archive, to be damaged."""
    return shutil.copytree(base / "latents", tmp_path / "copied")


@pytest.fixture
def written(monkeypatch):
    """Names of the arrays that encoding writes."""
    names = []
    write = encoding._write_array

    def note(path, values):
        names.append(path.name)
        write(path, values)

    monkeypatch.setattr(encoding, "_write_array", note)
    return names


def command(base, dest, *options):
    source, vae = base / "images.npz", base / "vae"
    return ("encode", f"--source={source}", f"--dest={dest}", f"--vae={vae}", *options)


def again(base, dest, *options):
    """Encode the images of ``base`` in this process; return what was printed."""
    return encode(base / "images.npz", dest, base / "vae", *options)


def refusal(base, dest, *options):
    return fail(dataset_tool, *command(base, dest, *options))


def content(folder):
    """Return the bytes of every visible file of a folder by name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def flip_byte(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# What it writes.


def test_an_archive_holds_the_moments_of_images_and_mirror_images(base):
    vae, pixels = load_autoencoder(base / "vae", "cpu"), ImageDataset(base / "images.npz")
    x = pixels.__getitems__(range(10, 20))[0]
    values = np.load(base / "latents/shard-00001.npy")
    assert values.dtype == np.float16
    assert values.shape == (10, 2, 8, 4, 4)
    for variant, images in enumerate((x, x.flip(-1))):
        expected = vae.moments(images).to(torch.float16).numpy()
        np.testing.assert_array_equal(values[:, variant], expected)
    assert np.load(base / "latents/shard-00003.npy").shape == (7, 2, 8, 4, 4)


def test_the_record_says_how_an_archive_was_made(base):
    record = json.loads((base / "latents/latents.json").read_text())
    for name, value in dict(
        format="setdiffit-latents",
        version=1,
        num_images=37,
        latent_shape=[4, 4, 4],
        kind="mean-std",
        mirrored=True,
        precision="fp32",
        input_transform="x / 127.5 - 1",
        source="images",
        class_names=["0", "1", "2"],
    ).items():
        assert record[name] == value, name
    assert [shard["num_images"] for shard in record["shards"]] == [10, 10, 10, 7]
    assert {"torch", "diffusers", "python"} <= set(record["packages"])


def test_neither_batch_nor_loader_processes_change_more_than_rounding(base, tmp_path):
    again(base, tmp_path / "workers", *OPTIONS, "--workers=2")
    assert content(tmp_path / "workers") == content(base / "latents")
    again(base, tmp_path / "batch", *OPTIONS, "--batch=3")
    for name in ("shard-00000.npy", "shard-00003.npy"):
        found, expected = np.load(tmp_path / "batch" / name), np.load(base / "latents" / name)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)


def test_bfloat16_products_are_close_and_noted(base, tmp_path):
    again(base, tmp_path / "bf16", *OPTIONS, "--precision=bf16")
    found, expected = LatentDataset(tmp_path / "bf16"), LatentDataset(base / "latents")
    assert found.record.precision == "bf16"
    difference = (found[5][0] - expected[5][0]).abs().max()
    assert 1e-4 < difference < 0.1


def test_grayscale_images_of_a_folder_without_labels_become_latents(tmp_path):
    vae = tiny_autoencoder(tmp_path / "vae", img_channels=1, latent_channels=2)
    source = make_folder(tmp_path / "in", ["1.png", "2.png"], mode="L")
    output = encode(source, tmp_path / "out", vae)
    assert "out: 2 latents of 2x4x4, no labels." in output
    assert not (tmp_path / "out/labels.npy").exists()
    assert LatentDataset(tmp_path / "out").img_channels == 1


# Ranks and interruptions.


TWICE = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from torch_utils import distributed
from data.latents.encode import Encoding, encode

source, vae, dest = sys.argv[2:]
encoding, device = Encoding(hflip=True, shard_size=10), distributed.init()
for num_missing in (4, 1):
    assert encode(source, dest, vae, encoding, device)[1] == num_missing
    if distributed.is_main() and num_missing == 4:
        (Path(dest) / "shard-00002.npy").unlink()
    distributed.barrier()
assert encode(source, dest, vae, encoding, device)[1] is None
distributed.shutdown()
"""


def test_two_ranks_write_the_bytes_of_one_also_when_only_one_shard_is_missing(base, tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    paths = (ROOT, base / "images.npz", base / "vae", tmp_path / "two")
    on_ranks(2, tmp_path / "twice.py", *paths)
    assert content(tmp_path / "two") == content(base / "latents")


KILLED = """
import os, signal
import dataset_tool
from data.latents import encode as encoding

number = 0

def killed_while_writing(path, values):
    global number
    number += 1
    if number == 3:
        with encoding.atomic_write(path) as file:
            file.write(values.data[: len(values) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    write_array(path, values)

write_array, encoding._write_array = encoding._write_array, killed_while_writing
dataset_tool.main()
"""


def test_a_killed_encoding_goes_on_with_what_is_missing(base, tmp_path, written):
    dest = tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED)
    killed = run_warm(tmp_path / "killed.py", *command(base, dest, *OPTIONS))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (dest / "latents.json").exists()
    assert len(list(dest.glob(".shard-*.tmp"))) == 1
    assert "encoding is not finished" in fail(dataset_tool, "info", dest)
    assert "encoding is not finished" in run_tool("verify", dest)[1]
    assert "2 of 4 shards existed already" in again(base, dest, *OPTIONS)
    assert written == ["shard-00002.npy", "shard-00003.npy", "crc32.npy", "labels.npy"]
    assert content(dest) == content(base / "latents")
    assert not list(dest.glob(".*.tmp"))


def test_an_encoding_stopped_before_its_record_needs_the_record_alone(base, tmp_path, written):
    dest = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:

        def stop(path, content):
            if path.name == "latents.json":
                raise KeyboardInterrupt
            write_json(path, content)

        write_json = encoding.write_json
        patch.setattr(encoding, "write_json", stop)
        assert call(dataset_tool, *command(base, dest, *OPTIONS)).code == 130
    assert not (dest / "latents.json").exists()
    written.clear()
    assert "4 of 4 shards existed already" in again(base, dest, *OPTIONS)
    assert written == ["crc32.npy", "labels.npy"]
    assert content(dest) == content(base / "latents")


def test_a_complete_archive_is_left_alone(base, copied, written):
    times = {path: path.stat().st_mtime_ns for path in copied.iterdir() if path.suffix}
    assert "complete already" in again(base, copied, *OPTIONS, "--batch=5")
    assert written == []
    assert times == {path: path.stat().st_mtime_ns for path in times}


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        (lambda f: (f / "shard-00001.npy").unlink(), ["shard-00001.npy"]),
        (lambda f: _shorten(f / "shard-00003.npy"), ["shard-00003.npy"]),
        (lambda f: (f / "shard-00000.npy").write_bytes(b""), ["shard-00000.npy"]),
        (lambda f: (f / "latents.json").write_text("{"), []),
        (lambda f: (f / "latents.json").unlink(), []),
        (lambda f: (f / "labels.npy").unlink(), []),
        (lambda f: (f / "encoding.json").unlink() or flip_byte(f / "labels.npy"), []),
        # What has other bytes than the record says is made again as well, once one is missing.
        (
            lambda f: (f / "shard-00001.npy").unlink() or flip_byte(f / "shard-00002.npy"),
            ["shard-00001.npy", "shard-00002.npy"],
        ),
    ],
)
def test_a_damaged_archive_is_repaired(base, copied, written, change, remade):
    change(copied)
    again(base, copied, *OPTIONS)
    assert written == [*remade, "crc32.npy", "labels.npy"]
    assert content(copied) == content(base / "latents")


# Refusals.


def test_another_encoding_is_refused_with_what_differs(base, copied, tmp_path):
    message = refusal(base, copied, "--shard-size=9", "--precision=bf16", "--mean-only")
    for name in ("--hflip", "--mean-only", "--precision", "--shard-size"):
        assert name in message
    assert "--vae" not in message
    vae = tiny_autoencoder(tmp_path / "vae", scaling_factor=0.25)
    message = fail(dataset_tool, *command(base, copied, *OPTIONS), f"--vae={vae}")
    assert "another autoencoder (--vae); choose another folder" in message
    other = tiny_images(tmp_path / "other.npz", num_images=37, num_classes=0)
    (copied / "encoding.json").unlink()  # The record says as much.
    message = fail(dataset_tool, *command(base, copied, *OPTIONS), f"--source={other}")
    assert "another images (--source); choose another folder" in message
    assert content(copied).keys() == content(base / "latents").keys() - {"encoding.json"}


def test_a_claim_that_cannot_be_read_is_one_sentence(base, copied):
    (copied / "encoding.json").write_text("{")
    assert "encoding.json: cannot be read" in refusal(base, copied, *OPTIONS)


def test_images_that_do_not_fit_are_refused_before_work_starts(base, tmp_path):
    for name, options, message in (
        ("odd.npz", dict(size=9), "holds images of 9x9, but the autoencoder"),
        ("gray.npz", dict(img_channels=1), "holds images of 1 channel(s), but the autoencoder"),
    ):
        source = tiny_images(tmp_path / name, num_images=2, **options)
        assert message in refusal(base, tmp_path / "out", f"--source={source}")
    assert "no such file" in refusal(base, tmp_path / "out", "--source=nothing.zip")
    assert "https://host/images: images at an address must be in one file" in refusal(
        base, tmp_path / "out", "--source=https://host/images"
    )
    assert "latents holds latents already" in refusal(
        base, tmp_path / "out", f"--source={base / 'latents'}"
    )
    assert not (tmp_path / "out").exists()


def test_a_target_of_another_kind_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written, because" in refusal(base, tmp_path / "file")
    assert "latents are written to a folder" in refusal(base, tmp_path / "out.zip")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/other.txt").write_text("")
    assert "in holds other files and no latents" in refusal(base, tmp_path / "in")


def test_two_encodings_of_one_folder_do_not_meet(base, tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(); input()"
    dest = tmp_path / "out"
    dest.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, dest / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        holder.stdout.readline()
        assert "another process is encoding into" in refusal(base, dest)
        holder.communicate(b"\n")
    again(base, dest)


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_values_that_float16_cannot_hold_are_one_sentence_with_the_image(base, tmp_path, value):
    vae = shutil.copytree(base / "vae", tmp_path / "vae")
    weights = load_file(vae / WEIGHTS)
    weights["quant_conv.bias"][0] = value
    save_file(weights, vae / WEIGHTS, metadata={"format": "pt"})
    message = refusal(base, tmp_path / "out", f"--vae={vae}")
    assert "images.npz, image 0: its latent has values that are not finite" in message
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_broken_image_and_want_of_memory_are_one_sentence(base, tmp_path, monkeypatch):
    source = make_folder(tmp_path / "in", ["1.png", "2.png"])
    (source / "2.png").write_bytes((source / "2.png").read_bytes()[:80])
    message = refusal(base, tmp_path / "out", f"--source={source}")
    assert message.startswith(f"Error: {source / '2.png'}: cannot be read")

    def no_memory(self, images):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Autoencoder, "moments", no_memory)
    assert "--batch: no memory for 10 images at once" in refusal(base, tmp_path / "other", *OPTIONS)


# Description and verification.


def test_info_tells_the_record_in_words(base):
    output = succeed(dataset_tool, "info", base / "latents").output
    dataset = LatentDataset(base / "latents")
    for text in (
        "latents       37, each with its mirror image",
        "latent shape  4x4x4, mean and standard deviation, float16",
        "normalised    (latent - 0) * 0.5",
        "images        8x8x3",
        f"autoencoder   {base / 'vae'}, hash {dataset.vae_hash}",
        "made with     fp32",
        "in 4 file(s)",
        f"content hash  {dataset.content_hash}",
        "classes       3",
        f"{np.bincount(dataset.labels)[2]}  2",
    ):
        assert text in output, text


def test_verify_lists_every_problem(base, copied):
    code, output = run_tool("verify", copied, "--workers=1")
    assert (code, "no problems found" in output) == (0, True)
    flip_byte(copied / "shard-00000.npy")
    (copied / "shard-00001.npy").unlink()
    values = np.load(copied / "shard-00002.npy")
    values[4, 1, 0, 0, 0] = np.inf
    np.save(copied / "shard-00002.npy", values)
    np.save(copied / "labels.npy", np.zeros(37, np.int64))
    shutil.copy(copied / "shard-00003.npy", copied / "shard-00004.npy")
    code, output = run_tool("verify", copied, "--workers=1")
    assert code == 1
    for problem in (
        "shard-00000.npy: its bytes differ from the checksum",
        "shard-00001.npy: is missing",
        "shard-00002.npy: its bytes differ",
        "shard-00002.npy: row 4 has values that no autoencoder gives",
        "labels.npy: damaged",
        "shard-00004.npy: is not in the record",
        "6 problem(s) found",
    ):
        assert problem in output, problem


def test_verify_tells_negative_deviations_and_damaged_records(base, copied):
    values = np.load(copied / "shard-00003.npy")
    values[6, 0, 4, 0, 0] = -1
    np.save(copied / "shard-00003.npy", values)
    assert "row 6 has values that no" in run_tool("verify", copied, "--workers=1")[1]
    (copied / "latents.json").write_text("[]")
    code, output = run_tool("verify", copied)
    assert code == 1
    assert "latents.json: not written by dataset_tool.py encode" in output
    assert "1 problem(s) found" in output


def test_help_shows_runnable_examples_and_needs_no_pytorch():
    assert "--nproc_per_node=8 dataset_tool.py encode --hflip" in (
        succeed(dataset_tool, "encode", "--help").output
    )
    code = "import dataset_tool, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
