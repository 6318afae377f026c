"""Values derived from a network's weights, kept until the weights change."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_kept: dict[Any, Any] | None = None  # None outside of :func:`fixed_weights`.


@contextlib.contextmanager
def fixed_weights(*networks: torch.nn.Module) -> Iterator[None]:
    """Until the block ends, make once what weights alone decide. They must not change inside it.

    Autocast then keeps what it casts of weights: left alone it casts them anew in every pass, and
    twice where a weight is used twice if it cannot be trained. ``networks`` are those whose weights
    cannot be trained. In torch's inference mode, which keeps no casts, they are cast each time.
    :func:`once` keeps the rest.
    """
    global _kept
    before, _kept = _kept, {}
    frozen = [p for own in networks for p in own.parameters() if not p.requires_grad]
    torch.autocast_increment_nesting()
    try:
        # Autocast keeps the casts of weights that can be trained, and of no others.
        for param in frozen:
            param.requires_grad_(True)
        yield
    finally:
        _kept = before
        for param in frozen:
            param.requires_grad_(False)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def once(key: Any, make: Callable[[], Any]) -> Any:
    """Return ``make()``, or what it returned for ``key`` before in this :func:`fixed_weights`.

    Nothing is kept that takes part in a gradient, or that a compiled graph makes.
    """
    if _kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]
