"""What a run is warned of: each watcher sees its fault, and nothing else alarms."""

import dataclasses
import math
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from faults import training as faults
from helpers import TINY_SETS, toy_data, train_on, train_tiny
from training_runs import only_run, read_rows

from configs.presets import PRESETS
from models import layers, network
from torch_utils import rng
from torch_utils.parameters import Parameters
from training import ema, loop, optimizer
from training.ema import EMA
from training.optimizer import GuardedAdam
from training.run_report.files import read_run
from training.telemetry import trim_rows
from training.watching.averages import AverageWatcher
from training.watching.context import ContextWatcher
from training.watching.probe import _differs_from_last
from training.watching.samples import compared, findings_of
from training.watching.tick import Tick
from training.watching.updates import UpdateMeter
from training.watching.watch import Judge, watchers_of

pytestmark = pytest.mark.usefixtures("one_cpu_thread")
STEPS = ("--iters=61", "--log-interval=20", "--snap=100", "--board=none")
# What faults patch, to be put back.
PATCHED = (
    (loop, "learning_rate"),
    (loop, "ema_beta"),
    (loop, "build_network"),
    (ema.EMA, "update"),
    (optimizer.GuardedAdam, "step"),
    (layers, "attend"),
    (rng.SeededNoise, "__init__"),
    (network.Network, "forward"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("watching")


def plant(monkeypatch, name):
    """Plant a fault until the test ends; return the finding that has to name it."""
    for owner, attribute in PATCHED:
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))
    (fault,) = (own for own in faults.FAULTS if own.name == name)
    fault.plant()
    return fault.expects


def findings(run_dir):
    path = run_dir / "watch.jsonl"
    return read_rows(path) if path.exists() else []


@pytest.mark.parametrize(
    "name", ["average_stands_still", "rounded_weights", "dead_layer", "one_context"]
)
def test_a_planted_fault_is_named_in_the_run_folder_the_log_and_once_in_the_report(
    base, tmp_path, monkeypatch, name
):
    expected = plant(monkeypatch, name)
    options = ("--cond", "--batch=8", *STEPS)
    run_dir = train_tiny(tmp_path, toy_data(base), *options).run_dir
    found = {row["name"]: row for row in findings(run_dir)}
    assert expected in found
    row = found[expected]
    assert row["kimg"] <= 0.008 * 61 + 1e-9
    line = f"Warning: {row['message']}: {row['remedy']}."
    assert (run_dir / "log.txt").read_text().count(line) == 1
    shown = [(n.name, num) for n, num in read_run(run_dir).notices if n.level == "warning"]
    assert shown.count((expected, 1)) == 1
    assert len(shown) == len(found)


def test_a_clean_run_is_silent_and_records_what_the_watchers_judge(base, tmp_path):
    run_dir = train_tiny(tmp_path, toy_data(base), "--cond", "--batch=4", *STEPS).run_dir
    assert findings(run_dir) == []
    first, *others = read_rows(run_dir / "stats.jsonl")
    assert not any(name.startswith("Watch/") for name in first)  # After one step.
    for row in others:
        mean = {name: stat["mean"] for name, stat in row.items() if name.startswith("Watch/")}
        assert mean["Watch/average_step"] == pytest.approx(1, abs=1e-3)
        assert 0 < mean["Watch/update_ratio"] < 1
        assert mean["Watch/rounded_weights"] < 0.1
        assert mean["Watch/activation/encoder.0.0"] > 0
        assert mean["Watch/logit/encoder.0.0"] > 0
        assert row["Watch/loss"]["num"] == 4
        assert row["Watch/context_gap"]["num"] <= 4  # Where the class is another.


def test_a_watch_changes_nothing_about_the_training(base, tmp_path):
    runs = []
    for option in ("--watch", "--no-watch"):
        args = ("--cond", "--batch=4", "--dropout=0.1", "--augment=0.2", *STEPS, option)
        runs.append(train_tiny(tmp_path / option, toy_data(base), *args).run_dir)
    with_watch, without = (read_rows(run_dir / "stats.jsonl") for run_dir in runs)
    assert [row["Loss/loss"] for row in with_watch] == [row["Loss/loss"] for row in without]
    assert not any(name.startswith("Watch/") for row in without for name in row)
    assert not (runs[1] / "metric-sample_spread.jsonl").exists()


