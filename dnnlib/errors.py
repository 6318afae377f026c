"""Errors in an input, in one form: where, what was given, what is accepted, how to go on."""

import pickle
from typing import Any

_NOTHING = object()
# Why an empty text is refused.
NOTHING_NAMED = "it names nothing; perhaps a variable is not set"


def refusal(
    where: Any, got: Any = _NOTHING, *, accepted: str = "", but: str = "", remedy: str = ""
) -> ValueError:
    """Return an error that says in one sentence what is wrong with an input.

    The sentence is ``WHERE: got GOT, but BUT; accepted: ACCEPTED; REMEDY.`` without the parts that
    are empty; without ``got`` it is ``WHERE: BUT; ...``. ``where`` is the option or the file, and
    ``remedy`` an imperative: ``use --batch=64``.
    """
    parts = [but] if got is _NOTHING else [f"got {got}, but {but}" if but else f"got {got}"]
    parts += [f"accepted: {accepted}" if accepted else "", remedy]
    return ValueError(f"{where}: {'; '.join(filter(None, parts))}.")


class NotFiniteError(ValueError):
    """Values that are infinite or no numbers, where an image or a score was to be made of them."""


def transportable(error: Exception) -> Exception:
    """Return ``error``, or its text as a ValueError if it cannot be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # Whatever keeps it from travelling, its text can.
        return ValueError(f"{type(error).__name__}: {error}")
    return error
