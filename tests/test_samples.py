"""Images to be scored: sample archives of ADM, and what is refused instead of being converted."""

import io
import json
import pickle
import shutil
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from helpers import forget_frames
from image_files import convert, make_folder, make_zip, random_image
from PIL import Image

from data.images.dataset import ImageDataset, open_images
from data.images.decode import ImageError
from data.images.samples import SampleArchive
from data.loader import make_loader

CPU = torch.device("cpu")


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_samples(path, *arrays, **named):
    np.savez(path, *arrays, **named)
    return path


def as_images(pixels):
    """Return [N, H, W, C] pixels as the tensor [N, C, H, W] that a dataset gives."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def message_of(path):
    """Return the sentence with which a path is refused, at once or when its images are read."""

    def read_all():
        dataset = open_images(path)
        dataset.__getitems__(range(len(dataset)))

    with pytest.raises(ValueError) as caught:
        read_all()
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    assert message.endswith(".")
    return message


# Sample archives.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_sample_archives_give_their_images_and_labels(tmp_path, save):
    pixels, labels = random_pixels(7, 8, 8, 3), np.array([3, 0, 1, 1, 0, 3, 2], np.int32)
    save(tmp_path / "samples.npz", pixels, labels)
    dataset = open_images(tmp_path / "samples.npz")
    assert (len(dataset), dataset.resolution, dataset.img_channels) == (7, 8, 3)
    assert (dataset.name, dataset.num_classes) == ("samples", 4)
    assert dataset.class_names == ["0", "1", "2", "3"]
    assert dataset.labels.dtype == np.int64
    images, cond = dataset.__getitems__([6, 0, 6, 3])
    assert torch.equal(images, as_images(pixels[[6, 0, 6, 3]]))
    assert images.is_contiguous()
    assert cond["label"].tolist() == [2, 3, 2, 1]


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 1)])
def test_grayscale_samples_have_one_channel(tmp_path, shape):
    pixels = random_pixels(*shape)
    dataset = open_images(save_samples(tmp_path / "gray.npz", pixels))
    assert dataset.img_channels == 1
    images, cond = dataset.__getitems__(range(4))
    assert torch.equal(images, torch.from_numpy(pixels).view(4, 1, 8, 8))
    assert (dataset.labels, dataset.class_names, cond) == (None, [], {})


def test_reference_batches_of_adm_hold_images_beside_statistics(tmp_path):
    pixels = random_pixels(3, 8, 8, 3)
    statistics = dict(mu=np.zeros(5), sigma=np.eye(5), mu_s=np.zeros(4), sigma_s=np.eye(4))
    path = save_samples(tmp_path / "VIRTUAL_x.npz", **statistics, arr_0=pixels)
    dataset = open_images(path)
    assert torch.equal(dataset.__getitems__(range(3))[0], as_images(pixels))
    assert dataset.labels is None


def test_the_layout_of_arrays_in_the_file_does_not_matter(tmp_path):
    pixels = random_pixels(5, 8, 8, 3)
    paths = [tmp_path / name for name in ("c.npz", "fortran.npz", "version2.npz")]
    save_samples(paths[0], pixels)
    save_samples(paths[1], np.asfortranarray(pixels))
    # Written by hand: .npy version 2.0, and an extra field in the headers.
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pixels, version=(2, 0))
    with zipfile.ZipFile(paths[2], "w") as archive:
        info = zipfile.ZipInfo("arr_0.npy")
        info.extra = struct.pack("<HH", 0x7777, 6) + b"filler"
        archive.writestr(info, buffer.getvalue())
    for path in paths:
        assert torch.equal(open_images(path).__getitems__(range(5))[0], as_images(pixels))


def test_an_archive_larger_than_what_reading_takes_stays_on_disk(tmp_path):
    pixels = random_pixels(64, 128, 128, 3)  # 3.1 MB.
    path = save_samples(tmp_path / "large.npz", pixels)
    tracemalloc.start()
    dataset = open_images(path)
    image, _ = dataset[63]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(image, as_images(pixels[63:])[0])
    assert peak < pixels.nbytes / 4
    assert len(pickle.dumps(dataset)) < 20_000


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_copies_and_workers_read_sample_archives(tmp_path, save):
    pixels = random_pixels(9, 32, 32, 3)
    save(tmp_path / "samples.npz", pixels, np.arange(9))
    dataset = open_images(tmp_path / "samples.npz")
    data = pickle.dumps(dataset)
    assert len(data) < 4000  # Copies read the file themselves.
    copy = pickle.loads(data)
    assert torch.equal(copy.__getitems__(range(9))[0], as_images(pixels))
    loader = make_loader(dataset, [[8, 1], [4], [0, 2, 3]], num_workers=2, device=CPU)
    for images, cond in loader:
        assert torch.equal(images, as_images(pixels[cond["label"].numpy()]))


def test_training_reads_sample_archives_too(tmp_path):
    path = save_samples(tmp_path / "samples.npz", random_pixels(4, 8, 8, 3), np.arange(4))
    dataset = ImageDataset(path, use_labels=True, max_size=2, resolution=8, channels=3)
    assert len(dataset) == 2
    assert ImageDataset(path).labels is None
    save_samples(path, random_pixels(4, 8, 8, 3))
    with pytest.raises(ValueError, match=r"samples\.npz: has no class labels .*arr_1"):
        open_images(path, use_labels=True)


def test_class_names_of_a_sample_archive_fix_the_number_of_classes(tmp_path):
    pixels, names = random_pixels(2, 8, 8, 3), ["cat", "dog", "Kälbchen"]
    path = tmp_path / "samples.npz"
    save_samples(path, arr_0=pixels, arr_1=np.array([1, 0]), class_names=np.array(names))
    dataset = open_images(path)
    assert (dataset.class_names, dataset.num_classes) == (names, 3)
    assert open_images(path, use_labels=False).labels is None


def test_the_content_hash_of_a_sample_archive_follows_images_and_labels(tmp_path):
    pixels, labels = random_pixels(4, 8, 8, 3), np.arange(4)
    path = tmp_path / "samples.npz"

    def content_hash(*arrays, save=np.savez, **named):
        save(path, *arrays, **named)
        return open_images(path).content_hash

    reference = content_hash(pixels, labels)
    assert content_hash(pixels, labels) == reference
    assert content_hash(pixels, labels, save=np.savez_compressed) == reference
    assert content_hash(pixels, labels, mu=np.zeros(3)) == reference
    shutil.copy(path, tmp_path / "copy.npz")
    assert open_images(tmp_path / "copy.npz").content_hash == reference
    changed = pixels.copy()
    changed[2, 3, 4, 1] ^= 1
    others = {content_hash(changed, labels), content_hash(pixels, labels[::-1])}
    others |= {content_hash(pixels), content_hash(pixels[:3], labels[:3])}
    assert len(others | {reference}) == 5


# Sample archives that are none.


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(mu=np.zeros(3), sigma=np.eye(3)), "has no array arr_0 (statistics such as mu"),
        (dict(images=np.zeros((2, 8, 8, 3), np.uint8)), "has no array arr_0; save the images"),
        (dict(arr_0=np.zeros((2, 8, 8, 3))), "float64 of shape [2, 8, 8, 3]; expected uint8"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), np.float32)), "scale the values to 0..255"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), np.uint16)), "uint16 of shape [2, 8, 8, 3]; expected"),
        (dict(arr_0=np.zeros((2, 8, 8, 4), np.uint8)), "alpha channel it seems; composite"),
        (dict(arr_0=np.zeros((2, 3, 8, 8), np.uint8)), "expected images [N, H, W, 3]"),
        (dict(arr_0=np.zeros((8, 8, 3), np.uint8)), "of shape [8, 8, 3]; expected images"),
        (dict(arr_0=np.zeros((2, 192), np.uint8)), "of shape [2, 192]; expected images"),
        (dict(arr_0=np.zeros((2, 0, 0, 3), np.uint8)), "of shape [2, 0, 0, 3]; expected images"),
        (dict(arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "holds no images"),
        (dict(arr_0=np.zeros((2, 8, 9, 3), np.uint8)), "image 0: is 9x8, but training and scores"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_unfit_sample_archive_is_one_sentence(tmp_path, save, arrays, words):
    save(tmp_path / "samples.npz", **arrays)
    assert words in message_of(tmp_path / "samples.npz")


class Exploit:
    """Unpickling it creates the file ``path``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["arr_0", "arr_1", "class_names"])
