"""The demo: the whole chain in miniature, and how it judges the result."""

import importlib
import json
import re

import click
import helpers
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import demo
import demos.sets
from demos.digits import class_agreement
from demos.steps import execute


@pytest.fixture
def at_root(monkeypatch):
    """The commands of a demo start in the project's folder, without GPU."""
    monkeypatch.chdir(helpers.ROOT)
    for name, value in helpers.quiet_environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("at_root")
def test_the_chain_runs_from_files_to_a_score_and_says_when_the_result_is_poor(tmp_path):
    outdir = tmp_path / "out"
    smaller = "--kimg=0.5 --base-dim=16 --hidden-dim=16 --time-dim=32 --sampler=euler --steps=2"
    result = helpers.call(demo, f"--outdir={outdir}", "--", *smaller.split())
    printed = result.output
    assert result.code == 1, printed + result.error
    assert "NOT as expected" in printed
    for title in ("Convert", "Train", "Generate 10 images of each class", "Score", "Result"):
        assert f"\n== {title}" in printed
    # It says beforehand how long it takes, and afterwards what was measured and where to look.
    assert "minutes" in printed[: printed.index("\n== Convert")]
    score = json.loads((outdir / "score.json").read_text())["rows"][0]
    assert f"(b) fd_pixels: {score['value']:.4f} over 1797 images" in printed
    assert "(a) class agreement: " in printed
    grid = outdir / "samples.png"
    assert f"Pictures: {grid}" in printed
    assert Image.open(grid).size == (10 * 50 + 2, 2 * 15 + 10 * 50 + 2)
    (run_dir,) = (outdir / "runs").iterdir()
    assert (run_dir / "reals.png").is_file()
    assert list(run_dir.glob("fakes-*.png"))
    assert len(list(outdir.glob("checked-*/*.png"))) == 500
    assert len((run_dir / "metric-fd_pixels.jsonl").read_text().splitlines()) >= 1


def real_digits(shift):
    """Return 200 real digits; image ``seed`` is of class (seed + shift) % 10."""
    digits = load_digits()
    rows = [np.flatnonzero(digits.target == (seed + shift) % 10)[seed // 10] for seed in range(200)]
    return (digits.images[rows] * 255 / 16).round().astype(np.uint8)


def test_class_agreement_is_high_for_real_digits_and_low_for_wrong_ones():
    asked = np.arange(200) % 10
    assert class_agreement(real_digits(shift=0), asked) > 0.97
    assert class_agreement(real_digits(shift=1), asked) < 0.03


@pytest.mark.usefixtures("at_root")
def test_a_step_that_fails_stops_the_demo():
    with pytest.raises(ValueError, match=r"dataset_tool\.py failed with exit code 2"):
        execute("Convert", "dataset_tool.py", "convert", "--sauce=digits")


SCRIPTS = [path.stem for path in helpers.ROOT.glob("*.py") if path.stem != "setdiffit"]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_script_and_subcommand_explains_itself_by_an_example(name):
    script = importlib.import_module(name)
    is_group = isinstance(script.main, click.Group)
    commands = script.main.list_commands(click.Context(script.main)) if is_group else []
    assert commands or not is_group
    overview = helpers.succeed(script, "--help").output
    for words in [[], *([command] for command in commands)]:
        output = helpers.succeed(script, *words, "--help").output
        assert output == helpers.succeed(script, *words, "-h").output
        assert "Usage: " in output
        if words or not commands:
            assert f"python {' '.join([f'{name}.py', *words])} " in overview + output


def test_the_demo_of_sets_judges_seen_and_unseen_classes_by_a_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(demos.steps, "execute", helpers.execute_warm)
    monkeypatch.setattr(demos.sets, "SAMPLES_PER_CLASS", 8)
    monkeypatch.setattr(demos.sets, "MODES", {"lag": ("--encoder-depth=0",)})
    outdir = tmp_path / "out"
    smaller = ["--kimg=0.5", "--hidden-dim=16", "--num-heads=2", "--sampler=euler", "--steps=2"]
    result = helpers.call(demo, "--sets", f"--outdir={outdir}", "--", *smaller)
    assert result.code == 1, result.output + result.error
    assert "lag: seen classes 0 to 7" in result.output
    for name in ("8", "9"):
        # Ten supports of one image each; the control are those of all other classes.
        line = rf"lag: unseen class {name} [\d.]+% of 10, control [\d.]+% of 74, one-sided p "
        assert re.search(line, result.output)
    assert (outdir / "sets-lag-seen.png").is_file()
    assert (outdir / "sets-lag-unseen.png").is_file()
    assert "NOT as expected" in result.output
