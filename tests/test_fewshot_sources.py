"""Datasets of few-shot learning, converted from small archives in their real layouts."""

import io
import itertools
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from image_files import convert, make_folder, run_tool
from PIL import Image

from data.convert.fewshot_sources import _CIFAR_FS, _FC100_SUPERCLASSES
from data.images.dataset import ImageDataset

# CIFAR-100's classes by superclass, both in alphabetical order.
CIFAR100 = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
FINE = sorted(name for names in CIFAR100.values() for name in names.split())
COARSE_OF = {name: index for index, names in enumerate(CIFAR100.values()) for name in names.split()}


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def cifar100_archive(path, per_class=1):
    """Write all hundred classes in the layout of cifar-100-python.tar.gz, with few images."""
    labels = [index for index in range(100) for _ in range(per_class)]
    contents = {"meta": {b"fine_label_names": [name.encode() for name in FINE]}}
    for number, part in enumerate(("train", "test")):
        contents[part] = {
            b"data": pixels(len(labels), 3072, seed=number),
            b"fine_labels": labels,
            b"coarse_labels": [COARSE_OF[FINE[label]] for label in labels],
        }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def converted(source, dest, *args):
    code, output = convert(source, dest, *args)
    assert code == 0, output
    return ImageDataset(dest, use_labels=True)


def refusal(source, dest, *args):
    code, output = convert(source, dest, *args)
    assert code != 0
    assert not dest.exists()
    assert "Traceback" not in output
    return " ".join(output.split())


def names_of(dataset, split):
    return {dataset.class_names[index] for index in dataset.class_splits[split]}


def assert_divided(dataset):
    parts = [set(part) for part in dataset.class_splits.values()]
    assert not any(one & other for one, other in itertools.combinations(parts, 2))
    assert set().union(*parts) == set(range(dataset.num_classes))


def test_fc100_divides_cifar100_by_superclass(tmp_path):
    archive = cifar100_archive(tmp_path / "cifar-100-python.tar.gz")
    dataset = converted(archive, tmp_path / "fc100.zip", "--class-split=fc100")
    assert [len(dataset.class_splits[s]) for s in ("train", "val", "test")] == [60, 20, 20]
    assert_divided(dataset)
    superclasses = list(CIFAR100)
    for split, numbers in _FC100_SUPERCLASSES.items():
        expected = {n for i in numbers for n in CIFAR100[superclasses[i]].split()}
        assert names_of(dataset, split) == expected
    assert {"baby", "fox", "bee", "whale"} <= names_of(dataset, "test")
    # Training and test images together.
    assert len(dataset) == 200
    assert np.bincount(dataset.labels).tolist() == [2] * 100


def test_cifar_fs_divides_cifar100_by_its_lists(tmp_path):
    archive = cifar100_archive(tmp_path / "cifar-100-python.tar.gz")
    dataset = converted(archive, tmp_path / "fs.zip", "--class-split=cifar-fs")
    assert [len(dataset.class_splits[s]) for s in ("train", "val", "test")] == [64, 16, 20]
    assert_divided(dataset)
    for split in ("val", "test"):
        assert names_of(dataset, split) == set(_CIFAR_FS[split].split()) <= set(FINE)
    assert "dolphin" in names_of(dataset, "train")


def test_a_class_of_two_superclasses_is_refused(tmp_path):
    archive = cifar100_archive(tmp_path / "cifar-100-python.tar.gz", per_class=2)
    with tarfile.open(archive) as file:
        contents = {m.name: pickle.load(file.extractfile(m), encoding="bytes") for m in file}
    contents["cifar-100-python/train"][b"coarse_labels"][0] = 0
    with tarfile.open(archive, "w:gz") as file:
        for name, content in contents.items():
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    message = refusal(archive, tmp_path / "x.zip", "--class-split=fc100")
    assert "class 'apple' has images of superclasses 0 and 4" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_split_takes_all_images(split, tmp_path):
    archive = cifar100_archive(tmp_path / "cifar-100-python.tar.gz")
    args = ("--class-split=fc100", f"--split={split}")
    assert f"--split: got {split}" in refusal(archive, tmp_path / "x.zip", *args)


def test_other_sources_have_no_class_split_to_choose(tmp_path):
    folder = make_folder(tmp_path / "in", ["a/0.png", "b/0.png"])
    message = refusal(folder, tmp_path / "x.zip", "--class-split=fc100")
    assert "is not a CIFAR-100 archive" in message


def write_labelled(folder, prefix="FC100", byte_keys=False, protocol=2, splits=None):
    folder.mkdir()
    wanted = splits or {"train": [3, 9], "val": [5], "test": [1, 70]}
    images = {}
    for number, (split, labels) in enumerate(wanted.items()):
        images[split] = pixels(2 * len(labels), 32, 32, 3, seed=number)
        content = {"data": images[split], "labels": [x for x in labels for _ in range(2)]}
        if byte_keys:
            content = {key.encode(): value for key, value in content.items()}
        data = pickle.dumps(content, protocol=protocol)
        (folder / f"{prefix}_{split}.pickle").write_bytes(data)
    return images


