"""Reference curves: honest bands, files of them, and what is said of a run."""

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, call, fail, succeed, toy_data, train_tiny
from PIL import Image
from reference_runs import SIGMAS, write_run, write_seeds
from scipy import stats
from training_runs import read_rows

import fid
import train
from configs.presets import PRESETS
from configs.reference import known, reference_path
from training.reference_curves.bands import student_quantile, tolerance_band
from training.reference_curves.curves import Series, align, curves_of
from training.reference_curves.judge import judge
from training.reference_curves.make import leave_one_out
from training.reference_curves.reference import read_reference, write_reference
from training.reference_curves.settings import deciding_settings
from training.run_report.history import History
from training.runs import read_start
from training.telemetry import trim_rows
from training.watching.reference import ReferenceWatch, place_reference


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return tmp_path_factory.mktemp("seeds")


@pytest.fixture(scope="module")
def reference(seeds):
    """The file of five seeds."""
    runs = write_seeds(seeds / "runs")
    output = succeed(fid, "curves", *runs, f"--out={seeds / 'digits.json'}").output
    assert "6 curves of 5 runs of preset digits up to kimg 88.832" in output
    return seeds / "digits.json"


def check(reference, run_dir, *args):
    """Return the exit code of fid.py check, and what it prints on one line."""
    result = call(fid, "check", run_dir, f"--against={reference}", *args)
    assert not result.error, result.error
    return result.code, " ".join(result.output.split())


# Bands.


def test_quantiles_of_student_are_those_of_scipy():
    for tail in (0.2, 0.025, 1e-3, 1e-5):
        for dof in (2.0, 4.0, 7.3, 60.0):
            expected = stats.t.isf(tail, dof)
            assert student_quantile(tail, dof) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("correlation", "early"), [(0.0, 0.0), (0.6, 0.0), (0.3, 4.0)])
def test_a_band_holds_as_many_further_runs_as_it_says(correlation, early):
    rng, num, length = np.random.default_rng(0), 300, 20
    spread = 0.01 * (1 + early * np.exp(-np.arange(length) / 3))
    inside, factors = 0, []
    for _ in range(num):
        noise = rng.normal(size=(6, length))
        for place in range(1, length):
            noise[:, place] *= (1 - correlation**2) ** 0.5
            noise[:, place] += correlation * noise[:, place - 1]
        values = 2.5 * np.exp(noise * spread)
        band = tolerance_band(values[:5], 0.95, length)
        inside += bool(np.all((values[5] >= band.low) & (values[5] <= band.high)))
        factors.append(band.factor)
    assert inside / num >= 0.95 - 2 * (0.05 * 0.95 / num) ** 0.5
    assert np.median(factors) < 7  # A band of any width would hold them.


def test_a_band_is_wide_where_runs_vary_much():
    rng = np.random.default_rng(1)
    spread = np.repeat([0.1, 0.001], 15)
    band = tolerance_band(np.exp(rng.normal(size=(5, 30)) * spread), 0.99, 30)
    assert band.spread[3] > 10 * band.spread[-3]
    single = tolerance_band(np.exp(rng.normal(size=(5, 1))), 0.99, 1)
    assert single.factor == pytest.approx(stats.t.isf(0.005, 4) * 1.2**0.5, rel=1e-4)


# Curves at the points of another run.


def test_means_over_other_ticks_are_means_over_the_same_images():
    fine = np.arange(1.0, 41.0)
    own = Series("window", 0.0, fine, 3 + np.sin(fine / 7))
    found = align(own, "window", 0.0, np.arange(4.0, 60.0, 4.0))
    assert found.kimg.tolist() == np.arange(8.0, 41.0, 4.0).tolist()
    expected = own.values.reshape(10, 4).mean(axis=1)[1:]
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)
    coarse = Series("window", 0.0, np.arange(8.0, 41.0, 8.0), np.arange(5.0))
    found = align(coarse, "window", 0.0, np.arange(4.0, 60.0, 4.0))
    assert found.kimg.tolist() == [16, 24, 32, 40]
    assert found.values.tolist() == [1, 2, 3, 4]
    assert found.groups == [(2, 3), (4, 5), (6, 7), (8, 9)]
    same = align(own, "window", 0.0, fine[:30])
    assert same.values.tolist() == own.values[:30].tolist()


