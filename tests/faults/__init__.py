"""Faults that tests plant in a run: each patches one function of the application."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, where it can be, and what has to name it.

    Attributes:
        name: Of the fault.
        presets: In whose runs it can be planted.
        expects: Name of the finding that has to tell it.
        plant: Patches the process that calls it.
        ranks: Number of processes that it needs.
    """

    name: str
    presets: tuple[str, ...]
    expects: str
    plant: Callable[[], None]
    ranks: int = 1
