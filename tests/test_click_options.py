"""Options declared as fields, and groups that load a command when it is used."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import click
import pytest
from helpers import ROOT

import benchmark
import dataset_tool
import demo
import fid
import generate
import import_weights
import train
from configs import PRESETS
from dnnlib.cli import settings
from dnnlib.click_options import param, takes
from dnnlib.config import split_optional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    source: str = param(required=True, help="Where from.")
    dest_dir: Path | None = param(help="Where to.")
    num: int = param(default=3, min=1, help="How many.")
    limit: int | None = param(help="At most.")
    share: float = param(default=0.5, max=1, max_open=True, help="Which part.")
    mode: str | None = param(choices=("a", "b"), help="Which way.")
    quiet: bool = param(help="Say nothing.")
    keep: bool = param("--keep/--drop", default=True, help="Keep it.")
    short: int = param("--short", "-s", default=0, help="Another name.")


def parse(*args):
    """Return the options that a command receives, and its other parameter."""

    @click.command()
    @click.argument("name")
    @takes(Options, "own")
    def command(name, own):
        return own, name

    return command.main(["x", *args], standalone_mode=False)


def test_a_command_receives_its_options_as_one_value():
    own, name = parse("--source=a")
    assert name == "x"
    assert own == Options(
        **dict(source="a", dest_dir=None, num=3, limit=None, share=0.5, mode=None, quiet=False),
        **dict(keep=True, short=0),
    )
    args = [
        "--dest-dir=b",
        "--num=2",
        "--limit=5",
        "--share=0.1",
        "--mode=b",
        "--quiet",
        "--drop",
        "-s",
        "7",
    ]
    own, _ = parse("--source=a", *args)
    assert own.dest_dir == Path("b")
    assert (own.num, own.limit, own.share, own.mode) == (2, 5, 0.1, "b")
    assert (own.quiet, own.keep, own.short) == (True, False, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Missing option '--source'"),
        ("--source=a --num=0", "0 is not in the range x>=1"),
        ("--source=a --limit=x", "'x' is not a valid integer"),
        ("--source=a --share=1", "1.0 is not in the range x<1"),
        ("--source=a --mode=c", "'c' is not one of 'a', 'b'"),
    ],
)
def test_values_of_the_wrong_type_or_range_are_refused(words, message):
    with pytest.raises(click.UsageError) as found:
        parse(*words.split())
    assert message in found.value.format_message()


def test_options_stand_in_the_order_of_the_fields_with_their_defaults():
    command = click.command()(takes(Options)(lambda options: None))
    names = [option.opts[0] for option in command.params]
    assert names[:4] == ["--source", "--dest-dir", "--num", "--limit"]
    text = " ".join(command.get_help(click.Context(command)).split())
    assert "How many. [default: 3; x>=1]" in text
    assert "Keep it. [default: keep]" in text
    assert "Say nothing. --keep" in text  # No default to speak of.


@pytest.mark.parametrize("script", [fid, dataset_tool], ids=lambda script: script.__name__)
def test_a_group_lists_what_each_of_its_commands_says_of_itself(script):
    context = click.Context(script.main)
    listed = script.main.get_help(context)
    for name, summary in script.main.summaries.items():
        assert f"{name} " in listed
        assert summary in " ".join(listed.split())
        assert script.main.get_command(context, name).help
    assert script.main.get_command(context, "nothing") is None


def test_examples_in_a_help_can_be_copied_and_no_summary_is_cut_off():
    for script in (benchmark, dataset_tool, fid):
        context = click.Context(script.main, info_name=f"{script.__name__}.py")
        listed = script.main.get_help(context)
        assert "..." not in listed.partition("Commands:")[2]
        names = script.main.list_commands(context)
        commands = [script.main.get_command(context, name) for name in names]
        texts = [command.get_help(click.Context(command)) for command in commands]
        for text in (listed, *texts):
            assert "Example: " not in text  # A paragraph, whose lines end anywhere.
            for line in text.splitlines():
                if line.strip().startswith(("python ", "torchrun ")):
                    assert "   " not in line.partition("#")[0].strip()  # As by a lost line break.


@pytest.mark.parametrize(
    "words",
    [
        *("fid --help", "fid compare --help", "fid conditions --help", "dataset_tool --help"),
        *(f"dataset_tool {name} --help" for name in dataset_tool.main.summaries),
    ],
)
def test_help_of_what_needs_no_pytorch_does_not_load_it(words):
    script, *args = words.split()
    code = f"""
import sys
import {script}
assert not any(name.startswith("commands.") for name in sys.modules)
{script}.main.main({args!r}, standalone_mode=False)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def options_of_every_command():
    """Yield the name of a command and each option that its dataclasses and arguments declare."""
    for script in (benchmark, dataset_tool, demo, fid, generate, import_weights, train):
        commands = {"": script.main}
        if isinstance(script.main, click.Group):
            context = click.Context(script.main)
            names = script.main.list_commands(context)
            commands = {name: script.main.get_command(context, name) for name in names}
        for name, command in commands.items():
            for option in command.params:
                yield f"{script.__name__} {name} {option.opts[0]}", option.type


def test_every_integer_of_a_command_has_bounds():
    unbounded = [
        name
        for name, kind in options_of_every_command()
        if isinstance(kind, click.types.IntParamType) and None in (kind.min, kind.max)
    ]
    assert unbounded == []


def test_every_integer_of_a_preset_has_bounds():
    unbounded = set()
    for preset in PRESETS.values():
        for setting in settings(preset.run):
            hint, _ = split_optional(setting.hint)
            numbers = typing.get_args(hint) or (hint,)
            bounds = [setting.field.metadata[name] for name in ("min", "max")]
            if int in numbers and None in bounds:
                unbounded.add(setting.name)
    assert unbounded == set()


@pytest.mark.parametrize("text", ["", " ", "٣", "1_0", "1e400", "0x10"])
def test_numbers_are_in_the_digits_that_people_type(text):
    for option in ("--num", "--share"):
        with pytest.raises(click.UsageError, match=r"not a valid|not in the range"):
            parse("--source=a", f"{option}={text}")


@pytest.mark.parametrize("option", ["--source", "--dest-dir"])
def test_a_blank_text_or_path_names_nothing(option):
    for text in ("", " ", "\t"):
        with pytest.raises(click.UsageError, match="names nothing; perhaps a variable is not set"):
            parse("--source=a", f"{option}={text}")
