"""Files of published weights: read as tensors alone, and checked by name and shape."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from dnnlib.files import fetch


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
        location: Path or URL.
        wanted: Tensors by name whose shapes the file's are compared with.
        network: What the weights are of, for messages.
        sha256: Checksum that the file must have; None for any.
        expected: A sentence that says what the file ought to hold, for messages.
        remedy: A sentence that says what to do where the file cannot be had.
        left_out: Regular expression, found in the names of tensors that do not count.

    Raises ValueError for a missing file, a failed download, a file that holds anything but tensors
    (nothing in it is executed), and other names or shapes.
    """
    try:
        path = fetch(location, sha256=sha256)
    except ValueError as error:
        raise ValueError(f"{network} needs its weights: {error} {remedy}") from error
    found = read_tensors(path, expected)
    found = {name: value for name, value in found.items() if not re.search(left_out, name)}
    return checked_weights(found, wanted, str(path), expected)


def read_tensors(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """Return the tensors by name of a file, on the CPU; nothing in it is executed.

    Args:
        path: A file that ``torch.save`` wrote, or one whose name ends with ``.safetensors``.
        expected: A sentence that says what it ought to hold, for messages.

    Raises ValueError for a file that is damaged or holds anything but tensors with names.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path, expected)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What a damaged or hostile file makes the unpickler raise has no common base.
    except Exception as error:
        raise ValueError(f"{path}: {_refusal(path, error)}. {expected}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: holds no names with tensors. {expected}")
    return {name: value.detach() for name, value in state.items()}


def read_safetensors(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """Return the tensors by name of a safetensors file, as :func:`read_tensors` does."""
    try:
        import safetensors
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: reading it needs the package safetensors, which is not installed: pip "
            "install safetensors."
        ) from None
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or no safetensors file. {expected}") from error


def _refusal(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        is_pickle = file.read(1) in (b"\x80", b"P")  # Bare, or in a zip archive.
    if is_pickle and isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL (\S+)", str(error))
        return "refused, because reading it would execute code" + (f" ({name[1]})" if name else "")
    return f"damaged, or no file of tensors ({type(error).__name__})"


def checked_weights(
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    label: str,
    expected: str,
) -> dict[str, torch.Tensor]:
    """Return the tensors ``found`` in float32, if names and shapes are those of ``wanted``.

    Raises ValueError, a sentence that begins with ``label`` and ends with ``expected``, otherwise.
    """
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    for names, what in ((missing, "missing"), (unknown, "unknown")):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{label}: {len(names)} weights {what}: {shown}. {expected}")
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{label}: {name} has shape {list(found[name].shape)}, expected "
                f"{list(value.shape)}. {expected}"
            )
    return {name: value.to(torch.float32) for name, value in found.items()}
