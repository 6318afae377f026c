"""Layout of a feature folder: its record, its manifests and what they say (docs/formats.md)."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.features.buckets import Bucket
from dnnlib.addresses import AddressError, is_address, open_address, under

FORMAT = "setdiffit-features"
SHARDS_FORMAT = "setdiffit-feature-shards"
FORMAT_VERSION = 1
RECORD_FILE = "features.json"  # Written last.
CLAIM_FILE = "preparing.json"  # There from the beginning of a preparation on.
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "validation")
FEATURES = ("vae", "visual", "text")
# The members that each feature has in a sample, in the order of a shard.
KEYS_OF = {
    "vae": ("vae.npy",),
    "visual": ("dinov3.npy", "dinov3_patches.npy"),
    "text": ("t5h.npy", "t5m.npy"),
}
KEYS = ("json", *(key for feature in FEATURES for key in KEYS_OF[feature]))
STATISTICS = ("vae", "cls", "patches")
AGAIN = "start the same dataset_tool.py features again, which makes what is missing"

_MAX_INT = 2**62  # So that sums do not wrap.

# The types of nested values.
_ENCODER = dict(location=str, hash=str, precision=str)
_VAE = dict(**_ENCODER, channels=int, downsampling=int, scale=float, shift=float)
_VISUAL = dict(**_ENCODER, patch_size=int, num_registers=int, dim=int)
_TEXT = dict(**_ENCODER, dim=int, max_tokens=int)
_BUCKET = dict(
    name=str,
    width=int,
    height=int,
    latent_shape=[int],
    patch_grid=[int],
    num=dict.fromkeys(SPLITS, int),
)
_RECORD = dict(
    name=str,
    source_hash=str,
    buckets=[_BUCKET],
    validation_share=float,
    shard_size=int,
    vae=_VAE,
    visual=_VISUAL,
    text=_TEXT,
    captions=dict(num_truncated=int),
    statistics={name: dict(count=int, mean=[float], std=[float]) for name in STATISTICS},
    content_hash=str,
    packages=dict(python=str),
)
_MANIFEST = dict(
    bucket=str,
    split=str,
    shards=[
        dict(
            file=str,
            num_samples=int,
            num_bytes=int,
            sha256=str,
            moments={name: dict(count=int, mean=[float], m2=[float]) for name in STATISTICS},
        )
    ],
    columns=dict(
        id=[str],
        shard=[int],
        offset={key: [int] for key in KEYS},
        size={key: [int] for key in KEYS},
        crc32={key: [int] for key in KEYS},
        fingerprint={feature: [str] for feature in FEATURES},
        truncated=[bool],
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketRecord:
    """One bucket of a feature folder.

    Attributes:
        latent_shape: c, h, w of its latents.
        patch_grid: Rows and columns of its patches.
        num: Number of samples of each split.
    """

    name: str
    width: int
    height: int
    latent_shape: tuple[int, int, int]
    patch_grid: tuple[int, int]
    num: dict[str, int]

    @property
    def bucket(self) -> Bucket:
        """Its size, as images are brought to."""
        return Bucket(self.width, self.height)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """All that is known of a feature folder: the content of ``features.json``.

    Attributes:
        name: The name of the images' folder or zip.
        source_hash: Identity of names, images and captions.
        buckets: All sizes, those without images included.
        vae: location, hash, precision, channels, downsampling, scale and shift of the autoencoder.
        visual: location, hash, precision, patch_size, num_registers and dim of the visual encoder.
        text: location, hash, precision, dim and max_tokens of the text encoder.
        captions: num_truncated, and what else is known of the captions.
        statistics: count, mean and std by channel of ``vae`` (raw latents), ``cls`` and
            ``patches``, over the training split of all buckets.
        content_hash: Identity of all shards.
    """

    name: str
    source_hash: str
    buckets: tuple[BucketRecord, ...]
    validation_share: float
    shard_size: int
    vae: dict[str, Any]
    visual: dict[str, Any]
    text: dict[str, Any]
    captions: dict[str, Any]
    statistics: dict[str, dict[str, Any]]
    content_hash: str
    packages: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``features.json``."""
        return dict(format=FORMAT, version=FORMAT_VERSION, **dataclasses.asdict(self))

    def num_samples(self, split: str) -> int:
        """Return the number of samples of a split, all buckets together."""
        return sum(bucket.num[split] for bucket in self.buckets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Where the samples of one split and bucket lie; a row for each, in order.

    Attributes:
        folder: The folder of the shards, or its address.
        shards: file, num_samples, num_bytes, sha256 and moments of each.
        ids: Names of the samples.
        shard: Index into ``shards`` of each sample, int64 [N].
        offset: For each of KEYS, where a member's data begin in the shard, int64 [N].
        size: For each of KEYS, the bytes of the member's data, int64 [N].
        crc32: For each of KEYS, the checksum of the member's data, int64 [N].
        fingerprint: For each of FEATURES, what it was made from, hexadecimal digits.
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

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def files(self) -> list[Path | str]:
        """The shards' paths or addresses."""
        return [under(self.folder, shard["file"]) for shard in self.shards]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``manifest.json``."""
        columns = dict(
            id=self.ids,
            shard=self.shard.tolist(),
            offset={key: values.tolist() for key, values in self.offset.items()},
            size={key: values.tolist() for key, values in self.size.items()},
            crc32={key: values.tolist() for key, values in self.crc32.items()},
            fingerprint=self.fingerprint,
            truncated=self.truncated.tolist(),
        )
        return dict(
            format=SHARDS_FORMAT,
            version=FORMAT_VERSION,
            bucket=self.bucket,
            split=self.split,
            shards=self.shards,
            columns=columns,
        )


def is_feature_folder(path: str | os.PathLike) -> bool:
    """Tell whether a path is a folder of features, complete or not."""
    return any((Path(path) / name).is_file() for name in (RECORD_FILE, CLAIM_FILE))


def is_complete(path: str | os.PathLike) -> bool:
    """Tell whether a path is a folder of features that are all there."""
    return (Path(path) / RECORD_FILE).is_file()


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:06d}.tar"


def bucket_folder(path: str | os.PathLike, split: str, bucket_name: str) -> Path | str:
    """Return where the shards of one split and bucket lie: an address if ``path`` is one."""
    assert split in SPLITS
    return under(path, split, f"bucket_{bucket_name}")


def read_feature_record(path: str | os.PathLike) -> FeatureRecord:
    """Return the record of a feature folder, which may be an address (see dnnlib/addresses.py).

    Raises ValueError if there is none, if it is damaged or of another version.
    """
    file = under(path, RECORD_FILE)
    if not (is_address(file) or file.is_file()):
        if is_feature_folder(path):
            raise ValueError(f"{Path(path)}: its preparation is not finished; {AGAIN}.")
        raise ValueError(
            f"{Path(path)}: not a folder of features made by dataset_tool.py features."
        )
    values = _read(file, FORMAT, _RECORD)
    problem = _problem_of_record(values)
    if problem:
        raise ValueError(f"{file}: damaged ({problem}); {AGAIN}.")
    buckets = tuple(
        BucketRecord(
            name=bucket["name"],
            width=bucket["width"],
            height=bucket["height"],
            latent_shape=tuple(bucket["latent_shape"]),
            patch_grid=tuple(bucket["patch_grid"]),
            num=bucket["num"],
        )
        for bucket in values["buckets"]
    )
    return FeatureRecord(**{**{name: values[name] for name in _RECORD}, "buckets": buckets})


def read_manifest(path: str | os.PathLike, split: str, bucket_name: str) -> Manifest:
    """Return the manifest of one split and bucket of a feature folder, which may be an address.

    Raises ValueError if it is missing, damaged or of another version.
    """
    folder = bucket_folder(path, split, bucket_name)
    file = under(folder, MANIFEST_FILE)
    if not (is_address(file) or file.is_file()):
        raise ValueError(f"{file}: is missing; {AGAIN}.")
    values = _read(file, SHARDS_FORMAT, _MANIFEST)
    columns, shards = values["columns"], values["shards"]
    problem = _problem_of_columns(columns, shards)
    if not problem and (values["bucket"], values["split"]) != (bucket_name, split):
        problem = f"it is of {values['split']} and bucket {values['bucket']}"
    if problem:
        raise ValueError(f"{file}: damaged ({problem}); {AGAIN}.")

    def arrays(name: str) -> dict[str, np.ndarray]:
        return {key: np.array(columns[name][key], np.int64) for key in KEYS}

    return Manifest(
        folder=folder,
        split=split,
        bucket=bucket_name,
        shards=shards,
        ids=columns["id"],
        shard=np.array(columns["shard"], np.int64),
        offset=arrays("offset"),
        size=arrays("size"),
        crc32=arrays("crc32"),
        fingerprint=columns["fingerprint"],
        truncated=np.array(columns["truncated"], bool),
    )


def _read_bytes(file: Path | str) -> bytes:
    if not is_address(file):
        return file.read_bytes()
    try:
        with open_address(file) as stream:
            return stream.read()
    except AddressError as error:
        raise ValueError(
            f"{str(error).rstrip('.')}; give the address of a folder made by dataset_tool.py "
            "features."
        ) from None


def _read(file: Path | str, expected_format: str, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object in a JSON file, its format, version and the types of its values checked."""
    data = _read_bytes(file)
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{file}: damaged, not valid JSON ({error}); {AGAIN}.") from None
    if not isinstance(values, dict) or values.get("format") != expected_format:
        raise ValueError(f"{file}: not written by dataset_tool.py features.")
    version = values.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{file}: has format version {version}, but this version of the software reads "
            f"{FORMAT_VERSION}; update the software."
        )
    problem = mistyped(values, layout)
    if problem:
        raise ValueError(f"{file}: damaged ({problem}); {AGAIN}.")
    return values