@pytest.mark.parametrize("prefix", ["FC100", "CIFAR_FS"])
@pytest.mark.parametrize(("byte_keys", "protocol"), [(False, 4), (True, 2)])
def test_pickles_of_labelled_images_become_one_dataset(prefix, byte_keys, protocol, tmp_path):
    images = write_labelled(tmp_path / "in", prefix, byte_keys, protocol)
    dataset = converted(tmp_path / "in", tmp_path / "out.zip")
    assert dataset.class_names == ["3", "9", "5", "1", "70"]
    assert dataset.class_splits == {"train": (0, 1), "val": (2,), "test": (3, 4)}
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    found = dataset.__getitems__(range(10))[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, np.concatenate(list(images.values())))


def test_splits_that_number_their_classes_alike_keep_them_apart(tmp_path):
    write_labelled(tmp_path / "in", splits={"train": [0, 1], "test": [0, 1]})
    dataset = converted(tmp_path / "in", tmp_path / "out.zip")
    assert dataset.class_names == ["train 0", "train 1", "test 0", "test 1"]
    assert dataset.class_splits == {"train": (0, 1), "test": (2, 3)}


def test_one_file_is_a_dataset_of_one_split(tmp_path):
    write_labelled(tmp_path / "in")
    dataset = converted(tmp_path / "in" / "FC100_test.pickle", tmp_path / "out.zip")
    assert dataset.class_splits == {"test": (0, 1)}


def test_mini_imagenet_caches_are_read_and_resized(tmp_path):
    folder = tmp_path / "mini"
    folder.mkdir()
    for number, split in enumerate(("train", "val", "test")):
        content = {
            "image_data": pixels(4, 84, 84, 3, seed=number),
            "class_dict": {f"n{number}1": [0, 2], f"n{number}0": [1, 3]},
        }
        data = pickle.dumps(content, protocol=2)
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(data)
    dataset = converted(folder, tmp_path / "out.zip", "--resolution=32")
    assert dataset.resolution == 32
    assert dataset.class_names == ["n00", "n01", "n10", "n11", "n20", "n21"]
    assert dataset.labels[:4].tolist() == [1, 0, 1, 0]
    assert dataset.class_splits == {"train": (0, 1), "val": (2, 3), "test": (4, 5)}
    # By area where they become smaller, as few-shot diffusion models have them.
    original = Image.fromarray(pixels(4, 84, 84, 3, seed=0)[1])
    larger = converted(folder, tmp_path / "larger.zip", "--resolution=96")
    for resized, resampling in ((dataset, "BOX"), (larger, "LANCZOS")):
        expected = original.resize([resized.resolution] * 2, Image.Resampling[resampling])
        pixels_there = resized.__getitems__([1])[0][0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels_there, np.asarray(expected))


def test_pickles_of_images_by_class_are_read(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    train = {7: pixels(3, 8, 8, 3), 2: pixels(2, 8, 8, 3, seed=1)}
    (folder / "train_cifar100.pkl").write_bytes(pickle.dumps(train))
    (folder / "test_cifar100.pkl").write_bytes(pickle.dumps({b"cat": pixels(2, 8, 8, 3, seed=2)}))
    dataset = converted(folder, tmp_path / "out.zip")
    assert dataset.class_names == ["2", "7", "cat"]
    assert np.bincount(dataset.labels).tolist() == [2, 3, 2]
    first = dataset.__getitems__([0])[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(first, train[7][0])
    assert dataset.class_splits == {"train": (0, 1), "test": (2,)}


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, bool, np.float32])
def test_omniglot_has_validation_classes_of_its_own_and_is_inverted(dtype, is_flat, tmp_path):
    folder = tmp_path / "omniglot"
    folder.mkdir()
    ink = {
        n: pixels(20, 28, 28, seed=i) > 200 for i, n in enumerate(f"c{i:02d}" for i in range(25))
    }
    scale = 255 if dtype == np.uint8 else 1
    arrays = {name: (~value * scale).astype(dtype) for name, value in ink.items()}
    if is_flat:
        arrays = {name: array.reshape(20, -1) for name, array in arrays.items()}
    np.savez(folder / "train_small.npz", **{n: a for n, a in arrays.items() if n < "c23"})
    np.savez(folder / "test_small.npz", **{n: a for n, a in arrays.items() if n >= "c23"})
    dataset = converted(folder, tmp_path / "out.zip")
    assert (dataset.resolution, dataset.img_channels) == (28, 1)
    assert_divided(dataset)
    assert names_of(dataset, "val") == {"c00", "c10", "c20"}
    assert names_of(dataset, "test") == {"c23", "c24"}
    assert len(dataset.class_splits["train"]) == 20
    row = int(np.flatnonzero(dataset.labels == dataset.class_names.index("c05"))[3])
    found = dataset.__getitems__([row])[0][0, 0].numpy()
    np.testing.assert_array_equal(found, ink["c05"][3] * 255)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_a_pickle_that_would_run_code_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "FC100_train.pickle"
    path.write_bytes(pickle.dumps({"data": Bomb(), "labels": [0]}))
    message = refusal(path, tmp_path / "x.zip")
    assert "FC100_train.pickle: is refused: it would run" in message
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no dictionary of images"),
        ({}, "holds no dictionary of images"),
        ({"data": pixels(2, 32, 32, 3), "labels": [0]}, "holds 2 images but 1 labels"),
        ({"data": pixels(2, 3072), "labels": [0, 1]}, "data holds no uint8 images"),
        ({"data": np.zeros((2, 8, 8, 3)), "labels": [0, 1]}, "data holds no uint8 images"),
        (
            {"image_data": pixels(2, 8, 8, 3), "class_dict": {"a": [0, 2]}},
            "class_dict names image 2",
        ),
        ({"image_data": pixels(2, 8, 8, 3), "class_dict": {"a": [0]}}, "image 1 has no class"),
        (
            {"image_data": pixels(2, 8, 8, 3), "class_dict": {"a": [0, 1], "b": [1]}},
            "has a class already",
        ),
        ({"a": pixels(1, 8, 8, 3), "b": pixels(1, 9, 9, 3)}, "images of different sizes"),
    ],
)
def test_wrong_content_is_named_in_a_sentence(content, message, tmp_path):
    path = tmp_path / "FC100_train.pickle"
    path.write_bytes(pickle.dumps(content))
    found = refusal(path, tmp_path / "x.zip")
    assert "FC100_train.pickle" in found
    assert message in found


