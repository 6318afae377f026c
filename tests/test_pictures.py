"""Grids of images: gaps, enlargement, and titles that stay within their places."""

import numpy as np
import pytest
import torch

from torch_utils.pictures import (
    Titles,
    class_titles,
    image_grid,
    is_our_image,
    mixed_grid,
    save_animation,
    save_image,
    support_picture,
)

BACKGROUND, GAP, LINE = 40, 2, 15


def filled(num, value, size=48, channels=1):
    return torch.full((num, channels, size, size), value, dtype=torch.uint8)


def ink(pixels):
    """Return whether anything is written on a part of a picture."""
    return bool((pixels != BACKGROUND).any())


def test_tiles_have_gaps_of_two_pixels_and_small_ones_are_enlarged():
    pixels = np.asarray(image_grid(filled(5, 250, size=10), columns=3))
    assert pixels.shape == (2 * (50 + GAP) + GAP, 3 * (50 + GAP) + GAP)
    assert (pixels[GAP : GAP + 50, GAP : GAP + 50] == 250).all()
    assert (pixels[:, 52:54] == BACKGROUND).all()
    assert (pixels[54:, 106:] == BACKGROUND).all()  # The second row has two.


def test_heading_columns_rows_and_captions_are_where_they_belong():
    titles = Titles("heading", ["a", "b"], ["left", ""], ["one", "", "", "four"])
    picture = image_grid(filled(4, 40), columns=2, titles=titles)
    pixels = np.asarray(picture)
    margin = picture.width - (2 * 50 + GAP)
    tops = [2 * LINE + GAP, 2 * LINE + GAP + 48 + LINE + GAP]
    assert picture.height == tops[1] + 48 + LINE + GAP
    assert ink(pixels[:LINE])
    assert ink(pixels[LINE : 2 * LINE, margin : margin + 50])
    assert ink(pixels[tops[0] : tops[0] + 48, :margin])
    assert not ink(pixels[tops[1] : tops[1] + 48, :margin])  # An empty title writes nothing.
    for row, column, is_written in ((0, 0, True), (0, 1, False), (1, 0, False), (1, 1, True)):
        below = pixels[tops[row] + 48 : tops[row] + 48 + LINE, margin + 50 * column :][:, :50]
        assert ink(below) == is_written
        tile = pixels[tops[row] : tops[row] + 48, margin + GAP + 50 * column :][:, :48]
        assert not ink(tile)


@pytest.mark.parametrize("text", ["x" * 300, "many words " * 60, "\n\t a \n", "字" * 40])
def test_a_long_text_stays_in_its_place(text):
    for channels in (1, 3):
        images = filled(2, 200, channels=channels)
        rows = [[image] for image in images]
        alone = np.asarray(mixed_grid(rows, 48))
        titled = np.asarray(mixed_grid(rows, 48, Titles(text, [text], [text, text])))
        margin = titled.shape[1] - alone.shape[1]
        assert margin <= 168 + 3 * GAP
        body = titled[2 * LINE :]
        assert (body[:, margin:] == alone).all()  # Nothing is written over an image.
        assert ink(body[:, : margin - GAP])
        assert not ink(body[:, margin - GAP : margin])


def test_columns_with_titles_are_aligned():
    wide, narrow = filled(1, 200, 48), filled(1, 200, 48)[..., :20]
    rows = [[narrow[0], wide[0]], [wide[0], narrow[0]]]
    pixels = np.asarray(mixed_grid(rows, 48, Titles(columns=["first", "second"])))
    assert pixels.shape[1] == 2 * 50 + GAP
    second = pixels[LINE + GAP :, 52:72]
    assert (second[:48] == 200).all()
    assert (second[50:98] == 200).all()


def test_a_class_is_named_once_for_a_row_or_a_column_where_all_agree():
    assert class_titles([], 4) == Titles(captions=[])
    assert class_titles(list("aab"), 2).rows == ["a", "b"]
    by_row = class_titles(list("aabb"), 2, "x")
    assert (by_row.heading, by_row.rows, by_row.captions) == ("x", ["a", "b"], ())
    assert class_titles(list("abcabca"), 3).columns == list("abc")
    assert class_titles(list("abca"), 2).captions == list("abca")
    assert class_titles(list("aaaa"), 2, "x") == Titles("a (x)")
    assert class_titles(list("ab"), 2).captions == list("ab")


def test_the_picture_has_supports_above_samples():
    supports = filled(6, 250).unflatten(0, (2, 3))
    samples = filled(10, 100).unflatten(0, (2, 5))
    pixels = np.asarray(support_picture(supports, samples, bands=2))
    # Five samples to a row, though there are three images in a support.
    block_w, block_h = 5 * 50 + GAP, 2 * (LINE + 50 + GAP)
    assert pixels.shape == (block_h + 20, 2 * block_w + 3 * 10)
    first = pixels[10 : 10 + block_h, 10 : 10 + block_w]
    assert ink(first[:LINE])
    assert ink(first[LINE + 52 : 2 * LINE + 52])
    assert (first[LINE + GAP : LINE + 50, 2:50] == 250).all()
    assert (first[2 * LINE + 54 : 2 * LINE + 102, 202:250] == 100).all()
    assert not ink(first[LINE + GAP : LINE + 50, 152:])


def test_our_pictures_and_animations_are_known_again(tmp_path):
    pictures = [image_grid(filled(2, value, channels=3), 2) for value in (10, 200)]
    save_image(pictures[0], tmp_path / "a.png")
    save_animation(pictures, tmp_path / "a.gif", [40, 2000])
    pictures[0].save(tmp_path / "b.gif", comment=b"\xff of another")
    known = {path.name: is_our_image(path) for path in tmp_path.iterdir()}
    assert known == {"a.png": True, "a.gif": True, "b.gif": False}
