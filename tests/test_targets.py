"""Outputs never replace or adopt what others made, and a full disk is one sentence."""

import errno
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import fail, succeed, trained_run, trained_snapshot
from PIL import Image
from training_runs import ROOT

import export
import generate
from data.features.buckets import Bucket
from dnnlib.files import atomic_write, check_target
from sampling.requests import encode_requests
from training.asked import Asked


def test_an_export_replaces_no_files_of_others(tmp_path):
    run = trained_run(tmp_path)
    dest = tmp_path / "mine"
    dest.mkdir()
    (dest / "README.md").write_text("mine")
    assert "README.md" in fail(export, f"--network={run}", f"--dest={dest}")
    assert (dest / "README.md").read_text() == "mine"
    succeed(export, f"--network={run}", f"--dest={dest}", "--overwrite")
    (dest / "config.json").unlink()  # As a kill leaves it.
    succeed(export, f"--network={run}", f"--dest={dest}")
    assert "--network" in fail(export, f"--network={dest}", f"--dest={dest}")


def test_pictures_of_others_do_not_pass_for_generated_ones(tmp_path):
    network = trained_snapshot(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "000001.png").write_bytes(b"mine")
    message = fail(generate, f"--network={network}", f"--outdir={out}", "--seeds=0-2")
    assert "000001.png is there, and no generation.json records how it was made" in message


def test_a_picture_of_another_size_is_named_where_a_grid_is_asked_for(tmp_path):
    command = (f"--network={trained_snapshot(tmp_path)}", "--seeds=0-2", "--steps=1")
    command = (*command, f"--outdir={tmp_path / 'out'}")
    succeed(generate, *command)
    Image.new("L", (5, 7)).save(tmp_path / "out" / "000001.png")
    message = fail(generate, *command, f"--grid={tmp_path / 'grid.png'}")
    assert "image 1 of 3, counted from 0, is 1x7x5, and most are" in message


def test_a_disk_that_fills_under_torch_save_is_an_error_of_the_file(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            pass

    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "x.pkl"):
        torch.save({"a": torch.zeros(100_000)}, Full())
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename.endswith("x.pkl")
    assert not list(tmp_path.iterdir())


def test_a_program_that_no_disk_holds_is_an_error_of_the_file(tmp_path):
    """As it is, PyTorch's writer ends the process."""
    code = (
        "import sys, torch; from pathlib import Path; from sampling import traced\n"
        "class Full:\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *exc): pass\n"
        "    def write(self, data): raise OSError(28, 'No space left on device')\n"
        "    def flush(self): pass\n"
        "traced.atomic_write = lambda path: Full()\n"
        "program = torch.export.export(torch.nn.Linear(300, 300), (torch.zeros(1, 300),))\n"
        "try: traced.save_program(program, Path('x.pt2'), {})\n"
        "except OSError: print('told')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "told\n"), found.stderr


def test_standard_output_is_no_target_even_where_it_is_a_file(tmp_path):
    link, file = tmp_path / "link", tmp_path / "file"
    file.touch()
    link.symlink_to("/proc/self/fd/1")
    with open(file, "w") as stream:
        stdout, number = os.dup(1), stream.fileno()
        os.dup2(number, 1)
        try:
            for path in (link, "/dev/stdout"):
                with pytest.raises(ValueError, match="is a pipe, socket, device, or a link"):
                    check_target("--out", path, overwrite=True)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
    # Other links, and files in memory, are files.
    link.unlink()
    link.symlink_to(file)
    check_target("--out", link, overwrite=True)
    if os.access("/dev/shm", os.W_OK):
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as there:
            check_target("--out", there.name, overwrite=True)


def test_a_prompt_that_is_no_text_is_refused():
    config = SimpleNamespace(model=None, features=None)
    asked = Asked(prompt=("a house", "\udcff"))
    with (
        mock.patch("sampling.requests.choose_bucket", return_value=Bucket(8, 8)),
        pytest.raises(ValueError, match=r"--prompt: got '\\udcff'; accepted: text in UTF-8"),
    ):
        encode_requests(SimpleNamespace(config=config), torch.device("cpu"), asked)
