"""Identities of weights and the versions of packages."""

import hashlib
import importlib.metadata
import platform
import sys

import torch


def package_versions(*others: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what is computed."""
    names = ["torch", "numpy", "pillow"]
    if "transformers" in sys.modules:  # Some detectors are its networks.
        names.append("transformers")
    versions = {name: importlib.metadata.version(name) for name in (*names, *others)}
    return dict(python=platform.python_version(), **versions)


def weights_hash(state_dict: dict[str, torch.Tensor]) -> str:
    """Return a hash of names, shapes and weights, which stays equal when a file is rewritten."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
