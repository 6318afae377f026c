"""The kinds of models. Importing this package registers them; each loads when it is needed.

Every module here implements the contract of :mod:`training.family` and answers every question
about its kind of model.
"""

import functools
import importlib
from typing import TYPE_CHECKING

from training.family import Family, named, of, register, restore_run

if TYPE_CHECKING:
    from training.checkpoint import Snapshot

__all__ = ["Family", "expect", "named", "of", "register", "restore_run"]


@functools.cache
def _load(module: str) -> Family:
    return importlib.import_module(f"families.{module}").FAMILY


for _name in ("image", "latent", "sets", "features"):
    register(_name, functools.partial(_load, _name))


def expect(snapshot: "Snapshot", name: str, problem: str) -> Family:
    """Return the family ``name`` for one of its snapshots; raises ValueError for any other."""
    if snapshot.config.family != name:
        raise ValueError(f"--network: {snapshot.path} {problem}.")
    return named(name)
