"""Manifests: where samples lie in shards, and fingerprints of what they were made from."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np

from data.features.record import (
    AGAIN,
    FEATURES,
    FORMAT_VERSION,
    KEYS,
    STATISTICS,
    bucket_folder,
    read_json,
)
from dnnlib.addresses import is_address, under
from dnnlib.typed import typed

FORMAT = "setdiffit-feature-shards"
MANIFEST_FILE = "manifest.json"

# The types of nested values.
_MOMENTS = dict(count=int, mean=list[float], m2=list[float])
_Moments = TypedDict("_Moments", _MOMENTS)
_AllMoments = TypedDict("_AllMoments", dict.fromkeys(STATISTICS, _Moments))
_SHARD = dict(file=str, num_samples=int, num_bytes=int, sha256=str, moments=_AllMoments)
_Shard = TypedDict("_Shard", _SHARD)
_ByKey = TypedDict("_ByKey", dict.fromkeys(KEYS, list[int]))
_PLACES = dict.fromkeys(("offset", "size", "crc32"), _ByKey)
_ByFeature = TypedDict("_ByFeature", dict.fromkeys(FEATURES, list[str]))
_FLAT = dict(id=list[str], shard=list[int], truncated=list[bool])
_Columns = TypedDict("_Columns", dict(**_FLAT, **_PLACES, fingerprint=_ByFeature))
_MANIFEST = dict(bucket=str, split=str, shards=list[_Shard], columns=_Columns)
_Manifest = TypedDict("_Manifest", _MANIFEST)


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:06d}.tar"


def empty_columns() -> dict[str, Any]:
    """Return the empty columns of a manifest, as lists to append to."""
    lists: dict[str, Any] = {name: {key: [] for key in KEYS} for name in _PLACES}
    fingerprint: dict[str, list] = {feature: [] for feature in FEATURES}
    return dict(id=[], shard=[], **lists, fingerprint=fingerprint, truncated=[])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Where the samples of some shards of one split and bucket lie: one row per sample, in order.

    Attributes:
        folder: The folder of the shards, or its address.
        shards: file, num_samples, num_bytes, sha256 and moments of each shard.
        ids: Names of the samples.
        shard: Index into ``shards`` of each sample, int64 [N].
        offset: For each of KEYS, the offset in bytes of the member's data in its shard, int64 [N].
        size: For each of KEYS, the size in bytes of the member's data, int64 [N].
        crc32: For each of KEYS, the checksum of the member's data, int64 [N].
        fingerprint: For each of FEATURES, the hash of what each sample's feature was made from.
        truncated: Whether the caption had more tokens than were kept, bool [N].
    """

    folder: Path | str
    split: str
    bucket: str
    shards: list[dict[str, Any]]
    ids: list[str]
    shard: np.ndarray
    offset: dict[str, np.ndarray]
    size: dict[str, np.ndarray]
    crc32: dict[str, np.ndarray]
    fingerprint: dict[str, list[str]]
    truncated: np.ndarray

    @classmethod
    def of(cls, folder: Path | str, values: Mapping[str, Any]) -> Self:
        """Return the manifest in JSON values; raises ValueError with what is wrong with them."""
        values = typed(_Manifest, values)
        columns = values["columns"]
        _check_columns(columns, values["shards"])
        arrays = {
            name: {key: np.array(columns[name][key], np.int64) for key in KEYS} for name in _PLACES
        }
        num_bytes = np.array([values["shards"][i]["num_bytes"] for i in columns["shard"]], np.int64)
        for key in KEYS:
            offset, size = arrays["offset"][key], arrays["size"][key]
            if ((offset < 0) | (size < 0) | (offset > num_bytes - size)).any():
                raise ValueError(f"a member {key} lies outside its shard")
        return cls(
            folder=folder,
            **{name: values[name] for name in ("split", "bucket", "shards")},
            ids=columns["id"],
            shard=np.array(columns["shard"], np.int64),
            **arrays,
            fingerprint=columns["fingerprint"],
            truncated=np.array(columns["truncated"], bool),
        )

    @classmethod
    def join(cls, folder: Path | str, split: str, bucket: str, parts: Sequence["Manifest"]) -> Self:
        """Return one manifest of all shards, from the manifests of single shards, in order."""
        columns = _joined([empty_columns(), *(part.to_dict()["columns"] for part in parts)])
        columns["shard"] = [index for index, part in enumerate(parts) for _ in part.ids]
        shards = [shard for part in parts for shard in part.shards]
        return cls.of(folder, dict(split=split, bucket=bucket, shards=shards, columns=columns))

    def of_shard(self, file: str) -> "Manifest | None":
        """Return the manifest of the single shard with this file name, or None without it."""
        number = next((i for i, s in enumerate(self.shards) if s["file"] == file), None)
        if number is None:
            return None
        rows = slice(*np.searchsorted(self.shard, [number, number + 1]))
        columns = _map(self._columns(), lambda column: column[rows])
        columns["shard"] = columns["shard"] - number
        return dataclasses.replace(self, shards=[self.shards[number]], **columns)

    def of_rows(self, rows: np.ndarray) -> "Manifest":
        """Return the manifest of some samples, with rows chosen by an int64 or bool array."""
        chosen = np.arange(len(self))[rows]

        def take(column: Any) -> Any:
            if isinstance(column, np.ndarray):
                return column[chosen]
            return [column[row] for row in chosen.tolist()]

        return dataclasses.replace(self, **_map(self._columns(), take))

    def _columns(self) -> dict[str, Any]:
        names = ("ids", "shard", *_PLACES, "fingerprint", "truncated")
        return {name: getattr(self, name) for name in names}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def files(self) -> list[Path | str]:
        """The shards' paths or addresses."""
        return [under(self.folder, shard["file"]) for shard in self.shards]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``manifest.json``."""
        columns = _map(self._columns(), lambda c: c.tolist() if isinstance(c, np.ndarray) else c)
        columns = dict(id=columns.pop("ids"), **columns)
        facts = dict(format=FORMAT, version=FORMAT_VERSION, bucket=self.bucket, split=self.split)
        return dict(facts, shards=self.shards, columns=columns)


def _map(columns: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return columns, some of which are dicts of columns, with ``change`` applied to each."""
    return {k: _map(v, change) if isinstance(v, dict) else change(v) for k, v in columns.items()}