def test_curves_end_before_the_first_value_that_is_no_number(tmp_path):
    run_dir = write_run(tmp_path / "run", 0)
    rows = read_rows(run_dir / "stats.jsonl")
    rows[6]["Loss/loss"]["mean"] = None
    (run_dir / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = History(run_dir / "stats.jsonl")
    history.read()
    found = curves_of(run_dir, history)
    assert len(found["Loss/loss"].kimg) == 5
    assert len(found["Loss/grad_norm"].kimg) == 11
    assert found["fd_pixels/fd_pixels"].kimg.tolist() == pytest.approx([40.448, 80.768])
    assert "Loss/learning_rate" not in found


# The command.


def test_a_further_seed_is_normal_and_each_tick_size_of_it(reference, tmp_path):
    for number, how in enumerate(({}, dict(num_ticks=5), dict(tick=2000), dict(tick=15_900))):
        run_dir = write_run(tmp_path / f"run-{number}", 17 + number, **how)
        code, output = check(reference, run_dir)
        assert code == 0, output
        assert re.search(r"Normal: up to kimg [\d.]+, all \d curves lie in the bands", output)
    code, output = check(reference, write_run(tmp_path / "one-tick", 30, num_ticks=1))
    assert code == 1
    assert "Nothing to compare yet" in output


def test_a_curve_that_leaves_its_band_is_named_with_its_place_and_reasons(reference, tmp_path):
    def raised(name, kimg):
        return 1.3 if name == "Loss/loss" and kimg > 40 else 1.0

    run_dir = write_run(tmp_path / "raised", 20, change=raised)
    code, output = check(reference, run_dir, f"--out={tmp_path / 'check.png'}")
    assert code == 1
    assert "Not normal: the loss is above its band since kimg 40.4" in output
    assert "learning rate" in output
    assert Image.open(tmp_path / "check.png").size[0] > 1000

    def passing(name, kimg):
        return 0.5 if name == SIGMAS[0] and 30 < kimg < 50 else 1.0

    _, output = check(reference, write_run(tmp_path / "passing", 21, change=passing))
    assert "the loss at sigma below 0.11 was below its band from kimg 32.4 to 48.5" in output

    def worse(name, kimg):
        return 3.0 if name == "fd_pixels" else 1.0

    _, output = check(reference, write_run(tmp_path / "worse", 22, change=worse))
    assert "Not normal: fd_pixels is above its band since kimg 40.4" in output
    assert "sampling" in output


def test_runs_of_other_settings_or_data_are_not_compared_unless_asked(reference, tmp_path):
    run_dir = write_run(tmp_path / "lr", 23, lr=0.004, batch=64)
    code, output = check(reference, run_dir)
    assert code == 1
    assert "Not comparable" in output
    assert "training.lr is 0.004 here and 0.002 there: it learns at a different pace" in output
    assert "training.batch is 64 here and 128 there" in output
    assert "ormal:" not in output
    code, output = check(reference, run_dir, "--anyway")
    assert "Warning: training.lr" in output
    assert "Normal:" in output
    _, output = check(reference, write_run(tmp_path / "data", 24, data=dict(num_images=100)))
    assert "the data hold 100 images here and 1797 there" in output
    code, output = check(reference, write_run(tmp_path / "copy", 25, data=dict(content_hash="b")))
    assert code == 0
    assert "Note: the data are other files" in output
    _, output = check(reference, write_run(tmp_path / "ema", 26, ema_kimg=1))
    assert "Not compared: fd_pixels is of weights that are averaged differently" in output


def test_curves_need_runs_that_differ_in_their_seeds_alone(seeds, reference, tmp_path):
    runs = sorted((seeds / "runs").iterdir())
    out = f"--out={tmp_path / 'out.json'}"
    assert "at least 3 runs" in fail(fid, "curves", *runs[:2], out)
    other = write_run(tmp_path / "a" / "other", 9, lr=0.1)
    assert "training.lr is 0.1 here" in fail(fid, "curves", *runs, other, out)
    same = write_run(tmp_path / "b" / "same", 1)
    assert "have the same seed, 1" in fail(fid, "curves", *runs, same, out)
    ticks = write_run(tmp_path / "c" / "ticks", 9, tick=4000)
    assert "measured at different points" in fail(fid, "curves", *runs, ticks, out)
    assert not (tmp_path / "out.json").exists()


def test_files_are_read_as_they_were_written_and_damaged_ones_refused(reference, tmp_path):
    found = read_reference(reference)
    write_reference(tmp_path / "again.json", found)
    assert read_reference(tmp_path / "again.json") == found
    values = json.loads(reference.read_text())
    for key, value in (("kimg", [3.0]), ("low", -1), ("kind", "line")):
        broken = json.loads(json.dumps(values))
        column = broken["curves"]["Loss/loss"][key]
        broken["curves"]["Loss/loss"][key] = [value] * len(column) if key == "low" else value
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        message = fail(fid, "check", tmp_path, f"--against={tmp_path / 'broken.json'}")
        assert "broken.json: damaged" in message or "neither" in message


# What is in the repository.


@pytest.mark.parametrize("preset", known())
def test_the_file_of_a_preset_is_what_its_seeds_say(preset):
    found = read_reference(reference_path(preset))
    assert found.preset == preset
    assert found.published or found.curves
    if not found.curves:
        return
    assert found.num_runs >= 5
    columns = {
        name: [
            Series(curve.kind, curve.start, np.array(curve.kimg), np.array(own), curve.protocol)
            for own in curve.values
        ]
        for name, curve in found.curves.items()
    }
    assert dataclasses.asdict(found.left_out) == dataclasses.asdict(
        leave_one_out(columns, found.coverage)
    )
    for curve in found.curves.values():
        assert np.all(np.array(curve.values) >= np.array(curve.low))
        assert np.all(np.array(curve.values) <= np.array(curve.high))
    # A preset that changes needs new curves: the command is in the file.
    own = deciding_settings(PRESETS[preset].run)
    made_of_data = ("model.", "training.label_drop", "data.", "features.text_lengths")
    chosen = ("training.ema", "training.kimg", "training.precision")  # By the command.
    others = [name for name in own if not name.startswith((*made_of_data, *chosen))]
    assert {n: found.settings.get(n) for n in others} == {n: own[n] for n in others}
    assert reference_path(preset).stat().st_size < 100_000


def test_the_script_trains_every_seed_and_goes_on_after_a_stop(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").write_text(
        """#!/bin/sh
echo "$@" >> calls
case "$2" in --outdir=*) mkdir -p "${2#--outdir=}/00000-x"; test "$3" != "$BROKEN" ;; esac
"""
    )
    (programs / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    script = [
        ROOT / "examples/reference.sh",
        "mine.json",
        "3",
        "2",
        "--preset=digits",
        "--desc=a b",
    ]
    few = subprocess.run([*script[:2], "2", *script[3:]], cwd=tmp_path, env=env, timeout=30)
    assert few.returncode == 2
    assert not (tmp_path / "calls").exists()
    for broken, code in (("--seed=1", 1), ("", 0)):
        (tmp_path / "calls").unlink(missing_ok=True)
        found = subprocess.run(script, cwd=tmp_path, env={**env, "BROKEN": broken}, timeout=30)
        assert (found.returncode != 0) == bool(code)
        calls = (tmp_path / "calls").read_text().splitlines()
        for seed in range(3):
            folder = f"--outdir=mine.json.runs/seed-{seed}"
            own = f"train.py {folder} --seed={seed} --resume=auto --preset=digits --desc=a b"
            assert sum(own in call for call in calls) == 1
        runs = " ".join(f"mine.json.runs/seed-{seed}/00000-x" for seed in range(3))
        assert any(f"fid.py curves {runs} --out=mine.json" in call for call in calls) == (not code)


# A run that is compared as it trains.

LESS = ("--preset=digits", "--num-stages=1", "--base-dim=16", "--hidden-dim=16", "--time-dim=32")
LESS += ("--batch=32", "--sampler=euler", "--steps=1", "--kimg=1.3", "--tick=0.1", "--snap=4")


def test_a_run_that_leaves_its_bands_says_so_once(tmp_path, monkeypatch):
    data = toy_data(tmp_path)
    runs = [
        train_tiny(tmp_path / f"seed-{seed}", data, f"--seed={seed}", tiny=LESS).run_dir
        for seed in range(3)
    ]
    log = (runs[0] / "log.txt").read_text()
    assert re.search(r"Predicted after 10 steps: [\d,.]+ images/s, \d+s until the end", log)
    assert re.search(r"Predicted and actual: disk .*images/s .*duration", log)
    path = tmp_path / "tiny.json"
    succeed(fid, "curves", *runs, f"--out={path}")
    monkeypatch.setattr(train, "find_reference", lambda preset: read_reference(path))
    normal = train_tiny(tmp_path / "normal", data, "--seed=3", tiny=LESS)
    assert "Compared with the reference curves of 3 seeds up to kimg 1.3" in normal.output
    assert "its band" not in normal.output
    page = (normal.run_dir / "report.html").read_text()
    assert "Normal: up to kimg" in page
    assert "band of other seeds" in page

    # The loss is of half the data's scale from the second half on.
    from training.objective import Objective

    whole, steps = Objective.prepare, []

    def halved(self, *args):
        steps.append(1)
        images, cond = whole(self, *args)
        return (images * 0.05 if len(steps) > 20 else images), cond

    monkeypatch.setattr(Objective, "prepare", halved)
    wrong = train_tiny(tmp_path / "wrong", data, "--seed=4", tiny=LESS)
    rows = read_rows(wrong.run_dir / "watch.jsonl")
    (row,) = [row for row in rows if row["name"] == "outside_reference"]
    assert "below its band since kimg" in row["message"]
    assert wrong.output.count("below its band since") == 1
    assert ReferenceWatch(wrong.run_dir).findings() == []
    # Had it been killed before the next state, a resumed run would tell it again.
    trim_rows(wrong.run_dir, round(row["kimg"] * 1000))
    assert ReferenceWatch(wrong.run_dir).findings() == []
    (wrong.run_dir / "stats.jsonl").rename(tmp_path / "stats.jsonl")
    trim_rows(wrong.run_dir, round(row["kimg"] * 1000) - 32)
    assert "outside_reference" not in (wrong.run_dir / "watch.jsonl").read_text()
    (tmp_path / "stats.jsonl").rename(wrong.run_dir / "stats.jsonl")
    (again,) = ReferenceWatch(wrong.run_dir).findings()
    history = History(wrong.run_dir / "stats.jsonl")
    history.read()
    assert not judge(wrong.run_dir, history, read_reference(path)).is_normal
    assert again.name == row["name"]
    # Scores of weights that are averaged otherwise are left out of the copy.
    found = read_reference(path)
    points = dataclasses.replace(found.curves["Loss/loss"], kind="point")
    with_score = dataclasses.replace(found, curves=found.curves | {"a/a": points})
    config, origin = read_start(normal.run_dir, print)
    for ema_kimg, num in ((config.training.ema_kimg, 1), (3.0, 0)):
        changed = config.changed("training", ema_kimg=ema_kimg)
        assert "Compared" in place_reference(normal.run_dir, changed, origin, with_score)
        kept = read_reference(normal.run_dir / "reference.json").curves
        assert len(kept) == len(found.curves) + num
    # With other settings it cannot be compared.
    other = train_tiny(tmp_path / "other", data, "--lr=0.1", tiny=LESS)
    assert not Path(other.run_dir / "reference.json").exists()
