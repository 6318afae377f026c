"""dataset_tool.py: every source, every option, every message, and interruption."""

import errno
import functools
import io
import json
import operator
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
from image_files import convert, make_folder, make_zip, random_image, read_target, run_tool
from PIL import Image

from data.convert import convert as conversion
from data.convert.source import Source
from data.images.dataset import ImageDataset
from data.images.decode import UnfitImageError, decode_image
from dnnlib.parallel import process_map

ROOT = Path(__file__).parent.parent


# Layout.


def test_digits_are_written_in_the_layout_of_edm(tmp_path):
    code, output = convert("digits", tmp_path / "digits.zip")
    assert code == 0, output
    names, images, metadata = read_target(tmp_path / "digits.zip")
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert len(names) == 1797
    assert names[0] == "00000/img00000000.png"
    assert names[1796] == "00001/img00001796.png"
    assert metadata["labels"] == [[n, int(t)] for n, t in zip(names, digits.target, strict=True)]
    assert metadata["class_names"] == [str(digit) for digit in range(10)]
    assert images[0].dtype == np.uint8
    np.testing.assert_array_equal(images[5], np.round(digits.images[5] * 255 / 16))
    assert np.max(images) == 255
    assert "1797 images of 8x8x1, 10 classes" in output


def test_two_conversions_are_equal_to_the_byte(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png"])
    convert(source, tmp_path / "1.zip")
    convert(source, tmp_path / "2.zip")
    run_tool("convert", f"--source={source}", f"--dest={tmp_path / '3.zip'}", "--workers=2")
    first = (tmp_path / "1.zip").read_bytes()
    assert first == (tmp_path / "2.zip").read_bytes() == (tmp_path / "3.zip").read_bytes()


def test_a_folder_target_holds_the_same_files_as_a_zip(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png"])
    (tmp_path / "out").mkdir()  # An existing empty folder is accepted.
    assert convert(source, tmp_path / "out")[0] == 0
    assert convert(source, tmp_path / "out.zip")[0] == 0
    folder, archive = read_target(tmp_path / "out"), read_target(tmp_path / "out.zip")
    assert folder[0] == archive[0]
    assert folder[2] == archive[2]
    np.testing.assert_array_equal(folder[1], archive[1])


def test_pngs_carry_no_metadata(tmp_path):
    (tmp_path / "in").mkdir()
    profile = b"not a real profile"
    random_image(0).save(tmp_path / "in/a.png", icc_profile=profile, dpi=(72, 72))
    convert(tmp_path / "in", tmp_path / "out")
    data = (tmp_path / "out/00000/img00000000.png").read_bytes()
    assert not any(chunk in data for chunk in (b"iCCP", b"pHYs", b"tEXt", b"tIME", b"eXIf"))


# Sample archives.


def test_a_sample_archive_holds_rgb_images_labels_and_class_names(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "b/2.png", "b/3.png"])
    code, output = convert(source, tmp_path / "out.npz")
    assert code == 0, output
    assert "out.npz: 3 images of 8x8x3, 2 classes" in output
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], [random_image(seed) for seed in range(3)])
        assert file["arr_1"].dtype == np.int64
        assert file["arr_1"].tolist() == [0, 1, 1]
        assert file["class_names"].tolist() == ["a", "b"]
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None


def test_an_unlabelled_sample_archive_holds_images_alone(tmp_path):
    source = make_folder(tmp_path / "in", ["1.png", "2.png"], width=16, height=16)
    code, output = convert(source, tmp_path / "out.npz", "--resolution=8", "--max-images=1")
    assert code == 0, output
    with np.load(tmp_path / "out.npz") as file:
        assert file.files == ["arr_0"]
        expected = random_image(0, 16, 16).resize((8, 8), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(file["arr_0"], [np.asarray(expected)])


def test_grayscale_is_repeated_in_a_sample_archive_and_the_tool_says_so(tmp_path):
    code, output = convert("digits", tmp_path / "out.npz", "--max-images=20")
    assert code == 0
    assert "Grayscale images became RGB" in output
    convert("digits", tmp_path / "out.zip", "--max-images=20")
    gray = np.stack(read_target(tmp_path / "out.zip")[1])
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], np.repeat(gray[..., None], 3, axis=3))
    random_image(0).save(make_folder(tmp_path / "in", ["a.png"], mode="L") / "b.png")
    assert "mixes grayscale and RGB" in convert(tmp_path / "in", tmp_path / "mixed.npz")[1]


def test_a_zip_becomes_a_sample_archive_and_the_same_zip_again(tmp_path):
    source = make_folder(tmp_path / "in", ["b/1.png", "a/2.png", "b/3.png"])
    convert(source, tmp_path / "1.zip")
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(files["dataset.json"])
    metadata["class_names"].append("a class without images")
    make_zip_of(tmp_path / "1.zip", files | {"dataset.json": json.dumps(metadata).encode()})
    convert(tmp_path / "1.zip", tmp_path / "2.zip")
    convert(tmp_path / "2.zip", tmp_path / "samples.npz")
    code, output = run_tool(
        "convert", f"--source={tmp_path / 'samples.npz'}", f"--dest={tmp_path / '3.zip'}"
    )
    assert code == 0, output
    assert (tmp_path / "3.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert convert(tmp_path / "3.zip", tmp_path / "again.npz")[0] == 0
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "samples.npz").read_bytes()


def make_zip_of(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_a_sample_archive_is_written_image_by_image(tmp_path):
    num_images = 300
    pixels = np.zeros((64, 64, 3), np.uint8)
    source = Source("noise", num_images, lambda index: pixels + np.uint8(index % 256), str)
    tracemalloc.start()
    conversion.convert_images(source, tmp_path / "out.npz", num_workers=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < num_images * pixels.nbytes / 2
    with np.load(tmp_path / "out.npz") as file:
        assert file["arr_0"].shape == (num_images, 64, 64, 3)
        assert (file["arr_0"] == np.arange(num_images).reshape(-1, 1, 1, 1) % 256).all()


@pytest.mark.parametrize("name", ["out.zip", "out.npz"])
def test_a_target_that_exists_is_left_alone(tmp_path, name):
    source = make_folder(tmp_path / "in", ["a.png"])
    (tmp_path / name).write_text("mine")
    code, output = convert(source, tmp_path / name)
    assert code == 1
    assert "exists already" in output
    assert (tmp_path / name).read_text() == "mine"
    assert convert(source, tmp_path / name, "--overwrite")[0] == 0
    assert len(ImageDataset(tmp_path / name)) == 1
    code, output = convert(tmp_path / name, tmp_path / name, "--overwrite")
    assert code == 1
    assert "is also the file of --source" in output
    assert len(ImageDataset(tmp_path / name)) == 1


# Pixels.


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("LA", (8, 8), (10, 0)), 255),
        (Image.new("L", (8, 8), 77), 77),
        (Image.new("1", (8, 8), 1), 255),
        (Image.new("RGB", (8, 8), (1, 2, 3)).quantize(4), [1, 2, 3]),
    ],
)
def test_every_kind_of_image_becomes_grayscale_or_rgb(tmp_path, image, expected):
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in/a.png")
    code, output = convert(tmp_path / "in", tmp_path / "out.zip")
    assert code == 0, output
    pixels = read_target(tmp_path / "out.zip")[1][0]
    assert pixels.ndim == (2 if isinstance(expected, int) else 3)
    np.testing.assert_array_equal(pixels[3, 3], expected)


def test_cmyk_becomes_rgb(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("CMYK", (8, 8)).save(tmp_path / "in/a.tif")
    convert(tmp_path / "in", tmp_path / "out.zip")
    np.testing.assert_array_equal(read_target(tmp_path / "out.zip")[1][0][0, 0], [255, 255, 255])


def test_sixteen_bit_grayscale_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "in/deep.png")
    code, output = convert(tmp_path / "in", tmp_path / "out.zip")
    assert code == 1
    assert "deep.png: has more than 8 bits per channel" in output