def test_arrays_of_python_objects_are_refused_and_not_unpickled(tmp_path, name):
    arrays = dict(arr_0=np.zeros((1, 8, 8, 3), np.uint8), arr_1=np.zeros(1, np.int64))
    arrays[name] = np.array([Exploit(tmp_path / "owned")], object)
    message = message_of(save_samples(tmp_path / "samples.npz", **arrays))
    assert name in message
    assert "bject" in message
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((3, 1), np.int64), "arr_1 holds int64 of shape [3, 1]; expected"),
        (np.zeros(2, np.int64), "integers [3]"),
        (np.zeros(3), "arr_1 holds float64"),
        (np.array([0, -1, 0]), "image 1: has label -1 in arr_1"),
        (np.array([0, 0, 2**63], np.uint64), "image 2: has label 9223372036854775808"),
    ],
)
def test_labels_that_are_no_class_indices_are_named(tmp_path, labels, words):
    path = save_samples(tmp_path / "samples.npz", random_pixels(3, 8, 8, 3), labels)
    assert words in message_of(path)


def test_class_names_that_do_not_fit_are_named(tmp_path):
    arrays = dict(arr_0=random_pixels(2, 8, 8, 3), arr_1=np.array([0, 1]))
    for names, words in (
        (np.array(["one"]), 'has label 1 in arr_1; .* "class_names" has 1 names'),
        (np.array([1, 2]), "class_names holds int64 of shape"),
    ):
        path = save_samples(tmp_path / "samples.npz", **arrays, class_names=names)
        with pytest.raises(ValueError, match=words):
            open_images(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_sample_archive_is_one_sentence(tmp_path, save):
    path = tmp_path / "samples.npz"
    save(path, np.zeros((40, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"text", b""):
        path.write_bytes(damaged)
        assert "not an .npz, or only part of one" in message_of(path)
    start = whole.index(b"arr_0.npy") + 9  # Of the member's content, after an extra field.
    path.write_bytes(whole[: start + 20] + b"\xff" * 10 + whole[start + 30 :])
    assert "arr_0 cannot be read" in message_of(path)


def test_an_array_shorter_than_its_shape_is_one_sentence(tmp_path):
    path = tmp_path / "samples.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = dict(descr="|u1", fortran_order=False, shape=(1000, 8, 8, 3))
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(192))
    assert "arr_0 has 192 bytes, but its shape [1000, 8, 8, 3] needs 192000" in message_of(path)


def test_an_encrypted_sample_archive_is_refused(tmp_path):
    path = save_samples(tmp_path / "samples.npz", random_pixels(2, 8, 8, 3))
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in message_of(path)


def test_a_file_cut_short_while_it_is_read_is_one_sentence(tmp_path):
    path = save_samples(tmp_path / "samples.npz", random_pixels(4, 8, 8, 3))
    dataset = open_images(path)
    with open(path, "r+b") as file:
        file.truncate(600)
    with pytest.raises(ImageError, match=r"samples\.npz, image 3: cannot be read \(the file ends"):
        dataset[3]


# Image files: nothing is converted silently.


def make_kind(folder, image, name="b.png", **save):
    """Write a plain image a.png and another one beside it."""
    make_folder(folder, ["a.png"])
    image.save(folder / name, **save)
    return folder


def png_of_depth_16(colour_type):
    """Return a PNG of 8x8 pixels with 16 bits per channel, which Pillow cannot write as RGB."""
    channels = {0: 1, 2: 3}[colour_type]
    rows = b"".join(b"\0" + bytes(16 * channels) for _ in range(8))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_folders_and_zips_are_read_as_by_training(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png", "b/3.png"])
    convert(source, tmp_path / "data.zip")
    make_zip(tmp_path / "plain.zip", source)
    expected = ImageDataset(tmp_path / "data.zip", use_labels=True)
    for name, is_labelled in (("data.zip", True), ("in", False), ("plain.zip", False)):
        dataset = open_images(tmp_path / name)
        images, _ = dataset.__getitems__(range(3))
        assert torch.equal(images, expected.__getitems__(range(3))[0])
        assert (dataset.labels is not None) == is_labelled
    dataset = open_images(tmp_path / "data.zip")
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.class_names == ["a", "b"]
    # References of a dataset are found again whoever computed them.
    assert dataset.content_hash == ImageDataset(tmp_path / "data.zip").content_hash


@pytest.mark.parametrize(
    ("image", "name", "save"),
    [
        (random_image(1, mode="RGBA"), "b.png", {}),
        (Image.new("RGBA", (8, 8), (1, 2, 3, 255)), "b.png", {}),
        (Image.new("LA", (8, 8), (10, 0)), "b.png", {}),
        (Image.new("RGB", (8, 8)), "b.png", dict(transparency=(0, 0, 0))),
        (Image.new("L", (8, 8)), "b.png", dict(transparency=0)),
        (random_image(1).quantize(4), "b.png", dict(transparency=0)),
        (random_image(1).quantize(4), "b.gif", dict(transparency=0)),
        (random_image(1, mode="RGBA"), "b.webp", dict(lossless=True)),
        (random_image(1, mode="RGBA"), "b.tif", {}),
    ],
)
def test_transparency_is_refused(tmp_path, image, name, save):
    folder = make_kind(tmp_path / "in", image, name, **save)
    assert f"{name}: has transparency" in message_of(folder)
    assert "dataset_tool.py convert" in message_of(folder)
    (folder / "a.png").unlink()
    assert len(ImageDataset(folder)[0][0]) in (1, 3)  # Training puts it on white.


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("b.png", png_of_depth_16(0)),
        ("b.png", png_of_depth_16(2)),
        ("b.pgm", b"P5 8 8 65535\n" + bytes(8 * 8 * 2)),
    ],
)
def test_deep_images_are_refused(tmp_path, name, data):
    folder = make_folder(tmp_path / "in", ["a.png"])
    (folder / name).write_bytes(data)
    assert f"{name}: has more than 8 bits per channel" in message_of(folder)


def deep_tiff():
    """Return an uncompressed TIFF of 8x8 RGB pixels with 16 bits per channel."""
    entries = [
        (256, 3, 1, 8),
        (257, 3, 1, 8),
        (258, 3, 3, 8),  # At offset 8: three numbers of bits.
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 200),
        (277, 3, 1, 3),
        (278, 3, 1, 8),
        (279, 4, 1, 384),
    ]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head = b"II*\0" + struct.pack("<I", 14) + struct.pack("<HHH", 16, 16, 16) + directory
    return head.ljust(200, b"\0") + bytes(384)


