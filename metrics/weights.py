"""Files of published weights: read as tensors alone, and checked by name and shape."""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.downloads import fetch
from dnnlib.errors import refusal

_MAX_BYTES = 2 << 30  # Of the weights of one network; VGG16's are half a gigabyte.
# What the arrays and numbers of NumPy 1 and 2 are called in pickles.
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
    """What a file holds of NumPy, such as the random state beside weights: nothing of it counts."""

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
        location: Path or URL of a ``.safetensors``, or of a file that ``torch.save`` wrote.
        wanted: Tensors by name whose shapes the file's are compared with.
        network, expected: For messages: what the weights are of, and a sentence that says what the
            file ought to hold.
        sha256: Checksum that the file must have; None for any.
        remedy: A sentence that says what to do where the file cannot be had.
        left_out: Regular expression, found in the names of tensors that do not count.

    Raises ValueError for a missing file, a failed download, a file that holds anything but tensors
    (nothing in it is executed), and other names or shapes.
    """
    try:
        path = fetch(location, sha256=sha256, max_bytes=_MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"{network} needs its weights: {error} {remedy}") from error
    found = _read_tensors(path, expected)
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
    """Return the tensors by name of a file: a safetensors, or one that ``torch.save`` wrote.

    Names within dictionaries are joined by dots. Of a training state, which holds several sets of
    weights, the first of ``parts`` that is there is returned, without its name: of ``ema``, what
    is called ``ema.``. Arrays of NumPy, such as the random state in it, are left out. Raises
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
    # What a damaged or hostile file makes the unpickler raise has no common base.
    except Exception as error:
        raise ValueError(f"{path}: {_refusal(path, error)}. {expected}") from error


def _read_tensors(path: Path, expected: str) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path, expected)
    state = _load(path, expected)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: holds no names with tensors. {expected}")
    return {name: value.detach() for name, value in state.items()}


def read_safetensors(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """Return the tensors by name of a safetensors file; ValueError for any other."""
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
        is_pickle = file.read(1) in (b"\x80", b"P")  # Bare, or in a zip archive.
    if is_pickle and isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL (\S+)", str(error))
        return "refused, because reading it would execute code" + (f" ({name[1]})" if name else "")
    return f"damaged, or not a file of tensors ({type(error).__name__})"
