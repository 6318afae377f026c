"""Layout, record and verification of a latent archive (docs/formats.md)."""

import dataclasses
import functools
import hashlib
import io
import math
import os
import zlib
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np

from dnnlib.addresses import AddressError, is_address, name_of, under
from dnnlib.files import regular_file, sha256_of_file
from dnnlib.parallel import process_map
from dnnlib.progress import progress
from dnnlib.remote.files import Known, OpenFiles, read_all
from dnnlib.typed import JsonFormat, typed

FORMAT = "setdiffit-latents"
FORMAT_VERSION = 1
RECORD_FILE = "latents.json"
CLAIM_FILE = "encoding.json"  # Written when an encoding begins.
LABELS_FILE = "labels.npy"
CHECKSUMS_FILE = "crc32.npy"
KINDS = ("mean-std", "mean")
_AGAIN = "start the same dataset_tool.py encode again, which makes what is missing"
_ROWS_AT_ONCE = 256
_MAX_BYTES = 1 << 32  # Limit for the files of the record, labels and checksums.


class ShardFacts(TypedDict):
    """What a record states about one shard."""

    file: str
    num_images: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRecord:
    """The record of a latent archive: the content of ``latents.json``."""

    num_images: int
    resolution: int  # Of the images, like img_channels.
    img_channels: int
    latent_shape: list[int]  # c, h, w.
    kind: str  # One of KINDS: whether standard deviations are stored after the means.
    mirrored: bool  # Whether latents of the mirror image of each image are stored too.
    scale: float
    shift: float
    vae: str
    vae_hash: str
    source: str
    source_hash: str
    class_names: list[str] | None
    labels_sha256: str | None
    input_transform: str
    precision: str
    shard_size: int
    shards: list[ShardFacts]
    packages: dict[str, str]
    checksums_sha256: str | None = None  # Of crc32.npy, which earlier versions did not write.

    def checked(self) -> Self:
        """Return this record; raises ValueError if its values contradict one another."""
        for name in ("num_images", "resolution", "img_channels", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}")
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(f"latent_shape is {self.latent_shape}")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}")
        if not self.scale:
            raise ValueError("scale is 0")
        if (self.class_names is None) != (self.labels_sha256 is None):
            raise ValueError("class_names and labels_sha256 do not agree")
        for index, shard in enumerate(self.shards):
            if shard["file"] != latent_shard_name(index) or shard["num_images"] < 1:
                raise ValueError(f"shard {index} is {shard}")
        num_images = sum(shard["num_images"] for shard in self.shards)
        if num_images != self.num_images:
            raise ValueError(f"num_images is {self.num_images}, but the shards hold {num_images}")
        return self

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """The shape [V, C, h, w] of the moments of one image; V is 2 with mirror images, else 1."""
        channels, height, width = self.latent_shape
        return 1 + self.mirrored, channels * (1 + (self.kind == "mean-std")), height, width

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``latents.json``."""
        return dict(format=FORMAT, version=FORMAT_VERSION, **dataclasses.asdict(self))


def is_latent_archive(path: str | os.PathLike) -> bool:
    """Return whether a path is a complete folder of latents; an address is judged by its name."""
    if is_address(path):
        return not name_of(path).lower().endswith((".zip", ".tar", ".npz"))
    return (Path(path) / RECORD_FILE).is_file()


def is_latent_folder(path: str | os.PathLike) -> bool:
    """Return whether a path is a folder of latents, complete or not."""
    return is_latent_archive(path) or (not is_address(path) and (Path(path) / CLAIM_FILE).is_file())


def latent_shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:05d}.npy"


def read_record(path: str | os.PathLike) -> LatentRecord:
    """Return the record of an archive; ValueError if missing, damaged or of a newer version."""
    file = under(path, RECORD_FILE)
    if not (is_address(file) or file.is_file()):
        if is_latent_folder(path):
            raise ValueError(f"{path}: its encoding is not finished; {_AGAIN}.")
        raise ValueError(f"{path}: not a folder of latents made by dataset_tool.py encode.")
    try:
        content = read_all(file, _MAX_BYTES)
    except AddressError as error:
        remedy = "give the address of a folder made by dataset_tool.py encode"
        raise ValueError(f"{str(error).rstrip('.')}; {remedy}.") from None
    parse = JsonFormat(FORMAT, FORMAT_VERSION, "dataset_tool.py encode", _AGAIN).parse
    return parse(content, file, lambda found: typed(LatentRecord, found).checked())


def known_shards(path: str, record: LatentRecord) -> dict[str, Known]:
    """Return size and checksum of each remote shard, so that no server need be asked for them."""
    known = {}
    for shard in record.shards:
        shape, header = (shard["num_images"], *record.row_shape), io.BytesIO()
        facts = dict(descr="<f2", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(header, facts)
        size = header.tell() + 2 * math.prod(shape)
        known[under(path, shard["file"])] = Known(size, shard["sha256"])
    return known


def check_latent_shard(
    path: Path | str, shape: tuple[int, ...], files: OpenFiles | None = None
) -> int:
    """Return the offset in bytes of the values in a shard, after a check of its header and size.

    ``files`` reads a shard at an address; None reads a local file.

    Raises ValueError if the file is not a complete float16 array of ``shape``.
    """
    try:
        local = files is None
        with open(path, "rb", opener=regular_file) if local else files.stream(path) as file:
            np.lib.format.read_magic(file)
            found, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), file.seek(0, os.SEEK_END)
    except AddressError:
        raise
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; {_AGAIN}.") from None
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: damaged ({reason}); delete it and {_AGAIN}.") from None
    if found != shape or fortran_order or dtype != np.float16:
        holds = f"holds {dtype} of shape {list(found)}, but the record says float16 {list(shape)}"
        raise ValueError(f"{path}: {holds}; delete it and {_AGAIN}.")
    expected = start + 2 * math.prod(shape)
    if size != expected:
        raise ValueError(f"{path}: has {size} bytes instead of {expected}; delete it and {_AGAIN}.")
    return start


def read_archive_labels(path: Path | str, record: LatentRecord) -> np.ndarray | None:
    """Return the class index of each image, int64 [N], or None if there are no labels.

    Raises ValueError if they are missing or damaged.
    """
    if record.class_names is None:
        return None
    file, shape = under(path, LABELS_FILE), (record.num_images,)
    labels = _read_array(file, "labels", np.int64, shape, record.labels_sha256)
    if labels.min() < 0 or labels.max() >= len(record.class_names):
        found = f"has labels from {labels.min()} to {labels.max()}"
        known = f"the record names {len(record.class_names)} classes"
        raise ValueError(f"{file}: {found}, but {known}; {_AGAIN}.")
    return labels


def read_checksums(path: Path | str, record: LatentRecord) -> np.ndarray | None:
    """Return the CRC-32s of the latents of each image and its mirror image, uint32 [N, V], or None.

    Earlier versions stored none. Raises ValueError if they are missing or damaged.
    """
    if record.checksums_sha256 is None:
        return None
    file, shape = under(path, CHECKSUMS_FILE), (record.num_images, record.row_shape[0])
    return _read_array(file, "checksums", np.uint32, shape, record.checksums_sha256)


def _read_array(
    file: Path | str, what: str, dtype: type, shape: tuple[int, ...], sha256: str
) -> np.ndarray:
    try:
        content = read_all(file, _MAX_BYTES)
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except AddressError:
        raise
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ValueError(f"{file}: cannot be read ({reason}); {_AGAIN}.") from None
    digest = hashlib.sha256(content).hexdigest()
    if (values.shape, values.dtype) != (shape, dtype) or digest != sha256:
        raise ValueError(f"{file}: damaged, not the {what} that the record names; {_AGAIN}.")
    return values


def checksums_of_shard(path: Path, rows: int, variants: int) -> tuple[str, np.ndarray]:
    """Return the SHA-256 of a shard and the CRC-32s of its rows, uint32 [rows, variants]."""
    values = np.load(path, mmap_mode="r").reshape(rows * variants, -1)
    crcs = [zlib.crc32(row) for row in values]
    return sha256_of_file(path), np.array(crcs, np.uint32).reshape(rows, variants)


def verify_latents(path: str | os.PathLike, *, num_workers: int | None = None) -> list[str]:
    """Read a whole archive and return one sentence for each problem found.

    Checks the record and the files of labels and row checksums. Of each shard it checks size and
    SHA-256, and that values are finite and standard deviations not negative.
    """
    folder, problems = Path(path), []
    try:
        record = read_record(folder)
    except ValueError as error:
        return [str(error)]
    for read in (read_archive_labels, read_checksums):
        try:
            read(folder, record)
        except ValueError as error:
            problems.append(str(error))
    inspect = functools.partial(_inspect_shard, folder=folder, record=record)
    results = process_map(inspect, record.shards, num_workers=num_workers, chunk_size=1)
    with progress(total=record.num_images, label=f"Verifying {folder}") as bar:
        for shard, found in zip(record.shards, results, strict=True):
            problems += found
            bar.update(shard["num_images"])
    known = {shard["file"] for shard in record.shards}
    problems += [
        f"{file}: is not in the record; delete it."
        for file in sorted(folder.glob("shard-*.npy"))
        if file.name not in known
    ]
    return problems


def _inspect_shard(shard: dict[str, Any], *, folder: Path, record: LatentRecord) -> list[str]:
    file = folder / shard["file"]
    try:
        check_latent_shard(file, (shard["num_images"], *record.row_shape))
    except ValueError as error:
        return [str(error)]
    problems = []
    if sha256_of_file(file) != shard["sha256"]:
        differs = "its bytes differ from the checksum in the record"
        problems.append(f"{file}: {differs}; delete it and {_AGAIN}.")
    values = np.load(file, mmap_mode="r")
    channels = record.latent_shape[0]
    for first in range(0, len(values), _ROWS_AT_ONCE):
        rows = values[first : first + _ROWS_AT_ONCE]
        bad = ~np.isfinite(rows).all(axis=(1, 2, 3, 4))
        bad |= (rows[:, :, channels:] < 0).any(axis=(1, 2, 3, 4))
        if bad.any():
            row = first + int(np.flatnonzero(bad)[0])
            problems.append(f"{file}: row {row} has values that no autoencoder gives.")
            break
    return problems
