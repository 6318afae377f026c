"""Command-line options generated from configuration dataclasses.

A script gives :class:`ConfigCommand` a function that picks the base configuration from the raw
arguments (by ``--preset``, by a snapshot). The command offers an option per field, grouped by
dataclass, with that configuration's values as defaults.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from click.core import ParameterSource

from dnnlib import launcher
from dnnlib.config import (
    Config,
    accepted_values,
    field_types,
    option_name,
    split_optional,
    split_words,
)
from dnnlib.errors import NOTHING_NAMED, refusal
from dnnlib.text import number_text


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a nested configuration, as the command line sees it."""

    path: tuple[str, ...]  # Field names from the outer configuration inwards.
    field: dataclasses.Field
    hint: Any
    value: Any
    title: str

    @property
    def name(self) -> str:
        return option_name(self.field)

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.field.metadata["aliases"]

    @property
    def is_bool(self) -> bool:
        return split_optional(self.hint)[0] is bool


def settings(config: Config, path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Yield every exposed field of ``config`` and of the configurations nested in it."""
    hints = field_types(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            yield from settings(value, (*path, field.name))
        elif field.metadata.get("exposed", False):
            yield Setting((*path, field.name), field, hints[field.name], value, config.title)


def show_value(value: Any) -> str:
    """Return a field's value as typed on the command line, floats to six significant digits."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(show_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


_BOOLS = dict.fromkeys(("1", "true", "yes", "on"), True)
_BOOLS |= dict.fromkeys(("0", "false", "no", "off"), False)


class FieldType(click.ParamType):
    """Parses the text of an option into the type of its field; the field checks the range."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        base, self.optional = split_optional(setting.hint)
        base, self.words = split_words(base)
        self.is_tuple = typing.get_origin(base) is tuple
        self.element = typing.get_args(base)[0] if self.is_tuple else base
        choices = setting.field.metadata.get("choices")
        if choices and not self.is_tuple:
            self.name = "|".join(choices)
        else:
            names = {int: "int", float: "float", bool: "bool"}
            kind = names.get(self.element, "text") + (",..." if self.is_tuple else "")
            self.name = "|".join([kind, *self.words])

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{self.name}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        text = value.strip()
        if text.lower() == "none" and (self.optional or self.is_tuple):
            return None if self.optional else ()
        if text.lower() in self.words:
            return text.lower()
        try:
            if self.is_tuple:
                return tuple(map(self._parse, filter(None, map(str.strip, text.split(",")))))
            return self._parse(text)
        except (ValueError, KeyError, OverflowError):
            accepted = accepted_values(self.setting.field, self.setting.hint)
            return self.fail(f"got {value!r}; accepted: {accepted}.", param, ctx)

    def _parse(self, text: str) -> Any:
        if self.element is bool:
            return _BOOLS[text.lower()]
        if self.element is str and not text:
            raise ValueError(text)
        if self.element in (int, float):
            number_text(text)
        if self.element is int:
            with contextlib.suppress(ValueError):
                return int(text)
            number = float(text)  # 1e3 and 64.0 are integers too.
            if number != int(number):
                raise ValueError(text)
            return int(number)
        return self.element(text)


class ConfigOption(click.Option):
    """A click option for one :class:`Setting`."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        metadata = setting.field.metadata
        names = [f"--{name}" for name in (setting.name, *setting.aliases)]
        # A flag may stand bare or with a value: --cond, --cond=True, --no-cond.
        settings = dict(is_flag=False, flag_value="True") if setting.is_bool else {}
        settings["help"] = f"{metadata['help']} [default: {show_value(setting.value)}]"
        super().__init__([*names, "_".join(setting.path)], type=FieldType(setting), **settings)


class ConfigCommand(click.Command):
    """A command with one option per field of a configuration, passed to its callback as ``config``.

    Args:
        base: Maps the raw arguments to the base configuration, or to None to offer only the fixed
            options. Called once per invocation, before parsing.
        elsewhere: Maps the name of an unknown option (without dashes) and the base configuration
            to a sentence that says where the option exists, or to None.
        expand: Maps the raw arguments to those that are parsed; called before ``base``.
        examples: Runnable commands shown at the end of ``--help``.
    """

    def __init__(
        self,
        *args: Any,
        base: Callable[[Sequence[str]], Config | None],
        elsewhere: Callable[[str, Config | None], str | None] = lambda name, config: None,
        expand: Callable[[list[str]], list[str]] = list,
        examples: str = "",
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("context_settings", dict(help_option_names=["-h", "--help"]))
        super().__init__(*args, **kwargs)
        self._fixed = list(self.params)
        self._base, self._elsewhere, self._examples = base, elsewhere, examples
        self._expand = expand

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = ["--help" if arg == "-h" else _normalise(arg) for arg in args]
        with usage_errors(ctx):
            args = [_normalise(arg) for arg in self._expand(args)]
            config = self._base(args)
        options = [] if config is None else list(map(self.make_option, settings(config)))
        bools = {f"--no-{name[2:]}": name for o in options if o.setting.is_bool for name in o.opts}
        args = [f"{bools[arg]}=False" if arg in bools else arg for arg in args]
        names = [name for param in self._fixed + options for name in param.opts]
        assert len(names) == len(set(names)), f"option names clash: {sorted(names)}"
        self.params = self._fixed + options
        try:
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            where = self._elsewhere(error.option_name.lstrip("-"), config)
            raise error if where is None else click.UsageError(where, ctx) from error
        given = {}
        for param in options:
            value = ctx.params.pop(param.name, None)
            if ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
                given[param.setting.path] = value
        with usage_errors(ctx):
            ctx.params["config"] = None if config is None else self.settle(config, given)
        ctx.meta["given"] = {path[-1] for path in given}
        return rest

    def make_option(self, setting: Setting) -> ConfigOption:
        return ConfigOption(setting)

    def settle(self, config: Config, given: dict[tuple[str, ...], Any]) -> Any:
        return replace_settings(config, given)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            title = param.setting.title if isinstance(param, ConfigOption) else "Main options"
            if record := param.get_help_record(ctx):
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self._examples:
            formatter.write(f"\nExamples:\n{self._examples.rstrip()}\n")


def _normalise(arg: str) -> str:
    """Spell option names with hyphens: ``--batch_gpu=4`` means ``--batch-gpu=4``."""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def raw_value(args: Sequence[str], name: str) -> str | None:
    """Return the last value of ``--name`` in unparsed arguments, or None.

    Raises ValueError if that value is blank, as it is when a shell variable is unset.
    """
    value = None
    for position, arg in enumerate(args):
        if arg == f"--{name}" and position + 1 < len(args):
            value = args[position + 1]
        elif arg.startswith(f"--{name}="):
            value = arg.partition("=")[2]
    if value is not None and not value.strip():
        raise refusal(f"--{name}", repr(value), but=NOTHING_NAMED)
    return value


def replace_settings(config: Config, given: dict[tuple[str, ...], Any]) -> Any:
    """Return ``config`` with the fields at the paths in ``given`` replaced.

    A field that has to divide a replaced one becomes its nearest divisor, unless it is given too.
    Raises ValueError if a value is out of range, or if a given field has no effect with the values
    of the other fields (one declared ``harmless`` only causes a warning).
    """
    changes = {path[0]: value for path, value in given.items() if len(path) == 1}
    for name in dict.fromkeys(path[0] for path in given if len(path) > 1):
        inner = {path[1:]: value for path, value in given.items() if path[0] == name}
        changes[name] = replace_settings(getattr(config, name), inner)
    changes = _with_divisors(config, changes)
    result = dataclasses.replace(config, **changes)
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in changes:
        problem = without_effect(fields, name, result)
        if problem is not None and not fields[name].metadata["harmless"]:
            raise ValueError(problem)
        if problem is not None and launcher.number("RANK") == 0:
            click.echo(f"Warning: {problem}", err=True)
    return result


def _with_divisors(config: Config, changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``changes`` plus the fields that must divide a changed one, each adjusted to do so.

    Rank 0 prints every adjustment.
    """
    found = dict(changes)
    for field in dataclasses.fields(config):
        sibling, own = field.metadata.get("divides"), getattr(config, field.name)
        if sibling not in changes or field.name in changes or changes[sibling] % own == 0:
            continue
        # Of two equally near divisors, the smaller one.
        near = sorted(range(1, 2 * own), key=lambda number: (abs(number - own), number))
        found[field.name] = next(number for number in near if changes[sibling] % number == 0)
        if launcher.number("RANK") == 0:
            names = f"--{option_name(field)}", f"--{sibling.replace('_', '-')} {changes[sibling]}"
            text = f"{names[0]}: {own} does not divide {names[1]}; {found[field.name]} does and is"
            click.echo(f"{text} used.", err=True)
    return found


def without_effect(fields: dict[str, dataclasses.Field], name: str, config: Config) -> str | None:
    """Return why the other settings of its section leave ``name`` without effect, or None."""
    option, metadata = option_name(fields[name]), fields[name].metadata
    for other, values in metadata.get("requires", {}).items():
        if getattr(config, other) not in values:
            accepted = " or ".join(
                f"--{option_name(fields[other])}={show_value(value)}" for value in values
            )
            found = show_value(getattr(config, other))
            return f"--{option} has an effect only with {accepted}; this run has {found}."
    for other, values in metadata.get("unless", {}).items():
        if getattr(config, other) in values:
            found = f"--{option_name(fields[other])}={show_value(getattr(config, other))}"
            remedy = "change that value, or leave it out"
            return f"--{option} has no effect with {found}; {remedy}."
    return None


@contextlib.contextmanager
def usage_errors(ctx: click.Context | None = None) -> Iterator[None]:
    """Turn a ValueError into a UsageError, which shows how to get help and exits with 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error), ctx) from error


def is_given(name: str) -> bool:
    """Return whether a parameter of the running command was typed, not left at its default."""
    context = click.get_current_context()
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE
