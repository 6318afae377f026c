"""A folder with good files of every kind, and with bad ones, for ``bad_invocations.txt``."""

import contextlib
import json
import os
import pickle
import shutil
import socket
import tarfile
import zipfile

import numpy as np
from golden_files import GOLDEN
from image_files import make_folder, make_zip
from PIL import Image


class Evil:
    """An object that leaves a file behind if it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


def make_bad_files(folder):
    """Fill a new folder, in which the invocations of the table run.

    It holds one run, dataset and snapshot of every family (from ``data/golden``), sound files that
    are for something else than what they are given for, and what nobody can use.
    """
    folder.mkdir()
    with tarfile.open(GOLDEN / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for kind in ("image", "latent", "sets", "features"):
        shutil.copy(folder / "runs" / kind / "network-snapshot-000000.pkl", folder / f"{kind}.pkl")
    _make_images(folder)
    _make_archives(folder)
    _make_damaged(folder)
    _make_strange(folder)
    return folder


def _make_images(folder):
    """Write sets of images that are sound, but differ from one another."""
    make_folder(folder / "pictures", ["a.png", "b.png", "c.png"])
    make_folder(folder / "classes", ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"])
    make_zip(folder / "unlabelled.zip", folder / "pictures")
    make_zip(folder / "grey.zip", make_folder(folder / "grey", ["a.png", "b.png"], mode="L"))
    make_zip(folder / "large.zip", make_folder(folder / "large", ["a.png"], width=16, height=16))
    make_zip(folder / "wide.zip", make_folder(folder / "wide", ["a.png"], width=16))
    make_folder(folder / "mixed", ["a.png"])
    make_folder(folder / "mixed", ["b.png"], width=4, height=4)
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(folder / "samples.npz", arr_0=images, arr_1=np.arange(4))
    np.savez(folder / "floats.npz", arr_0=images / 255)
    np.savez(folder / "other.npz", x=images)
    statistics = dict(mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "inception.npz", **statistics)
    np.savez(folder / "nan.npz", mu=np.full(2048, np.nan), sigma=statistics["sigma"])
    np.savez(folder / "short.npz", mu=np.zeros(3), sigma=np.eye(4))
    row = dict(metric="fd_pixels", value=1.0, num_images=4)
    (folder / "rows.json").write_text(json.dumps({"rows": [row]}))
    (folder / "other.json").write_text(json.dumps({"rows": [row | dict(num_images=5)]}))


def _make_archives(folder):
    """Write what is to be converted first: official archives, and folders as they unpack."""
    cifar = folder / "cifar-10-batches-py"
    cifar.mkdir()
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (cifar / name).write_bytes(pickle.dumps(batch, protocol=2))
    (cifar / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}, 2))
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(cifar, cifar.name)
    (folder / "mnist").mkdir()
    for kind, shape in (("images-idx3", (2, 28, 28)), ("labels-idx1", (2,))):
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        data = header + bytes(int(np.prod(shape)))
        (folder / "mnist" / f"train-{kind}-ubyte").write_bytes(data)


def _make_damaged(folder):
    """Write files that are damaged, or that would do harm."""
    for name in ("image.pkl", "images.zip", "samples.npz", "picture.png", "cifar-10-python.tar.gz"):
        content = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(content[: len(content) // 2])
    (folder / "evil.pkl").write_bytes(pickle.dumps({"fid": Evil()}))
    np.savez(folder / "evil.npz", arr_0=np.array([Evil()]), mu=np.array([Evil()]))
    with tarfile.open(folder / "evil.tar.gz", "w:gz") as archive:
        archive.add(folder / "evil.pkl", "batches.meta")
    with zipfile.ZipFile(folder / "evil-network.pkl", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Evil()))
        archive.writestr("x/version", "3")
    zipfile.ZipFile(folder / "empty.zip", "w").close()
    (folder / "empty.file").touch()
    (folder / "empty").mkdir()
    (folder / "words.txt").write_text("no image, no network\n")
    (folder / "noise.bin").write_bytes(np.random.default_rng(0).bytes(5000))
    for name, text in {
        "list": "[]",
        "labels-list": '{"labels": {"a.png": 1}}',
        "huge-label": '{"labels": [["a.png", 999999999], ["b.png", 0], ["c.png", 1]]}',
        "negative-label": '{"labels": [["a.png", -1], ["b.png", 0], ["c.png", 1]]}',
        "stranger": '{"labels": [["z.png", 0]]}',
        "deep": "[" * 100_000,
        "cut": '{"labels": [["a.p',
    }.items():
        shutil.copytree(folder / "pictures", folder / "metadata" / name)
        (folder / "metadata" / name / "dataset.json").write_text(text)
    options = json.loads((folder / "runs/image/training_options.json").read_text())
    for name, text in {
        "no-json": "{",
        "list": "[]",
        "deep": "[" * 100_000,
        "unknown": json.dumps({"config": options["config"] | {"colour": 1}}),
        "typed": json.dumps({"config": options["config"] | {"data": 3}}),
    }.items():
        (folder / "damaged-runs" / name).mkdir(parents=True)
        (folder / "damaged-runs" / name / "training_options.json").write_text(text)
    for name, text in dict(no="x\n", list="[]", deep="[" * 100_000, bare='{"rows": [1]}').items():
        (folder / f"rows-{name}.json").write_text(text)
    for kind, file in (("latents", "latents.json"), ("features", "features.json")):
        shutil.copytree(folder / kind, folder / f"damaged-{kind}")
        (folder / f"damaged-{kind}" / file).write_text("{")


def _make_strange(folder):
    """Make what stands among files without being one."""
    os.symlink("loop", folder / "loop")
    os.symlink("nowhere", folder / "dangling")
    os.mkfifo(folder / "fifo")
    (folder / "circle").mkdir()
    os.symlink(".", folder / "circle" / "again")
    here = os.getcwd()
    try:  # The address of a socket is short.
        os.chdir(folder)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
            server.bind("socket")
    finally:
        os.chdir(here)