def test_deep_tiffs_are_refused(tmp_path):
    folder = make_folder(tmp_path / "in", ["a.png"])
    (folder / "b.tif").write_bytes(deep_tiff())
    assert "b.tif: has more than 8 bits per channel" in message_of(folder)


def test_other_colours_are_refused(tmp_path):
    folder = make_kind(tmp_path / "in", Image.new("CMYK", (8, 8)), "b.jpg")
    assert "b.jpg: is neither grayscale nor RGB (mode CMYK)" in message_of(folder)


@pytest.mark.parametrize("name", ["b.png", "b.bmp", "b.tif", "b.ppm", "b.webp", "b.jp2", "b.gif"])
def test_plain_images_of_any_format_are_read_to_the_pixel(tmp_path, name):
    save = dict(lossless=True) if name == "b.webp" else {}
    image = random_image(1)
    if name == "b.gif":
        image = image.quantize(200)
    folder = make_kind(tmp_path / "in", image, name, **save)
    pixels = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(open_images(folder)[1][0].permute(1, 2, 0), pixels)


def test_bilevel_and_palette_pngs_are_expanded(tmp_path):
    (tmp_path / "bits").mkdir()
    bits = Image.fromarray(random_pixels(8, 8) > 128)
    bits.save(tmp_path / "bits/a.png")
    np.testing.assert_array_equal(open_images(tmp_path / "bits")[0][0][0], np.asarray(bits) * 255)
    palette = random_image(3).quantize(16)
    folder = make_kind(tmp_path / "palette", palette)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(open_images(folder)[1][0].permute(1, 2, 0), expected)


