"""Property tests: whatever a file or option holds, parsers return what is right or one sentence."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import random_image

from data.convert.cifar_mnist import open_cifar
from data.convert.labelling import LabelChoice, label_images
from data.features.preparation.captions import read_captions
from data.features.shards import from_npy
from data.images.archive import is_hidden, open_archive
from data.images.labels import parse_class_names, parse_labels
from data.images.members import parse_metadata
from dnnlib.text import by_number, parse_ranges

FEW = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["labels", "Labels", "class_names", "class_splits", "captions"])
# Names as archives may hold them: folders, dots, other alphabets, but no way out of a folder.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1, max_size=12)
PATHS = st.lists(NAMES.filter(lambda name: name not in (".", "..")), min_size=1, max_size=3)


def one_sentence(error, *, holds="", ending="."):
    """Check that an error is a sentence for users."""
    text = str(error)
    assert text.endswith(ending)
    assert holds in text
    assert "\n" not in text
    assert "Traceback" not in text


@FEW
@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 20)), min_size=1, max_size=9))
def test_ranges_are_the_integers_that_they_span_in_order(pairs):
    text = ",".join(f"{low}-{low + more}" if more else str(low) for low, more in pairs)
    expected = [number for low, more in pairs for number in range(low, low + more + 1)]
    assert parse_ranges("--seeds", text) == expected


@FEW
@given(st.text(max_size=12) | st.text("0123456789-, ", max_size=30))
def test_any_text_is_a_list_of_integers_or_one_sentence(text):
    try:
        found = parse_ranges("--seeds", text)
    except ValueError as error:
        one_sentence(error, holds="--seeds: ")
    else:
        assert all(type(number) is int and number >= 0 for number in found)


@FEW
@given(st.sets(NAMES | st.integers(0, 30).map(str), min_size=1, max_size=6), st.data())
def test_every_class_is_found_by_its_name(names, data):
    names = sorted((n for n in names if "," not in n and n == n.strip()), key=by_number)
    if names:
        name = data.draw(st.sampled_from(names))
        assert parse_ranges("--class", name, names) == [names.index(name)]
        numbers = [int(n) for n in names if n.isascii() and n.isdecimal()]
        assert numbers == sorted(numbers)


@FEW
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_dataset_json_or_one_sentence(content):
    try:
        assert isinstance(parse_metadata(content, "dataset.json"), dict)
    except ValueError as error:
        one_sentence(error)


@FEW
@given(st.dictionaries(KEYS, JSON | st.lists(st.tuples(NAMES, st.integers()), max_size=4)))
def test_any_entries_of_a_dataset_json_are_labels_or_one_sentence(metadata):
    try:
        labels = parse_labels(metadata.get("labels"), "dataset.json")
        class_names = parse_class_names(metadata.get("class_names"), "dataset.json")
    except ValueError as error:
        one_sentence(error)
    else:
        assert all(0 <= label < 1_000_000 for label in labels.values())
        assert class_names is None or all(isinstance(name, str) for name in class_names)


@FEW
@given(st.dictionaries(NAMES, st.integers(0, 999_999), max_size=6))
def test_labels_are_read_as_they_were_written(labels):
    expected = {name.replace("\\", "/"): label for name, label in labels.items()}
    pairs = json.loads(json.dumps(list(labels.items())))
    assert parse_labels(pairs, "dataset.json") == parse_labels(labels, "dataset.json") == expected


@pytest.fixture(scope="module")
def png():
    buffer = io.BytesIO()
    random_image(0).save(buffer, format="png")
    return buffer.getvalue()


@FEW
@given(st.sets(PATHS.map("/".join), min_size=1, max_size=5))
def test_a_zip_of_any_names_has_each_image_once_and_counts_the_others(tmp_path, png, names):
    wanted = sorted(f"{name}.png" for name in names)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in wanted:
            archive.writestr(name, png)
            archive.writestr(name.removesuffix(".png") + ".heic", b"?")
    seen = [name for name in wanted if not is_hidden(name)]
    try:
        found = open_archive(tmp_path / "in.zip")
    except ValueError as error:
        assert not seen
        one_sentence(error)
        return
    assert found.names == seen
    assert all(found.read(index) == png for index in range(len(found)))
    assert found.others == sorted(name.removesuffix("png") + "heic" for name in seen)
    try:
        labelling = label_images(found, LabelChoice())
    except ValueError as error:
        one_sentence(error)
        return
    if labelling.labels is not None:
        assert len(labelling.labels) == len(seen)
        assert len(set(labelling.class_names)) == len(labelling.class_names)
        assert set(labelling.labels) == set(range(len(labelling.class_names)))


@FEW
@given(st.lists(st.tuples(PATHS.map("/".join), st.binary(max_size=20)), max_size=4))
def test_a_tar_of_any_names_is_no_cifar_archive_and_says_so(tmp_path, members):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"in\.tar: has no file .*meta") as error:
        open_cifar(tmp_path / "in.tar")
    one_sentence(error.value)


@FEW
@given(st.binary(max_size=200), st.integers(0, 150))
def test_any_bytes_are_an_array_or_an_error_that_names_them(noise, at):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(12, dtype=np.float16))
    content = bytearray(buffer.getvalue())
    content[at : at + len(noise)] = noise
    try:
        assert isinstance(from_npy(bytes(content)), np.ndarray)
    except ValueError as error:
        one_sentence(error, ending="")


@FEW
@given(st.lists(JSON | st.fixed_dictionaries(dict(file=NAMES, caption=st.text(max_size=9)))))
def test_any_lines_are_captions_or_one_sentence(tmp_path, rows):
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        found = read_captions(None, ["a.png", "b.png"], str(path))
    except ValueError as error:
        one_sentence(error, holds="captions.jsonl: line")
    else:
        assert all(caption == caption.strip() != "" for caption in found.values())
