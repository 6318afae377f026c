"""What a network is conditioned on besides the noise level."""

import dataclasses
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Context:
    """The conditioning of a batch of N images, as every backbone takes it.

    The first dimension of every field is the batch; a field that a model does not use is None. A
    conditioner that passes on more returns a subclass with further such fields.
    """

    vector: Tensor | None = None  # [N, D], one vector per image
    tokens: Tensor | None = None  # [N, L, D], one sequence per image
    # [N, L], true where a token may be attended to; or float32, added to the attention scores.
    mask: Tensor | None = None
    label: Tensor | None = None  # [N, D], embedding of the class, where vector or tokens hold a set
    # [N, layers, 2 heads, M, d], keys and values of the tokens in each layer, precomputed for many
    # passes.
    keys_values: Tensor | None = None

    def concat(self, *others: Self) -> Self:
        """Return this context and the others, in order, joined along the batch.

        Raises ValueError if a field is present in only some of them.
        """
        contexts = (self, *others)
        fields = {}
        for field in dataclasses.fields(self):
            values = [getattr(context, field.name) for context in contexts]
            missing = [value is None for value in values]
            if any(missing) and not all(missing):
                raise ValueError(f"Cannot join contexts with and without {field.name!r}.")
            fields[field.name] = None if missing[0] else torch.cat(values)
        return type(self)(**fields)

    def index(self, rows: slice | Tensor) -> Self:
        """Return the context of some images, given by a slice or a tensor of indices or bools."""
        return self._map(lambda value: value[rows])

    def repeat(self, count: int) -> Self:
        """Return each image's context ``count`` times in a row: [a, b] becomes [a, a, b, b]."""
        return self._map(lambda value: value.repeat_interleave(count, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**{k: None if v is None else function(v) for k, v in values.items()})
