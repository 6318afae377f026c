"""Every row of ``bad_invocations.txt``: a command line, how it must end, and what it must say."""

import importlib
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from bad_files import make_bad_files
from conftest import made_once
from helpers import call

TABLE = Path(__file__).with_name("bad_invocations.txt")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MODULES = {"posthoc_ema": "commands.posthoc_ema"}
_LIMIT_SEC = 20


def rows():
    """Yield exit code, word and command line of each row; headings and empty lines are none."""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            code, word, command = re.fullmatch(r"([12]) +('[^']*'|\S+) +(.*)", line).groups()
            yield int(code), word.strip("'"), command


@pytest.fixture(scope="session")
def bad_files(shared_dir):
    folder = shared_dir / "bad-files"
    with made_once(folder) as missing:
        if missing:
            make_bad_files(folder)
    return folder


def entries(folder):
    """Return every path below a folder with the time of its last change."""
    paths = (p for p in folder.rglob("*") if p.name != ".lock")
    return {
        path: path.lstat().st_mtime_ns for path in paths if path.is_symlink() or not path.is_dir()
    }


def parse(command):
    """Return the variables, the script and the arguments of a command line."""
    words = [os.fsdecode(word.encode().replace(b"<FF>", b"\xff")) for word in shlex.split(command)]
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words[0], words[1:]


def message_of(error):
    """Return the sentences that a failed command leaves on the screen, on one line.

    What click puts before them, the usage and how to get help, and warnings are left out.
    """
    lines = error.strip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Error: "))
    return " ".join(" ".join(lines[first:]).split())


def test_the_table_has_hundreds_of_rows_of_every_command():
    commands = [command for _, _, command in rows()]
    assert len(commands) == len(set(commands)) >= 300
    called = {" ".join(parse(command)[1:2] + tuple(parse(command)[2][:1])) for command in commands}
    for script in ("fid", "dataset_tool", "benchmark"):
        for name in importlib.import_module(script).main.summaries:
            assert f"{script} {name}" in called
    assert {parse(command)[1] for command in commands} >= {"train", "generate", "import_weights"}


@pytest.mark.parametrize(("code", "word", "command"), rows(), ids=lambda value: str(value)[:100])
def test_a_bad_invocation_ends_with_a_sentence(code, word, command, bad_files, monkeypatch):
    variables, script, args = parse(command)
    monkeypatch.chdir(bad_files)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    module = importlib.import_module(_MODULES.get(script, script))
    before = entries(bad_files)

    def give_up(*_):
        raise AssertionError(f"still running after {_LIMIT_SEC} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_LIMIT_SEC)
    try:
        result = call(module, *args)
    finally:
        signal.alarm(0)
    assert result.code == code, result.output + result.error
    message = message_of(result.error)
    assert word in message
    assert len(message) < 600
    assert message.count(". ") < 4
    assert message.endswith((".", "?", ")"))
    assert entries(bad_files) == before