def test_mixtures_are_refused(tmp_path):
    folder = make_kind(tmp_path / "sizes", random_image(1, 16, 16))
    assert "b.png: is 16x16 with 3 channel(s), but" in message_of(folder)
    assert "--resolution=N" in message_of(folder)
    folder = make_kind(tmp_path / "kinds", random_image(1, mode="L"))
    assert "b.png: is 8x8 with 1 channel(s), but" in message_of(folder)
    assert "which makes all RGB" in message_of(folder)


def test_broken_files_and_empty_folders_are_refused(tmp_path):
    folder = make_kind(tmp_path / "in", random_image(1))
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    assert "b.png: cannot be read (" in message_of(folder)
    (tmp_path / "empty").mkdir()
    assert "empty: holds no images" in message_of(tmp_path / "empty")
    assert "absent: no such file" in message_of(tmp_path / "absent")
    assert "a.png: is 9x8" in message_of(make_folder(tmp_path / "wide", ["a.png"], width=9))
    (tmp_path / "empty/dataset.json").write_text(json.dumps({"labels": []}))
    assert "holds no images" in message_of(tmp_path / "empty")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_refusal_is_one_sentence_also_from_a_worker(tmp_path, num_workers):
    folder = make_kind(tmp_path / "in", random_image(1, mode="RGBA"))
    loader = make_loader(open_images(folder), [[0], [1]], num_workers=num_workers, device=CPU)
    with pytest.raises(ImageError) as caught:
        list(loader)
    forget_frames(caught)
    assert "b.png: has transparency" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_but_the_arrays_of_images_is_opened(tmp_path):
    path = save_samples(
        tmp_path / "samples.npz", arr_0=random_pixels(2, 8, 8, 3), mu=np.array([{}], object)
    )
    assert len(SampleArchive(path)) == 2


def test_a_flipped_byte_is_noticed_where_the_identity_of_samples_is_asked_for(tmp_path):
    path = save_samples(tmp_path / "samples.npz", random_pixels(40, 8, 8, 3))
    assert open_images(path).content_hash.startswith("v2-")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"samples.npz: arr_0 cannot be read \(Bad CRC-32"):
        _ = open_images(path).content_hash
