"""Squares of photographs: where they are cut, and that no pixel of one split is in another."""

import numpy as np
import pytest
from image_files import convert, make_folder, read_target
from PIL import Image

from data.convert.crops import held_out_cells
from data.convert.sources import Selection, open_source

RED, BLUE = (255, 0, 0), (0, 0, 255)


def crops(source, num=200, size=16, **selected):
    """Return the crops of a source; photographs are measured in this process."""
    selection = Selection(crops=num, size=(size, size), num_workers=1, **selected)
    found = open_source(str(source), selection)
    return [found.item(index) for index in range(found.num_images)], found


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (80, 80), (301, 97), (75, 1000)])
def test_no_pixel_of_the_test_split_is_in_a_crop_of_the_train_split(tmp_path, size):
    source = make_folder(tmp_path / "in", ["1.png"], width=size[0], height=size[1])
    seen = {}
    for split in ("train", "test", "all"):
        mask = np.zeros(size[::-1], bool)
        for crop in crops(source, split=split)[0]:
            left, top, right, bottom = crop.box
            assert right - left == bottom - top >= 16
            assert right - left <= min(size) * 0.22
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            mask[top:bottom, left:right] = True
        seen[split] = mask
    assert not (seen["train"] & seen["test"]).any()
    assert (seen["all"] & ~seen["train"] & ~seen["test"]).any()  # Margins.
    assert 0.2 < seen["test"].mean() < 0.34
    assert seen["train"].mean() > 0.3


def test_the_crops_of_a_size_fill_all_that_their_split_may_use(tmp_path):
    """No part of a photograph is left out of training but its cells and what is beside them."""
    source = make_folder(tmp_path / "in", ["1.png"], width=320, height=240)
    mask = np.zeros((240, 320), bool)
    for left, top, right, bottom in (crop.box for crop in crops(source, num=3000)[0]):
        mask[top:bottom, left:right] = True
    for left, top, right, bottom in held_out_cells((320, 240)):
        assert not mask[top:bottom, left:right].any()
        mask[top:bottom, left:right] = True
    assert mask.mean() > 0.99


def test_converted_crops_show_their_own_part_of_the_photograph_alone(tmp_path):
    photograph = Image.new("RGB", (300, 200), BLUE)
    for cell in held_out_cells(photograph.size):
        photograph.paste(RED, cell)
    (tmp_path / "in").mkdir()
    photograph.save(tmp_path / "in" / "1.png")
    for split, colour in (("train", BLUE), ("test", RED)):
        dest = tmp_path / f"{split}.zip"
        args = ("--crops=40", "--resolution=32", f"--split={split}")
        code, output = convert(tmp_path / "in", dest, *args)
        assert code == 0, output
        _, images, _ = read_target(dest)
        assert np.array(images).shape == (40, 32, 32, 3)
        assert (np.array(images) == colour).all()


def test_crops_are_those_of_the_photograph_at_their_box(tmp_path):
    source = make_folder(tmp_path / "in", ["1.png", "2.png"], width=128, height=96)
    found, _ = crops(source, num=5, size=21)  # The longest edge is 21: nothing is resized.
    for index, crop in enumerate(found):
        with Image.open(source / f"{1 + index // 5}.png") as photograph:
            expected = np.asarray(photograph.crop(crop.box))
        np.testing.assert_array_equal(crop.pixels(), expected)
    assert len({crop.box for crop in found}) > 5


def test_every_crop_has_the_label_of_its_photograph_and_equal_sources_give_equal_bytes(tmp_path):
    source = make_folder(tmp_path / "in", ["dog/1.png", "cat/2.png"], width=96, height=80)
    args = ("--crops=3", "--resolution=16")
    for dest in ("1.zip", "2.zip"):
        code, output = convert(source, tmp_path / dest, *args)
        assert code == 0, output
    assert "6 images of 16x16x3, 2 classes" in output
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    metadata = read_target(tmp_path / "1.zip")[2]
    assert [label for _, label in metadata["labels"]] == [0, 0, 0, 1, 1, 1]
    assert convert(source, tmp_path / "3.zip", *args, "--labels=none")[0] == 0
    assert read_target(tmp_path / "3.zip")[2] == {"labels": None, "class_names": None}


def test_photographs_that_are_too_small_or_broken_are_listed_once_or_left_out(tmp_path):
    source = make_folder(tmp_path / "in", ["1.png"], width=96, height=80)
    make_folder(source, ["2.png"], width=72, height=200)
    (source / "3.png").write_bytes((source / "1.png").read_bytes()[:500])
    args = ("--crops=20", "--resolution=16", "--split=test")
    code, output = convert(source, tmp_path / "out.zip", *args)
    assert code == 1
    assert "2 of 3 images cannot be used" in output
    assert output.count("2.png: is 72x200; squares of 16 need 74 pixels a side") == 1
    assert output.count("3.png: ") == 1
    assert not (tmp_path / "out.zip").exists()
    code, output = convert(source, tmp_path / "out.zip", *args, "--skip-broken")
    assert code == 0, output
    assert "20 taken, 2 left out (2 broken or too small)" in output
    assert len(read_target(tmp_path / "out.zip")[0]) == 20


def test_max_images_counts_photographs_not_their_crops(tmp_path):
    source = make_folder(tmp_path / "in", ["1.png", "2.png", "3.png"], width=96, height=80)
    args = ("--crops=4", "--resolution=16", "--max-images=2")
    code, output = convert(source, tmp_path / "out.zip", *args)
    assert code == 0, output
    assert "8 taken, 1 left out (1 beyond --max-images)" in output
