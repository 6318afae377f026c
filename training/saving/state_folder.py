"""A training state as a folder: tensors in parts that ranks write in parallel, and a manifest.

Parts are safetensors files. The manifest is JSON; it is written last and has every checksum.
"""

import concurrent.futures
import errno
import json
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib.files import read_file, sha256_of_file
from dnnlib.saver import MANIFEST, manifest_checksum, remove_state
from dnnlib.typed import parse_json
from torch_utils.saver import memory_order
from torch_utils.states import Pieces, map_leaves, put_together

FORMAT_VERSION = 2  # Configurations of version 1 did not name the family of their model.
STATE_FORMAT = "setdiffit-training-state"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_ALIGNMENT = 64
_MAX_HEADER = 1 << 30
# Error numbers that speak of the content: a folder in place of a file, or a damaged archive (None:
# an OSError that did not come from the operating system).
_OF_CONTENT = (None, errno.EISDIR, errno.ENOTDIR, errno.EINVAL)


class IntactError(ValueError):
    """A state that cannot be read now, or by this version, but may be intact: it is left alone."""


def check_readable(path: Path, error: Exception) -> None:
    """Raise IntactError if ``error`` comes from the disk or from access rights, not the content."""
    if isinstance(error, OSError) and error.errno not in _OF_CONTENT:
        but = f"cannot be read now ({error.strerror}), which does not mean that it is damaged"
        raise IntactError(f"{path}: {but}; nothing was changed.") from error


def part_name(rank: int) -> str:
    """Return the name of the part that a rank writes."""
    return f"part-{rank:05d}.safetensors"


def sorted_for_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the order of a part: the widest dtypes first, so that all are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def part_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the beginning of a part: the length of the header, then dtypes, shapes and offsets.

    Tensors are written as they lie in memory. Where that permutes the dimensions, as channels_last
    does, ``order`` in the metadata has the permutation, and ``shape`` is in that order.
    """
    orders = {name: memory_order(tensor) for name, tensor in tensors.items()}
    unusual = {name: order for name, order in orders.items() if order != sorted(order)}
    header: dict[str, Any] = {"__metadata__": {"order": json.dumps(unusual)}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        shape = [tensor.shape[dim] for dim in orders[name]]
        header[name] = dict(dtype=_NAMES[tensor.dtype], shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_part(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a part by name, memory-mapped: they are read when they are used.

    Raises ValueError, KeyError, TypeError or AttributeError for a file that is not a part.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise ValueError("its header is too long")
        header = parse_json(file.read(size).decode())
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    orders = parse_json(header.pop("__metadata__")["order"])
    found = {}
    for name, about in header.items():
        dtype, shape = _DTYPES[about["dtype"]], about["shape"]
        start, end = about["data_offsets"]
        count = torch.Size(shape).numel()
        if (
            not 0 <= start <= end <= len(content) - 8 - size
            or end - start != count * dtype.itemsize
        ):
            raise ValueError(f"{name} is not where its header says")
        tensor = torch.empty(shape, dtype=dtype)
        if count:
            place = dict(count=count, offset=8 + size + start)
            tensor = torch.frombuffer(content, dtype=dtype, **place).view(shape)
        if name in orders:
            tensor = tensor.permute([orders[name].index(dim) for dim in range(tensor.ndim)])
        found[name] = tensor
    return found


def load(path: Path, *, lazily: bool) -> dict[str, Any]:
    """Return a state whose checksums all match; raises ValueError for anything else.

    With ``lazily`` its tensors are :class:`~torch_utils.states.Pieces`. If another state takes the
    path while this one is being read, that one is read instead.
    """
    while True:
        before = _identity(path)
        try:
            state = _read(path, lazily)
        except ValueError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return state


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a folder from others that take its path (inode, mtime); None if absent."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def _read(path: Path, lazily: bool) -> dict[str, Any]:
    try:
        manifest = parse_json(read_file(path / MANIFEST).decode())
        check_version(path, manifest.get("version"))
        if manifest["format"] != STATE_FORMAT:
            raise ValueError("its manifest is of something else")
        if manifest.pop("checksum", None) != manifest_checksum(manifest):
            raise ValueError(f"checksum of {MANIFEST} does not match")
        for part in manifest["parts"]:
            if not re.fullmatch(r"part-\d{5,}\.safetensors", part["name"]):
                raise ValueError(f"it names {part['name']!r} as a part")
        files = [path / part["name"] for part in manifest["parts"]]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            checksums = pool.map(sha256_of_file, files)
            for file, part, checksum in zip(files, manifest["parts"], checksums, strict=True):
                if checksum != part["sha256"]:
                    raise ValueError(f"{file}: damaged (its checksum does not match).")
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for file, part in zip(files, manifest["parts"], strict=True):
            tensors = read_part(file)
            for key, first in part["first_rows"].items():
                found.setdefault(key, []).append((first, tensors[key]))
        state = put_together(manifest["tree"], lambda key: found[key])
        state = dict(state, config=manifest["config"])
        # Lazy tensors are checked as well, so that missing rows are found now and not on use.
        map_leaves(lambda pieces: pieces.check(), state, (Pieces,))
        return state if lazily else map_leaves(lambda leaf: leaf.whole(), state, (Pieces,))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {Path(error.filename).name} is missing.") from None
    except (KeyError, TypeError, AttributeError, OSError, UnicodeDecodeError) as error:
        check_readable(path, error)
        raise ValueError(f"{path}: not a training state, or damaged ({error}).") from error
    except IntactError:
        raise
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: damaged ({text}).") from error


def check_version(path: Path, version: Any) -> None:
    """Raise IntactError for a file of a later format version, ValueError for one without any."""
    if not isinstance(version, int) or version > FORMAT_VERSION:
        but = f"this version of the software reads up to {FORMAT_VERSION}"
        kind = IntactError if isinstance(version, int) else ValueError
        raise kind(f"{path}: has format version {version}, but {but}; update the software.")


def is_of_stop(path: Path) -> bool:
    """Return whether a run with --rollback wrote a state only to stop; False if unknown."""
    try:
        return parse_json(read_file(path / MANIFEST)).get("of_stop", False) is True
    except (OSError, ValueError, AttributeError):
        return False


def is_state_folder(path: Path) -> bool:
    """Return whether a path is a complete training state in parts: a folder with a manifest."""
    return path.name.startswith("training-state-") and (path / MANIFEST).is_file()


def remove_incomplete_states(run_dir: Path) -> None:
    """Delete the folders of states that never got a manifest."""
    for path in run_dir.glob("training-state-*"):
        if path.is_dir() and not is_state_folder(path):
            remove_state(path)
