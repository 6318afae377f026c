"""This code against ``data/golden``: what earlier code made of the same commands.

``data/make_golden.py`` tells what is there. Images may differ by the last of 255 levels and losses
by 1e-5, which is what another build of PyTorch may change.
"""

import shutil
import tarfile

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, offered_options, pixels_hash, read_json, read_losses
from helpers import read_pixels, succeed

import generate
import train

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

SAMPLES = read_json("golden.json")["samples"]
RESUMED = read_json("golden.json")["resumed"]
OPTIONS = read_json("options.json")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    shutil.copytree(GOLDEN / "samples", folder / "samples")
    return folder


@pytest.fixture(autouse=True)
def golden(unpacked, monkeypatch):
    """The folder with the files that earlier code made, in which relative paths are theirs."""
    monkeypatch.chdir(unpacked)
    return unpacked


def test_every_kind_of_model_has_files():
    kinds = {"image", "latent", "sets", "features"}
    assert RESUMED.keys() == kinds
    assert {name.partition("-")[0] for name in SAMPLES} == kinds


@pytest.mark.parametrize("name", SAMPLES)
def test_stored_pictures_are_those_that_were_made(name):
    for file, expected in SAMPLES[name]["pixels"].items():
        assert pixels_hash(GOLDEN / "samples" / name / file) == expected


@pytest.mark.parametrize("name", SAMPLES)
def test_snapshots_of_before_give_the_images_of_before(name, tmp_path):
    succeed(generate, *SAMPLES[name]["args"], f"--outdir={tmp_path}")
    files = SAMPLES[name]["pixels"]
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")} == {*files}
    for file in files:
        difference = read_pixels(tmp_path / file) - read_pixels(GOLDEN / "samples" / name / file)
        assert np.abs(difference).max() <= 1, file


@pytest.mark.parametrize("kind", RESUMED)
def test_states_of_before_go_on_with_the_losses_of_before(kind, golden, tmp_path):
    run_dir = shutil.copytree(golden / "runs" / kind, tmp_path / kind)
    succeed(train, f"--resume={run_dir}", *RESUMED[kind]["args"])
    expected = RESUMED[kind]["losses"]
    torch.testing.assert_close(read_losses(run_dir), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("command_line", OPTIONS)
def test_no_option_of_before_is_gone_and_no_default_is_another(command_line):
    """An option that has another name now must still be known by those that it had."""
    found = {}
    for names, default in offered_options(command_line).items():
        found.update(dict.fromkeys(names.split(), (names, default)))
    gone = [names for names in OPTIONS[command_line] if not found.keys() >= {*names.split()}]
    assert gone == []
    for names, default in OPTIONS[command_line].items():
        assert len({found[name] for name in names.split()}) == 1, f"{names} is several options"
        assert default in (None, found[names.split()[0]][1]), names