def test_a_full_disk_is_told_with_the_name_of_the_folder(tmp_path, monkeypatch):
    def write_bytes(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_folder(tmp_path / "in", ["a.png"])
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    code, output = convert(tmp_path / "in", tmp_path / "out")
    assert (code, f"Error: {tmp_path / 'out'}: No space left on device." in output) == (1, True)


def test_more_than_eight_bits_are_refused_where_scores_need_each_bit(tmp_path):
    values = np.arange(192, dtype=np.uint16).reshape(8, 8, 3)
    ppm = b"P6 # a comment of 3 8 8 255\n8 8\n%d\n"
    decode_image(ppm % 255 + values.astype(np.uint8).tobytes(), exact=True)
    with pytest.raises(UnfitImageError, match="more than 8 bits per channel"):
        decode_image(ppm % 65535 + values.astype(">u2").tobytes(), exact=True)
    for ending in ("JPEG2000", "j2k"):
        file, options = io.BytesIO(), dict(no_jp2=ending == "j2k")
        Image.fromarray(values.astype(np.uint8)).save(file, "JPEG2000", **options)
        data = bytearray(file.getvalue())
        decode_image(bytes(data), exact=True)
        # The depths of the three channels, less 1.
        depths = slice(begin := data.index(b"\xff\x4f\xff\x51") + 42, begin + 9, 3)
        assert data[depths] == bytes([7, 7, 7])
        data[depths] = bytes([15, 15, 15])
        with pytest.raises(UnfitImageError, match="more than 8 bits per channel"):
            decode_image(bytes(data), exact=True)


def test_the_exif_orientation_is_applied(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255  # White above; orientation 6 shows it turned clockwise: white on the right.
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending in ("png", "tif"):
        Image.fromarray(pixels).save(tmp_path / f"in/a.{ending}", exif=exif)
    code, output = convert(tmp_path / "in", tmp_path / "out.zip")
    assert code == 0, output
    for image in read_target(tmp_path / "out.zip")[1]:
        np.testing.assert_array_equal(image, np.rot90(pixels, -1))


@pytest.mark.parametrize("modes", [("L", "RGB", "L"), ("RGB", "L", "RGB")])
def test_a_mixture_of_grayscale_and_rgb_becomes_rgb(tmp_path, modes):
    (tmp_path / "in").mkdir()
    for index, mode in enumerate(modes):
        random_image(index, mode=mode).save(tmp_path / f"in/{index}.png")
    code, output = convert(tmp_path / "in", tmp_path / "out.zip")
    assert code == 0
    assert "mixes grayscale and RGB" in output
    images = read_target(tmp_path / "out.zip")[1]
    for index, mode in enumerate(modes):
        expected = random_image(index, mode=mode).convert("RGB")
        np.testing.assert_array_equal(images[index], np.asarray(expected))


# Resolution and transforms.


def test_images_of_one_square_size_are_kept_to_the_pixel(tmp_path):
    source = make_folder(tmp_path / "in", ["a.png", "b.png"], width=7, height=7)
    convert(source, tmp_path / "out.zip")
    np.testing.assert_array_equal(read_target(tmp_path / "out.zip")[1][1], random_image(1, 7, 7))


def test_resolution_resizes_square_images(tmp_path):
    source = make_folder(tmp_path / "in", ["a.png"], width=16, height=16)
    convert(source, tmp_path / "out.zip", "--resolution=8")
    expected = random_image(0, 16, 16).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(read_target(tmp_path / "out.zip")[1][0], np.asarray(expected))


def striped(width, height, left, right):
    """Return a picture that is white except for columns [left, right), which are black."""
    pixels = np.full((height, width), 255, np.uint8)
    pixels[:, left:right] = 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize("transform", ["center-crop", "center-crop-dhariwal"])
def test_square_crops_take_the_centre(tmp_path, transform):
    (tmp_path / "in").mkdir()
    # 64x32 with a black middle of 32 columns: exactly the central square.
    striped(64, 32, 16, 48).save(tmp_path / "in/wide.png")
    striped(64, 32, 16, 48).rotate(90, expand=True).save(tmp_path / "in/high.png")
    code, output = convert(
        tmp_path / "in", tmp_path / "out.zip", "--resolution=8", f"--transform={transform}"
    )
    assert code == 0, output
    for image in read_target(tmp_path / "out.zip")[1]:
        assert image.shape == (8, 8)
        # Dhariwal's bicubic runs before the crop: only its edge sees the white.
        np.testing.assert_array_equal(image[1:-1, 1:-1], 0)


def test_dhariwal_halves_by_averages_before_the_bicubic_step(tmp_path):
    (tmp_path / "in").mkdir()
    image = random_image(0, 52, 40)
    image.save(tmp_path / "in/a.png")
    convert(
        tmp_path / "in",
        tmp_path / "out.zip",
        "--resolution=8",
        "--transform=center-crop-dhariwal",
    )
    halved = image.resize((26, 20), Image.Resampling.BOX).resize((13, 10), Image.Resampling.BOX)
    scaled = halved.resize((10, 8), Image.Resampling.BICUBIC)
    expected = np.asarray(scaled)[:, 1:9]
    np.testing.assert_array_equal(read_target(tmp_path / "out.zip")[1][0], expected)


@pytest.mark.parametrize(("resolution", "bar"), [("8x4", 2), ("8", 1)])
def test_wide_crops_lie_between_black_bars(tmp_path, resolution, bar):
    source = make_folder(tmp_path / "in", ["a.png"], width=20, height=20)
    code, output = convert(
        source,
        tmp_path / "out.zip",
        f"--resolution={resolution}",
        "--transform=center-crop-wide",
    )
    assert code == 0, output
    image = read_target(tmp_path / "out.zip")[1][0]
    assert image.shape == (8, 8, 3)
    assert not image[:bar].any()
    assert not image[-bar:].any()
    assert image[bar:-bar].any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--transform=center-crop"], "needs a size; give --resolution=N"),
        (["--resolution=0"], "got '0'; accepted"),
        (["--resolution=big"], "got 'big'; accepted"),
        (["--resolution=8x4"], "training images are square"),
        (["--resolution=4x8", "--transform=center-crop-wide"], "higher than wide"),
        (["--split=train"], "has no splits"),
    ],
)
def test_options_that_make_no_sense_are_explained(tmp_path, args, message):
    source = make_folder(tmp_path / "in", ["a.png"])
    code, output = convert(source, tmp_path / "out.zip", *args)
    assert code == 1
    assert message in output


