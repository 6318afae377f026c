"""Captions of images: the four places they come from, and what is refused."""

import json
import zipfile

import pytest
from image_files import make_folder, make_zip

from data.features.preparation.captions import read_captions, require_captions
from data.images.archive import open_archive

NAMES = ["a/1.png", "a/2.png", "b.v2.png"]
EXPECTED = {"a/1.png": "one", "a/2.png": "two \u2028 lines", "b.v2.png": "three"}


@pytest.fixture
def source(tmp_path):
    return make_folder(tmp_path / "images", NAMES)


def write_texts(folder):
    for name, caption in EXPECTED.items():
        path = folder / f"{name.removesuffix('.png')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f" {caption}\n", encoding="utf-8")
    return folder


def write_lines(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    return str(path)


def read(source, *args):
    archive = open_archive(source)
    return read_captions(archive, archive.names, *args)


def test_captions_are_text_files_beside_images_in_a_folder_or_zip(source, tmp_path):
    write_texts(source)
    assert read(source) == EXPECTED
    assert read(make_zip(tmp_path / "images.zip", source)) == EXPECTED


def test_captions_are_text_files_in_another_folder(source, tmp_path):
    assert read(source, str(write_texts(tmp_path / "texts"))) == EXPECTED


def test_no_name_in_an_archive_leads_out_of_the_folder_of_texts(tmp_path):
    image = make_folder(tmp_path / "images", ["1.png"]) / "1.png"
    texts = tmp_path / "texts"
    texts.mkdir()
    (tmp_path / "outside.txt").write_text("no caption")
    names = [f"{tmp_path}/outside.png", "../outside.png", "a/../../outside.png", "inside.png"]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in names:
            archive.writestr(name, image.read_bytes())
    (texts / "inside.txt").write_text("inside")
    assert read(tmp_path / "images.zip", str(texts)) == {"inside.png": "inside"}


def test_captions_are_lines_of_a_file(source, tmp_path):
    rows = [dict(file=name, caption=caption) for name, caption in EXPECTED.items()]
    rows += [dict(file="another.png", caption="four")]
    assert read(source, write_lines(tmp_path / "1.jsonl", *rows)) == EXPECTED
    rows = [dict(file_name=f"./{name}", text=caption) for name, caption in EXPECTED.items()]
    assert read(source, write_lines(tmp_path / "2.jsonl", *rows)) == EXPECTED
    rows = [dict(file=n.replace("/", "\\"), caption="no", short=c) for n, c in EXPECTED.items()]
    assert read(source, write_lines(tmp_path / "3.jsonl", *rows), "short") == EXPECTED


def test_captions_are_metadata_of_the_dataset(source):
    for value in (EXPECTED, list(EXPECTED.items())):
        (source / "dataset.json").write_text(json.dumps(dict(labels=None, captions=value)))
        assert read(source, "metadata") == EXPECTED
    (source / "dataset.json").write_text(json.dumps(dict(blip=EXPECTED)))
    assert read(source, "metadata", "blip") == EXPECTED
    with pytest.raises(ValueError, match='has no "captions"'):
        read(source, "metadata")


def test_missing_and_empty_captions_are_counted_and_the_first_named(source):
    write_texts(source)
    (source / "a/1.txt").unlink()
    (source / "b.v2.txt").write_text(" \n")
    captions = read(source)
    assert captions == {"a/2.png": EXPECTED["a/2.png"]}
    with pytest.raises(ValueError) as error:
        require_captions(captions, NAMES, "images", None)
    assert "2 of 3 images of images have no caption in text files beside" in str(error.value)
    assert "a/1.png, b.v2.png; write one for each" in str(error.value)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 must be an object"),
        ('{"file": "a/2.png", "caption": 3}', "line 2 must be an object"),
        ('{"file": "a/1.png", "caption": "other"}', "gives a/1.png another caption than before"),
    ],
)
def test_a_damaged_line_is_named(source, tmp_path, line, part):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"file": "a/1.png", "caption": "one"}\n' + line)
    with pytest.raises(ValueError) as error:
        read(source, str(path))
    assert part in str(error.value)


def test_other_damage_is_one_sentence(source, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl cannot be read"):
        read(source, str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="--caption-key: has no effect"):
        read(source, None, "key")
    (source / "a/1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a/1\.txt: is not text in UTF-8"):
        read(source)
    (source / "dataset.json").write_text('{"captions": [["a/1.png"]]}')
    with pytest.raises(ValueError, match="which is not a pair of a file name and a caption"):
        read(source, "metadata")
