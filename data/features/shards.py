"""Shards of feature folders: tars of samples, whose members are read by position."""

import collections
import contextlib
import dataclasses
import io
import json
import os
import tarfile
import tokenize
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np

from data.features.manifests import Manifest, empty_columns
from data.features.quantised import as_float16
from data.features.record import FEATURES, KEYS, KEYS_OF, PATCHES, STATISTICS
from dnnlib.files import atomic_write, regular_file, sha256_of_file
from dnnlib.typed import parse_json, typed

Members = Mapping[str, bytes]  # The data of a sample's members by key.

_BLOCK = tarfile.BLOCKSIZE
_UNUSABLE = -1  # Instead of the checksum of a description that must be written again.
_MAX_ATTEMPTS = 100

# Shapes of the arrays of a bucket, by key; None stands for any length. The length of the mask
# t5m.npy is the largest allowed. The shape of patches is that of their values, in 8 as in 16 bits.
Shapes = Mapping[str, tuple[int | None, ...]]
_ANY: Shapes = {
    "vae.npy": (None, None, None),
    "dinov3.npy": (None,),
    PATCHES: (None, None),
    "t5h.npy": (None, None),
    "t5m.npy": (None,),
}


def to_npy(array: np.ndarray) -> bytes:
    """Return an array as the bytes of an ``.npy`` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), (1, 0), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """Return the array in the bytes of an ``.npy`` file; raises ValueError if it is damaged."""
    try:
        for _ in range(_MAX_ATTEMPTS):
            # Parsing headers in several threads at once can fail (CPython issue 106905).
            with contextlib.suppress(SystemError):
                return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        raise ValueError("its header cannot be parsed")
    # What numpy raises when a damaged header does not describe an array.
    except (
        *(ValueError, EOFError, SyntaxError, TypeError),
        *(MemoryError, OverflowError, tokenize.TokenError),
    ) as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None


def check_feature(feature: str, members: Members, shapes: Shapes) -> None:
    """Raise ValueError, with the reason, unless a sample has all members of a feature, intact.

    Members must have the right dtype and shape, and finite values.
    """
    arrays = {}
    for key in KEYS_OF[feature]:
        if key not in members:
            raise ValueError(f"{key} is missing")
        try:
            array = from_npy(members[key])
            array = arrays[key] = as_float16(array) if key == PATCHES else array
        except ValueError as error:
            raise ValueError(f"{key} is damaged ({error})") from None
        dtype = np.dtype(bool if key == "t5m.npy" else np.float16)
        if array.dtype != dtype:
            raise ValueError(f"{key} holds {array.dtype}, not {dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{key} has values that are not finite")
        shape = shapes.get(key, _ANY[key])
        fits = len(array.shape) == len(shape) and all(
            wanted in (None, side) for side, wanted in zip(array.shape, shape, strict=True)
        )
        if key != "t5m.npy" and not fits:
            raise ValueError(f"{key} has shape {list(array.shape)}, not {list(shape)}")
    if feature == "text":
        hidden, mask = arrays["t5h.npy"], arrays["t5m.npy"]
        (most,) = shapes.get("t5m.npy", _ANY["t5m.npy"])
        if mask.ndim != 1 or not len(mask) or not mask.all():
            raise ValueError("t5m.npy is not a mask of valid tokens alone")
        if most is not None and len(mask) > most:
            raise ValueError(f"t5m.npy has {len(mask)} tokens, more than {most}")
        if len(hidden) != len(mask):
            raise ValueError(f"t5h.npy has {len(hidden)} rows, not {len(mask)}")


# Statistics.


def moments_of(values: np.ndarray) -> dict[str, Any]:
    """Return count, mean [C] and summed squared deviations m2 [C] of rows [N, C], in float64."""
    values = values.astype(np.float64)
    mean = values.mean(axis=0)
    values -= mean
    np.square(values, out=values)
    return dict(count=len(values), mean=mean, m2=values.sum(axis=0))


def merge_moments(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the moments of two groups of rows combined (Chan, Golub and LeVeque, 1979)."""
    if not first["count"] or not second["count"]:
        return dict(first if first["count"] else second)
    count = first["count"] + second["count"]
    mean, other = np.asarray(first["mean"]), np.asarray(second["mean"])
    change = other - mean
    return dict(
        count=count,
        mean=mean + change * (second["count"] / count),
        m2=np.asarray(first["m2"])
        + second["m2"]
        + np.square(change) * (first["count"] * second["count"] / count),
    )


class Tally:
    """Accumulates the moments of latents, CLS tokens and patches over samples."""

    def __init__(self) -> None:
        self.moments: dict[str, dict[str, Any]] = {
            name: dict(count=0, mean=[], m2=[]) for name in STATISTICS
        }

    def add(self, members: Members) -> None:
        """Add the arrays of a sample."""
        latent = from_npy(members["vae.npy"])
        rows = dict(
            vae=latent.reshape(len(latent), -1).T,
            cls=from_npy(members["dinov3.npy"])[None],
            patches=as_float16(from_npy(members[PATCHES])),
        )
        for name in STATISTICS:
            self.moments[name] = merge_moments(self.moments[name], moments_of(rows[name]))

    def to_dict(self) -> dict[str, Any]:
        """Return the moments as plain values, without rounding."""
        return {
            name: {key: np.asarray(value).tolist() for key, value in part.items()}
            for name, part in self.moments.items()
        }


# Writing and reading.