def test_a_mixture_of_sizes_needs_a_resolution(tmp_path):
    source = make_folder(tmp_path / "in", ["a.png"])
    random_image(0, 9, 9).save(source / "b.png")
    code, output = convert(source, tmp_path / "out.zip")
    assert code == 1
    assert "b.png: is 9x9, but images before it are 8x8; give --resolution=N" in output
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize("args", [[], ["--resolution=4"]])
def test_an_image_that_is_not_square_needs_a_transform(tmp_path, args):
    source = make_folder(tmp_path / "in", ["a.png"], width=9)
    code, output = convert(source, tmp_path / "out.zip", *args)
    assert code == 1
    assert "a.png: is 9x8, not square" in output
    assert "--transform=center-crop" in output
    assert ("--resolution" in output) == (not args)


def test_max_images_keeps_the_first_ones_and_all_class_names(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "a/2.png", "b/3.png"])
    code, output = convert(source, tmp_path / "out.zip", "--max-images=2")
    names, _, metadata = read_target(tmp_path / "out.zip")
    assert code == 0
    assert len(names) == 2
    assert metadata["class_names"] == ["a", "b"]
    assert "1 of 2 classes have no image" in output


# Broken images.


def make_broken_folder(tmp_path):
    source = make_folder(tmp_path / "in", ["a/1.png", "a/2.png", "b/3.png", "b/4.png"])
    whole = (source / "a/2.png").read_bytes()
    (source / "a/2.png").write_bytes(whole[: len(whole) // 2])
    (source / "b/3.png").write_bytes(b"no image at all")
    return source


@pytest.mark.parametrize("name", ["out.zip", "out.npz"])
def test_broken_images_are_all_listed_and_nothing_is_written(tmp_path, name):
    code, output = convert(make_broken_folder(tmp_path), tmp_path / name)
    assert code == 1
    assert "2 of 4 images cannot be used" in output
    assert "a/2.png: " in output
    assert "b/3.png: not an image of a known format" in output
    assert "--skip-broken" in output
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_skip_broken_leaves_them_out_and_counts_them(tmp_path):
    code, output = convert(make_broken_folder(tmp_path), tmp_path / "out.zip", "--skip-broken")
    assert code == 0
    assert "Skipped 2 broken image(s)" in output
    names, images, metadata = read_target(tmp_path / "out.zip")
    assert metadata["labels"] == [[names[0], 0], [names[1], 1]]
    np.testing.assert_array_equal(images[1], np.asarray(random_image(3)))


def test_skip_broken_counts_before_it_writes_a_sample_archive(tmp_path):
    code, output = convert(make_broken_folder(tmp_path), tmp_path / "out.npz", "--skip-broken")
    assert code == 0
    assert "Skipped 2 broken image(s)" in output
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], [random_image(0), random_image(3)])
        assert file["arr_1"].tolist() == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.npz"]


