"""Numbers, durations and lists as people read and type them."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from dnnlib.config import did_you_mean
from dnnlib.errors import refusal

_MAX_SEED = 2**32 - 1
MAX_LISTED = 10_000_000  # Integers in one list: a range can ask for too many in a few characters.


def format_time(seconds: float) -> str:
    """Return a duration such as ``42s``, ``3m 05s``, ``2h 07m`` or ``4d 03h``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total // 60 % 60:02d}m"
    return f"{total // 86400}d {total // 3600 % 24:02d}h"


def format_count(number: float, unit: str = "") -> str:
    """Return a count with a metric prefix: ``15.93M``, ``4.20k``, ``12``."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.2f}{prefix}{unit}"
    return f"{number:g}{unit}"


def format_kimg(kimg: float) -> str:
    """Return a number of kimg as text, with two decimals below 1 and one above: ``154.3``."""
    return f"{kimg:.2f}" if 0 < kimg < 1 else f"{kimg:.1f}"


def join_names(names: Iterable[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def is_number(text: str) -> bool:
    """Return whether a text consists of 1 to 18 ASCII decimal digits."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


def number_text(text: str) -> str:
    """Return ``text`` unchanged; raises ValueError if it has an underscore or is not ASCII.

    Python's own parsers accept underscores between digits, and the digits of other scripts.
    """
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    return text


def by_number(name: str) -> tuple[bool, int, str]:
    """Return a sort key that puts numeric names first, by value, and then the others by letters."""
    return not is_number(name), int(name) if is_number(name) else 0, name


def check_seeds(where: str, seeds: Iterable[Any]) -> None:
    """Raise ValueError if a seed is not an integer from 0 to 2^32 - 1."""
    for seed in seeds:
        try:
            is_seed = not isinstance(seed, bool) and 0 <= operator.index(seed) <= _MAX_SEED
        except TypeError:
            is_seed = False
        if not is_seed:
            raise refusal(where, repr(seed), accepted=f"integers from 0 to {_MAX_SEED:,}")


def parse_ranges(
    where: str, parts: str | Sequence[str], names: Sequence[str] | None = None
) -> list[int]:
    """Return the integers that a list such as ``0-3,7,10-11`` names, in the order given.

    Args:
        where: The option, for error messages.
        parts: The list as one text, or its elements.
        names: Class names. Each may stand for its index, and only their indices are accepted. If
            any name is a number, all numbers are taken for names, so that ``1,2`` and ``1-2`` mean
            the same; a range then covers the classes whose numbers lie in it.

    Raises ValueError for any other text, and for more than :data:`MAX_LISTED` integers.
    """
    found: list[int] = []
    numbers = {int(name): i for i, name in enumerate(names or ()) if is_number(name)}
    for part in map(str.strip, parts.split(",") if isinstance(parts, str) else parts):
        if names is not None and part in names:
            same = [index for index, name in enumerate(names) if name == part]
            if len(same) > 1:
                but = f"classes {join_names(map(str, same[:4]))} have that name"
                raise refusal(where, repr(part), but=but, remedy="give an index, or rename them")
            found += same
            continue
        low, dash, high = part.partition("-")
        if not is_number(low) or (dash and not is_number(high)):
            if names is not None:
                first = f" The first are {join_names(names[:8])}." if names else ""
                raise ValueError(f"{where}: no class {part!r}.{did_you_mean(part, names) or first}")
            raise refusal(where, repr(part), accepted="integers and ranges, as 0-63,100")
        first, last = int(low), int(high or low)
        if last < first:
            raise ValueError(f"{where}: got {part}, which ends before it starts.")
        if numbers:
            for number in (first, last):
                if number not in numbers:
                    known = join_names(map(str, sorted(numbers)[:8]))
                    remedy = "where names are numbers, numbers are names"
                    problem = f"no class is called {number}; {remedy}, and the first are {known}"
                    raise refusal(where, part, but=problem)
            found += [numbers[number] for number in sorted(numbers) if first <= number <= last]
            continue
        if names is not None and last >= len(names):
            accepted = f"names, and indices from 0 to {len(names) - 1}"
            raise refusal(where, part, accepted=accepted)
        if len(found) + last - first >= MAX_LISTED:
            problem = f"a list holds at most {MAX_LISTED:,} numbers"
            raise refusal(where, part, but=problem, remedy="give fewer at a time")
        found.extend(range(first, last + 1))
    return found
