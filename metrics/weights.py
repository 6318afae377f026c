"""Reads files of published weights: as tensors only, with names and shapes checked."""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.downloads import fetch
from dnnlib.errors import refusal

_MAX_BYTES = 2 << 30  # Largest file of weights to download; VGG16's has half a gigabyte.
# The names under which pickles refer to arrays and scalars of NumPy 1 and 2.
_NUMPY_NAMES = (
    "numpy.ndarray",
    "numpy.dtype",
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
)


class _LeftAside:
    """Stands in for NumPy objects in a file, such as a random state, and drops their content."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_weights(
    location: str,
    wanted: Mapping[str, torch.Tensor],
    *,
    network: str,
    sha256: str | None,
    expected: str,
    remedy: str,
    left_out: str,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, float32 on the CPU, with the names and shapes of ``wanted``.

    Args:
        location: Path or URL of a ``.safetensors`` file, or of one that ``torch.save`` wrote.
        wanted: Tensors by name, whose shapes those in the file must have.
        network, expected: Name of the network, and a sentence about what the file should hold, for
            error messages.
        sha256: Checksum that the file must have; None accepts any.
        remedy: A sentence for the error message if the file cannot be fetched.
        left_out: Regular expression; tensors in whose names it is found are ignored.

    Raises ValueError for a missing file, a failed download, a file without tensors or with anything
    but plain data (nothing in it is executed), and names or shapes that differ.
    """
    try:
        path = fetch(location, sha256=sha256, max_bytes=_MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"{network} needs its weights: {error} {remedy}") from error
    found = read_checkpoint(path, expected)
    found = {name: value for name, value in found.items() if not re.search(left_out, name)}
    for names, what in ((wanted.keys() - found, "missing"), (found.keys() - wanted, "unknown")):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{path}: {len(names)} weights {what}: {shown}. {expected}")
    for name, value in wanted.items():
        shapes = [list(tensor.shape) for tensor in (found[name], value)]
        if shapes[0] != shapes[1]:
            but = f"{name} has shape {shapes[0]}, expected {shapes[1]}"
            raise ValueError(f"{path}: {but}. {expected}")
    return {name: value.to(torch.float32) for name, value in found.items()}


def read_checkpoint(
    path: Path, expected: str, parts: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name: a safetensors file, or one that ``torch.save`` wrote.

    Names in nested dictionaries are joined by dots. A training state holds several sets of weights:
    of these, the first of ``parts`` that exists is returned, without its prefix (for ``ema``, the
    names that begin with ``ema.``). NumPy arrays, such as a random state, are left out. Raises
    ValueError for a file without tensors, or with anything but plain data; nothing in it is
    executed.
    """
    if path.suffix == ".safetensors":
        found = read_safetensors(path, expected)
    else:
        found = dict(_named_tensors(_load(path, expected)))
    for part in parts:
        inside = {
            n.removeprefix(f"{part}."): t for n, t in found.items() if n.startswith(f"{part}.")
        }
        if inside:
            return inside
    if not found:
        raise ValueError(f"{path}: holds no names with tensors. {expected}")
    return found


def _named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _named_tensors(child, f"{name}.{key}" if name else str(key))


def _load(path: Path, expected: str) -> Any:
    try:
        with torch.serialization.safe_globals([(_LeftAside, name) for name in _NUMPY_NAMES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    # The errors that a damaged or hostile file causes in the unpickler have no common base.
    except Exception as error:
        raise ValueError(f"{path}: {_refusal(path, error)}. {expected}") from error


def read_safetensors(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name; raises ValueError for any other file."""
    try:
        import safetensors
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        but = "reading it needs the package safetensors, which is not installed"
        raise refusal(path, but=but, remedy="pip install safetensors") from None
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file. {expected}") from error


def _refusal(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        is_pickle = file.read(1) in (b"\x80", b"P")  # A bare pickle, or one in a zip archive.
    if is_pickle and isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL (\S+)", str(error))
        return "refused, because reading it would execute code" + (f" ({name[1]})" if name else "")
    return f"damaged, or not a file of tensors ({type(error).__name__})"
