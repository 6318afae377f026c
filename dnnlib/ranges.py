"""Lists of integers as people type them: ``0-7,9``."""

from collections.abc import Sequence

from dnnlib.config import did_you_mean


def parse_ranges(
    where: str, parts: str | Sequence[str], names: Sequence[str] | None = None
) -> list[int]:
    """Return the integers of a list such as ``0-3,7,10-11``, in its order.

    Args:
        where: The option, with which errors begin.
        parts: The list as text, or its elements.
        names: Names of classes. Each may stand for its index, and no other index is accepted.

    Raises ValueError for anything else.
    """
    found: list[int] = []
    for part in map(str.strip, parts.split(",") if isinstance(parts, str) else parts):
        if names is not None and part in names:
            found.append(list(names).index(part))
            continue
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            if names is not None:
                raise ValueError(f"{where}: no class {part!r}.{did_you_mean(part, names)}")
            raise ValueError(f"{where}: got {part!r}; accepted: integers and ranges, as 0-63,100.")
        first, last = int(low), int(high or low)
        if last < first:
            raise ValueError(f"{where}: got {part}, which ends before it starts.")
        if names is not None and last >= len(names):
            raise ValueError(
                f"{where}: got {part}; accepted: names, and indices from 0 to {len(names) - 1}."
            )
        found.extend(range(first, last + 1))
    return found
