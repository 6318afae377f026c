"""Frozen configuration dataclasses whose fields carry type, default, help and range.

One definition of a field serves the command line (:mod:`dnnlib.cli`), ``training_options.json``
and the metadata of a snapshot.
"""

import dataclasses
import difflib
import functools
import importlib
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

Affects = Literal["result", "speed"]
_RULES: dict[str, Any] = dict.fromkeys(["min", "max", "choices", "name", "divides"])
_RULES |= dict(aliases=(), requires={}, unless={}, exposed=True, harmless=False)


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    affects: Affects | Mapping[str, tuple[Any, ...]] = "result",
    **rules: Any,
) -> Any:
    """Return a dataclass field that describes itself.

    Args:
        default: Default value; without it the field is required.
        help: One line for ``--help``.
        affects: "result" if the value can change the result of a run, "speed" if it changes only
            how fast the run computes or what it reports. A mapping from sibling fields to values
            if it affects the result only while every sibling has one of its values. See
            :func:`identity`.
        rules: ``min``, ``max``: inclusive range of a number, or of every element of a tuple.
            ``choices``: accepted strings. ``name``: option name without the dashes, by default the
            field name with hyphens. ``aliases``: further option names. ``requires``: sibling fields
            and the values with which this field has an effect; giving the option while it has none
            is an error. ``unless``: the reverse. ``harmless``: True to warn instead of raising.
            ``divides``: a sibling that this field must divide; if only the sibling is given, this
            field becomes the nearest number that divides it.
            ``exposed``: False for a derived field (from the dataset, say) that has no option.
    """
    assert rules.keys() <= _RULES.keys(), f"unknown rules {rules.keys() - _RULES.keys()}"
    metadata = {**_RULES, **rules, "help": help, "affects": affects}
    return dataclasses.field(default=default, metadata=metadata)


def inherited(base: type["Config"], name: str, default: Any = dataclasses.MISSING, **meta) -> Any:
    """Return the field ``name`` of ``base`` with another default or other metadata.

    A subclass of ``base`` declares the field again with it, with the same type; ``meta`` holds the
    arguments of :func:`option` that differ.
    """
    field = next(field for field in dataclasses.fields(base) if field.name == name)
    if default is dataclasses.MISSING:
        default = field.default
    return dataclasses.field(default=default, metadata={**field.metadata, **meta})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of every configuration: frozen, keyword-only, validated on construction.

    A subclass that sets ``family`` can be restored by that name through :func:`from_dict` on any
    of its base classes, which lets a snapshot name its kind of model without naming code. If the
    base lists the name in ``family_modules``, its module is imported on demand. In a subclass that
    sets ``affects`` to "speed", no field affects the result of a run.
    """

    family: ClassVar[str | None] = None
    family_modules: ClassVar[dict[str, str]] = {}
    title: ClassVar[str] = "Options"
    affects: ClassVar[Affects] = "result"

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for field in dataclasses.fields(self):
            _check_value(self, field, hints[field.name])


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the types of a class's fields by name; their annotations are evaluated once."""
    return typing.get_type_hints(kind)


def option_name(field: dataclasses.Field) -> str:
    """Return the command-line name of a field, without the dashes."""
    return field.metadata.get("name") or field.name.replace("_", "-")


def accepted_values(field: dataclasses.Field, hint: Any) -> str:
    """Return a phrase for messages that says which values a field accepts."""
    meta = field.metadata
    base, optional = split_optional(hint)
    base, words = split_words(base)
    if meta.get("choices"):
        text = "one of " + ", ".join(meta["choices"])
    else:
        is_tuple = typing.get_origin(base) is tuple
        element = typing.get_args(base)[0] if is_tuple else base
        text = {int: "an integer", float: "a number", bool: "True or False", str: "text"}.get(
            element, getattr(element, "__name__", str(element))
        )
        if is_tuple:
            text = {"an integer": "integers", "a number": "numbers"}.get(text, text)
            elements = typing.get_args(base)
            count = "" if Ellipsis in elements else f"{len(elements)} "
            text = f"{count}{text} separated by commas"
        low, high = meta.get("min"), meta.get("max")
        if low is not None and high is not None:
            text += f" from {_bound(low)} to {_bound(high)}"
        elif low is not None:
            text += f" of at least {_bound(low)}"
        elif high is not None:
            text += f" of at most {_bound(high)}"
    others = [*words, *(["none"] if optional else [])]
    return ", ".join([text, *others[:-1], *(f"or {other}" for other in others[-1:])])


