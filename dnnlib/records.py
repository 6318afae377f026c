"""Frozen dataclasses read back from JSON, each value checked against the type of its field."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dnnlib.config import split_optional

T = TypeVar("T")


def read_values(
    content: bytes, file: Path | str, *, format: str, version: int, maker: str, remedy: str
) -> dict[str, Any]:
    """Return the object in a JSON file, its format and version checked.

    Args:
        content: What the file holds.
        file: Its path or address, with which errors begin.
        format: What its ``format`` must be.
        version: The highest ``version`` that is known.
        maker: The command that writes such files.
        remedy: What to do about a damaged one.

    Raises ValueError.
    """
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file}: damaged, not valid JSON ({error}); {remedy}.") from None
    if not isinstance(values, dict) or values.get("format") != format:
        raise ValueError(f"{file}: not written by {maker}.")
    found = values.get("version")
    if type(found) is not int or not 1 <= found <= version:
        raise ValueError(
            f"{file}: has format version {found}, but this version of the software reads up to "
            f"{version}; update the software."
        )
    return values


def make_record(record_type: type[T], values: Any, name: str = "") -> T:
    """Return a dataclass made of values from JSON, at whatever depth dataclasses are nested.

    Its fields may be of bool, int, float, str, ``Any``, ``T | None``, ``list[T]``,
    ``tuple[T, ...]``, ``tuple[T, U]``, ``dict[str, T]`` and dataclasses. Numbers are finite; keys
    that are no fields are not looked at.
    Raises ValueError that says which value is wrong or missing: ``buckets[1].width is 'x'``.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name or 'the record'} is {values!r}")
    hints = typing.get_type_hints(record_type)
    found = {}
    for field in dataclasses.fields(record_type):
        inner = f"{name}.{field.name}" if name else field.name
        if field.name in values:
            found[field.name] = _checked(values[field.name], hints[field.name], inner)
        elif _is_required(field):
            raise ValueError(f"{inner} is missing")
    return record_type(**found)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked(value: Any, hint: Any, name: str) -> Any:
    """Return a value from JSON as one of type ``hint``; raises ValueError if it is another."""
    base, optional = split_optional(hint)
    if base is Any or (optional and value is None):
        return value
    if dataclasses.is_dataclass(base):
        return make_record(base, value, name)
    kind, args = typing.get_origin(base) or base, typing.get_args(base)
    if kind is dict and isinstance(value, dict):
        element = args[1] if args else Any
        return {key: _checked(item, element, f"{name}.{key}") for key, item in value.items()}
    if kind in (list, tuple) and isinstance(value, list):
        if kind is list or Ellipsis in args:
            args = (args[0] if args else Any,) * len(value)
        if len(args) == len(value):
            items = zip(value, args, strict=True)
            return kind(_checked(item, arg, f"{name}[{i}]") for i, (item, arg) in enumerate(items))
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif type(value) is kind and kind not in (list, dict, float):
        return value
    raise ValueError(f"{name} is {value!r}")
