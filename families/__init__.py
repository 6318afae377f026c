"""The kinds of models. Importing this package registers them; each is loaded when it is needed.

The modules ``image``, ``latent``, ``sets`` and ``features`` each implement the contract of
:mod:`training.family` for one kind of model; the others hold what they share.
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
    """Return the family ``name`` if a snapshot belongs to it; raises ValueError otherwise.

    ``problem`` ends the message, after the path of the snapshot.
    """
    if snapshot.config.family != name:
        raise ValueError(f"--network: {snapshot.path} {problem}.")
    return named(name)