def _bound(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def split_optional(hint: Any) -> tuple[Any, bool]:
    """Return ``(T, True)`` for ``T | None`` and ``(hint, False)`` for anything else."""
    kinds = _alternatives(hint)
    others = [kind for kind in kinds if kind is not type(None)]
    return functools.reduce(operator.or_, others), len(others) < len(kinds)


def split_words(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """Return ``(T, words)`` for ``T | Literal[words]`` and ``(hint, ())`` for anything else."""
    kinds = _alternatives(hint)
    literals = [kind for kind in kinds if typing.get_origin(kind) is Literal]
    if len(literals) != 1 or len(kinds) != 2:
        return hint, ()
    (base,) = [kind for kind in kinds if kind is not literals[0]]
    return base, typing.get_args(literals[0])


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def has_type(value: Any, hint: Any) -> bool:
    """Return whether a value has a type, which is a class or a tuple type.

    An int passes as a float, a bool does not pass as a number, and a float must be finite.
    """
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if args[1:] == (Ellipsis,):
            return all(has_type(element, args[0]) for element in value)
        return len(value) == len(args) and all(map(has_type, value, args))
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def _check_value(config: Config, field: dataclasses.Field, hint: Any) -> None:
    value = getattr(config, field.name)
    base, optional = split_optional(hint)
    base, words = split_words(base)
    if (value is None and optional) or value in words:
        return
    choices, low, high = (field.metadata.get(name) for name in ("choices", "min", "max"))
    valid = has_type(value, base) and all(
        (not choices or element in choices)
        and (low is None or element >= low)
        and (high is None or element <= high)
        for element in (value if isinstance(value, tuple) else (value,))
    )
    if not valid:
        got = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
        text = f"--{option_name(field)}: got {got}; accepted: {accepted_values(field, hint)}."
        near = did_you_mean(value, choices) if choices and isinstance(value, str) else ""
        raise ValueError(text + near)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest of ``choices``, or an empty string.

    A choice that starts with ``name`` counts as nearest.
    """
    choices = list(choices)
    longer = [choice for choice in choices if name and choice.startswith(name)]
    near = longer or difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def unknown(what: str, name: str, choices: Iterable[str]) -> ValueError:
    """Return the ValueError for a name that is not among ``choices``; it suggests the nearest."""
    choices = list(choices)
    accepted = f"accepted: {', '.join(choices)}.{did_you_mean(name, choices)}"
    return ValueError(f"Unknown {what} {name!r}; {accepted}")


def to_dict(config: Config) -> dict[str, Any]:
    """Return a configuration as plain containers, ready for JSON or a snapshot."""
    result: dict[str, Any] = {} if config.family is None else {"family": config.family}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            value = to_dict(value)
        result[field.name] = list(value) if isinstance(value, tuple) else value
    return result


def identity(config: Config) -> dict[str, Any]:
    """Return the settings that decide the result of a run, as ``{"section.field": value}``.

    Two runs with equal identities compute the same result. The sections are the fields of
    ``config`` that are configurations themselves; its other fields are left out. Values are as in
    :func:`to_dict`, a section within a section is one value, and fields that affect only the speed
    are left out at every depth.
    """
    sections = [(name, value) for name, value in vars(config).items() if isinstance(value, Config)]
    return {f"{s}.{name}": value for s, own in sections for name, value in _deciding(own).items()}


def _deciding(config: Config) -> dict[str, Any]:
    """Return :func:`to_dict`'s result without the fields that affect only the speed."""
    if config.affects == "speed":
        return {}
    values = to_dict(config)
    for field in dataclasses.fields(config):
        value, affects = getattr(config, field.name), field.metadata.get("affects", "result")
        if isinstance(affects, Mapping):
            matters = all(getattr(config, name) in those for name, those in affects.items())
        else:
            matters = affects == "result"
        if not matters:
            del values[field.name]
        elif isinstance(value, Config):
            values[field.name] = _deciding(value)
    return values


def from_dict(config_type: type[Config], values: Mapping[str, Any]) -> Any:
    """Return the configuration that :func:`to_dict` turned into ``values``.

    Fields missing from ``values``, as in files of older versions, take their defaults. Raises
    ValueError for an unknown field or family, or for a value out of range.
    """
    values = dict(values)
    family = values.pop("family", None)
    if not isinstance(family, str | None):
        raise ValueError(f"The family of a {config_type.__name__} is {family!r}, not a name")
    if family is not None:
        config_type = family_class(config_type, family)
    hints = field_types(config_type)
    names = [field.name for field in dataclasses.fields(config_type)]
    for name, value in values.items():
        if name not in names:
            problem = f"Unknown setting {name!r} in a {config_type.__name__}"
            remedy = f"the file may come from a newer version.{did_you_mean(name, names)}"
            raise ValueError(f"{problem}; {remedy}")
        base, _ = split_optional(hints[name])
        is_section = isinstance(base, type) and issubclass(base, Config)
        if is_section and not isinstance(value, Mapping):
            raise ValueError(
                f"Setting {name!r} of a {config_type.__name__} is {value!r}, not an object"
            )
        if is_section:
            values[name] = from_dict(base, value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return config_type(**values)


def family_class(config_type: type[Config], family: str) -> type[Config]:
    """Return the subclass of ``config_type`` named ``family``, importing its module if needed.

    Raises ValueError for an unknown name.
    """
    modules = config_type.family_modules
    if family in modules:
        importlib.import_module(modules[family])
    families = _families(config_type)
    if family not in families:
        known = ", ".join(sorted({*families, *modules}))
        raise ValueError(f"Unknown family {family!r}; this version knows {known}.")
    return families[family]


def _families(config_type: type[Config]) -> dict[str, type[Config]]:
    """Return ``config_type`` and its subclasses that set ``family``, by that name."""
    found = {} if config_type.family is None else {config_type.family: config_type}
    for derived in config_type.__subclasses__():
        found |= _families(derived)
    return found
