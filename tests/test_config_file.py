"""Options from a file: of any JSON or YAML, and of the runs of every preset."""

import json
import pickle
import sys
import tarfile
from pathlib import Path

import helpers
import numpy as np
import pytest
import yaml

import train
from commands import prepare
from commands.config_file import read_config_file
from configs.presets import PRESETS
from dnnlib.config import to_dict
from training import launch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plan(monkeypatch):
    """Call train.py and return the configuration that it would train."""
    seen = []
    monkeypatch.setattr(launch, "print_plan", lambda config, num_classes: seen.append(config))

    def call(*args):
        helpers.succeed(train, *args, "--dry-run")
        return seen.pop()

    return call


def written(path, content):
    text = yaml.safe_dump(content) if path.suffix in (".yaml", ".yml") else json.dumps(content)
    path.write_text(text)
    return f"--config={path}"


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_file_is_options_and_what_is_typed_counts_more(plan, tmp_path, suffix):
    content = dict(preset="cifar10", lr=1e-4, batch_gpu=16, cond=True, hflip=False)
    content["ema-stds"] = [0.05, 0.1]
    file = written(tmp_path / f"options{suffix}", content)
    typed = "--preset=cifar10 --lr=0.0001 --batch-gpu=16 --cond --no-hflip --ema-stds=0.05,0.1"
    assert plan(file) == plan(*typed.split())
    changed = plan(file, "--lr=0.5", "--cond=False")
    assert (changed.training.lr, changed.data.cond) == (0.5, False)
    assert changed.training.batch_gpu == 16
    assert plan("--lr=0.5", file, "--cond=False") == changed
    assert plan(file, "--preset=ffhq64", "--batch-gpu=8").preset == "ffhq64"


def test_numbers_as_yaml_reads_them_are_numbers(plan, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("preset: digits\nlr: 1e-4\n--kimg: 12\n")
    config = plan(f"--config={path}")
    assert (config.training.lr, config.training.kimg) == (1e-4, 12)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_options_of_a_run_give_its_configuration_again(plan, tmp_path, preset):
    config = plan(f"--preset={preset}", "--seed=7")
    file = written(tmp_path / "training_options.json", dict(config=to_dict(config), command="x"))
    assert plan(file) == config
    assert plan(file, "--seed=8") == config.changed("training", seed=8)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"preset": "digits", "lrr": 1}', "No such option '--lrr'"),
        ("a.json", '{"preset": "digits", "lr": "fast"}', "--lr"),
        ("a.json", '{"preset": "digits", "lr": -1}', "--lr"),
        ("a.json", '{"preset": "digits", "training": {"lr": 1}}', "without sections"),
        ("a.json", '{"preset": "digits", "config": "b.json"}', "names --config"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"kimg": 1, "lr": 1, "kimg": 2}', "not valid JSON ('kimg' is listed twice)"),
        ("a.yaml", "kimg: 1\nkimg: 2", "not valid YAML ('kimg' is listed twice)"),
        ("a.json", "[1]", "no option names with values"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "[" * 2000, "not valid YAML"),
        ("a.yaml", "!!map [1, 2]", "not valid YAML"),
        ("a.yaml", "!!python/object/apply:os.system [echo]", "not valid YAML"),
        ("a.json", '{"config": {"preset": "digits"}}', "--config"),
        ("a.json", '{"config": {"family": "image", "surprise": 1}}', "surprise"),
    ],
)
def test_a_file_that_does_not_fit_gets_a_sentence(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    assert message in helpers.fail(train, f"--config={path}", "--dry-run")


def test_yaml_without_its_package_gets_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("preset: digits")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ValueError, match="pip install pyyaml, or write JSON"):
        read_config_file(str(path))


# The folder of runs, and official archives.


def test_runs_go_to_the_folder_runs_by_default(tmp_path, monkeypatch):
    data = helpers.toy_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    helpers.succeed(train, f"--data={data}", *helpers.TINY, "--iters=1")
    (run_dir,) = (tmp_path / "runs").iterdir()
    # A run is continued where it lies.
    helpers.succeed(train, f"--resume={run_dir}", "--iters=2")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run_dir.name]


@pytest.fixture
def data_dir(tmp_path):
    """A folder with the official archive of CIFAR-10, of 20 images."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(1, 6):
        batch = {b"data": random.integers(0, 256, (4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(batch))
    names = {b"label_names": [f"c{i}".encode() for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return tmp_path


def test_an_official_archive_is_converted_when_that_is_asked_for(data_dir):
    options = [f"--data-dir={data_dir}", "--dataset=cifar10", f"--outdir={data_dir / 'runs'}"]
    message = helpers.fail(train, *options, *helpers.TINY)
    assert "cifar-10-python.tar.gz has to be converted first" in message
    assert "add --prepare, or run python dataset_tool.py convert --source=" in message
    args = [*options, *helpers.TINY, "--resolution=32", "--iters=1", "--cond"]
    output = helpers.succeed(train, *args, "--prepare").output
    assert f"Converting {data_dir / 'cifar-10-python.tar.gz'}" in output
    assert (data_dir / "cifar10.zip").is_file()
    assert "Converting" not in helpers.succeed(train, *args, "--prepare").output


def test_other_ranks_wait_for_the_first(tmp_path, monkeypatch):
    path, waits = tmp_path / "cifar10.zip", []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            path.touch()

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(prepare.time, "sleep", sleep)
    prepare.prepare_data(tmp_path, "cifar10", path, convert=True)
    assert len(waits) == 3


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("cifar-100-python.tar.gz", "cifar100"), ("cifar-10-python.tar.gz", "cifar10.zip")],
)
def test_archives_are_found_by_the_usual_names(tmp_path, name, dataset):
    (tmp_path / name).touch()
    (tmp_path / "other.tar.gz").touch()
    assert prepare.official_archive(tmp_path, dataset) == tmp_path / name
    assert prepare.official_archive(tmp_path, "mnist") is None


def test_an_archive_of_a_dataset_with_a_longer_name_is_another_one(tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").touch()
    assert prepare.official_archive(tmp_path, "cifar10") is None
    folder = tmp_path / "FashionMNIST"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").touch()
    assert prepare.official_archive(tmp_path, "mnist") is None
    assert prepare.official_archive(tmp_path, "fashion-mnist") == folder


def test_a_folder_that_holds_the_archive_is_not_the_data(tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    run = PRESETS["cifar10"].run
    assert prepare.with_named_data(run, (), tmp_path, "cifar10").data.data == str(folder)
    (folder / "cifar-10-python.tar.gz").touch()
    converted = prepare.with_named_data(run, (), tmp_path, "cifar10").data.data
    assert converted == str(tmp_path / "cifar10.zip")
