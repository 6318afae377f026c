"""Shards of feature folders: tars of samples whose members are read at their place in the file."""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import tokenize
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.features.record import FEATURES, KEYS, KEYS_OF, STATISTICS
from dnnlib.files import atomic_write, sha256_of_file

Members = Mapping[str, bytes]  # The data of a sample's members by key.

_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK  # Of zeros, which end a tar.


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What arrays of one bucket look like; None where the encoder is not known."""

    latent_shape: tuple[int, ...] | None = None
    num_patches: int | None = None
    visual_dim: int | None = None
    text_dim: int | None = None
    max_tokens: int | None = None


@dataclasses.dataclass(kw_only=True)
class ShardIndex:
    """Where the members of a shard's samples lie, and what they are; a row for each sample.

    Attributes:
        bucket: Name of the bucket.
        num_bytes, sha256: Of the whole file.
        moments: Of the statistics: count, mean and m2, the sum of squared deviations, by channel.
        ids: Names of the samples.
        offset, size, crc32: Of each of KEYS: where the data begin, their bytes and checksum.
        fingerprint: Of each of FEATURES: what it was made from, None where it cannot be used.
        truncated: Whether the caption had more tokens than were kept.
    """

    bucket: str
    num_bytes: int
    sha256: str
    moments: dict[str, Any]
    ids: list[str] = dataclasses.field(default_factory=list)
    offset: dict[str, list[int]] = dataclasses.field(default_factory=lambda: _columns(KEYS))
    size: dict[str, list[int]] = dataclasses.field(default_factory=lambda: _columns(KEYS))
    crc32: dict[str, list[int]] = dataclasses.field(default_factory=lambda: _columns(KEYS))
    fingerprint: dict[str, list[str | None]] = dataclasses.field(
        default_factory=lambda: _columns(FEATURES)
    )
    truncated: list[bool] = dataclasses.field(default_factory=list)


def _columns(names: Iterable[str]) -> dict[str, list]:
    return {name: [] for name in names}


def to_npy(array: np.ndarray) -> bytes:
    """Return an array as the bytes of an ``.npy`` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), (1, 0), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """Return the array in the bytes of an ``.npy`` file; raises ValueError if it is damaged."""
    stream = io.BytesIO(data)
    try:
        return np.lib.format.read_array(stream, allow_pickle=False)
    # What a damaged header makes of the text that should describe an array.
    except (
        *(ValueError, EOFError, SyntaxError, TypeError),
        *(MemoryError, OverflowError, tokenize.TokenError),
    ) as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None


def problem_of(feature: str, members: Members, shapes: Shapes) -> str | None:
    """Return what is wrong with the members of a sample's feature, or None.

    They must be there, have the right types and shapes, and finite values.
    """
    arrays = {}
    for key in KEYS_OF[feature]:
        if key not in members:
            return f"{key} is missing"
        try:
            arrays[key] = from_npy(members[key])
        except ValueError as error:
            return f"{key} is damaged ({error})"
        dtype = np.dtype(bool if key == "t5m.npy" else np.float16)
        if arrays[key].dtype != dtype:
            return f"{key} holds {arrays[key].dtype}, not {dtype}"
        if key != "t5m.npy" and not np.isfinite(arrays[key]).all():
            return f"{key} has values that are not finite"
    if feature == "vae":
        wanted: list[tuple[str, tuple[int | None, ...]]] = [
            ("vae.npy", shapes.latent_shape or (None, None, None))
        ]
    elif feature == "visual":
        wanted = [
            ("dinov3.npy", (shapes.visual_dim,)),
            ("dinov3_patches.npy", (shapes.num_patches, shapes.visual_dim)),
        ]
    else:
        mask = arrays["t5m.npy"]
        if mask.ndim != 1 or not len(mask) or not mask.all():
            return "t5m.npy is not a mask of valid tokens alone"
        if shapes.max_tokens is not None and len(mask) > shapes.max_tokens:
            return f"t5m.npy has {len(mask)} tokens, more than {shapes.max_tokens}"
        wanted = [("t5h.npy", (len(mask), shapes.text_dim))]
    for key, shape in wanted:
        found = arrays[key].shape
        same = len(found) == len(shape) and all(
            b is None or a == b for a, b in zip(found, shape, strict=True)
        )
        if not same:
            return f"{key} has shape {list(found)}, not {list(shape)}"
    return None


# Statistics.


def moments_of(values: np.ndarray) -> dict[str, Any]:
    """Return count, mean and m2 of rows [N, C] by channel, in float64."""
    values = values.astype(np.float64)
    mean = values.mean(axis=0)
    values -= mean
    np.square(values, out=values)
    return dict(count=len(values), mean=mean, m2=values.sum(axis=0))