def test_damaged_files_are_named_in_a_sentence(tmp_path):
    path = tmp_path / "FC100_train.pickle"
    path.write_bytes(pickle.dumps({"data": pixels(2, 8, 8, 3), "labels": [0, 1]})[:-300])
    assert "FC100_train.pickle: is refused" in refusal(path, tmp_path / "x.zip")
    folder = tmp_path / "omniglot"
    folder.mkdir()
    (folder / "test_small.npz").write_bytes(b"nothing")
    np.savez(folder / "train_small.npz", a=pixels(2, 28, 28))
    assert "test_small.npz: cannot be read" in refusal(folder, tmp_path / "x.zip")


def test_files_of_two_datasets_in_a_folder_are_refused(tmp_path):
    write_labelled(tmp_path / "in")
    data = (tmp_path / "in" / "FC100_test.pickle").read_bytes()
    (tmp_path / "in" / "CIFAR_FS_test.pickle").write_bytes(data)
    assert "holds files of several datasets" in refusal(tmp_path / "in", tmp_path / "x.zip")


def test_a_pickle_without_a_split_in_its_name_is_refused(tmp_path):
    (tmp_path / "images.pickle").write_bytes(pickle.dumps({}))
    message = refusal(tmp_path / "images.pickle", tmp_path / "x.zip")
    assert "the name does not say its split" in message


def test_a_folder_of_images_with_a_pickle_beside_them_stays_one(tmp_path):
    folder = make_folder(tmp_path / "in", ["a/0.png", "b/0.png"])
    (folder / "notes.pkl").write_bytes(pickle.dumps({}))
    assert converted(folder, tmp_path / "x.zip").class_names == ["a", "b"]


# Splits in a dataset of ours.


def test_class_splits_survive_another_conversion_and_are_shown(tmp_path):
    write_labelled(tmp_path / "in")
    first = converted(tmp_path / "in", tmp_path / "a.zip")
    second = converted(tmp_path / "a.zip", tmp_path / "folder", "--resolution=16")
    third = converted(tmp_path / "folder", tmp_path / "b.zip")
    assert first.class_splits == second.class_splits == third.class_splits
    code, output = run_tool("info", str(tmp_path / "b.zip"))
    assert code == 0
    assert "class split   2 train, 1 val, 2 test" in output
    assert ImageDataset(tmp_path / "b.zip").class_splits == {}  # Without labels.


def test_a_sample_archive_says_that_it_keeps_no_split(tmp_path):
    write_labelled(tmp_path / "in")
    code, output = convert(tmp_path / "in", tmp_path / "a.npz")
    assert code == 0
    assert "The split of the classes is left out" in output
    assert ImageDataset(tmp_path / "a.npz", use_labels=True).class_splits == {}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([0], "must have lists of class indices called train, val and test"),
        ({"training": [0]}, "must have lists of class indices called train, val and test"),
        ({"train": 3}, "must have lists of class indices; train is none"),
        ({"train": [0, 9]}, "has class 9 in train; accepted: 0 to 4"),
        ({"train": [True]}, "has class True in train"),
        ({"train": [0], "test": [0]}, "has class 0 in train and in test"),
    ],
)
def test_malformed_splits_are_refused(splits, message, tmp_path):
    write_labelled(tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "a.zip")
    with (
        zipfile.ZipFile(tmp_path / "a.zip") as old,
        zipfile.ZipFile(tmp_path / "b.zip", "w") as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name == "dataset.json":
                content = json.dumps(dict(json.loads(content), class_splits=splits))
            new.writestr(name, content)
    with pytest.raises(ValueError, match=message):
        ImageDataset(tmp_path / "b.zip", use_labels=True)
