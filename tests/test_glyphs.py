"""Letters of fonts as classes: which there are, how they are drawn, how made ones are judged."""

import dataclasses
import importlib.util
import re
import unicodedata

import helpers
import numpy as np
import pytest
import torch
from image_files import convert, read_target

import demo
import demos.glyphs
import demos.steps
from data.convert.convert import convert_images
from data.convert.glyphs import (
    DRAWINGS,
    FACES,
    MIN_FACES,
    Glyph,
    find_letters,
    open_glyphs,
)
from data.convert.source import Source
from data.convert.sources import Selection, open_source
from data.fewshot.episodes import episodes_of_dataset
from data.images.dataset import ImageDataset
from demos.letters import measure_copying, train_judge
from torch_utils.pictures import Titles, image_grid

SIZE = (16, 16)


@pytest.fixture(scope="module")
def glyphs():
    return open_glyphs("glyphs", "all", SIZE)


def drawn(letter, font):
    return Glyph(font, letter, SIZE[0]).pixels().astype(np.float64) / 255


def test_whole_scripts_are_never_trained_on(glyphs):
    splits = {name: set(part) for name, part in glyphs.class_splits.items()}
    assert sorted(index for part in splits.values() for index in part) == list(
        range(len(glyphs.class_names))
    )
    for index, letter in enumerate(glyphs.class_names):
        name = unicodedata.name(letter)
        assert (index in splits["test"]) == ("ARMENIAN" in name or "GEORGIAN" in name), name
        assert (index in splits["val"]) == ("LAO" in name), name
    assert len(splits["train"]) > 1000
    assert len(splits["test"]) > 150


def test_no_face_draws_a_letter_that_it_does_not_have():
    boxes = {}
    for letter, fonts in list(find_letters().faces.items())[::7]:
        assert len(fonts) >= MIN_FACES
        for font in fonts:
            if font not in boxes:
                boxes[font] = drawn("\U0010fffe", font)
            image = drawn(letter, font)
            assert image.max() > 0.3, (letter, font.stem)
            assert np.abs(image - boxes[font]).max() > 0.1, (letter, font.stem)


def test_letters_that_look_alike_are_one_class(glyphs):
    kept = set(glyphs.class_names)
    assert "A" in kept
    # A Greek and a Cyrillic A, a Cyrillic and a Greek o, an Armenian vo (n) and oh (o).
    assert not kept & set("\u0391\u0410\u043e\u03bf\u0578\u0585")
    faces = find_letters().faces
    rng = np.random.default_rng(0)
    seen = [glyphs.class_names[index] for index in glyphs.class_splits["train"]]
    unseen = [glyphs.class_names[index] for index in glyphs.class_splits["test"]]
    for letter in rng.choice(unseen, 3, replace=False):
        own = {font: drawn(letter, font) for font in faces[letter]}
        for other in rng.choice(seen, 150, replace=False):
            shared = [font for font in faces[letter] if font in faces[other]]
            gaps = [np.sqrt(np.square(own[f] - drawn(other, f)).mean()) for f in shared]
            assert not gaps or np.mean(gaps) > 0.07, (letter, other)


def test_every_face_of_a_letter_differs_and_is_drawn_twice(glyphs):
    labels = np.array(glyphs.labels)
    for index in (0, 500, len(glyphs.class_names) - 1):
        rows = np.flatnonzero(labels == index)
        images = [glyphs.item(row).pixels() for row in rows]
        assert len(rows) >= MIN_FACES * DRAWINGS
        assert len({image.tobytes() for image in images}) == len(rows)
        assert [glyphs.item(row).drawing for row in rows] == [0, 1] * (len(rows) // DRAWINGS)
        for plain, changed in zip(images[::2], images[1::2], strict=True):
            gap = np.sqrt(np.square(plain / 255.0 - changed / 255.0).mean())
            assert 0.02 < gap < 0.45


def test_the_faces_of_the_two_splits_are_different_ones_of_the_same_letters():
    train, test = (open_glyphs("glyphs", split, SIZE) for split in ("train", "test"))
    assert train.class_names == test.class_names
    faces = [
        {source.item(i).font.stem for i in range(source.num_images)} for source in (train, test)
    ]
    assert faces[0] <= set(FACES["train"])
    assert faces[1] == set(FACES["test"])
    assert not faces[0] & faces[1]
    counts = [np.bincount(source.labels) for source in (train, test)]
    # A set of six and six held-out images; two other faces of every letter that is judged.
    assert counts[0].min() >= 12
    assert counts[1][list(test.class_splits["test"])].min() >= 2 * DRAWINGS


def test_conversions_of_letters_are_equal_and_keep_names_and_splits(tmp_path):
    args = ("--resolution=16", "--max-images=80", "--workers=1")
    code, output = convert("glyphs", tmp_path / "1.zip", *args)
    assert code == 0, output
    assert "letters are left out, because they look like another one" in output
    source = open_source("glyphs", Selection(size=SIZE))
    convert_images(source, tmp_path / "2.zip", max_images=80, num_workers=2)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    _, images, metadata = read_target(tmp_path / "1.zip")
    assert metadata["class_names"][:3] == ["A", "B", "C"]
    assert {*metadata["class_splits"]} == {"train", "val", "test"}
    np.testing.assert_array_equal(images[7], source.item(7).pixels())


def test_letters_are_drawn_at_the_resolution_asked_for():
    assert open_source("glyphs").item(0).pixels().shape == (28, 28)
    large = open_source("glyphs", Selection(size=(64, 64))).item(0).pixels()
    assert large.shape == (64, 64)
    rows, columns = np.flatnonzero(large.max(1) > 30), np.flatnonzero(large.max(0) > 30)
    assert max(np.ptp(rows), np.ptp(columns)) == pytest.approx(0.86 * 64, abs=3)
    assert rows.mean() == pytest.approx(31.5, abs=1.5)


def test_missing_fonts_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("data.convert.glyphs.find_letters", find_letters.__wrapped__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, output = convert("glyphs", tmp_path / "out.zip")
    assert code == 1
    assert "pip install matplotlib" in output
    elsewhere = dataclasses.make_dataclass("Spec", ["origin"])(str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: elsewhere)
    code, output = convert("glyphs", tmp_path / "out.zip")
    assert code == 1
    assert "has no DejaVuSans.ttf" in output
    assert not (tmp_path / "out.zip").exists()


def test_titles_name_letters_that_the_pictures_font_lacks_by_their_code():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    titled = [image_grid(images, 1, Titles(rows=[text])) for text in ("Ա", "U+0531", "U+0532")]
    assert titled[0].tobytes() == titled[1].tobytes() != titled[2].tobytes()


# The demo.

CHOSEN = ("test", 6), ("train", 12)


@pytest.fixture(scope="module")
def few_letters(tmp_path_factory):
    """A folder with the demo's two datasets of a few letters."""
    folder = tmp_path_factory.mktemp("letters")
    for split, name in (("train", "glyphs"), ("test", "glyphs-test")):
        source = open_glyphs("glyphs", split, SIZE)
        classes = [index for part, num in CHOSEN for index in source.class_splits[part][:num]]
        rows = [row for row, label in enumerate(source.labels) if label in classes]
        few = Source(
            name,
            len(rows),
            lambda index, source=source, rows=rows: source.item(rows[index]),
            source.image_name,
            [int(source.labels[row]) for row in rows],
            source.class_names,
            {part: source.class_splits[part][:num] for part, num in CHOSEN},
        )
        convert_images(few, folder / f"{name}.zip", num_workers=1)
    return folder


def datasets_of(folder):
    names = ("glyphs", "glyphs-test")
    return [ImageDataset(folder / f"{name}.zip", use_labels=True) for name in names]


def test_the_judge_knows_letters_in_faces_that_it_has_not_seen(few_letters):
    images, others = datasets_of(few_letters)
    classes = list(images.class_splits["test"])
    judge = train_judge(others, classes, num_steps=60)
    rows = np.flatnonzero(np.isin(images.labels, classes))
    pixels, _ = images.__getitems__(rows.tolist())
    assert (judge.classify(pixels) == images.labels[rows]).mean() > 0.9
    assert set(judge.classify(torch.zeros_like(pixels))) <= set(classes)


def test_copies_of_a_support_are_near_it_and_other_faces_are_not(few_letters):
    images, others = datasets_of(few_letters)
    episodes = episodes_of_dataset(images, support_size=5, num_per_class=1)
    copies = measure_copying(episodes.supports[:, :2], episodes, images, others)
    assert copies.ratio == 0
    real = [np.flatnonzero(others.labels == index)[:2].tolist() for index in episodes.classes]
    samples = torch.stack([others.__getitems__(rows)[0] for rows in real])
    fresh = measure_copying(samples, episodes, images, others)
    assert fresh.ratio == pytest.approx(1, abs=0.1)
    # Another drawing of the same face is nearer than another face, and no copy.
    assert 0 < np.median(fresh.same_faces) < np.median(fresh.other_faces)
    assert "100.0% are nearer than 99% of other faces" in copies.describe()


def test_real_letters_pass_the_demo_and_those_of_other_supports_and_copies_do_not(few_letters):
    images, others = datasets_of(few_letters)
    episodes = episodes_of_dataset(images, support_size=5, num_per_class=1)
    episodes = episodes[np.flatnonzero(np.isin(episodes.classes, images.class_splits["test"]))]
    judge = train_judge(others, images.class_splits["test"], num_steps=60)
    real = [np.flatnonzero(others.labels == index)[:4].tolist() for index in episodes.classes]
    real = torch.stack([others.__getitems__(rows)[0] for rows in real])

    def passes(mode, samples):
        made = demos.glyphs.MadeImages(episodes, samples, free=torch.zeros_like(samples[0]))
        lines, is_good = demos.glyphs.judge_images(mode, made, judge, images, others)
        assert lines[-2].startswith(f"{mode}: all ")
        return is_good

    for mode in demos.glyphs.MODES:
        assert passes(mode, real)
        assert not passes(mode, real.roll(1, 0))
        assert not passes(mode, episodes.supports[:, :4])


def test_the_demo_of_letters_judges_those_of_scripts_never_seen(few_letters, monkeypatch):
    monkeypatch.setattr(demos.glyphs, "MODES", {"lag": ("--encoder-depth=0",)})
    monkeypatch.setattr(demos.glyphs, "train_judge", lambda *a: train_judge(*a, num_steps=30))
    monkeypatch.setattr(demos.steps, "execute", helpers.execute_warm)
    smaller = ["--kimg=0.5", "--hidden-dim=16", "--num-heads=2", "--sampler=euler", "--steps=2"]
    result = helpers.call(demo, "--letters", f"--outdir={few_letters}", "--", *smaller)
    assert result.code == 1, result.output + result.error
    assert re.search(r"of 6 letters; .* knows \d+\.\d% of the real ones", result.output)
    for script in ("Armenian", "all"):
        line = rf"lag: {script} [\d.]+% of 48, control [\d.]+% with other supports, [\d.]+% without"
        assert re.search(line, result.output), result.output
    assert "lag: distance to the support 0." in result.output
    assert (few_letters / "glyphs.png").is_file()
    assert "NOT as expected" in result.output