def write_shard(
    path: Path, split: str, bucket: str, samples: Iterable[tuple[str, dict[str, Any], Members]]
) -> Manifest:
    """Write a shard, which appears whole or not at all, and return its manifest.

    ``samples`` yields the name of each sample, the content of its member ``json``, and the data of
    its other members. Equal samples give equal bytes: members are in the order of KEYS, without
    dates and owners.
    """
    columns, tally = empty_columns(), Tally()
    with (
        atomic_write(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, description, members in samples:
            members = {"json": to_json(description), **members}
            places = {}
            for key in KEYS:
                places[key] = tar.offset + _BLOCK, members[key]
                tar.addfile(_header(name, key, len(members[key])), io.BytesIO(members[key]))
            _add_row(columns, name, description, places)
            tally.add(members)
    return _index(path, split, bucket, columns, sha256_of_file(path), tally)


def _add_row(
    columns: Mapping[str, Any],
    name: str,
    description: Mapping[str, Any],
    places: Mapping[str, tuple[int, bytes]],
) -> None:
    """Add a sample to the columns of its shard; ``places`` has offset and data of each member."""
    columns["id"].append(name)
    columns["shard"].append(0)
    columns["truncated"].append(description["truncated"])
    for feature in FEATURES:
        columns["fingerprint"][feature].append(description["fingerprint"].get(feature, ""))
    for key, (offset, data) in places.items():
        columns["offset"][key].append(offset)
        columns["size"][key].append(len(data))
        columns["crc32"][key].append(zlib.crc32(data))


def _index(
    path: Path, split: str, bucket: str, columns: Mapping[str, Any], sha256: str, tally: Tally
) -> Manifest:
    """Return the manifest of a single shard."""
    num, num_bytes = len(columns["id"]), path.stat().st_size
    shard = dict(file=path.name, num_samples=num, num_bytes=num_bytes, sha256=sha256)
    shards = [dict(shard, moments=tally.to_dict())]
    return Manifest.of(
        path.parent, dict(split=split, bucket=bucket, shards=shards, columns=columns)
    )


def to_json(description: Mapping[str, Any]) -> bytes:
    """Return the bytes of the member ``json``."""
    return json.dumps(description, ensure_ascii=False).encode()


def _header(name: str, key: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"{name}.{key}")
    info.size = size
    return info


def read_member(file: BinaryIO, index: Manifest, row: int, key: str) -> bytes:
    """Return the data of a member of an open shard; ``index`` is the shard's manifest.

    Raises ValueError, with the reason, if the member is damaged or lies elsewhere.
    """
    offset, size = int(index.offset[key][row]), int(index.size[key][row])
    data = os.pread(file.fileno(), _BLOCK + size, offset - _BLOCK) if offset >= _BLOCK else b""
    if data[:_BLOCK] != _header(index.ids[row], key, size).tobuf(tarfile.USTAR_FORMAT):
        raise ValueError(f"{key} is not where it should be")
    data = data[_BLOCK:]
    if len(data) < size or zlib.crc32(data) != index.crc32[key][row]:
        raise ValueError(f"{key} differs from its checksum")
    return data


def check_shard(
    path: Path,
    index: Manifest,
    shapes: Shapes,
    visit: Callable[[Members], None] = lambda members: None,
) -> tuple[Manifest, list[str]]:
    """Read a whole shard; return its manifest, with damaged features marked, and the problems.

    Members are read where ``index`` says. Each problem is a phrase about a sample and a damaged
    feature (or ``json``), or about the whole file. In the manifest returned, a damaged feature has
    an empty fingerprint, a damaged ``json`` no valid checksum, and a shard with problems an empty
    ``sha256``. ``visit`` is called with the members of each sample that could be read.
    """
    problems = []
    fingerprint = {feature: list(column) for feature, column in index.fingerprint.items()}
    crc32 = {**index.crc32, "json": index.crc32["json"].copy()}
    with open(path, "rb", opener=regular_file) as file:
        for row, name in enumerate(index.ids):
            members: dict[str, bytes] = {}
            for feature, keys in dict(json=("json",), **KEYS_OF).items():
                try:
                    found = {key: read_member(file, index, row, key) for key in keys}
                    members.update(found)
                    if feature in FEATURES:
                        check_feature(feature, found, shapes)
                except ValueError as error:
                    problems.append(f"{name}, {feature}: {error}")
                    if feature in FEATURES:
                        fingerprint[feature][row] = ""
                    else:
                        crc32["json"][row] = _UNUSABLE
            visit(members)
    (shard,) = index.shards
    if not problems and sha256_of_file(path) != shard["sha256"]:
        problems.append("its bytes differ from the checksum in the manifest")
    shards = [dict(shard, sha256="")] if problems else index.shards
    return dataclasses.replace(index, shards=shards, fingerprint=fingerprint, crc32=crc32), problems


class _Description(TypedDict):
    fingerprint: dict[str, str]
    truncated: bool


def recover_index(path: Path, split: str, bucket: str) -> Manifest:
    """Return a manifest of a shard that has none, reconstructed from its samples.

    Samples without a readable description are left out. The manifest has an empty ``sha256``, so
    that it never counts as that of an intact shard.
    """
    columns = empty_columns()
    places: dict[str, dict[str, tarfile.TarInfo]] = collections.defaultdict(dict)
    with open(path, "rb", opener=regular_file) as file:
        # Keep what was found before any damage.
        with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                name, _, key = info.name.partition(".")
                places[name][key] = info

        def read(info: tarfile.TarInfo | None) -> tuple[int, bytes]:
            if info is None:
                return 0, b""  # No member can lie there.
            file.seek(info.offset_data)
            return info.offset_data, file.read(info.size)

        for name, infos in places.items():
            found = {key: read(infos.get(key)) for key in KEYS}
            try:
                description = typed(_Description, parse_json(found["json"][1]))
            except ValueError:
                continue
            _add_row(columns, name, description, found)
    return _index(path, split, bucket, columns, "", Tally())