def mistyped(value: Any, layout: Any, name: str = "") -> str | None:
    """Return what differs between a value read from JSON and the types that it should have.

    ``layout`` is a type, a list of one layout for all elements, or a dict of layouts by key; keys
    that it does not name are not looked at.
    """
    if isinstance(layout, Mapping):
        if not isinstance(value, dict):
            return f"{name} is {value!r}"
        for key, inner in layout.items():
            if key not in value:
                return f"{name}{'.' if name else ''}{key} is missing"
            problem = mistyped(value[key], inner, f"{name}{'.' if name else ''}{key}")
            if problem:
                return problem
        return None
    if isinstance(layout, list):
        if not isinstance(value, list):
            return f"{name} is {value!r}"
        if isinstance(layout[0], type) and layout[0] is not float:  # Long columns.
            bad = [item for item in value if type(item) is not layout[0]]
            return f"{name} holds {bad[0]!r}" if bad else None
        problems = (mistyped(item, layout[0], f"{name}[{i}]") for i, item in enumerate(value))
        return next(filter(None, problems), None)
    if layout is float:
        is_right = type(value) in (int, float) and math.isfinite(value)
    else:
        is_right = type(value) is layout
    return None if is_right else f"{name} is {value!r}"


def _problem_of_record(values: dict[str, Any]) -> str | None:
    """Return what is wrong with a record whose types are right, or None."""
    channels = values["vae"]["channels"]
    for bucket in values["buckets"]:
        shape, grid = bucket["latent_shape"], bucket["patch_grid"]
        if bucket["name"] != f"{bucket['width']}x{bucket['height']}":
            return f"bucket {bucket['name']} is {bucket['width']}x{bucket['height']}"
        if len(shape) != 3 or min(shape) < 1 or shape[0] != channels:
            return f"latent_shape is {shape}"
        if len(grid) != 2 or min(grid) < 1:
            return f"patch_grid is {grid}"
        if min(bucket["num"].values()) < 0:
            return f"bucket {bucket['name']} has {bucket['num']} samples"
    if not values["buckets"] or values["shard_size"] < 1:
        return f"{len(values['buckets'])} buckets, shard_size {values['shard_size']}"
    if not values["vae"]["scale"]:
        return "the scale of vae is 0"
    dim = values["visual"]["dim"]
    for name, length in zip(STATISTICS, (channels, dim, dim), strict=True):
        part = values["statistics"][name]
        if not len(part["mean"]) == len(part["std"]) == length or min(part["std"], default=0) < 0:
            return f"statistics of {name} are not those of {length} channels"
    return None