def test_statistics_of_a_sharded_run_are_those_of_a_whole_one(base, tmp_path):
    rows = []
    for shard in ("none", "full"):
        options = (*TINY_SETS, "--batch=4", "--lr=1e-3", "--iters=20", "--log-interval=20")
        options = (*options, f"--data={toy_data(base)}", f"--outdir={tmp_path / shard}")
        train_on(2, *options, "--board=none", f"--shard={shard}")
        rows.append(read_rows(only_run(tmp_path / shard) / "stats.jsonl")[-1])
    means = [{k: row[k]["mean"] for k in row if k.startswith("Watch/")} for row in rows]
    assert len(means[0]) > 10
    assert means[1] == pytest.approx(means[0], rel=1e-2, abs=1e-3)


def test_what_a_step_did_is_told_from_weights_gradients_and_average():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    parameters = Parameters(network)
    average = EMA(parameters)
    adam = GuardedAdam(parameters)
    meter = UpdateMeter(parameters, average, adam, [])
    weights, grads = [], []
    for _ in range(3):
        adam.zero_grad()
        network(torch.randn(5, 4)).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        meter.begin()
        weights.append([p.detach().clone() for p in network.parameters()])
        adam.step(1e-3)
        average.update(0.9, adam.skipped)
        found = meter.measure(0.9)
    assert found["average_step"] == pytest.approx(1, abs=1e-4)
    assert found["lost_updates"] == 0
    assert found["rounded_weights"] < 0.1
    now, before = (
        torch.cat([own.detach().flatten() for own in step if own.ndim > 1])
        for step in (network.parameters(), weights[-1])
    )
    ratio = float((now - before).norm() / before.norm())
    assert found["update_ratio"] == pytest.approx(ratio, rel=1e-4)
    momentum = 0.9 * 0.1 * grads[0] + 0.1 * grads[1]
    alignment = torch.nn.functional.cosine_similarity(momentum, grads[2], dim=0)
    assert found["gradient_alignment"] == pytest.approx(float(alignment), rel=1e-4)
    meter.begin()
    adam.step(1e-30)  # Every update is lost in rounding, which is measured, too.
    found = meter.measure(0.9)
    assert (found["lost_updates"], found["update_ratio"]) == (1, 0)
    meter.begin()
    adam.step(0.0)
    assert not {"lost_updates", "update_ratio"} & meter.measure(0.9).keys()
    meter.begin()
    network[0].weight.grad.fill_(math.nan)
    adam.step(1e-3)
    assert meter.measure(0.9) == {}


def judged(preset, rows):
    """Return the findings of rows of means, by the watchers of a preset, tick by tick."""
    run = PRESETS[preset].run
    judge = Judge(run, mock.Mock(phase=lambda nimg: 0), watchers_of(run))
    found = []
    for number, row in enumerate(rows, start=1):
        stats = {f"Watch/{k}": dict(num=32, mean=mean, std=0.1) for k, mean in row.items()}
        found.append([own.name for own in judge.fresh(stats, 20 * number * run.step_nimg)])
    return found


def test_a_finding_is_told_when_it_appears_and_again_only_after_it_has_gone():
    well, wrong = dict(loss=1.0, average_step=1.0), dict(loss=1.0, average_step=0.0)
    found = judged("digits", [well, wrong, wrong, {}, wrong, well, wrong])
    assert found == [[], ["average_not_updated"], [], [], [], [], ["average_not_updated"]]


USUAL = dict(loss=1.0, update_ratio=0.005, gradient_alignment=-0.3, average_step=1.0)
USUAL |= dict(average_gap=0.02, context_gap=0.1, rounded_weights=0.0, lost_updates=0.01)
USUAL |= {"activation/a": 5.0, "activation/b": 9.0, "gain/a": 2.0, "gain/b": 1.2}
USUAL |= {"logit/a": 9.0, "gradient/a": 0.1, "gradient/b": 0.01}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(), []),
        (dict(update_ratio=0.05), ["learning_rate_high"]),
        (
            {"update_ratio": 0.02, "activation/a": 1e4, "activation/b": 1e5},
            ["learning_rate_high"],
        ),
        (dict(update_ratio=0.02), []),
        (dict(update_ratio=1e-4, gradient_alignment=0.99), ["learning_rate_low"]),
        (dict(update_ratio=1e-4, gradient_alignment=0.1), []),  # As in fine-tuning.
        (dict(average_step=3.0), ["average_not_updated"]),
        (dict(average_gap=0.5), ["average_behind"]),
        (dict(rounded_weights=0.99), ["weights_rounded"]),
        (dict(lost_updates=0.8), ["updates_lost"]),
        ({"gradient/b": 1e-9}, ["layer_dead"]),
        ({"gain/a": 80.0}, ["layer_exploding"]),
        ({"logit/a": 900.0}, ["attention_saturated"]),
    ],
)
def test_watchers_see_their_own_fault_and_no_other(changes, expected):
    found = judged("digits", [{**USUAL, **changes}] * 5)
    assert [name for names in found for name in names] == expected


