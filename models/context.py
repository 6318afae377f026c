"""What a network is conditioned on, beside the noise level."""

import dataclasses
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Context:
    """The conditioning of a batch of N images, as every backbone takes it.

    Every field has the batch as its first dimension, or is None where a model has no such input. A
    conditioner that hands on more has a subclass with further fields of that kind.
    """

    vector: Tensor | None = None  # [N, D], one vector per image
    tokens: Tensor | None = None  # [N, L, D], a sequence per image
    # [N, L], true where a token takes part; or float32, added to the scores of attention to it.
    mask: Tensor | None = None
    label: Tensor | None = None  # [N, D], an embedding of the class beside that of something else
    # [N, layers, 2 heads, M, d], keys and values that layers make of the tokens, where many passes
    # take them.
    keys_values: Tensor | None = None

    def concat(self, *others: Self) -> Self:
        """Return the contexts of several batches, in order, as one batch.

        Raises ValueError if a field is present in some of them only.
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
        """Return the context of some of the images: a slice, or a tensor of indices or bools."""
        return self._map(lambda value: value[rows])

    def repeat(self, count: int) -> Self:
        """Return each image's context ``count`` times in a row: [a, b] becomes [a, a, b, b]."""
        return self._map(lambda value: value.repeat_interleave(count, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**{k: None if v is None else function(v) for k, v in values.items()})
