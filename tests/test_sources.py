"""What dataset_tool.py convert reads: folders, zips, CIFAR, MNIST, digits and none of these."""

import dataclasses
import errno
import gzip
import io
import json
import os
import pickle
import re
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
from image_files import convert, make_folder, make_zip, random_image, read_target

from data.convert.sources import open_source
from data.images import members
from data.images.archive import open_archive
from data.images.labels import parse_class_names, read_labels

# Folders and zips.


def test_labels_come_from_the_first_folder_level(tmp_path):
    source = make_folder(tmp_path / "in", ["dog/x/1.png", "cat/2.png", "dog/0.png"])
    code, output = convert(source, tmp_path / "out.zip")
    assert code == 0, output
    _, images, metadata = read_target(tmp_path / "out.zip")
    assert metadata["class_names"] == ["cat", "dog"]
    assert [label for _, label in metadata["labels"]] == [0, 1, 1]
    np.testing.assert_array_equal(images[0], np.asarray(random_image(1)))


def test_a_zip_gives_the_same_dataset_as_its_folder(tmp_path):
    source = make_folder(tmp_path / "in", ["dog/1.png", "cat/2.png"])
    convert(source, tmp_path / "folder.zip")
    convert(make_zip(tmp_path / "in.zip", source), tmp_path / "zip.zip")
    assert (tmp_path / "folder.zip").read_bytes() == (tmp_path / "zip.zip").read_bytes()


def test_a_single_folder_around_everything_is_no_class(tmp_path):
    make_folder(tmp_path / "in", ["all/dog/1.png", "all/cat/2.png", "__MACOSX/x.png", ".h/y.png"])
    convert(make_zip(tmp_path / "in.zip", tmp_path / "in"), tmp_path / "out.zip")
    names, _, metadata = read_target(tmp_path / "out.zip")
    assert len(names) == 2
    assert metadata["class_names"] == ["cat", "dog"]


def test_images_without_folders_are_unlabelled_and_the_tool_says_so(tmp_path):
    code, output = convert(make_folder(tmp_path / "in", ["1.png", "2.png"]), tmp_path / "out.zip")
    assert code == 0
    assert "No labels" in output
    assert read_target(tmp_path / "out.zip")[2] == {"labels": None, "class_names": None}


def test_an_image_beside_class_folders_is_named(tmp_path):
    source = make_folder(tmp_path / "in", ["dog/1.png", "cat/2.png", "stray.png"])
    code, output = convert(source, tmp_path / "out.zip")
    assert code == 1
    assert "stray.png: lies outside the class folders" in output


def test_dataset_json_has_precedence_over_folders(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png"])
    metadata = {"labels": [["a/1.png", 2], ["b\\2.png", 0]], "class_names": ["x", "y", "z"]}
    (source / "dataset.json").write_text(json.dumps(metadata))
    code, output = convert(source, tmp_path / "out.zip")
    assert code == 0
    assert "1 of 3 classes have no image" in output
    result = read_target(tmp_path / "out.zip")[2]
    assert [label for _, label in result["labels"]] == [2, 0]
    assert result["class_names"] == ["x", "y", "z"]


def test_a_converted_dataset_converts_to_itself(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png"])
    convert(source, tmp_path / "1.zip")
    convert(tmp_path / "1.zip", tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"labels": [["a/1.png", 0]]}, "b/2.png: has no label in"),
        ({"labels": [["a/1.png", 0], ["b/2.png", 1]], "class_names": ["x"]}, "has label 1"),
        ({"labels": [["a/1.png", [0.5]], ["b/2.png", 1]]}, "a label is a class index"),
        ({"labels": [["a/1.png", -1], ["b/2.png", 1]]}, "a label is a class index"),
        ({"labels": [[0]]}, "is not a [file name, class index] pair"),
        ({"labels": 3}, '"labels" must be a list'),
        ({"labels": [["a/1.png", 0], ["b/2.png", 1]], "class_names": [1, 2]}, "list of names"),
        ([], "expected an object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_dataset_json_is_explained(tmp_path, metadata, message):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png"])
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    (source / "dataset.json").write_text(text)
    code, output = convert(source, tmp_path / "out.zip")
    assert code == 1
    assert message in output
    assert "dataset.json" in output


