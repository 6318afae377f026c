"""Stages features between encoder and shard: one file each, named by what it was made from."""

import contextlib
import json
import shutil
import zipfile
import zlib
from pathlib import Path

from data.features.record import FEATURES, KEYS_OF
from data.features.shards import Members, Shapes, check_feature
from dnnlib.files import atomic_write
from dnnlib.typed import parse_json

_FACTS = "fingerprint.json"
_TIME = (1980, 1, 1, 0, 0, 0)
# What reading a damaged file can raise.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Stage:
    """The staged features of a feature folder: one file per (sample, feature, fingerprint).

    The name of a file states what it was made from. A feature is therefore staged if its file
    exists, and files are never modified.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` is the feature folder."""
        self._folder = folder / ".staged"

    def file(self, name: str, feature: str, fingerprint: str) -> Path:
        """Return the path of a sample's feature."""
        return self._folder / feature / name[:2] / f"{name}-{fingerprint}.zip"

    def put(
        self, name: str, feature: str, fingerprint: str, members: Members, truncated: bool = False
    ) -> None:
        """Stage a sample's feature, whole or not at all; ``truncated`` says if its text was cut."""
        facts = json.dumps(dict(fingerprint=fingerprint, truncated=truncated)).encode()
        with (
            atomic_write(self.file(name, feature, fingerprint)) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            for key, data in {_FACTS: facts, **members}.items():
                archive.writestr(zipfile.ZipInfo(key, _TIME), data)

    def get(
        self, name: str, feature: str, fingerprint: str, shapes: Shapes
    ) -> tuple[dict[str, bytes], bool] | None:
        """Return the members of a staged feature, and whether its text was cut.

        Returns None if the file is missing or damaged, or if its arrays have wrong shapes or values
        that are not finite.
        """
        with (
            contextlib.suppress(*_DAMAGE),
            zipfile.ZipFile(self.file(name, feature, fingerprint)) as archive,
        ):
            facts = parse_json(archive.read(_FACTS))
            members = {key: archive.read(key) for key in KEYS_OF[feature]}
            check_feature(feature, members, shapes)
            return members, bool(facts.get("truncated"))
        return None

    def keys(self) -> list[tuple[str, str, str]]:
        """Return sample, feature and fingerprint of all files, sorted, from their names alone.

        Files of earlier versions, named ID.zip, are renamed; the fingerprint is inside them.
        """
        found = []
        for feature in FEATURES:
            for path in sorted((self._folder / feature).glob("*/[!.]*.zip")):
                name, _, fingerprint = path.stem.partition("-")
                if not fingerprint:  # If the file is damaged it stays empty, and matches none.
                    with contextlib.suppress(*_DAMAGE), zipfile.ZipFile(path) as archive:
                        fingerprint = str(parse_json(archive.read(_FACTS))["fingerprint"])
                        path.rename(self.file(name, feature, fingerprint))
                found.append((name, feature, fingerprint))
        return found

    def remove(self, key: tuple[str, str, str]) -> None:
        """Delete the file of a sample, feature and fingerprint."""
        self.file(*key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything that is staged."""
        shutil.rmtree(self._folder, ignore_errors=True)
