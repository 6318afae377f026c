"""Faults to plant in training runs, each by a patch of one function of the application."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake as a user or a change of the code could make it.

    Attributes:
        name: Of the fault.
        presets: In which it is planted.
        expects: The name of the finding that says so.
        plant: Puts it into this process, before training starts.
        options: Further options of train.py that it needs.
        ranks: Number of processes that it needs.
    """

    name: str
    presets: tuple[str, ...]
    expects: str
    plant: Callable[[], None]
    options: tuple[str, ...] = ()
    ranks: int = 1