# Sample archives.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(5, 8, 8, 3), (5, 8, 8, 1), (5, 8, 8)])
def test_sample_archives_are_read_with_their_labels(tmp_path, save, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save(tmp_path / "in.npz", pixels, np.array([2, 0, 0, 1, 2]))
    code, output = convert(tmp_path / "in.npz", tmp_path / "out.zip")
    assert code == 0, output
    _, images, metadata = read_target(tmp_path / "out.zip")
    np.testing.assert_array_equal(images, pixels.squeeze(3) if shape[3:] == (1,) else pixels)
    assert [label for _, label in metadata["labels"]] == [2, 0, 0, 1, 2]
    assert metadata["class_names"] == ["0", "1", "2"]


def test_a_sample_archive_without_labels_is_unlabelled_and_the_tool_says_so(tmp_path):
    pixels = np.zeros((2, 9, 8, 3), np.uint8)
    np.savez(tmp_path / "in.npz", arr_0=pixels, mu=np.zeros(3), sigma=np.eye(3))
    args = ["--resolution=4", "--transform=center-crop"]
    code, output = convert(tmp_path / "in.npz", tmp_path / "out.zip", *args)
    assert code == 0, output
    assert "No labels" in output
    assert read_target(tmp_path / "out.zip")[2] == {"labels": None, "class_names": None}


def test_unfit_sample_archives_are_explained(tmp_path):
    path = tmp_path / "in.npz"

    def message(*arrays, args=(), **named):
        np.savez(path, *arrays, **named)
        code, output = convert(path, tmp_path / "out.zip", *args)
        assert code == 1
        assert "in.npz" in output
        assert not (tmp_path / "out.zip").exists()
        return output

    images = np.zeros((2, 8, 8, 3), np.uint8)
    assert "expected uint8" in message(images / 255)
    assert "has no array arr_0" in message(mu=np.zeros(2))
    assert "arr_1 holds int64 of shape [3]" in message(images, np.arange(3))
    assert "image 0: is 8x7, not square" in message(images[:, 1:])
    assert "has no splits" in message(images, args=["--split=all"])


def test_a_sample_archive_cut_short_while_it_is_read_is_explained(tmp_path):
    np.savez(tmp_path / "in.npz", np.zeros((4, 8, 8, 3), np.uint8))
    source = open_source(str(tmp_path / "in.npz"))
    with open(tmp_path / "in.npz", "r+b") as file:
        file.truncate(600)
    with pytest.raises(ValueError, match=r"in\.npz, image 3: cannot be read \(the file ends"):
        source.item(3)


# CIFAR.


def python2_style(batch):
    """Return a protocol-2 pickle with the names that the official files use."""
    return pickle.dumps(batch, protocol=2).replace(b"numpy._core", b"numpy.core")


def make_cifar(path, kind, replace=None, per_file=3):
    """Write an archive in the official layout; returns images [N, 32, 32, 3] and labels by file."""
    rng = np.random.default_rng(0)
    folder, files, meta = {
        10: (
            "cifar-10-batches-py",
            [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"],
            ("batches.meta", b"label_names"),
        ),
        100: ("cifar-100-python", ["train", "test"], ("meta", b"fine_label_names")),
    }[kind]
    contents, truth = {}, {}
    for name in files:
        images = rng.integers(0, 256, (per_file, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, kind, per_file).tolist()
        batch = {
            b"data": np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(per_file, 3072),
            b"filenames": [b"x.png"] * per_file,
            b"batch_label": b"batch",
        }
        if kind == 10:
            batch[b"labels"] = labels
        else:
            batch[b"fine_labels"] = labels
            batch[b"coarse_labels"] = [label // 5 for label in labels]
        contents[name] = python2_style(batch)
        truth[name] = images, labels
    names = [f"class{index}".encode() for index in range(kind)]
    contents[meta[0]] = python2_style({meta[1]: names, b"num_vis": 3072})
    contents["readme.html"] = b"<html>"
    contents.update(replace or {})
    with tarfile.open(path, "w:gz") as archive:
        for name, data in contents.items():
            if data is not None:
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return truth


@pytest.mark.parametrize("kind", [10, 100])
@pytest.mark.parametrize("split", [None, "test", "all"])
def test_cifar_archives_are_read_in_their_official_layout(tmp_path, kind, split):
    truth = make_cifar(tmp_path / "cifar.tar.gz", kind)
    args = [] if split is None else [f"--split={split}"]
    code, output = convert(tmp_path / "cifar.tar.gz", tmp_path / "out.zip", *args)
    assert code == 0, output
    _, images, metadata = read_target(tmp_path / "out.zip")
    chosen = {
        None: [pair for name, pair in truth.items() if not name.startswith("test")],
        "test": [pair for name, pair in truth.items() if name.startswith("test")],
        "all": list(truth.values()),
    }[split]
    np.testing.assert_array_equal(images, np.concatenate([images for images, _ in chosen]))
    labels = [label for _, labels in chosen for label in labels]
    assert [label for _, label in metadata["labels"]] == labels
    assert metadata["class_names"] == [f"class{index}" for index in range(kind)]


class Exploit:
    """Unpickling it creates the file ``path``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("where", ["data_batch_3", "batches.meta"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, where):
    attack = pickle.dumps({b"data": Exploit(tmp_path / "owned")}, protocol=2)
    make_cifar(tmp_path / "cifar.tar.gz", 10, {where: attack})
    code, output = convert(tmp_path / "cifar.tar.gz", tmp_path / "out.zip")
    assert code == 1
    assert f"{where} is refused: it would run" in output
    assert "open" in output
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out.zip").exists()


def test_a_codec_cannot_be_smuggled_into_a_pickle(tmp_path):
    attack = b"c_codecs\nencode\n(X\x03\x00\x00\x00abcX\x05\x00\x00\x00rot13tR."
    make_cifar(tmp_path / "cifar.tar.gz", 10, {"data_batch_1": attack})
    code, output = convert(tmp_path / "cifar.tar.gz", tmp_path / "out.zip")
    assert code == 1
    assert "would run _codecs.encode with codec 'rot13'" in output


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"data_batch_2": None}, "has no file data_batch_2"),
        ({"batches.meta": None}, "is not a CIFAR-10 or CIFAR-100 python archive"),
        ({"data_batch_1": b"\x80\x02}"}, "not a readable pickle"),
        ({"data_batch_1": pickle.dumps([1])}, "holds no dictionary"),
        ({"data_batch_1": pickle.dumps({b"data": [1]})}, "holds no uint8 image data"),
        ({"data_batch_1": python2_style({b"data": np.zeros((2, 5), np.uint8)})}, "5 values"),
        ({"data_batch_1": python2_style({b"data": np.zeros((2, 3072), np.uint8)})}, "no labels"),
        ({"batches.meta": pickle.dumps({})}, "names no classes"),
        (
            {"batches.meta": python2_style({b"label_names": [b"one"]})},
            "beyond the 1 classes",
        ),
    ],
)
def test_an_unfit_cifar_archive_is_explained(tmp_path, replace, message):
    make_cifar(tmp_path / "cifar.tar.gz", 10, replace)
    code, output = convert(tmp_path / "cifar.tar.gz", tmp_path / "out.zip")
    assert code == 1
    assert message in output
    assert "cifar.tar.gz" in output


def test_a_truncated_cifar_archive_is_explained(tmp_path):
    make_cifar(tmp_path / "cifar.tar.gz", 10)
    data = (tmp_path / "cifar.tar.gz").read_bytes()
    (tmp_path / "cifar.tar.gz").write_bytes(data[: len(data) // 2])
    code, output = convert(tmp_path / "cifar.tar.gz", tmp_path / "out.zip")
    assert code == 1
    assert "only part of one" in output


# MNIST.


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def make_mnist(folder, compress, separator="-"):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    truth = {}
    for prefix, num in (("train", 5), ("t10k", 3)):
        images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, num, dtype=np.uint8)
        truth[prefix] = images, labels
        for kind, array in (("images", images), ("labels", labels)):
            name = f"{prefix}-{kind}{separator}idx{array.ndim}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
            else:
                (folder / name).write_bytes(idx_bytes(array))
    return truth


@pytest.mark.parametrize(("compress", "separator"), [(True, "-"), (False, "-"), (False, ".")])
def test_mnist_is_read_from_its_folder_or_file(tmp_path, compress, separator):
    truth = make_mnist(tmp_path / "mnist", compress, separator)
    ending = ".gz" if compress else ""
    file = tmp_path / f"mnist/t10k-images{separator}idx3-ubyte{ending}"
    cases = [
        (tmp_path / "mnist", [], ["train"]),
        (tmp_path / "mnist", ["--split=all"], ["train", "t10k"]),
        (file, [], ["t10k"]),
    ]
    for number, (source, args, parts) in enumerate(cases):
        dest = tmp_path / f"{number}.zip"
        code, output = convert(source, dest, *args)
        assert code == 0, output
        _, images, metadata = read_target(dest)
        np.testing.assert_array_equal(images, np.concatenate([truth[part][0] for part in parts]))
        labels = np.concatenate([truth[part][1] for part in parts]).tolist()
        assert [label for _, label in metadata["labels"]] == labels
        assert metadata["class_names"] == [str(digit) for digit in range(10)]


def test_unfit_mnist_files_are_explained(tmp_path):
    make_mnist(tmp_path / "mnist", compress=False)
    folder = tmp_path / "mnist"
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    whole = images.read_bytes()

    def message():
        code, output = convert(folder, tmp_path / "out.zip")
        assert code == 1
        return output

    images.write_bytes(whole[:-1])
    assert "should hold 3920 values" in message()
    images.write_bytes(b"PK" + whole)
    assert "is not an idx file" in message()
    images.write_bytes(b"\x1f\x8b" + whole)
    assert "cannot be read" in message()
    images.write_bytes(whole)
    labels.write_bytes(idx_bytes(np.zeros(4, np.uint8)))
    assert "holds 4 labels for the 5 images" in message()
    labels.unlink()
    assert "has no labels beside it" in message()
    images.unlink()
    assert "has no train-images-idx3-ubyte" in message()
    assert "is not a file of images" in convert(folder / "t10k-labels-idx1-ubyte", "x.zip")[1]


# Sources and targets that are none.


def test_digits_without_scikit_learn_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, output = convert("digits", tmp_path / "out.zip")
    assert code == 1
    assert "pip install scikit-learn" in output


def test_a_source_that_is_none_is_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "fake.zip").write_text("x")
    make_folder(tmp_path / "in", ["a.png"])
    for source, message in (
        (tmp_path / "absent", "does not exist; accepted"),
        (tmp_path / "empty", "empty: holds no images"),
        (tmp_path / "notes.txt", "its kind is unknown; accepted"),
        (tmp_path / "fake.zip", "fake.zip: not a zip archive"),
    ):
        code, output = convert(source, tmp_path / "out.zip")
        assert code == 1
        assert message in output
    code, output = convert(tmp_path / "in", tmp_path / "out.tar.gz")
    assert code == 1
    assert "accepted: a name ending in .zip or .npz, or a folder" in output


def test_a_link_back_to_a_folder_above_is_not_followed_round(tmp_path):
    folder = make_folder(tmp_path / "images", ["a/0.png", "b/1.png"])
    (folder / "a" / "again").symlink_to(folder)
    elsewhere = make_folder(tmp_path / "elsewhere", ["2.png"])
    (folder / "c").symlink_to(elsewhere)
    assert open_source(str(folder)).num_images == 3


@pytest.mark.parametrize(
    ("names", "args", "line"),
    [
        (["a/1.png", "b/2.png"], [], "Labels: 2 classes from folder level 1: a, b."),
        (["x/a/1.png", "x/b/2.png"], [], "Labels: 2 classes from folder level 2: a, b."),
        (["1/a.png", "10/b.png", "2/c.png"], [], "3 classes from folder level 1: 1, 2, 10."),
        (["00000/00001.png", "01000/01002.png"], [], "No labels: the folders are shards of 1,000"),
        (["images1024x1024/00000/00000.png", "images1024x1024/01000/01000.png"], [], "No labels"),
        (["train/a/1.png", "val/b/2.png"], ["--label-level=2"], "from folder level 2: a, b."),
        (["train/1.png", "val/2.png"], ["--labels=folders"], "level 1: train, val."),
        (["a/1.png", "b/2.png"], ["--labels=none"], "No labels: --labels=none."),
    ],
)
def test_what_is_taken_for_labels_is_printed(tmp_path, names, args, line):
    source = make_folder(tmp_path / "in", names)
    code, output = convert(source, tmp_path / "out.zip", *args)
    assert code == 0, output
    assert line in output
    classes = None if "No labels" in line else line.rpartition(": ")[2].rstrip(".").split(", ")
    assert read_target(tmp_path / "out.zip")[2]["class_names"] == classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train/a/1.png", "val/b/2.png"],
            "splits, .*/in/train, or give --label-level=2",
        ),
        (["train/1.png", "val/2.png"], "look like splits, .* or give --labels=folders if they"),
        (["00000/img00000000.png", "00001/img00001000.png"], "lost its dataset.json; restore it"),
        (["0000/a.png", "0007/b.png"], "'0000' and '0007' look like shards"),
        (["in/sub/a/1.png", "in/sub/b/1.png"], "below the one folder 'sub', .*--label-level=3"),
    ],
)
def test_folders_that_may_be_no_classes_are_asked_about(tmp_path, names, message):
    source = make_folder(tmp_path / "in", names)
    code, output = convert(source, tmp_path / "out.zip")
    assert code == 1
    assert re.search(message, output), output
    assert "--labels=none" in output


def test_labels_come_from_a_file_of_names_and_classes(tmp_path):
    source = make_folder(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text("a.png,dog\nb.png,cat\n\nc.png,cat\n")
    (tmp_path / "labels.json").write_text('{"labels": {"a.png": 1, "b.png": 0}}')
    for name, classes in (("labels.csv", ["cat", "dog"]), ("labels.json", ["0", "1"])):
        dest = tmp_path / f"{name}.zip"
        code, output = convert(source, dest, f"--labels={tmp_path / name}")
        assert code == 0, output
        assert f"from {name}: {', '.join(classes)}" in output
        metadata = read_target(dest)[2]
        assert metadata["class_names"] == classes
        assert [label for _, label in metadata["labels"]] == [1, 0]
        assert ("labels 1 file(s) that are not there: c.png" in output) == (name == "labels.csv")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--labels=absent.csv"], "got absent.csv, but it cannot be read (No such file"),
        (["--labels=none", "--label-level=1"], "has an effect on folders alone"),
        (["--label-level=3"], "has no folder of level 3"),
    ],
)
def test_a_choice_of_labels_that_makes_no_sense_is_explained(tmp_path, args, message):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png"])
    code, output = convert(source, tmp_path / "out.zip", *args)
    assert code == 1
    assert message in output
    code, output = convert("digits", tmp_path / "out.zip", "--labels=folders")
    assert code == 1
    assert "digits has labels of its own" in output


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset.json", '{"labels": [["a/1.png", 0], ["b/2.png", 1], ["a/1.png", 1]]}', "twice"),
        ("dataset.json", '{"labels": {"a/1.png": 0, "a/1.png": 1}}', "'a/1.png' is listed twice"),
        ("dataset.json", '{"labels": [["A/1.PNG", 0], ["b/2.png", 1]]}', "called A/1.PNG there"),
        ("dataset.json", '{"Labels": []}', 'write it "labels"'),
        ("dataset.json", '{"labels": [["a/1.png", 999999999]]}', "below 1,000,000"),
        ("dataset.json", "[" * 100_000, "nested too deeply"),
        ("a/dataset.json", "{}", "a/dataset.json: labels nothing here; it belongs at"),
        ("Dataset.JSON", "{}", "labels nothing here; it belongs at"),
    ],
)
def test_a_dataset_json_that_would_mislead_is_told(tmp_path, file, content, message):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png"])
    (source / file).write_text(content)
    code, output = convert(source, tmp_path / "out.zip")
    assert code == 1
    assert message in output


def test_what_is_left_out_is_counted_with_the_reason(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "a/2.png", "b/3.png", "b/4.png"])
    for name in ("a/x.heic", "b/y.HEIC", "b/z.avif", "b/photo"):
        (source / name).write_bytes(b"?")
    (source / "a/2.png").write_bytes(b"?")
    for place in (source, make_zip(tmp_path / "in.zip", source)):
        code, output = convert(place, tmp_path / f"{place.name}.out", "--skip-broken")
        assert code == 0, output
        counted = "3 taken, 5 left out (2 .heic, 1 without extension, 1 .avif, 1 broken)"
        assert counted in output
    code, output = convert(source, tmp_path / "1.zip", "--max-images=1")
    assert "1 taken, 7 left out (" in output
    assert "3 beyond --max-images" in output
    assert "1797 taken, 0 left out." in convert("digits", tmp_path / "2.zip")[1]


def test_a_folder_that_cannot_be_read_is_an_error_unless_broken_ones_are_skipped(
    tmp_path, monkeypatch
):
    source, scandir = make_folder(tmp_path / "in", ["a/1.png", "b/2.png", "c/3.png"]), os.scandir

    def refuse(path):
        if str(path).endswith("in/b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    code, output = convert(source, tmp_path / "out.zip")
    assert code == 1
    assert "in/b: cannot be read (Permission denied)" in output
    code, output = convert(source, tmp_path / "out.zip", "--skip-broken")
    assert code == 0, output
    assert "2 taken, 1 left out (1 folder(s) that cannot be read)" in output


def test_a_single_class_folder_is_named_in_a_note(tmp_path):
    folder = make_folder(tmp_path / "images", ["cat/0.png", "cat/1.png"])
    line = open_source(str(folder)).label_line
    assert "No labels: all images are in one folder, cat" in line


def test_names_in_a_zip_are_plain_and_none_is_there_twice(tmp_path):
    image = make_folder(tmp_path / "in", ["a.png"])
    with zipfile.ZipFile(tmp_path / "dots.zip", "w") as archive:
        for name in ("./a/1.png", "b//2.png", "c/../d/3.png"):
            archive.write(image / "a.png", name)
    assert open_archive(tmp_path / "dots.zip").names == ["a/1.png", "b/2.png", "d/3.png"]
    for name in ("a.png", "./a.png"):
        with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.write(image / "a.png", "a.png")
            archive.write(image / "a.png", name)
        code, output = convert(tmp_path / "twice.zip", tmp_path / "out.zip")
        assert (code, "twice.zip: holds a.png twice; pack it again" in output) == (1, True)


def test_files_that_nobody_reads_may_be_there_twice_and_labels_have_plain_names(tmp_path):
    image = make_folder(tmp_path / "in", ["a.png"]) / "a.png"
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.write(image, "./a.png")
        for name in ("readme.md", "__MACOSX/._a.png") * 2:
            archive.write(image, name)
        archive.writestr("dataset.json", '{"labels": [["./a.png", 0]]}')
    archive = open_archive(tmp_path / "in.zip")
    assert archive.names == ["a.png"]
    assert read_labels(archive)[0].tolist() == [0]


def test_what_unpacks_to_too_much_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "_MAX_UNPACKED", 1 << 20)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fits.png", bytes(1 << 20))
        archive.writestr("more.png", bytes((1 << 20) + 1))
        archive.writestr("much.png", bytes(1 << 24))
    archive = open_archive(tmp_path / "in.zip")
    assert archive.read(0) == bytes(1 << 20)
    for index in (1, 2):
        with pytest.raises(ValueError, match="it unpacks to more than"):
            archive.read(index)
    member = archive.member(0)
    cut = dataclasses.replace(member, compressed_size=member.compressed_size - 9)
    with pytest.raises(ValueError, match="its compressed data are damaged"):
        cut.read()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('name,class\na.png,"red, dark"\nb.png,"b\n1"\n', ["b\n1", "red, dark"]),
        ("Name, Class\r\na.png,x\r\nb.png,x\u2028y\r\n", ["x", "x\u2028y"]),
        ("a.png,x\nb.png,\n", "line 2 names no class"),
        ("a.png,x\nb.png,y,z\n", "line 2 has 3 value(s), not a file name and a class"),
    ],
)
def test_a_csv_file_may_have_a_header_and_quoted_classes_and_none_without_a_name(
    tmp_path, text, found
):
    make_folder(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text(text, newline="")
    labels = f"--labels={tmp_path / 'labels.csv'}"
    code, output = convert(tmp_path / "in", tmp_path / "out.zip", labels)
    if isinstance(found, str):
        assert (code, found in output) == (1, True)
        return
    assert (code, "that are not there" in output) == (0, False)
    assert read_labels(open_archive(tmp_path / "out.zip"))[1] == found


def test_names_of_classes_that_are_no_text_are_explained(tmp_path):
    for number, name in enumerate((b"x\xff", b"y")):
        folder = os.path.join(os.fsencode(tmp_path), b"in", name)
        os.makedirs(folder)
        random_image(number).save(os.path.join(folder, b"1.png"))
    code, output = convert(tmp_path / "in", tmp_path / "out.zip")
    assert (code, r"the name of the class 'x\udcff' is not valid text" in output) == (1, True)
    with pytest.raises(ValueError, match=r"the name of the class '\\ud800' is not valid text"):
        parse_class_names(["\ud800"], "dataset.json")
