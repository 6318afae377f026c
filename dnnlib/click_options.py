"""Options declared as dataclass fields, and command groups that import a command when it is used.

These options belong to a single command, such as paths and numbers of images; those that configure
a model or a run are fields of a :class:`dnnlib.config.Config`.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dnnlib.config import field_types, split_optional
from dnnlib.errors import NOTHING_NAMED
from dnnlib.text import number_text


def param(*names: str, default: Any = None, **settings: Any) -> Any:
    """Return a dataclass field that becomes an option of a command.

    The annotation of the field gives the type of the option; a ``bool`` becomes a flag.

    Args:
        names: Option names with their dashes; by default the field name with hyphens.
        default: Default value, shown by ``--help`` unless it is None or False.
        settings: ``help`` and other arguments of :class:`click.Option`. ``min`` and ``max`` bound a
            number (``max_open`` excludes the upper bound), ``choices`` lists the accepted strings,
            ``may_be_empty`` allows an empty string.
    """
    return dataclasses.field(default=default, metadata=dict(names=names, settings=settings))


def takes(kind: type, name: str = "options") -> Callable[[Callable], Callable]:
    """Return a decorator that gives a command an option for each :func:`param` of a dataclass.

    The command receives their values as one ``kind`` in its argument ``name``. The decorator goes
    below ``click.command``; options of decorators further up come first in ``--help``.
    """
    fields = [field for field in dataclasses.fields(kind) if "settings" in field.metadata]
    hints = field_types(kind)

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def with_options(**values: Any) -> Any:
            own = kind(**{field.name: values.pop(field.name) for field in fields})
            return function(**values, **{name: own})

        for field in reversed(fields):
            with_options = _click_option(field, hints[field.name])(with_options)
        return with_options

    return decorate


def overwrites(function: Callable) -> Callable:
    """Decorate a command with the option --overwrite, which :func:`output_rules` reads."""

    def note(ctx: click.Context, _: Any, value: bool) -> None:
        ctx.meta["overwrite"] = value

    text = "Replace an output file that this command did not make."
    settings = dict(is_flag=True, expose_value=False, callback=note, help=text)
    return click.option("--overwrite", **settings)(function)


def output_rules(name: str) -> dict[str, Any]:
    """Return the arguments of :func:`dnnlib.files.check_target` for the output option ``name``.

    They say whether --overwrite was given, and which paths the other options of the running command
    name.
    """
    ctx = click.get_current_context()
    named = {other: value for other, value in ctx.params.items() if isinstance(value, str | Path)}
    named.pop(name, None)
    return dict(overwrite=ctx.meta.get("overwrite", False), inputs=named)


def _click_option(field: dataclasses.Field, hint: Any) -> Callable[[Callable], Callable]:
    settings = dict(field.metadata["settings"])
    names = field.metadata["names"] or (f"--{field.name.replace('_', '-')}",)
    hint, _ = split_optional(hint)
    limits = {name: settings.pop(name) for name in ("min", "max", "max_open") if name in settings}
    may_be_empty = settings.pop("may_be_empty", False)
    if "choices" in settings:
        settings["type"] = click.Choice(list(settings.pop("choices")))
    elif hint in (int, float):
        settings["type"] = (IntType if hint is int else FloatType)(**limits)
    elif hint is Path:
        settings["type"] = PathType()
    elif hint is bool and "/" not in names[0]:
        settings["is_flag"] = True
    elif hint is not bool and not may_be_empty:
        settings["type"] = TextType()
    if field.default is not None:
        settings |= dict(default=field.default, show_default=field.default is not False)
    return click.option(*names, field.name, **settings)


class IntType(click.IntRange):
    """An integer in a range, written in the digits 0 to 9."""

    name = "integer"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> int:
        return super().convert(_number(self, value, param, ctx), param, ctx)


class FloatType(click.FloatRange):
    """A finite number in a range, written in the digits 0 to 9."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> float:
        number = super().convert(_number(self, value, param, ctx), param, ctx)
        return number if math.isfinite(number) else self.fail(f"got {value!r}.", param, ctx)


def _number(kind: click.ParamType, value: Any, param: Any, ctx: click.Context | None) -> Any:
    try:
        return number_text(value) if isinstance(value, str) else value
    except ValueError:
        return kind.fail(f"{value!r} is not a valid number.", param, ctx)


class TextType(click.types.StringParamType):
    """A text that is not blank, as it would be if it came from an unset shell variable."""

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> str:
        return super().convert(_named(self, value, param, ctx), param, ctx)


class PathType(click.Path):
    """A path that is not blank, as a pathlib.Path; takes the settings of :class:`click.Path`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> Path:
        return super().convert(_named(self, value, param, ctx), param, ctx)


def _named(kind: click.ParamType, value: Any, param: Any, ctx: click.Context | None) -> Any:
    if isinstance(value, str) and not value.strip():
        kind.fail(f"got {value!r}, but {NOTHING_NAMED}.", param, ctx)
    return value


class LazyGroup(click.Group):
    """A group that imports a command only when it is called or its help is shown.

    Args:
        package: Package with one module per command, named like the command, which holds it as
            ``command``.
        summaries: What each command does, by its name: one sentence for the help of the group.
    """

    def __init__(self, *args: Any, package: str, summaries: dict[str, str], **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", dict(help_option_names=["-h", "--help"]))
        super().__init__(*args, **kwargs)
        self._package, self.summaries = package, summaries

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return ["-h", "--help"]  # Not the context's: click keeps the first that it makes.

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.summaries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.summaries:
            return importlib.import_module(f"{self._package}.{cmd_name}").command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.summaries.items()))
