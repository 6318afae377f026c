"""Launchers: what their variables say, errors that they repeat, and processes that outlive them."""

import ipaddress
import json
import os
import signal
import subprocess
import sys
from unittest import mock

import click
import pytest
from helpers import fail
from training_runs import ROOT

import train as train_script
from dnnlib import launcher, program
from dnnlib.progress import progress

ALL = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SET = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="here", MASTER_PORT="1", LOCAL_RANK="1")


@pytest.fixture
def variables(monkeypatch):
    """Sets the variables of a launcher, and no others."""

    def replace(values):
        for name in (*ALL, *launcher._SCHEDULERS):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return replace


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2: is set in the environment, but RANK, MASTER_ADDR"),
        (dict(SET, MASTER_PORT=""), "but MASTER_PORT is not; start with torchrun"),
        (dict(WORLD_SIZE=""), "WORLD_SIZE: got ''; accepted: a number"),
        (dict(SET, RANK="first"), "RANK: got 'first'"),
        (dict(SET, RANK="2"), "RANK: got 2; accepted: 0 to 1"),
        (dict(SLURM_STEP_NUM_TASKS="4"), "srun started 4 processes, which would each do"),
        (dict(OMPI_COMM_WORLD_SIZE="2"), "mpirun started 2 processes"),
    ],
)
def test_variables_without_their_launcher_are_told(variables, values, problem):
    variables(values)
    with pytest.raises(ValueError, match=":") as caught:
        launcher.joins_others()
    assert problem in str(caught.value)


def test_complete_variables_and_none_are_not_in_doubt(variables):
    variables({})
    assert not launcher.joins_others()
    variables(dict(WORLD_SIZE="1"))
    assert not launcher.joins_others()
    variables(dict(WORLD_SIZE="1", SLURM_STEP_NUM_TASKS="4"))
    assert not launcher.joins_others()
    variables(dict(SET, SLURM_STEP_NUM_TASKS="2"))
    assert launcher.joins_others()


def test_torchrun_gets_the_sentence_of_an_error(monkeypatch, tmp_path):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    sentence = fail(train_script, "--preset=digits", f"--outdir={tmp_path}")
    assert json.loads(path.read_text())["message"] in sentence


def test_signatures_of_addresses_are_not_shown(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])

    def fail():
        raise ValueError("--data: http://a.b/c.zip?sig=x%2Fy&t=1:2: is broken; see http://d/?e=f.")

    with pytest.raises(SystemExit):
        program.run(click.command(fail))
    shown = "Error: --data: http://a.b/c.zip: is broken; see http://d/."
    assert capsys.readouterr().err.strip() == shown


def test_an_error_of_a_library_keeps_its_traceback_in_every_folder(monkeypatch):
    @click.command()
    def command():
        ipaddress.ip_address("nowhere")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ValueError, match="nowhere"):
        program.run(command)


ORPHAN = "import dnnlib.launcher; print('on', flush=True); import time; time.sleep(60)"
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_in_its_start_up_ends_with_its_launcher():
    settings = dict(cwd=ROOT, env={**os.environ, "TORCHELASTIC_RUN_ID": "test"}, text=True)
    command = [sys.executable, "-c", LAUNCHER, ORPHAN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, **settings) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ""  # At the end of the last process that holds the pipe.

    # The launcher has gone before the process looks: what has it now is no Python.
    shell = f'{sys.executable} -c "{ORPHAN}"; echo $?'
    found = subprocess.run(["sh", "-c", shell], capture_output=True, check=True, **settings)
    assert found.stdout == "1\n"


SLOW_WRITE = """
import click, signal, sys, time
from dnnlib.program import run
from dnnlib.files import atomic_write

@click.command()
@click.argument("path")
def command(path):
    with atomic_write(path) as file:
        file.write(b"half")
        print("writing", flush=True)
        time.sleep(30)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # A shell in the background may have it ignored.
run(command)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_command_at_once_and_without_half_written_files(tmp_path, number):
    command = [sys.executable, "-c", SLOW_WRITE, str(tmp_path / "target")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=2)
    assert error == f"Stopped by {number.name}.\n"
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), "Not enough memory; use a smaller batch"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...\nmore"),
            "Not enough memory for 20.00 GiB; use",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
            ),
            "Not enough memory for 8 bytes; use",
        ),
    ],
)
def test_want_of_memory_is_one_sentence(error, wanted, capsys):
    @click.command()
    def command():
        raise error

    with pytest.raises(SystemExit) as stop, mock.patch.object(sys, "argv", ["x"]):
        program.run(command)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith(f"Error: {wanted}")
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_was_closed_takes_what_nobody_reads(monkeypatch, name):
    @click.command()
    def command():
        click.echo("to nobody")
        with progress(total=1, label="Working") as bar:
            bar.update(1)

    monkeypatch.setattr(sys, "argv", ["tool.py"])
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        program.run(command)
    assert ended.value.code == 0


def test_an_error_of_the_disk_that_has_a_sentence_alone_is_told_by_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool.py"])

    @click.command()
    def command():
        raise OSError("The process that writes was killed")

    with pytest.raises(SystemExit) as ended:
        program.run(command)
    assert (ended.value.code, capsys.readouterr().err) == (
        1,
        "Error: The process that writes was killed.\n",
    )


@pytest.mark.parametrize("end", [" 7) is killed by signal: Killed. ", "(s) 7) exited unexpectedly"])
def test_a_lost_process_of_a_loader_is_a_sentence_by_whichever_way_it_is_noticed(
    capsys, monkeypatch, end
):
    monkeypatch.setattr(sys, "argv", ["tool.py"])

    @click.command()
    def command():
        raise RuntimeError(f"DataLoader worker (pid{end}")

    with pytest.raises(SystemExit) as ended:
        program.run(command)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("Error: A process that loads data was killed")