def _joined(parts: Sequence[Any]) -> Any:
    """Return the concatenation of lists, or of the lists in dicts with the same keys."""
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return [value for part in parts for value in part]


def _check_columns(columns: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError, with the reason, if the columns do not fit the samples of the shards."""
    num = len(columns["id"])
    for group, column in columns.items():
        for name, rows in (column if isinstance(column, dict) else {group: column}).items():
            if len(rows) != num:
                raise ValueError(f"{name} has {len(rows)} rows, not {num}")
    if len(set(columns["id"])) != num:
        raise ValueError("an id appears twice")
    numbers = [i for i, shard in enumerate(shards) for _ in range(shard["num_samples"])]
    if columns["shard"] != numbers:
        raise ValueError("the rows are not those of the shards in order")


def read_manifest(path: str | os.PathLike, split: str, bucket_name: str) -> Manifest:
    """Return the manifest of a split and bucket of a feature folder, which may be an address.

    Raises ValueError if it is missing, damaged or of a newer version.
    """
    folder = bucket_folder(path, split, bucket_name)
    file = under(folder, MANIFEST_FILE)
    if not (is_address(file) or file.is_file()):
        raise ValueError(f"{file}: is missing; {AGAIN}.")

    def parse(values: dict[str, Any]) -> Manifest:
        manifest = Manifest.of(folder, values)
        if (manifest.bucket, manifest.split) != (bucket_name, split):
            raise ValueError(f"it is of {manifest.split} and bucket {manifest.bucket}")
        for index, shard in enumerate(manifest.shards):
            if shard["file"] != shard_name(index):
                raise ValueError(f"shard {index} is {shard['file']}")
        return manifest

    return read_json(file, FORMAT, parse)
