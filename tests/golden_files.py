"""What the files in ``data/golden`` hold, and how commands are compared with them."""

import contextlib
import hashlib
import importlib
import json
import os
import re
from pathlib import Path
from unittest import mock

import click
from helpers import read_pixels, succeed

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
_MODULES = {"training.posthoc_ema": "commands.posthoc_ema"}
LOSSES = ("Loss/loss", "Loss/grad_norm")


def read_json(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def pixels_hash(path):
    """Return the SHA-256 of a picture's size and pixels, whatever way they are stored."""
    pixels = read_pixels(path).astype("uint8")
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def read_losses(run_dir):
    """Return the means of :data:`LOSSES` in every tick that a run folder has a record of."""
    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return [{name: row[name]["mean"] for name in LOSSES} for row in rows]


def offered_options(command_line):
    """Return the default of every option by its names, such as ``--batch --batch-size``.

    ``command_line`` is a module, such as ``fid``, a sub-command if it has some, and options. What
    is returned is what ``--help`` tells, apart from its words: a default is None if there is none
    or if it is told in words.
    """
    script, *args = command_line.split()
    with _help_of_commands() as helped:
        succeed(_module(script), *args, "--help")
    ((command, ctx),) = helped
    options = [param for param in command.get_params(ctx) if isinstance(param, click.Option)]
    return {" ".join(o.opts + o.secondary_opts): _default(o, ctx) for o in options}


def offered_commands(script):
    """Return the command lines of a module: itself, or all its sub-commands."""
    with _help_of_commands() as helped:
        succeed(_module(script), "--help")
    ((command, ctx),) = helped
    if not isinstance(command, click.Group):
        return [script]
    return [f"{script} {name}" for name in command.list_commands(ctx)]


def _module(script):
    """Return the module of a command that is called by the name ``script``."""
    return importlib.import_module(_MODULES.get(script, script))


@contextlib.contextmanager
def _help_of_commands():
    """Collect every command whose help is asked for, and the context, in place of the help."""
    helped = []

    def get_help(command, ctx):
        helped.append((command, ctx))
        return ""

    with mock.patch.object(click.Command, "get_help", get_help):
        yield helped


def _default(option, ctx):
    value = option.get_default(ctx)
    if isinstance(value, str | int | float):
        return str(value)
    record = option.get_help_record(ctx)
    shown = re.search(r"\[default: (\S+)\]$", record[1]) if record else None
    # A run knows the absolute path of its data, which was relative to its folder at first.
    return shown[1].removeprefix(f"{os.getcwd()}/") if shown else None
