"""Where generated images go, and which class each has."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib.files import atomic_write
from dnnlib.ranges import parse_ranges
from dnnlib.text import join_names


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


def claim_outdir(outdir: Path, protocol: dict[str, Any]) -> None:
    """Note in ``outdir`` how its images are made; raises ValueError if it holds others."""
    path = outdir / "generation.json"
    protocol = json.loads(json.dumps(protocol))
    if path.is_file():
        try:
            there = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: cannot be read ({error}), so that the images beside it may be of any "
                "making; choose another folder, or delete that one."
            ) from error
        names = [name for name in protocol if there.get(name) != protocol[name]]
        if names:
            raise ValueError(
                f"--outdir: {outdir} holds images made with another {join_names(names)}; choose "
                "another folder, or delete that one to start anew."
            )
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(protocol, file, indent=2)