def test_a_context_is_unused_where_another_makes_no_difference():
    nothing = dict(num=32, mean=0.0, std=0.0)
    noise = dict(num=32, mean=1e-4, std=0.1)
    watcher = ContextWatcher()

    def look(step, gap):
        stats = {"Watch/context_gap": gap, "Watch/loss": dict(num=32, mean=1.0, std=0.3)}
        return [own.name for own in watcher.look(Tick(step, 3000, (0,), stats)) or []]

    assert [look(step, nothing) for step in (10, 20, 40)] == [[], [], ["context_unused"]]
    assert look(100, noise) == []  # Too early to tell.
    found = [look(step, noise) for step in range(1000, 1200, 20)]
    assert found[-1] == ["context_unused"]
    found = [look(step, dict(noise, mean=0.05)) for step in range(1200, 1400, 20)]
    assert found[-1] == []


def test_an_average_that_is_still_young_by_its_own_settings_is_not_behind():
    for rampup, names in ((0.05, ["average_behind"]), (None, [])):
        training = dataclasses.replace(
            PRESETS["digits"].run.training, ema_kimg=100.0, ema_rampup=rampup
        )
        watcher = AverageWatcher(training, 128)
        stats = dict(loss=1.0, average_gap=0.8, average_step=1.0)
        stats = {f"Watch/{k}": dict(num=32, mean=mean, std=0.1) for k, mean in stats.items()}
        found = watcher.look(Tick(100, 100_000, (0,), stats))
        assert [finding.name for finding in found] == names


def test_a_resumed_run_tells_again_what_it_lost_and_nothing_that_it_has(
    base, tmp_path, monkeypatch
):
    plant(monkeypatch, "average_stands_still")
    args = ("--cond", "--batch=4", "--iters=61", "--log-interval=20", "--board=none")
    data = toy_data(base)
    whole = train_tiny(tmp_path / "whole", data, *args, "--dump=1").run_dir
    (first,) = [row for row in findings(whole) if row["name"] == "average_not_updated"]
    for nimg, num_left in ((84, 1), (4, 0)):
        copy = tmp_path / str(nimg)
        shutil.copytree(whole, copy)
        trim_rows(copy, nimg)
        assert len([row for row in findings(copy) if row == first]) == num_left


def test_rows_with_the_same_conditions_do_not_tell_whether_they_are_used():
    rows = torch.ones(4, dtype=torch.bool)
    cond = dict(label=torch.tensor([1, 1, 2, 2]), size=torch.tensor([8, 8]))
    assert _differs_from_last(cond, rows).tolist() == [True, False, True, False]
    cond["text"] = torch.zeros(4, 2, 3)
    cond["text"][1] = 1
    assert _differs_from_last(cond, rows).tolist() == [True, True, True, False]
    assert _differs_from_last({}, rows).all()


def test_the_spread_of_samples_tells_few_from_many():
    generator = np.random.default_rng(0)
    reals = [torch.from_numpy(generator.integers(0, 256, (1, 9, 9), np.uint8)) for _ in range(40)]
    others = [torch.from_numpy(generator.integers(0, 256, (1, 32, 20), np.uint8)) for _ in range(9)]
    few = [reals[row % 4] for row in range(40)]
    same = [reals[0]] * 40
    for fakes, is_collapsed in ((reals, False), (few, True), (same, True)):
        values = compared(fakes, reals)
        found = findings_of(dict(metric="sample_spread", values=values))
        assert [own.name for own in found] == ["samples_collapsed"] * is_collapsed
    assert compared(few, reals)["spread"] > 0.5  # That alone does not tell.
    assert compared(others, reals)["spread"] > 0
    row = dict(metric="fid50k_full", detector="inception/features", spread=0.01)
    assert [own.name for own in findings_of(row)] == ["samples_collapsed"]
    assert findings_of(dict(row, spread=0.8)) == findings_of(dict(row, spread=None)) == []