def _problem_of_columns(columns: dict[str, Any], shards: list[dict[str, Any]]) -> str | None:
    """Return what is wrong with the columns of a manifest whose types are right, or None."""
    num = len(columns["id"])
    for name in ("offset", "size", "crc32"):
        for key in KEYS:
            if max(map(abs, columns[name][key]), default=0) > _MAX_INT:
                return f"{name} of {key} is out of range"
    groups = [columns[name].items() for name in ("offset", "size", "crc32", "fingerprint")]
    flat = [(name, columns[name]) for name in ("shard", "truncated")]
    for name, column in [*flat, *(pair for group in groups for pair in group)]:
        if len(column) != num:
            return f"{name} has {len(column)} rows, not {num}"
    if len(set(columns["id"])) != num:
        return "an id is there twice"
    expected = [index for index, shard in enumerate(shards) for _ in range(shard["num_samples"])]
    if columns["shard"] != expected:
        return "the rows are not those of the shards in order"
    for index, shard in enumerate(shards):
        if shard["file"] != shard_name(index):
            return f"shard {index} is {shard['file']}"
    for key in KEYS:
        offset, size = (np.array(columns[name][key], np.int64) for name in ("offset", "size"))
        num_bytes = np.array([shards[index]["num_bytes"] for index in expected], np.int64)
        if ((offset < 0) | (size < 0) | (offset + size > num_bytes)).any():
            return f"a member {key} lies outside its shard"
    return None