@pytest.mark.parametrize("name", ["out.zip", "out.npz"])
def test_skip_broken_with_nothing_left_is_an_error(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    code, output = convert(tmp_path / "in", tmp_path / name, "--skip-broken")
    assert code == 1
    assert "no image is left" in output
    assert not (tmp_path / name).exists()


def test_a_damaged_member_of_a_zip_is_listed(tmp_path):
    source = make_folder(tmp_path / "in", ["1.png", "2.png"])
    path = make_zip(tmp_path / "in.zip", source)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("2.png").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 40 : offset + 80] = b"\xff" * 40
    path.write_bytes(data)
    code, output = convert(path, tmp_path / "out.zip")
    assert code == 1
    assert "1 of 2 images cannot be used" in output
    assert "in.zip/2.png: " in output


# Interruption.


def start_long_conversion(tmp_path, dest, early=False):
    """Start a conversion in a process group of its own; return it half-way.

    With ``early`` that is when its first decoding process has been started and is importing.
    """
    source = tmp_path / "in"
    source.mkdir()
    random_image(0, 96, 96).save(tmp_path / "one.png")
    for index in range(4000):
        os.link(tmp_path / "one.png", source / f"{index:05d}.png")
    process = subprocess.Popen(
        [sys.executable, "dataset_tool.py", "convert", f"--source={source}", f"--dest={dest}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        # A background job of a shell is born deaf to Ctrl-C, and would pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 60
    while time.time() < deadline:
        if early:
            for child in psutil.Process(process.pid).children():
                if "--multiprocessing-fork" in child.cmdline():
                    assert blocks_sigint(child.pid)
                    return process
        for path in () if early else tmp_path.glob(".out*"):
            written = path.stat().st_size if path.is_file() else len(list(path.rglob("*.png")))
            if written > (50_000 if path.is_file() else 10):
                assert process.poll() is None
                return process
        time.sleep(0.01)
    raise AssertionError("the conversion did not start")


def blocks_sigint(pid):
    """Return whether a process blocks SIGINT, where the system says so."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return True
    mask = next(line for line in status.read_text().splitlines() if line.startswith("SigBlk"))
    return bool(int(mask.split()[1], 16) >> (signal.SIGINT - 1) & 1)


def wait_until_group_is_gone(process):
    deadline = time.time() + 30
    while time.time() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("processes of the conversion were left")


@pytest.mark.parametrize("name", ["out.zip", "out"])
def test_a_killed_conversion_leaves_no_target_and_no_processes(tmp_path, name):
    process = start_long_conversion(tmp_path, tmp_path / name)
    process.kill()
    process.wait()
    assert not (tmp_path / name).exists()
    wait_until_group_is_gone(process)
    assert convert("digits", tmp_path / name, "--max-images=3")[0] == 0


@pytest.mark.parametrize(
    ("number", "name", "early"),
    [
        (signal.SIGINT, "out", False),
        (signal.SIGINT, "out.zip", True),
        (signal.SIGHUP, "out.zip", False),
        (signal.SIGTERM, "out.zip", False),
        (signal.SIGTERM, "out.npz", False),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number, name, early):
    process = start_long_conversion(tmp_path, tmp_path / name, early)
    if number in (signal.SIGINT, signal.SIGHUP):
        os.killpg(process.pid, number)  # What a terminal sends reaches the whole group.
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "one.png"]
    wait_until_group_is_gone(process)


def test_a_taken_target_is_not_touched(tmp_path):
    (tmp_path / "out.zip").write_text("precious")
    make_folder(tmp_path / "out", ["precious.png"])
    for name in ("out.zip", "out"):
        code, output = convert("digits", tmp_path / name)
        assert code == 1
        assert "exists already" in output
    assert (tmp_path / "out.zip").read_text() == "precious"


# Parallel decoding.


def test_process_map_keeps_order_and_takes_few_items_ahead():
    taken = 0

    def items():
        nonlocal taken
        for index in range(5000):
            taken += 1
            yield -index

    results = process_map(abs, items(), num_workers=2, chunk_size=4)
    first = [next(results) for _ in range(10)]
    assert taken <= 40
    assert first + list(results) == list(range(5000))


def kill_this_process(item):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_this_process_within_a_result(item):
    def send(connection, content):
        os.write(connection.fileno(), bytes(content)[:-1])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = send
    return item


@pytest.mark.parametrize("function", [kill_this_process, kill_this_process_within_a_result])
def test_process_map_explains_a_process_that_was_killed(function):
    with pytest.raises(ValueError, match="was killed"):
        list(process_map(function, range(40), num_workers=2))


def test_process_map_raises_what_a_process_raised():
    with pytest.raises(ZeroDivisionError) as caught:
        list(process_map(functools.partial(operator.floordiv, 1), [1, 0], num_workers=2))
    assert "in _apply" in caught.value.__notes__[0]


# info and verify.


def test_info_describes_a_dataset(tmp_path):
    convert("digits", tmp_path / "digits.zip", "--max-images=100")
    code, output = run_tool("info", tmp_path / "digits.zip")
    assert code == 0
    lines = [line.split() for line in output.splitlines() if line]
    assert ["images", "100"] in lines
    assert ["resolution", "8x8"] in lines
    assert ["channels", "1"] in lines
    assert ["classes", "10"] in lines
    from sklearn.datasets import load_digits

    for digit, count in enumerate(np.bincount(load_digits().target[:100])):
        assert [str(digit), str(count), str(digit)] in lines
    content_hash = next(line for line in lines if line[:2] == ["content", "hash"])[2]
    assert len(content_hash.removeprefix("v2-")) == 64
    convert(make_folder(tmp_path / "in", ["a.png"]), tmp_path / "plain.zip")
    assert "none (no labels)" in run_tool("info", tmp_path / "plain.zip")[1]
    assert run_tool("info", tmp_path / "absent.zip")[0] == 1


@pytest.mark.parametrize("name", ["out.zip", "out"])
def test_verify_accepts_what_convert_wrote(tmp_path, name):
    convert("digits", tmp_path / name, "--max-images=40")
    code, output = run_tool("verify", tmp_path / name)
    assert code == 0, output
    assert "no problems found" in output


def test_verify_lists_every_problem(tmp_path):
    convert("digits", tmp_path / "out", "--max-images=40")
    folder = tmp_path / "out/00000"
    (folder / "img00000003.png").write_bytes(b"broken")
    random_image(0, 9, 9, "L").save(folder / "img00000004.png")
    random_image(0, 8, 8).save(folder / "img00000005.png")
    (folder / "img00000006.png").unlink()
    random_image(0, 8, 8, "L").save(folder / "new.png")
    path = tmp_path / "out/dataset.json"
    metadata = json.loads(path.read_text())
    metadata["labels"][7][1] = 10
    metadata["labels"].append(metadata["labels"][8])
    path.write_text(json.dumps(metadata))
    code, output = run_tool("verify", tmp_path / "out", "--workers=1")
    assert code == 1
    for problem in (
        "img00000003.png: not an image",
        "img00000004.png: is 9x9 with 1 channel(s), but most images are 8x8 with 1",
        "img00000005.png: is 8x8 with 3 channel(s)",
        "a label for 00000/img00000006.png, which does not exist",
        "img00000007.png: has label 10, beyond the 10 classes",
        "more than one label",
        "new.png: has no label",
        "7 problem(s) found",
    ):
        assert problem in output, problem


def test_verify_notices_a_flipped_bit_by_the_checksum(tmp_path):
    convert("digits", tmp_path / "out.zip", "--max-images=10")
    data = bytearray((tmp_path / "out.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        info = archive.getinfo("00000/img00000004.png")
    data[info.header_offset + 30 + len(info.filename) + info.file_size - 1] ^= 1
    (tmp_path / "out.zip").write_bytes(data)
    code, output = run_tool("verify", tmp_path / "out.zip", "--workers=1")
    assert code == 1
    assert "img00000004.png: its bytes differ from the checksum" in output


def test_verify_reports_images_that_are_not_square(tmp_path):
    source = make_folder(tmp_path / "in", ["a.png", "b.png"], width=9)
    code, output = run_tool("verify", source, "--workers=1")
    assert code == 1
    assert "images are 9x8, not square" in output


def test_info_and_verify_describe_a_sample_archive(tmp_path):
    convert("digits", tmp_path / "out.npz", "--max-images=100")
    code, output = run_tool("info", tmp_path / "out.npz")
    assert code == 0, output
    lines = [line.split() for line in output.splitlines() if line]
    for line in (["images", "100"], ["resolution", "8x8"], ["channels", "3"], ["classes", "10"]):
        assert line in lines
    code, output = run_tool("verify", tmp_path / "out.npz")
    assert code == 0, output
    assert "no problems found" in output


def test_verify_lists_the_problems_of_a_sample_archive(tmp_path):
    path = tmp_path / "out.npz"
    np.savez(path, np.zeros((2, 64, 65, 3), np.uint8), np.array([0, -1]))
    data = bytearray(path.read_bytes())
    data[20_000] = 1
    path.write_bytes(data)
    code, output = run_tool("verify", path)
    assert code == 1
    for problem in (
        "arr_0 cannot be read (Bad CRC-32",
        "images are 65x64, not square",
        "image 1: has label -1",
        "3 problem(s) found",
    ):
        assert problem in output, problem
    np.savez(path, mu=np.zeros(2))
    assert "has no array arr_0" in run_tool("verify", path)[1]
    assert "has no array arr_0" in run_tool("info", path)[1]


def test_help_shows_runnable_examples():
    for args, line in (
        ([], "python dataset_tool.py info datasets/cifar10.zip"),
        (["convert"], "--source=cifar-10-python.tar.gz --dest=datasets/cifar10.zip"),
        (["convert"], "python dataset_tool.py convert --source=out/ --dest=samples.npz"),
    ):
        code, output = run_tool(*args, "--help")
        assert code == 0
        assert line in output


@pytest.mark.parametrize("kind", ["link", "mount", "current"])
def test_a_folder_that_cannot_be_replaced_is_filled(kind, tmp_path, monkeypatch):
    """An empty mount point as of a Docker volume, a link to an empty folder, and ``.``."""
    source, dest = make_folder(tmp_path / "in", ["a/1.png", "b/2.png"]), tmp_path / "out"
    place = tmp_path / "place"
    place.mkdir()
    if kind == "link":
        dest.symlink_to(place)
    elif kind == "current":
        monkeypatch.chdir(place)
        dest = "."
    else:
        dest, rename = place, os.rename

        def refuse(old, new):
            if os.fspath(new) == os.fspath(place):
                raise OSError(errno.EBUSY, "Device or resource busy")
            rename(old, new)

        monkeypatch.setattr(os, "rename", refuse)
    code, output = convert(source, dest)
    assert code == 0, output
    assert kind != "link" or dest.is_symlink()
    assert sorted(path.name for path in place.iterdir()) == ["00000", "dataset.json"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
