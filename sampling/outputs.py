"""Where generated images go, and which class each has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.resumable import claim
from dnnlib.ranges import parse_ranges


def parse_classes(text: str | None, class_names: Sequence[str]) -> tuple[int, ...]:
    """Return class indices for names, indices and ranges such as ``cat,3,5-7``.

    Returns an empty tuple for None: each seed draws its class. Raises ValueError for a class that
    the model does not have.
    """
    if text is None:
        return ()
    if not class_names:
        raise ValueError(f"--class: got {text!r}, but the model is unconditional.")
    return tuple(parse_ranges("--class", text, class_names))


def labels_of_seeds(seeds: Sequence[int], classes: Sequence[int]) -> list[int] | None:
    """Return the class of each seed, ``classes[seed % len(classes)]``, or None without classes."""
    return [classes[seed % len(classes)] for seed in seeds] if classes else None


def image_path(outdir: Path, seed: int, subdirs: bool) -> Path:
    """Return the file of one seed: ``000123.png``, under ``000000`` with subfolders."""
    folder = outdir / f"{seed - seed % 1000:06d}" if subdirs else outdir
    return folder / f"{seed:06d}.png"


def claim_outdir(outdir: Path, protocol: Mapping[str, Any]) -> None:
    """Note in ``outdir`` how its images are made; raises ValueError if it holds others."""
    claim(outdir / "generation.json", protocol, "--outdir", "images")