def merge_moments(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Return the moments of two groups of rows together (Chan, Golub and LeVeque, 1979)."""
    if first is None or not first["count"]:
        return second
    if not second["count"]:
        return first
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


def sample_moments(members: Members) -> dict[str, dict[str, Any]]:
    """Return the moments of one sample's arrays, by name of the statistics."""
    latent = from_npy(members["vae.npy"])
    return dict(
        vae=moments_of(latent.reshape(len(latent), -1).T),
        cls=moments_of(from_npy(members["dinov3.npy"])[None]),
        patches=moments_of(from_npy(members["dinov3_patches.npy"])),
    )


def plain_moments(moments: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Return moments as plain values, exactly."""
    return {
        name: None
        if part is None
        else dict(count=part["count"], **{k: np.asarray(part[k]).tolist() for k in ("mean", "m2")})
        for name, part in moments.items()
    }


# Writing and reading.


def write_shard(
    path: Path, bucket: str, samples: Iterable[tuple[str, dict[str, Any], Members]]
) -> ShardIndex:
    """Write a shard, which appears whole or not at all; return where everything lies in it.

    ``samples`` yields name, the content of the member ``json``, and the data of the others. Equal
    samples give equal bytes.
    """
    index = ShardIndex(bucket=bucket, num_bytes=0, sha256="", moments={})
    moments: dict[str, Any] = dict.fromkeys(STATISTICS)
    digest = hashlib.sha256()
    position = 0
    with atomic_write(path) as file:

        def write(data: bytes) -> None:
            nonlocal position
            file.write(data)
            digest.update(data)
            position += len(data)

        for name, description, members in samples:
            members = {"json": to_json(description), **members}
            index.ids.append(name)
            index.truncated.append(description["truncated"])
            for feature in FEATURES:
                index.fingerprint[feature].append(description["fingerprint"][feature])
            for key in KEYS:
                data = members[key]
                write(_header(f"{name}.{key}", len(data)))
                index.offset[key].append(position)
                index.size[key].append(len(data))
                index.crc32[key].append(zlib.crc32(data))
                write(data)
                write(bytes(-len(data) % _BLOCK))
            for statistic, part in sample_moments(members).items():
                moments[statistic] = merge_moments(moments[statistic], part)
        write(bytes(_END + -(position + _END) % tarfile.RECORDSIZE))
    return dataclasses.replace(
        index, num_bytes=position, sha256=digest.hexdigest(), moments=plain_moments(moments)
    )


def to_json(description: dict[str, Any]) -> bytes:
    """Return the bytes of the member ``json``."""
    return json.dumps(description, ensure_ascii=False).encode()


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def read_member(descriptor: int, index: ShardIndex, row: int, key: str) -> bytes:
    """Return the data of a member; raises ValueError with the reason if they are damaged."""
    offset, size = index.offset[key][row], index.size[key][row]
    data = os.pread(descriptor, _BLOCK + size, offset - _BLOCK)
    if data[:_BLOCK] != _header(f"{index.ids[row]}.{key}", size):
        raise ValueError(f"{key} is not where it should be")
    data = data[_BLOCK:]
    if len(data) < size or zlib.crc32(data) != index.crc32[key][row]:
        raise ValueError(f"{key} differs from its checksum")
    return data


def check_shard(path: Path, index: ShardIndex, shapes: Shapes) -> tuple[ShardIndex, list[str]]:
    """Read all of a shard; return its index without what cannot be used, and the problems.

    Members are looked for where the index says. A problem is a sentence's rest, for each sample
    and feature (or ``json``) that is damaged; if there is any, the index has no ``sha256``.
    """
    problems = []
    fingerprint = {feature: list(column) for feature, column in index.fingerprint.items()}
    crc32 = {**index.crc32, "json": list(index.crc32["json"])}
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for row, name in enumerate(index.ids):
            for feature in ("json", *FEATURES):
                keys = ("json",) if feature == "json" else KEYS_OF[feature]
                try:
                    members = {key: read_member(descriptor, index, row, key) for key in keys}
                    problem = None if feature == "json" else problem_of(feature, members, shapes)
                except ValueError as error:
                    problem = str(error)
                if problem is None:
                    continue
                problems.append(f"{name}, {feature}: {problem}")
                if feature == "json":
                    crc32["json"][row] = -1  # It can be written again, and must be.
                else:
                    fingerprint[feature][row] = None
    finally:
        os.close(descriptor)
    if not problems and sha256_of_file(path) != index.sha256:
        problems.append("its bytes differ from the checksum in the manifest")
    sha256 = "" if problems else index.sha256
    return dataclasses.replace(index, sha256=sha256, fingerprint=fingerprint, crc32=crc32), problems


def index_shard(path: Path, bucket: str, shapes: Shapes) -> ShardIndex:
    """Return the index of a shard of which nothing is known, from the samples in it.

    What is damaged is left out; so are samples without a readable description. The index has no
    ``sha256``, and therefore never counts as that of a whole shard.
    """
    index = ShardIndex(bucket=bucket, num_bytes=path.stat().st_size, sha256="", moments={})
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    name, _, key = info.name.partition(".")
                    samples.setdefault(name, {})[key] = info
        except tarfile.TarError:
            pass  # What was found before the damage counts.
        for name, infos in samples.items():
            members = {}
            for key in KEYS:
                if key in infos:
                    file.seek(infos[key].offset_data)
                    members[key] = file.read(infos[key].size)
            description = _description(members.get("json", b""))
            if description is None:
                continue
            index.ids.append(name)
            index.truncated.append(description["truncated"])
            for key in KEYS:
                index.offset[key].append(infos[key].offset_data if key in infos else _BLOCK)
                index.size[key].append(len(members.get(key, b"")))
                index.crc32[key].append(zlib.crc32(members.get(key, b"")))
            for feature in FEATURES:
                found = description["fingerprint"].get(feature)
                if problem_of(feature, members, shapes) is not None:
                    found = None
                index.fingerprint[feature].append(found)
    return index


def _description(data: bytes) -> dict[str, Any] | None:
    """Return the content of the member ``json`` if it is one."""
    try:
        description = json.loads(data)
    except ValueError:
        return None
    is_one = (
        isinstance(description, dict)
        and isinstance(description.get("fingerprint"), dict)
        and type(description.get("truncated")) is bool
    )
    return description if is_one else None
