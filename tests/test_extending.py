"""docs/extending.md: its code adds a family, a sampler, a metric and a preset from outside."""

import json
import math
import re
import subprocess
import sys

import helpers
import pytest
import torch
from helpers import ROOT, fail, quiet_environment, succeed

import fid
import generate
import train
from configs.presets import PRESETS
from diffusion.config import SamplingConfig
from diffusion.precond import EDMPrecond
from diffusion.samplers import SAMPLERS, num_evaluations, sample
from metrics.metric import METRICS
from models import ARCHITECTURES
from training import family
from training.checkpoint import find_states, load_snapshot, load_state

MODULES = ["toy", "dpm_2", "distance_of_means", "wide_digits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The code of the page, as files."""
    folder = tmp_path_factory.mktemp("extensions")
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, flags=re.DOTALL)
    assert {name.removesuffix(".py") for name, _ in blocks} == {"extended", *MODULES}
    for name, code in blocks:
        (folder / name).write_text(code, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def extensions(folder):
    """Import them; the registries are as before at the end."""
    registries = (SAMPLERS, METRICS, ARCHITECTURES, family._FAMILIES, PRESETS.data)
    before = [dict(registry) for registry in registries]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name in MODULES:
            __import__(name)
        yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return helpers.toy_data(tmp_path_factory.getbasetemp())


TOY = ["--preset=toy", "--hidden-dim=64", "--batch=32", "--tick=0", "--label-drop=0.2"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run of 60 steps."""
    outdir = tmp_path_factory.mktemp("runs")
    return helpers.train_tiny(outdir, data, "--iters=60", "--snap=100", tiny=TOY).run_dir


def test_the_family_trains_through_the_public_command(runs):
    rows = [json.loads(line) for line in (runs / "stats.jsonl").read_text().splitlines()]
    losses = [row["Loss/loss"]["mean"] for row in rows]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert json.loads((runs / "training_options.json").read_text())["config"]["family"] == "toy"


def test_a_run_of_the_family_resumes_bit_for_bit(runs, data, tmp_path):
    part = helpers.train_tiny(tmp_path, data, "--iters=30", tiny=TOY).run_dir
    succeed(train, f"--resume={part}", "--iters=60")
    (resumed,), (whole,) = (
        [load_state(path) for path in find_states(folder)[:1]] for folder in (part, runs)
    )
    for name, value in whole["net"].items():
        assert torch.equal(value, resumed["net"][name]), name


def test_the_family_samples_and_scores(runs, data, tmp_path):
    network = sorted(runs.glob("network-snapshot-*.pkl"))[-1]
    snapshot = load_snapshot(network)
    assert snapshot.config.model.family == "toy-mlp"
    out = tmp_path / "out"
    options = ("--num=12", "--class=ring", "--cfg-scale=1.5", "--sampler=dpm_2")
    succeed(generate, f"--network={network}", f"--outdir={out}", *options)
    assert len(list(out.glob("*.png"))) == 12
    metrics = "--metrics=fd_pixels,distance_of_means"
    printed = succeed(fid, "calc", f"--network={network}", f"--ref={data}", metrics).output
    values = dict(re.findall(r"^(\w+) ([\d.]+) \(42 images\)", printed, flags=re.MULTILINE))
    mean = float(values["distance_of_means"])
    assert 0 < mean**2 <= float(values["fd_pixels"])  # Which is its first term.


def test_the_family_has_its_own_options_checks_and_description(data):
    plan = succeed(train, "--preset=toy", "--hidden-dim=48", "--dry-run").output
    assert re.search(r"hidden +2 layers of 48", plan)
    assert "at most 16" in fail(train, "--preset=toy", "--resolution=32", "--dry-run")
    assert "no such option" in fail(train, "--preset=toy", "--window=4", "--dry-run")


def test_the_sampler_is_of_second_order_and_counts_its_evaluations():
    std = 0.5  # Of Gaussian data, whose exact denoiser and ODE solution are known.
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return x * std**2 / (std**2 + sigma**2)

    def error(steps):
        config = SamplingConfig(sampler="dpm_2", steps=steps)
        calls.clear()
        x0 = sample(denoise, torch.ones(1, 1, 1, 1), config, EDMPrecond()).item()
        assert len(calls) == num_evaluations(config)
        return abs(x0 - 80 * std / math.hypot(std, 80))

    assert error(64) < error(32) / 3.5


def test_the_preset_is_another_ones_with_some_fields_replaced():
    plan = succeed(train, "--preset=wide-digits", "--dry-run").output
    assert "wide-digits" in plan
    assert PRESETS["wide-digits"].run.training == PRESETS["digits"].run.training


def test_the_launcher_runs_a_program_with_the_extensions(folder):
    done = subprocess.run(
        [sys.executable, str(folder / "extended.py"), "train.py", "--preset=toy", "--dry-run"],
        cwd=ROOT,
        env=quiet_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "2 layers of 256" in done.stdout
