"""Builds the members of a ``torch.save`` archive whose tensors already lie elsewhere."""

import collections
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_utils.saver import memory_order

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class Archive:
    """Collects the members of a file that ``torch.load`` reads as a tree of values and tensors.

    Args:
        place: Copies bytes or a tensor to where the file is written from; returns the copy's place.
    """

    def __init__(self, place: Callable[[Any], Any]) -> None:
        self._place = place
        self._storages: list[Any] = []

    def add(self, tensor: Tensor) -> Any:
        """Place a tensor of any dtype in ``_STORAGES``; return its stand-in for the tree."""
        order = memory_order(tensor)
        strides, step = [0] * tensor.ndim, 1
        for dim in reversed(order):
            strides[dim], step = step, step * tensor.shape[dim]
        kind = _STORAGES[tensor.dtype]
        storage = ("storage", kind, str(len(self._storages)), "cpu", tensor.numel())
        self._storages.append(self._place(tensor))
        return _Tensor(storage, tuple(tensor.shape), tuple(strides))

    def members(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return the place of every member of the archive by name; ``tree`` holds stand-ins."""
        content = io.BytesIO()
        _Pickler(content, protocol=2).dump(tree)
        found = {
            "archive/data.pkl": self._place(content.getvalue()),
            "archive/byteorder": self._place(b"little"),
        }
        found.update({f"archive/data/{i}": place for i, place in enumerate(self._storages)})
        return dict(found, **{"archive/version": self._place(b"3\n")})


class _Tensor:
    """Stands for a tensor whose elements are in another member; ``torch.load`` rebuilds it."""

    def __init__(self, storage: tuple, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self._about = (_Storage(storage), 0, shape, strides, False, collections.OrderedDict())

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self._about


class _Storage:
    def __init__(self, name: tuple) -> None:
        self.name = name


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        return obj.name if isinstance(obj, _Storage) else None
