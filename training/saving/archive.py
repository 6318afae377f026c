"""The members of an archive as ``torch.save`` writes it, with its tensors still elsewhere."""

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
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class Archive:
    """Collects a tree of plain values with tensors in it, for a file that ``torch.load`` reads.

    Args:
        place: Puts bytes or a tensor somewhere, and returns where that is.
    """

    def __init__(self, place: Callable[[Any], Any]) -> None:
        self._place = place
        self._storages: list[Any] = []

    def add(self, tensor: Tensor) -> Any:
        """Place a tensor, and return what stands for it in the tree."""
        order = memory_order(tensor)
        strides, step = [0] * tensor.ndim, 1
        for dim in reversed(order):
            strides[dim], step = step, step * tensor.shape[dim]
        kind = _STORAGES[tensor.dtype]
        storage = ("storage", kind, str(len(self._storages)), "cpu", tensor.numel())
        self._storages.append(self._place(tensor))
        return _Tensor(storage, tuple(tensor.shape), tuple(strides))

    def members(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return where each member of the archive is, by its name."""
        content = io.BytesIO()
        _Pickler(content, protocol=2).dump(tree)
        found = {
            "archive/data.pkl": self._place(content.getvalue()),
            "archive/byteorder": self._place(b"little"),
        }
        found.update({f"archive/data/{i}": place for i, place in enumerate(self._storages)})
        return dict(found, **{"archive/version": self._place(b"3\n")})


class _Tensor:
    """Is read as a tensor whose elements are in another member of the archive."""

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
