"""Captions of images: from text files beside them, a JSONL file, or the dataset's metadata."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.images.members import Archive
from dnnlib.errors import refusal
from dnnlib.files import read_file
from dnnlib.typed import parse_json

METADATA = "metadata"
_FILE_KEYS = ("file", "file_name")
_CAPTION_KEYS = ("caption", "text")
_NUM_SHOWN = 3


def read_captions(
    archive: Archive, names: Sequence[str], location: str | None = None, key: str | None = None
) -> dict[str, str]:
    """Return the captions of images by name, stripped of white space at both ends.

    Args:
        archive: The folder or zip of the images.
        names: Names of the images, relative to the archive. Captions of other images, and empty
            captions, are left out.
        location: A ``.jsonl`` file of objects with "file" (or "file_name") and "caption" (or
            "text"); a folder of text files, named like the images but ending in ``.txt``; the word
            ``metadata`` for "captions" in the archive's ``dataset.json``, an object or a list of
            [name, caption] pairs; or None for text files beside the images.
        key: The key to use instead of "caption" in a JSONL file, or of "captions" in the metadata.

    Raises ValueError, one sentence, if a source of captions is missing or damaged; text files may
    be missing.
    """
    if location == METADATA:
        captions = _from_metadata(archive, key or "captions")
    elif location is not None and not os.path.isdir(location):
        captions = _from_jsonl(location, (key,) if key else _CAPTION_KEYS)
    elif key is not None:
        remedy = "give --captions=FILE.jsonl or --captions=metadata, or leave it out"
        raise refusal("--caption-key", but="has no effect on text files", remedy=remedy)
    elif location is None:
        captions = _from_files(names, archive.read_file)
    else:
        # Joined as texts, because the name of an image in an archive may begin with a slash.
        captions = _from_files(names, lambda name: _read(Path(f"{location}/{name}")))
    found = {name: captions.get(name, "").strip() for name in names}
    return {name: caption for name, caption in found.items() if caption}


def require_captions(
    captions: Mapping[str, str], names: Sequence[str], source: Path | str, location: str | None
) -> None:
    """Raise ValueError, one sentence, if any of the images ``names`` has no caption.

    ``source`` and ``location`` are where the images and the captions came from.
    """
    missing = [name for name in names if name not in captions]
    if missing:
        where = "text files beside the images" if location is None else location
        shown = ", ".join(missing[:_NUM_SHOWN]) + (", ..." if len(missing) > _NUM_SHOWN else "")
        problem = f"{len(missing)} of {len(names)} images of {source} have no caption in {where}"
        remedy = "write one for each, or give another --captions"
        raise refusal("--captions", but=f"{problem}: {shown}", remedy=remedy)


def _from_metadata(archive: Archive, key: str) -> dict[str, str]:
    where = f"{archive.path}/dataset.json"
    pairs = archive.metadata().get(key)
    if pairs is None:
        problem = f'{where} is missing or has no "{key}"'
        raise refusal("--captions", but=problem, remedy="add it, or give another --captions")
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, list):
        raise ValueError(f'{where}: "{key}" must be an object of captions by file name.')
    captions: dict[str, str] = {}
    for pair in pairs:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(part, str) for part in pair):
            problem = f'"{key}" holds {pair!r}, which is not a pair of a file name and a caption'
            raise ValueError(f"{where}: {problem}.")
        _add(captions, *pair, where)
    return captions


def _from_jsonl(location: str, keys: Sequence[str]) -> dict[str, str]:
    try:
        data = read_file(location)
    except OSError as error:
        problem = f"{location} cannot be read ({error.strerror})"
        remedy = f"give a .jsonl file, a folder of text files, or {METADATA}"
        raise refusal("--captions", but=problem, remedy=remedy) from None
    captions: dict[str, str] = {}
    for number, line in enumerate(_decoded(data, location).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{location}: line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where} is not valid JSON ({error}).") from None
        name, caption = (
            next((row[k] for k in options if isinstance(row, dict) and k in row), None)
            for options in (_FILE_KEYS, keys)
        )
        if not isinstance(name, str) or not isinstance(caption, str):
            texts = f'"{_FILE_KEYS[0]}" and "{keys[0]}"'
            raise ValueError(f"{where} must be an object with the texts {texts}.")
        _add(captions, name, caption, where)
    return captions


def _add(captions: dict[str, str], name: str, caption: str, where: str) -> None:
    name = name.replace("\\", "/").removeprefix("./")
    if captions.setdefault(name, caption) != caption:
        raise ValueError(f"{where}: gives {name} another caption than before; keep one of them.")


def _from_files(names: Sequence[str], read: Callable[[str], bytes | None]) -> dict[str, str]:
    captions = {}
    for name in names:
        file = f"{name.rpartition('.')[0]}.txt"
        try:
            data = read(file)
        except ValueError as error:
            raise ValueError(f"{file}: cannot be read ({error}).") from None
        if data is not None:
            captions[name] = _decoded(data, file)
    return captions


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: is not text in UTF-8; convert it.") from None
