"""Errors in an input, in one form: where, what was given, what is accepted, how to go on."""

import pickle
from typing import Any

_NOTHING = object()
# The reason given where an empty text is refused.
NOTHING_NAMED = "it names nothing; perhaps a variable is not set"


def refusal(
    where: Any, got: Any = _NOTHING, *, accepted: str = "", but: str = "", remedy: str = ""
) -> ValueError:
    """Return an error that says in one sentence what is wrong with an input.

    The sentence is ``WHERE: got GOT, but BUT; accepted: ACCEPTED; REMEDY.`` without the parts that
    are empty; if ``got`` is left out, it starts with ``WHERE: BUT``. ``where`` is the option or
    file, and ``remedy`` an imperative such as ``use --batch=64``.
    """
    parts = [but] if got is _NOTHING else [f"got {got}, but {but}" if but else f"got {got}"]
    parts += [f"accepted: {accepted}" if accepted else "", remedy]
    return ValueError(f"{where}: {'; '.join(filter(None, parts))}.")


class NotFiniteError(ValueError):
    """Infinite or NaN values where an image or a score needs finite ones."""


def transportable(error: Exception) -> Exception:
    """Return ``error``, or a ValueError with its type and text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # Pickling can fail in any way.
        return ValueError(f"{type(error).__name__}: {error}")
    return error
