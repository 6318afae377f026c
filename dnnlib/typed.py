"""Values read from JSON, checked against the types that they should have."""

import dataclasses
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dnnlib.config import field_types, has_type, split_optional
from dnnlib.errors import refusal

T = TypeVar("T")


def parse_json(content: str | bytes, **hooks: Any) -> Any:
    """Return the value of a JSON text; raises ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(content, **hooks)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dict; an ``object_pairs_hook`` that raises ValueError for repeated keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{twice!r} is listed twice")
    return found


@dataclasses.dataclass(frozen=True)
class JsonFormat:
    """A format of JSON files, each an object with the keys ``format`` and ``version``."""

    name: str  # The value of ``format``.
    version: int  # The highest version that can be read; the lowest is 1.
    command: str  # The command that writes such files.
    remedy: str  # What to do about a damaged file, as an imperative.

    def parse(self, content: bytes, file: Path | str, make: Callable[[dict[str, Any]], T]) -> T:
        """Return ``make(values)`` for the object that ``content``, read from ``file``, encodes.

        Raises ValueError if the file has another format or a newer version, or is damaged: not
        JSON, or values for which ``make`` raises ValueError or OverflowError.
        """
        try:
            values = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{file}: damaged, not valid JSON ({error}); {self.remedy}.") from None
        if not isinstance(values, dict) or values.get("format") != self.name:
            raise ValueError(f"{file}: not written by {self.command}.")
        version = values.get("version")
        if type(version) is not int or not 1 <= version <= self.version:
            problem = f"this version of the software reads up to {self.version}"
            problem = f"has format version {version}, but {problem}"
            raise refusal(file, but=problem, remedy="update the software")
        try:
            return make(values)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{file}: damaged ({error}); {self.remedy}.") from None


def typed(hint: Any, value: Any, name: str = "") -> Any:
    """Return a value read from JSON as the type ``hint``, after checking it at every depth.

    Args:
        hint: A dataclass (its defaults stand for missing keys, unknown keys are dropped), a
            TypedDict (unknown keys are kept, unchecked), a dict, a list, a tuple of fixed length,
            int, float, str or bool; any of these ``| None``.
        name: What error messages call the value.

    Raises ValueError that names the first mismatch, such as ``buckets[1].num is 'x'``.
    """
    hint, is_optional = split_optional(hint)
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if (value is None and is_optional) or _is_scalar(hint, value):
        return value
    if typing.is_typeddict(hint) or dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _typed_object(hint, value, name)
    elif origin is tuple and isinstance(value, list) and len(value) == len(inner):
        pairs = enumerate(zip(inner, value, strict=True))
        return tuple(typed(part, item, f"{name}[{i}]") for i, (part, item) in pairs)
    elif origin is list and isinstance(value, list):
        if all(_is_scalar(inner[0], item) for item in value):  # There may be millions.
            return value
        return [typed(inner[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {key: typed(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    raise ValueError(f"{name} is {value!r}")


def _is_scalar(hint: Any, value: Any) -> bool:
    return hint in (int, float, str, bool) and has_type(value, hint)


def _typed_object(hint: Any, value: dict[str, Any], name: str) -> Any:
    is_class = dataclasses.is_dataclass(hint)
    fields = {f.name: f.default for f in dataclasses.fields(hint)} if is_class else {}
    hints = field_types(hint)
    found = {}
    for key in fields or hints:
        path = f"{name}.{key}" if name else key
        if key not in value and fields.get(key, dataclasses.MISSING) is not dataclasses.MISSING:
            continue
        if key not in value:
            raise ValueError(f"{path} is missing")
        found[key] = typed(hints[key], value[key], path)
    return hint(**found) if is_class else {**value, **found}
