"""Trees of tensors that several ranks write in parts, and that are reassembled when read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a state's tensor that one rank holds."""

    own: Tensor  # [R, ...], possibly with no rows.
    shape: tuple[int, ...]  # Of the whole tensor.
    first: int  # Index in the whole tensor of the first row of ``own``.
    is_written: bool  # Whether this rank writes them, as others may hold the same rows.


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A tensor of a state, in parts that are mapped from files and not read until :meth:`whole`."""

    shape: tuple[int, ...]  # Of the whole tensor.
    pieces: tuple[tuple[int, Tensor], ...]  # Each part, after the index of its first row.

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0][1].dtype

    def check(self) -> None:
        """Raise ValueError unless the parts make up the whole tensor."""
        row = 0
        for first, part in self._sorted():
            if first != row or part.ndim != len(self.shape) or part.shape[1:] != self.shape[1:]:
                raise ValueError(f"rows {row} to {first} of a tensor are missing")
            row += len(part) if part.ndim else 0
        if self.shape and row != self.shape[0]:
            raise ValueError(f"rows {row} to {self.shape[0]} of a tensor are missing")

    def whole(self) -> Tensor:
        """Return the whole tensor."""
        parts = [part for _, part in self._sorted()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _sorted(self) -> list[tuple[int, Tensor]]:
        return sorted(self.pieces, key=lambda piece: (piece[0], len(self.shape) and len(piece[1])))


def take_apart(
    tree: Any, writers: Sequence[int], rank: int
) -> tuple[Any, dict[str, Tensor], dict[str, int]]:
    """Return a JSON tree, the tensors that ``rank`` writes by key, and the first row of each.

    The JSON tree is the same on every rank. Tensors that are not a :class:`Part` must be the same
    on all ranks, and are divided among the ranks ``writers`` by size. ``tree`` may consist of
    dicts, lists, tuples, tensors and JSON values.
    """
    own: dict[str, Tensor] = {}
    first_rows: dict[str, int] = {}
    whole: dict[str, Tensor] = {}

    def encode(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            items = [[name, encode(child, f"{key}/{name}")] for name, child in node.items()]
            return dict(dict=items)
        if isinstance(node, list | tuple):
            kind = "list" if isinstance(node, list) else "tuple"
            return {kind: [encode(child, f"{key}/{i}") for i, child in enumerate(node)]}
        if isinstance(node, Part):
            if node.is_written and (node.own.numel() or not node.first):
                own[key], first_rows[key] = node.own.detach(), node.first
            return dict(tensor=key, shape=list(node.shape))
        if isinstance(node, Tensor):
            whole[key] = node.detach()
            return dict(tensor=key, shape=list(node.shape))
        return dict(value=node)

    encoded = encode(tree, "")
    for key, writer in _share_out(whole, writers).items():
        if writer == rank:
            own[key], first_rows[key] = whole[key], 0
    return encoded, own, first_rows


def _share_out(tensors: Mapping[str, Tensor], writers: Sequence[int]) -> dict[str, int]:
    """Return the rank that writes each tensor: the first for the weight averages, else balanced.

    The first writer has a copy of the averages anyway, as it writes the snapshots.
    """
    load = dict.fromkeys(writers, 0)
    found = {}
    for key in sorted(tensors, key=lambda key: not key.startswith("/ema/")):
        first = key.startswith("/ema/")
        found[key] = writer = writers[0] if first else min(load, key=load.get)
        load[writer] += tensors[key].nbytes
    return found


def put_together(tree: Any, find: Callable[[str], list[tuple[int, Tensor]]]) -> Any:
    """Return the tree that :func:`take_apart` encoded, with :class:`Pieces` in place of tensors.

    ``find(key)`` returns the parts of a tensor, each after the index of its first row. Raises
    KeyError, TypeError, ValueError or AttributeError if ``tree`` is not such an encoding.
    """
    ((kind, node),) = ((k, v) for k, v in tree.items() if k != "shape")
    if kind == "dict":
        return {name: put_together(child, find) for name, child in node}
    if kind in ("list", "tuple"):
        children = [put_together(child, find) for child in node]
        return children if kind == "list" else tuple(children)
    if kind == "tensor":
        pieces = tuple(find(node))
        if not pieces:
            raise ValueError(f"no part holds {node}")
        return Pieces(tuple(tree["shape"]), pieces)
    if kind == "value":
        return node
    raise ValueError(f"{kind} is not part of a state")


def map_leaves(function: Callable[[Any], Any], tree: Any, kinds: tuple[type, ...]) -> Any:
    """Return nested dicts, lists and tuples with ``function`` applied to each leaf of ``kinds``."""
    if isinstance(tree, kinds):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, child, kinds) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(function, child, kinds) for child in tree)
    return tree
