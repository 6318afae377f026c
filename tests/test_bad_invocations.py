"""Every row of ``bad_invocations.txt``: a command line, how it must end, and what it must say."""

import contextlib
import importlib
import os
import re
import shlex
import signal
from pathlib import Path

import click
import pytest
from bad_files import make_bad_files
from helpers import ROOT, call
from sharing import made_once

from dnnlib import addresses

TABLE = Path(__file__).with_name("bad_invocations.txt")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MODULES = {"posthoc_ema": "commands.posthoc_ema"}
_LIMIT_SEC = 20
_MAX_LENGTH = 900  # Of two sentences, one of which may list all metrics.


def read_table():
    """Return the rows below each heading: exit code, word and command line."""
    sections = {}
    for line in TABLE.read_text(encoding="utf-8").split("\n\n", 1)[1].splitlines():
        if line.startswith("#"):
            rows = sections.setdefault(line.strip("# "), [])
        elif line:
            code, word, command = re.fullmatch(r"([12])  ('[^']*'|\S+) +(.*)", line).groups()
            rows.append((int(code), word.strip("'"), command))
    return sections


SECTIONS = read_table()


@pytest.fixture(scope="session")
def bad_files(shared_dir):
    folder = shared_dir / "bad-files"
    with made_once(folder) as missing:
        if missing:
            make_bad_files(folder)
    return folder


def entries(folder):
    """Return the files below a folder with the time of their last change; locks do not count."""
    found = {}
    for top, folders, names in os.walk(folder):
        found[top] = sorted(folders)
        paths = (os.path.join(top, name) for name in names if name != ".lock")
        found |= {path: os.lstat(path).st_mtime_ns for path in paths}
    return found


def parse(command):
    """Return the variables, the script and the arguments of a command line."""
    words = [os.fsdecode(word.encode().replace(b"<FF>", b"\xff")) for word in shlex.split(command)]
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words[0], words[1:]


@contextlib.contextmanager
def time_limit():
    def give_up(*_):
        raise AssertionError(f"still running after {_LIMIT_SEC} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_LIMIT_SEC)
    try:
        yield
    finally:
        signal.alarm(0)


def shortcoming(code, word, command):
    """Return how a command line ends otherwise than its row says; None if it does not."""
    variables, script, args = parse(command)
    with pytest.MonkeyPatch.context() as patch, time_limit():
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            result = call(importlib.import_module(_MODULES.get(script, script)), *args)
        except Exception as error:
            return f"it raises {error!r}"
    # What click puts before it, how the command is used and how to get help, does not count.
    found = re.search(r"^Error: (.*)", result.error, re.MULTILINE | re.DOTALL)
    message = found[1] if found else ""
    if result.code != code:
        return f"it exits with {result.code} and {message!r}"
    if word not in message or len(message) > _MAX_LENGTH or "Traceback" in result.error:
        return f"it says {result.error!r}"
    return None


def test_the_table_has_hundreds_of_rows_of_every_command():
    commands = [command for rows in SECTIONS.values() for *_, command in rows]
    assert len(commands) == len(set(commands)) >= 300
    called = {parse(command)[1] for command in commands}
    programs = {path.stem for path in ROOT.glob("*.py")} - {"setdiffit"}
    assert called == programs | {"posthoc_ema"}
    for script in ("fid", "dataset_tool", "benchmark"):
        main = importlib.import_module(script).main
        for name in main.list_commands(click.Context(main)):
            assert f"{script}.py {name}" in SECTIONS


@pytest.mark.parametrize("section", SECTIONS)
def test_bad_invocations_end_with_a_sentence_and_change_nothing(section, bad_files, monkeypatch):
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(addresses, "_WAITS_SEC", ())
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    problems, before = [], entries(bad_files)
    for row in SECTIONS[section]:
        problem, after = shortcoming(*row), entries(bad_files)
        if problem is None and after != before:
            changed = [path for path in after | before if after.get(path) != before.get(path)]
            problem = f"it changes {', '.join(changed)}"
        if problem is not None:
            problems.append(f"{row[2]}: {problem}")
        before = after
    assert not problems, "\n".join(problems)
