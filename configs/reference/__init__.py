"""Reference curves of presets, and the figures published for them."""

from pathlib import Path

from configs.presets import PRESETS
from dnnlib.config import did_you_mean
from dnnlib.errors import refusal
from training.reference_curves.reference import Reference, read_reference

_FOLDER = Path(__file__).parent


def reference_path(preset: str) -> Path | None:
    """Return the reference file of a preset; None if it has none."""
    path = _FOLDER / f"{preset}.json"
    return path if preset in PRESETS and path.is_file() else None


def find_reference(preset: str) -> Reference | None:
    """Return the reference of a preset; None if it has none. Raises ValueError if it is damaged."""
    path = reference_path(preset)
    return None if path is None else read_reference(path)


def reference_of(name: str, given: str | None = None) -> Reference:
    """Return the reference of a preset or, if --against was typed, that in a file.

    Args:
        name: Preset or file.
        given: What was typed as --against, if anything.

    Raises ValueError if there is none.
    """
    path = reference_path(name)
    if path is None and given is not None and name not in PRESETS:
        if not Path(name).exists():
            near = did_you_mean(name, PRESETS)
            but = f"{name} is neither a preset nor a file{near and '. ' + near.strip().rstrip('.')}"
            raise refusal("--against", but=but, accepted=f"{', '.join(known())}, or a file")
        return read_reference(Path(name), "--against")
    if path is None:
        where = "RUN" if given is None else "--against"
        but = f"there are no reference curves of preset {name}"
        remedy = "make some with examples/reference.sh, and give the file with --against"
        raise refusal(where, but=but, remedy=remedy)
    return read_reference(path)


def known() -> list[str]:
    """Return the names of all presets with a reference file, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))
