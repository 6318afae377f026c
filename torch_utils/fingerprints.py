"""Hashes of weights, and the versions of packages."""

import functools
import hashlib
import importlib.metadata
import platform
import sys

import torch


def package_versions(*others: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that can affect results.

    Those are torch, numpy, pillow, transformers if it is loaded, and ``others``.
    """
    names = ["torch", "numpy", "pillow"]
    if "transformers" in sys.modules:  # It provides some detectors.
        names.append("transformers")
    versions = {name: _version(name) for name in (*names, *others)}
    return dict(python=platform.python_version(), **versions)


_version = functools.cache(importlib.metadata.version)  # Which reads files, 5 ms each.


def weights_hash(state_dict: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, shapes, dtypes and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
