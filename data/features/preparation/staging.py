"""Features between their encoder and their shard: a file for each, with what it was made from."""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.features.record import FEATURES, KEYS_OF
from data.features.shards import Members, Shapes, problem_of
from dnnlib.files import atomic_write

STAGING_FOLDER = ".staged"
_SIDECAR = "fingerprint.json"
_TIME = (1980, 1, 1, 0, 0, 0)


def staged_file(folder: Path, feature: str, name: str) -> Path:
    """Return where the feature of a sample is staged in a feature folder."""
    return folder / STAGING_FOLDER / feature / name[:2] / f"{name}.zip"


def stage(
    folder: Path, feature: str, name: str, fingerprint: str, members: Members, **facts: Any
) -> None:
    """Write a sample's feature with its fingerprint; both appear together, or neither does.

    A zip holds the members and, as JSON, the fingerprint and ``facts``.
    """
    sidecar = json.dumps(dict(fingerprint=fingerprint, **facts)).encode()
    with (
        atomic_write(staged_file(folder, feature, name)) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for key, data in {_SIDECAR: sidecar, **members}.items():
            archive.writestr(zipfile.ZipInfo(key, _TIME), data)


def read_staged(
    folder: Path, feature: str, name: str, fingerprint: str, shapes: Shapes
) -> tuple[dict[str, bytes], dict[str, Any]] | None:
    """Return members and facts of a staged feature; None if it is not there as it should be.

    It must have been made from what ``fingerprint`` says, be whole, and have finite values of the
    right shapes.
    """
    try:
        with zipfile.ZipFile(staged_file(folder, feature, name)) as archive:
            facts = json.loads(archive.read(_SIDECAR))
            if not isinstance(facts, dict) or facts.get("fingerprint") != fingerprint:
                return None
            members = {key: archive.read(key) for key in KEYS_OF[feature]}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return None if problem_of(feature, members, shapes) is not None else (members, facts)


def staged_names(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield feature and sample of everything that is staged, in order."""
    for feature in FEATURES:
        top = folder / STAGING_FOLDER / feature
        for inner in sorted(top.iterdir()) if top.is_dir() else ():
            for entry in sorted(os.listdir(inner)):
                if not entry.startswith("."):
                    yield feature, entry.partition(".")[0]


def unstage(folder: Path, name: str) -> None:
    """Delete all staged features of a sample."""
    for feature in FEATURES:
        staged_file(folder, feature, name).unlink(missing_ok=True)


def clear_staged(folder: Path) -> None:
    """Delete everything that is staged."""
    shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
