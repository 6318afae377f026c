"""Options that take several values, and the configurations that their combinations yield."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from dnnlib.cli import (
    ConfigCommand,
    ConfigOption,
    FieldType,
    Setting,
    show_value,
    without_effect,
)
from dnnlib.config import Config, option_name
from dnnlib.text import number_text

MAX_VALUES = 1_000  # In one range.
Path = tuple[str, str]  # Names of a section and of a field in it.


def expand_ranges(text: str) -> str:
    """Return a comma-separated list with each range START:STOP:STEP replaced by its numbers.

    ``1:2:0.5,4`` becomes ``1.0,1.5,2.0,4``; a range includes STOP if the steps reach it. Raises
    ValueError for a malformed range, or one without numbers or with more than MAX_VALUES.
    """
    return ",".join(itertools.chain.from_iterable(map(_numbers, text.split(","))))


def _numbers(text: str) -> Sequence[str]:
    if ":" not in text:
        return [text]
    try:
        start, stop, step = (Decimal(number_text(part.strip())) for part in text.split(":"))
        num = math.floor((stop - start) / step) + 1 if step > 0 else 0
    except (ValueError, InvalidOperation, OverflowError):
        num = 0
    if not 0 < num <= MAX_VALUES:
        raise ValueError(text)
    return [f"{start + step * index:f}" for index in range(num)]


class AxisType(FieldType):
    """Parses one or several values of a field into a tuple.

    Commas separate the values, or slashes if a value may contain commas itself.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        choices = setting.field.metadata.get("choices")
        self._separator = "/" if self.is_tuple or (self.element is str and not choices) else ","
        self._has_ranges = not self.is_tuple and self.element in (int, float)
        self.name += "/..." if self._separator == "/" else ",..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            text = expand_ranges(value) if self._has_ranges else value
        except ValueError as error:
            accepted = "START:STOP:STEP with a STEP above 0 and up to 1,000 values, such as 1:4:0.5"
            self.fail(f"got the range {str(error)!r}; accepted: {accepted}.", param, ctx)
        convert = super().convert
        values = [convert(part, param, ctx) for part in text.split(self._separator)]
        if len(set(values)) < len(values):
            self.fail(f"got {value!r}, which holds a value twice.", param, ctx)
        return tuple(values)


class AxisOption(ConfigOption):
    """An option of one setting that takes several values."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.type = AxisType(setting)


class AxesCommand(ConfigCommand):
    """A command whose callback receives the :class:`Axes` that were typed, as ``config``.

    Args:
        axes: Sections of the configuration whose options take several values.
    """

    def __init__(self, *args: Any, axes: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._axes = axes

    def make_option(self, setting: Setting) -> ConfigOption:
        return (
            AxisOption(setting) if setting.path[0] in self._axes else super().make_option(setting)
        )

    def settle(self, config: Config, given: dict[tuple[str, ...], Any]) -> Any:
        lists = {path: values for path, values in given.items() if path[0] in self._axes}
        others = {path: value for path, value in given.items() if path not in lists}
        return Axes(super().settle(config, others), lists)


@dataclasses.dataclass(frozen=True)
class Axes:
    """A base configuration, and the values that some of its settings take in turn."""

    base: Config
    values: Mapping[Path, Sequence[Any]]

    def configs(self) -> dict[Config, dict[str, Any]]:
        """Return every distinct combination, with the values of its axes by option name.

        A setting that has no effect in a combination keeps its base value there. Raises ValueError
        for values out of range, and for a setting that has no effect in any combination.
        """
        found: dict[Config, dict[str, Any]] = {}
        problems: dict[Path, str] = {}
        effective: set[Path] = set()
        for values in itertools.product(*self.values.values()):
            chosen = dict(zip(self.values, values, strict=True))
            while True:
                config = self._with(chosen)
                idle = _without_effect(config, chosen)
                if not idle:
                    break
                problems |= idle
                chosen = {path: value for path, value in chosen.items() if path not in idle}
            effective |= chosen.keys()
            own = {self.name(path): _at(config, path) for path in self.values}
            found.setdefault(config, own)
        for path, problem in problems.items():
            if path not in effective:
                raise ValueError(problem)
        return found

    def name(self, path: Path) -> str:
        """Return the option name of the setting at ``path``, without the dashes."""
        return option_name(_fields(getattr(self.base, path[0]))[path[1]])

    def _with(self, chosen: Mapping[Path, Any]) -> Config:
        sections: dict[str, dict[str, Any]] = {}
        for (section, name), value in chosen.items():
            sections.setdefault(section, {})[name] = value
        changed = {
            section: dataclasses.replace(getattr(self.base, section), **own)
            for section, own in sections.items()
        }
        return dataclasses.replace(self.base, **changed)


def _fields(section: Config) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(section)}


def _at(config: Config, path: Path) -> Any:
    return getattr(getattr(config, path[0]), path[1])


def _without_effect(config: Config, chosen: Mapping[Path, Any]) -> dict[Path, str]:
    """Return the chosen settings that have no effect, each with the sentence that says why."""
    found = {}
    for section, name in chosen:
        own = getattr(config, section)
        problem = without_effect(_fields(own), name, own)
        if problem is not None:
            found[section, name] = problem
    return found


def value_text(value: Any) -> str:
    """Return a value as typed on the command line, with every digit that it takes to restore it."""
    if isinstance(value, tuple):
        return ",".join(map(value_text, value)) or "none"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return show_value(value)


def options_of(config: Config, base: Config, sections: Sequence[str]) -> list[str]:
    """Return the options that turn the sections of ``base`` into those of ``config``, as typed."""
    options = []
    for section in sections:
        own, other = getattr(config, section), getattr(base, section)
        for name, field in _fields(own).items():
            changed = getattr(own, name) != getattr(other, name)
            if changed and without_effect(_fields(own), name, own) is None:
                options.append(f"--{option_name(field)}={value_text(getattr(own, name))}")
    return options
