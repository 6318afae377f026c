"""Values that are computed once: from weights until those change, or a limited number by key."""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

_MAX_KEPT = 64
_kept: dict[Any, Any] | None = None  # None outside :func:`fixed_weights`.


@contextlib.contextmanager
def fixed_weights(*networks: torch.nn.Module) -> Iterator[None]:
    """A context in which values that depend on weights alone are computed once.

    The weights must not change in it. Autocast keeps its casts of weights until the block ends;
    otherwise it would repeat them in every pass, and for frozen weights at every use. ``networks``
    are those with frozen weights. In torch's inference mode, casts are never kept. :func:`once`
    keeps other values.
    """
    global _kept
    before, _kept = _kept, {}
    frozen = [p for own in networks for p in own.parameters() if not p.requires_grad]
    torch.autocast_increment_nesting()
    try:
        # Autocast keeps only the casts of weights that require gradients.
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
    """Return ``make()``, computed once per ``key`` within a :func:`fixed_weights` block.

    Nothing is kept while gradients are enabled, or while a graph is being compiled.
    """
    if _kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


class Kept:
    """Values by key, computed once each; they are dropped when there would be more than 64."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed once per ``key``.

        A graph that is being compiled computes its own value, for tensors made in it do not outlive
        its tracing.
        """
        if torch.compiler.is_compiling():
            return make()
        if key not in self._values:
            if len(self._values) >= _MAX_KEPT:
                self._values.clear()
            self._values[key] = make()
        return self._values[key]
