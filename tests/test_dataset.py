"""ImageDataset, PositionSampler and the loaders."""

import itertools
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_sharer

import numpy as np
import pytest
import torch
from helpers import forget_frames, succeed
from image_files import convert, make_folder, make_zip, random_image
from PIL import Image

import dataset_tool
from data.images import identity
from data.images.codec import PixelCodec
from data.images.config import DatasetConfig
from data.images.dataset import ImageDataset, MirroredImages, open_dataset
from data.images.decode import ImageError, UnfitImageError, decode_image
from data.loader import iterate_images, make_loader, read_batches
from data.samplers import PositionSampler
from torch_utils import distributed
from torch_utils.rng import epoch_permutation
from training.report import save_reals

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path):
    """A zip of ten 8x8 RGB images in two classes; image k is ``random_image(k)``."""
    source = make_folder(tmp_path / "in", [f"{'ab'[k // 5]}/{k}.png" for k in range(10)])
    code, output = convert(source, tmp_path / "data.zip")
    assert code == 0, output
    return tmp_path / "data.zip"


def expected_images(indices):
    arrays = [np.asarray(random_image(int(index))) for index in indices]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def rewrite(path, change=None, metadata=None, compression=zipfile.ZIP_STORED):
    """Write a zip anew with changed files (None deletes one) or a changed dataset.json."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files.update(change or {})
    if metadata is not None:
        files["dataset.json"] = json.dumps(json.loads(files["dataset.json"]) | metadata).encode()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)


def png_bytes(image, path):
    image.save(path)
    return path.read_bytes()


# Reading.


def test_items_and_batches_hold_uint8_images_and_labels(data):
    dataset = ImageDataset(data, use_labels=True)
    image, cond = dataset[7]
    assert image.dtype == torch.uint8
    assert cond["label"].dtype == torch.int64
    assert torch.equal(image, expected_images([7])[0])
    assert cond["label"] == 1
    images, cond = dataset.__getitems__([9, 0, 9])
    assert torch.equal(images, expected_images([9, 0, 9]))
    assert images.is_contiguous()
    assert cond["label"].tolist() == [1, 0, 1]
    assert (len(dataset), dataset.num_images) == (10, 10)
    assert (dataset.resolution, dataset.img_channels, dataset.name) == (8, 3, "data")


def test_labels_are_delivered_only_when_asked_for(data):
    labelled, plain = ImageDataset(data, use_labels=True), ImageDataset(data)
    assert labelled.labels.dtype == np.int64
    assert labelled.labels.tolist() == [0] * 5 + [1] * 5
    assert (labelled.num_classes, labelled.class_names) == (2, ["a", "b"])
    assert (plain.labels, plain.num_classes, plain.class_names) == (None, 0, [])
    assert plain[3][1] == {}


def test_the_class_count_comes_from_the_names_or_else_from_the_labels(data):
    rewrite(data, metadata={"class_names": ["a", "b", "none of these"]})
    assert ImageDataset(data, use_labels=True).num_classes == 3
    rewrite(data, metadata={"class_names": None})
    dataset = ImageDataset(data, use_labels=True)
    assert (dataset.num_classes, dataset.class_names) == (2, ["0", "1"])
    assert ImageDataset(data, use_labels=True, max_size=1).num_classes == 2


def test_a_preview_has_rows_of_images_spread_over_the_data_by_class(data):
    rewrite(data, metadata={"labels": [[f"00000/img{i:08d}.png", i % 2] for i in range(10)]})
    labelled, plain = ImageDataset(data, use_labels=True), ImageDataset(data)
    assert [len(row) for row in labelled.preview(64).rows] == [8, 2]
    by_class = [*range(0, 10, 2), *range(1, 10, 2)]
    shown = torch.stack([image for row in labelled.preview(64).rows for image in row])
    assert torch.equal(shown, expected_images(by_class))
    (row,) = plain.preview(3).rows
    assert torch.equal(torch.stack(row), expected_images([0, 4, 9]))
    mirrored = MirroredImages(plain)
    assert torch.equal(torch.stack(mirrored.preview(3).rows[0]), torch.stack(row))
    for dataset in (labelled, plain, mirrored):
        assert dataset.summary() is None
    assert (labelled.class_counts, plain.class_counts) == ([5, 5], [])


def test_grayscale_has_one_channel(tmp_path):
    convert("digits", tmp_path / "digits.zip", "--max-images=5")
    dataset = ImageDataset(tmp_path / "digits.zip", resolution=8, channels=1)
    assert dataset[4][0].shape == (1, 8, 8)
    pixels = Image.open(zipfile.ZipFile(dataset.path).open("00000/img00000004.png"))
    np.testing.assert_array_equal(dataset[4][0][0], np.asarray(pixels))


def test_folder_stored_and_compressed_zip_hold_the_same_dataset(data, tmp_path):
    with zipfile.ZipFile(data) as archive:
        archive.extractall(tmp_path / "folder")
    make_zip(tmp_path / "deflated.zip", tmp_path / "folder")
    reference = ImageDataset(data, use_labels=True).__getitems__(range(10))
    for path in (tmp_path / "folder", tmp_path / "deflated.zip"):
        images, cond = ImageDataset(path, use_labels=True).__getitems__(range(10))
        assert torch.equal(images, reference[0])
        assert torch.equal(cond["label"], reference[1]["label"])


def test_a_flipped_byte_in_a_zip_is_noticed_when_the_image_is_read(data):
    with zipfile.ZipFile(data) as archive:
        info = archive.getinfo("00000/img00000004.png")
    content = bytearray(data.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + info.file_size - 1] ^= 1
    data.write_bytes(content)
    dataset = ImageDataset(data)
    dataset.__getitems__([3, 5])
    with pytest.raises(ImageError, match=r"img00000004\.png: .* differ from the checksum"):
        dataset.__getitems__([4])


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    chunk = struct.pack(">II", 60_000, 60_000) + bytes([8, 2, 0, 0, 0])
    header = b"IHDR" + chunk
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    png += struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 0) + b"IDAT"
    png += struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(UnfitImageError, match="is 60000x60000, more than 268,435,456 pixels"):
        decode_image(png)


def test_max_size_is_a_seeded_subset_in_order(data):
    subsets = [ImageDataset(data, use_labels=True, max_size=4, seed=seed) for seed in (0, 0, 1)]
    files = [[subset.file_label(k) for k in range(4)] for subset in subsets]
    assert files[0] == files[1] == sorted(files[0])
    assert files[0] != files[2]
    numbers = [int(name[-6:-4]) for name in files[0]]
    assert torch.equal(subsets[0].__getitems__(range(4))[0], expected_images(numbers))
    assert subsets[0].labels.tolist() == [number // 5 for number in numbers]
    assert len(ImageDataset(data, max_size=10)) == 10


def test_the_content_hash_follows_images_labels_and_subset_but_not_the_path(data, tmp_path):
    reference = ImageDataset(data).content_hash
    copy = tmp_path / "copy.zip"
    copy.write_bytes(data.read_bytes())
    hashes = {reference, ImageDataset(copy, use_labels=True, max_size=10).content_hash}
    assert len(hashes) == 1
    for seed in (0, 1):
        hashes.add(ImageDataset(copy, max_size=4, seed=seed).content_hash)
    rewrite(copy, metadata={"class_names": ["a", "c"]})
    hashes.add(ImageDataset(copy).content_hash)
    image = png_bytes(random_image(99), tmp_path / "new.png")
    rewrite(copy, {"00000/img00000003.png": image})
    hashes.add(ImageDataset(copy).content_hash)
    assert len(hashes) == 5


def test_a_zip_and_the_folder_that_it_is_unpacked_to_are_the_same_data(data, tmp_path):
    with zipfile.ZipFile(data) as file:
        file.extractall(tmp_path / "folder")
    folder, packed = ImageDataset(tmp_path / "folder"), ImageDataset(data)
    assert folder.content_hash == packed.content_hash
    # Compressed or not.
    with zipfile.ZipFile(tmp_path / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((tmp_path / "folder").rglob("*.*")):
            file.write(path, path.relative_to(tmp_path / "folder"))
    assert ImageDataset(tmp_path / "deflated.zip").content_hash == packed.content_hash


def test_the_content_hash_of_a_folder_follows_its_contents_and_not_its_dates(tmp_path):
    folder = make_folder(tmp_path / "in", ["1.png", "2.png"])
    before = ImageDataset(folder).content_hash
    # Two files of equal length and date, as zips of equal shape unpack to, are two contents.
    other = shutil.copytree(folder, tmp_path / "other")
    content = bytearray((other / "2.png").read_bytes())
    content[-20] ^= 1
    (other / "2.png").write_bytes(content)
    for path in (folder / "1.png", folder / "2.png", other / "1.png", other / "2.png"):
        os.utime(path, (1, 1))
    assert ImageDataset(folder).content_hash == before
    assert ImageDataset(other).content_hash != before


def test_an_unchanged_file_is_read_once_for_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_MIN_AGE_NS", 0)
    folder = make_folder(tmp_path / "in", ["1.png", "2.png", "3.png"])
    read, crc = [], identity._crc
    monkeypatch.setattr(identity, "_crc", lambda path: read.append(path.name) or crc(path))
    first = ImageDataset(folder).content_hash
    assert ImageDataset(folder).content_hash == first
    assert sorted(read) == ["1.png", "2.png", "3.png"]
    # Its length and date alone do not vouch for a file: another one in its place is read.
    stat = (folder / "2.png").stat()
    replacement = tmp_path / "2.png"
    replacement.write_bytes((folder / "2.png").read_bytes())
    os.utime(replacement, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(replacement, folder / "2.png")
    assert ImageDataset(folder).content_hash == first
    assert sorted(read) == ["1.png", "2.png", "2.png", "3.png"]
    (cache,) = (tmp_path / "cache" / "checksums").iterdir()
    cache.write_bytes(b"damaged")
    assert ImageDataset(folder).content_hash == first
    assert len(read) == 7


def test_an_identity_of_version_1_is_checked_by_its_own_rule(data, tmp_path):
    folder = make_folder(tmp_path / "in", ["1.png", "2.png"])
    for path in (data, folder):
        dataset = ImageDataset(path)
        old = dataset._subset_hash(dataset.archive.old_fingerprint())
        assert dataset.is_same_as(old)
        assert dataset.is_same_as(dataset.content_hash)
        assert not dataset.is_same_as(old[::-1])
    os.utime(folder / "2.png", (1, 1))
    assert not ImageDataset(folder).is_same_as(old)


def test_many_threads_and_copies_read_at_once(data):
    dataset = pickle.loads(pickle.dumps(ImageDataset(data, use_labels=True)))
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda k: dataset[k % 10][0], range(200)))
    assert torch.equal(torch.stack(images[-10:]), expected_images(range(10)))


def test_the_cache_serves_what_workers_decoded_even_if_the_file_is_gone(data):
    dataset = ImageDataset(data, use_labels=True, cache=True)
    sampler = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    for images, _ in make_loader(dataset, sampler, num_workers=2, device=CPU):
        assert images.dtype == torch.uint8
    os.truncate(data, 0)
    indices = [8, 0, 3, 3]
    images, cond = dataset.__getitems__(indices)
    assert torch.equal(images, expected_images(indices))
    assert cond["label"].tolist() == [1, 0, 0, 0]
    with pytest.raises(ImageError):
        dataset[9]


def test_a_cache_that_does_not_fit_is_refused(data, monkeypatch):
    full = os.statvfs_result((4096, 4096, 1000, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    with pytest.raises(ValueError, match=r"data\.zip: --cache needs .* train without --cache"):
        ImageDataset(data, cache=True)


def test_a_config_opens_its_dataset(data):
    config = DatasetConfig(data=str(data), cond=True, max_size=3, cache=True)
    dataset = open_dataset(config, resolution=8, channels=3, seed=5)
    assert (len(dataset), dataset.num_classes) == (3, 2)
    with pytest.raises(ValueError, match="--data is missing"):
        open_dataset(DatasetConfig())
    with pytest.raises(ValueError, match="--max-size"):
        DatasetConfig(max_size=0)


def test_reals_show_every_class(data, tmp_path):
    dataset = ImageDataset(data, use_labels=True, max_size=9)
    save_reals(dataset, PixelCodec(), tmp_path / "reals.png")
    assert Image.open(tmp_path / "reals.png").mode == "RGB"


# Data that do not fit.


def test_resolution_and_channels_are_checked_against_the_first_image(data):
    with pytest.raises(ValueError, match=r"data\.zip/00000/img00000000\.png: is 8x8, but .* 16"):
        ImageDataset(data, resolution=16)
    with pytest.raises(ValueError, match=r"img00000000\.png: has 3 channel\(s\), but 1"):
        ImageDataset(data, channels=1)


def test_paths_that_are_no_dataset_are_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("text")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    for name, message in (
        ("absent.zip", "no such file or folder"),
        ("empty", "holds no images"),
        ("empty.zip", "holds no images"),
        ("text.zip", "not a zip archive"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            ImageDataset(tmp_path / name)


def test_images_that_are_not_square_are_refused(tmp_path):
    folder = make_folder(tmp_path / "in", ["a.png"], width=9)
    with pytest.raises(ValueError, match=r"in/a\.png: is 9x8, .* --transform=center-crop"):
        ImageDataset(folder)


def test_another_shape_is_named_when_it_is_read(data, tmp_path):
    large = png_bytes(random_image(0, 9, 9), tmp_path / "large.png")
    gray = png_bytes(random_image(0, mode="L"), tmp_path / "gray.png")
    rewrite(data, {"00000/img00000003.png": large, "00000/img00000004.png": gray})
    dataset = ImageDataset(data)
    with pytest.raises(ImageError, match=r"img00000003\.png: is 9x9 with 3 .* is 8x8 with 3"):
        dataset[3]
    with pytest.raises(ImageError, match=r"img00000004\.png: is 8x8 with 1 channel.*all RGB"):
        dataset[4]


def test_a_tar_is_to_be_unpacked_before_it_is_converted(tmp_path):
    random_image(0, 9, 8).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    succeed(dataset_tool, "index", tmp_path / "data.tar")
    remedy = r"unpack it into a folder and convert that with python .* --source=FOLDER"
    with pytest.raises(ValueError, match=rf"a\.png: is 9x8, .*; {remedy}"):
        ImageDataset(tmp_path / "data.tar")


def test_missing_and_impossible_labels_are_named(data, tmp_path):
    labels = [[f"00000/img{k:08d}.png", k % 2] for k in range(10)]
    rewrite(data, metadata={"labels": labels[:8]})
    with pytest.raises(ValueError, match=r"img00000008\.png: has no label .*\(and 1 more image\)"):
        ImageDataset(data, use_labels=True)
    rewrite(data, metadata={"labels": labels, "class_names": ["only"]})
    with pytest.raises(ValueError, match=r"img00000001\.png: has label 1 .* names 1 classes"):
        ImageDataset(data, use_labels=True)
    rewrite(data, metadata={"labels": None})
    with pytest.raises(ValueError, match=r"data\.zip: has no class labels .*--cond"):
        ImageDataset(data, use_labels=True)
    assert len(ImageDataset(data)) == 10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_one_sentence_also_from_a_worker(data, num_workers):
    rewrite(data, {"00000/img00000003.png": b"\x89PNG\r\n\x1a\nbroken"})
    loader = make_loader(ImageDataset(data), [[2, 3]], num_workers=num_workers, device=CPU)
    with pytest.raises(ImageError) as caught:
        list(loader)
    forget_frames(caught)
    message = str(caught.value)
    assert "data.zip/00000/img00000003.png: cannot be read" in message
    assert "\n" not in message


def test_an_encrypted_or_exotic_zip_is_refused(data):
    content = bytearray(data.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # A flag in the last directory entry.
    (data.parent / "encrypted.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"dataset\.json: is encrypted"):
        ImageDataset(data.parent / "encrypted.zip")
    rewrite(data, compression=zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="compressed by a method other than deflate"):
        ImageDataset(data)


# Positions.


def make_sampler(size=10, *, start_nimg=0, batch_size=8, batch_gpu=8, rank=0, world_size=1, seed=3):
    return PositionSampler(
        size,
        seed=seed,
        start_nimg=start_nimg,
        batch_size=batch_size,
        batch_gpu=batch_gpu,
        rank=rank,
        world_size=world_size,
    )


def take_steps(num_steps, *, batch_size=8, batch_gpu=8, world_size=1, **kwargs):
    """Return the global batches of some steps, put together from all ranks' micro-batches."""
    rounds = -(-batch_size // (batch_gpu * world_size))
    samplers = [
        iter(
            make_sampler(
                batch_size=batch_size,
                batch_gpu=batch_gpu,
                world_size=world_size,
                rank=rank,
                **kwargs,
            )
        )
        for rank in range(world_size)
    ]
    steps = []
    for _ in range(num_steps):
        parts = [list(itertools.islice(sampler, rounds)) for sampler in samplers]
        sizes = [len(batch) for part in parts for batch in part]
        assert max(sizes) <= batch_gpu
        assert max(sizes) - min(sizes) <= batch_size % (batch_gpu * world_size)
        steps.append([index for part in parts for batch in part for index in batch])
    return steps


def test_positions_follow_the_permutations_of_the_epochs():
    stream = np.concatenate(take_steps(5)).tolist()
    expected = np.concatenate([epoch_permutation(3, epoch, 10) for epoch in range(4)])
    assert stream == expected.tolist()


@pytest.mark.parametrize("size", [3, 10, 1000])
def test_global_batches_do_not_depend_on_ranks_or_batch_gpu(size):
    reference = take_steps(12, size=size)
    for world_size, batch_gpu in ((1, 4), (1, 1), (2, 4), (2, 2), (4, 2), (8, 1), (3, 2), (5, 2)):
        assert take_steps(12, size=size, world_size=world_size, batch_gpu=batch_gpu) == reference


def test_a_run_resumes_at_any_image_count():
    stream = np.concatenate(take_steps(20)).tolist()
    for start_nimg in (8, 56, 3, 17):
        resumed = np.concatenate(take_steps(5, start_nimg=start_nimg)).tolist()
        assert resumed == stream[start_nimg : start_nimg + 40]


def test_every_epoch_holds_every_image_once_and_seeds_differ():
    stream = np.concatenate(take_steps(50, size=7)).tolist()
    for epoch in range(50 * 8 // 7):
        assert sorted(stream[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert np.concatenate(take_steps(50, size=7, seed=4)).tolist() != stream


def test_a_dataset_smaller_than_the_batch_wraps_around():
    (step,) = take_steps(1, size=3, batch_size=32)
    assert {step.count(index) for index in range(3)} <= {10, 11}


# Loaders.


@pytest.mark.parametrize("cache", [False, True])
def test_batches_are_equal_with_any_number_of_workers(data, cache):
    streams = []
    for num_workers in (0, 2):
        dataset = ImageDataset(data, use_labels=True, cache=cache)
        loader = make_loader(
            dataset, make_sampler(batch_gpu=4), num_workers=num_workers, device=CPU
        )
        streams.append(list(itertools.islice(loader, 9)))
    indices = itertools.islice(make_sampler(batch_gpu=4), 9)
    for wanted, (images, cond), (other_images, other_cond) in zip(indices, *streams, strict=True):
        assert torch.equal(images, expected_images(wanted))
        assert torch.equal(other_images, images)
        assert torch.equal(other_cond["label"], cond["label"])


def test_a_loader_leaves_the_global_random_numbers_alone(data):
    before = torch.get_rng_state()
    next(iter(make_loader(ImageDataset(data), make_sampler(), num_workers=2, device=CPU)))
    assert torch.equal(torch.get_rng_state(), before)


class Squares(torch.utils.data.Dataset):
    """A dataset with keys of its own kind."""

    remote_bytes = 0

    def __getitems__(self, keys):
        return torch.tensor([base**power for base, power in keys]), {}


def test_other_samplers_and_datasets_use_the_same_loader():
    loader = make_loader(Squares(), [[(2, 3), (3, 2)], [(5, 1)]], num_workers=1, device=CPU)
    assert [images.tolist() for images, _ in loader] == [[8, 9], [5]]


class SlowProcesses(torch.utils.data.Dataset):
    """Tells the process that serves each batch, after a while."""

    remote_bytes = 0

    def __getitems__(self, keys):
        time.sleep(0.05)
        return torch.tensor([os.getpid()]), {"threads": torch.tensor([torch.get_num_threads()])}


def test_workers_outlive_the_signals_that_stop_a_run_and_obey_their_parent():
    iterator = iter(make_loader(SlowProcesses(), make_sampler(), num_workers=2, device=CPU))
    pids = {next(iterator)[0].item() for _ in range(2)}
    assert len(pids) == 2
    assert os.getpid() not in pids
    for pid in pids:
        # Sent by another process, as a scheduler or terminal does.
        for name in ("INT", "USR1", "TERM"):
            subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    for _ in range(12):  # More than what was fetched ahead.
        images, cond = next(iterator)
        assert images.item() in pids
        assert cond["threads"].item() == 1
    for worker in iterator._workers:
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


class Handles(torch.utils.data.Dataset):
    """Hands out files the way that PyTorch hands out the memory of tensors."""

    remote_bytes = 0

    def __getitems__(self, keys):
        return resource_sharer.DupFd(0), {}


def test_a_worker_does_not_complain_of_a_stop_between_asking_for_a_batch_and_having_it(capfd):
    iterator = iter(make_loader(Handles(), make_sampler(), num_workers=1, device=CPU))
    handle, _ = next(iterator)
    address, key = handle._id
    with socket.socket(socket.AF_UNIX) as leaves_at_once:
        leaves_at_once.connect(address)
    os.close(handle.detach())  # Served after that.
    assert not capfd.readouterr().err
    resource_sharer._resource_sharer.get_connection((address, key + 1000)).close()
    os.close(next(iterator)[0].detach())
    assert "KeyError" in capfd.readouterr().err


@pytest.mark.parametrize("world_size", [1, 3, 12])
def test_ranks_share_all_images_in_order(data, world_size, monkeypatch):
    dataset, batches = ImageDataset(data), []
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches.append(list(iterate_images(dataset, batch_size=4)))
    sizes = [sum(len(images) for _, images in part) for part in batches]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(images) <= 4 for part in batches for _, images in part)
    indices, images = (
        torch.cat([batch[k] for part in batches for batch in part]) for k in range(2)
    )
    assert indices.tolist() == list(range(10))
    assert torch.equal(images, expected_images(range(10)))


def test_processes_read_ahead_if_asked_for_or_if_there_are_many_images(monkeypatch):
    class Readers:
        remote_bytes = 0.0

        def __getitems__(self, keys):
            return torch.tensor([os.getpid()] * len(keys)), {}

    def are_others(**settings):
        batches = read_batches(Readers(), [[0]], **settings)
        return [pid != os.getpid() for _, pids in batches for pid in pids.tolist()]

    monkeypatch.setattr("data.loader.num_cores_of_rank", lambda most: 1)
    assert are_others(num_workers=1) == [True]
    assert are_others() == are_others(num_workers=0) == [False]
    monkeypatch.setattr("data.loader._MIN_IMAGES_FOR_WORKERS", 1)
    assert are_others() == [True]
    assert are_others(num_workers=0) == [False]


def test_iteration_with_workers_gives_the_same_images(data):
    batches = list(iterate_images(ImageDataset(data), batch_size=3, num_workers=2))
    assert [indices.tolist() for indices, _ in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert torch.equal(torch.cat([images for _, images in batches]), expected_images(range(10)))


def test_a_signal_for_the_main_process_is_still_its_own(data):
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(True))
    try:
        next(iter(make_loader(ImageDataset(data), make_sampler(), num_workers=1, device=CPU)))
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert received


def test_what_a_reader_leaves_out_is_counted_and_told_once(tmp_path, capsys):
    for name in ("a.png", "b.png", "c.heic", "d.HEIC", "LICENSE", "dataset.json"):
        if name.endswith("png"):
            Image.new("L", (8, 8)).save(tmp_path / name)
        else:
            (tmp_path / name).write_text("{}")
    for _ in range(2):
        ImageDataset(tmp_path)
    line = "2 taken, 3 left out (2 .heic, 1 without extension)."
    assert capsys.readouterr().err == f"{tmp_path}: {line}\n"
    assert f"files         {line}" in succeed(dataset_tool, "info", tmp_path).output
