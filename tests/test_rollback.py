"""Runs that go back: what is found, what is written, what comes of it, and kills on the way."""

import functools
import itertools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import TINY, call, succeed, toy_data
from training_runs import differences, final_state, only_run, per_tick, read_rows
from unstable_runs import KILLS, LAYER, Unstable, planted

import train
from configs.presets import PRESETS
from data.samplers import BucketSampler, PositionSampler
from families import of
from torch_utils import rng
from torch_utils.parameters import Parameters
from training.checkpoint import find_snapshots, find_states, load_state, read_header
from training.family import Part
from training.optimizer import GuardedAdam
from training.stability.locate import first_not_finite
from training.stability.monitor import Monitor
from training.stability.rollbacks import remove_abandoned
from training.stability.spikes import SpikeDetector

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

# Seven steps of eight images, a tick with a state each; every third has a snapshot and pictures.
RUN = (*TINY, "--num-stages=1", "--iters=7", "--tick=0", "--snap=3", "--dump=1", "--resume=auto")
RUN += ("--skip-limit=2", "--rollback=2", "--sample-batch=4", "--board=none")
OVERFLOW = dict(overflow={3, 4, 5, 6})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("rollback")


def run(base, outdir, *options):
    return succeed(train, f"--outdir={outdir}", f"--data={toy_data(base)}", *RUN, *options)


@pytest.fixture(scope="module")
def undisturbed(base):
    """Folder and output of a run whose layer overflows at the steps 3 and 4, and that goes back."""
    with planted(**OVERFLOW):
        result = run(base, base / "undisturbed")
    return only_run(base / "undisturbed"), result.output


def assert_equal(run_dir, reference):
    """Require the same files with the same content, but for times."""
    names = [sorted(path.name for path in folder.glob("[!.]*")) for folder in (run_dir, reference)]
    assert names[0] == names[1]
    for path in find_states(reference):
        states = load_state(run_dir / path.name), load_state(path)
        for state in states:
            del state["progress"]["elapsed_sec"]
        assert differences(*states) == [], path.name
    for path in reference.glob("network-snapshot-*.pkl"):
        files = run_dir / path.name, path
        assert differences(*[torch.load(f, weights_only=True)["ema"] for f in files]) == []
    for path in reference.glob("fakes-*.png"):
        assert (run_dir / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("Progress/kimg", "Loss/loss", "Loss/grad_norm", "Loss/skipped_steps"):
        assert per_tick(run_dir, name) == per_tick(reference, name)
    assert read_rows(run_dir / "rollbacks.jsonl") == read_rows(reference / "rollbacks.jsonl")


def test_the_log_names_layer_and_step_and_the_run_goes_back_before_them(undisturbed):
    run_dir, output = undisturbed
    assert f"not finite for 2 steps, from step 4 (kimg 0.02) on: the output of {LAYER}" in output
    assert "Rollback 1: from kimg 0.04 to kimg 0.02" in output
    (row,) = read_rows(run_dir / "rollbacks.jsonl")
    assert [row[name] for name in ("number", "from_nimg", "to_nimg")] == [1, 40, 24]
    assert LAYER in row["reason"]
    assert LAYER in (run_dir / "log.txt").read_text()
    assert np.allclose(per_tick(run_dir, "Progress/kimg"), 0.008 * np.arange(1, 8))
    assert per_tick(run_dir, "Loss/skipped_steps") == [0] * 7
    made = {path.stem: read_header(path)[1] for path in run_dir.glob("network-snapshot-*.pkl")}
    numbers = {name[-3:]: found.get("rollbacks", 0) for name, found in made.items()}
    assert numbers == {"008": 0, "032": 1, "056": 1}
    assert final_state(run_dir)["progress"]["rollbacks"] == 1


def test_what_follows_a_rollback_is_a_function_of_seed_number_and_position(
    undisturbed, base, tmp_path
):
    """A run without a fault that is told of a rollback of its last step."""
    reference, _ = undisturbed
    run(base, tmp_path, "--iters=4")
    run_dir = only_run(tmp_path)
    shutil.copy(reference / "rollbacks.jsonl", run_dir)
    last = find_snapshots(run_dir)[0].stem.removeprefix("network-snapshot-")
    shown = run_dir / f"conditioning-{last}.jsonl"
    shown.touch()
    remove_abandoned(run_dir)
    assert not shown.exists()
    run(base, tmp_path)
    assert_equal(run_dir, reference)
    # Without it, the same steps have other losses, and those before have the same.
    run(base, tmp_path / "without", "--snap=100")
    losses = [per_tick(folder, "Loss/loss") for folder in (only_run(tmp_path / "without"), run_dir)]
    equal = [first == second for first, second in zip(*losses, strict=True)]
    assert equal == [True] * 3 + [False] * 4


@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_on_the_way_leaves_no_trace(undisturbed, base, tmp_path, start_process, kill):
    reference, _ = undisturbed
    script = helpers.ROOT / "tests" / "unstable_runs.py"
    faults = dict(overflow=[3, 4, 5, 6])
    for found, code in ((dict(faults, kill=kill), None), (faults, 0)):
        args = (
            f"--faults={json.dumps(found)}",
            f"--outdir={tmp_path}",
            f"--data={toy_data(base)}",
            *RUN,
        )
        process = start_process(*args, script=script, warm=True)
        process.finish(code)
        if code is None:
            assert (only_run(tmp_path) / "rollbacks.jsonl").exists() != kill.startswith("before")
    assert_equal(only_run(tmp_path), reference)


@pytest.mark.parametrize(
    ("tick", "num_before", "overflow", "places"),
    # A regular state comes between stop and rollback, or none.
    [(0.016, 6, {6, 7, 8}, [72, 40]), (0.024, 5, {5, 6}, [56, 32])],
)
def test_a_stop_by_a_signal_changes_nothing_of_a_later_rollback(
    restored_handlers, base, tmp_path, monkeypatch, tick, num_before, overflow, places
):
    """The stop is within a tick, and the fault begins right after it."""
    options = (f"--tick={tick}", "--iters=11", "--snap=100", "--keep-states=2")
    step, num_steps = GuardedAdam.step, []

    def stopped(*args):
        num_steps.append(None)
        if len(num_steps) == num_before:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with planted(overflow=overflow):
        run(base, tmp_path / "undisturbed", *options)
        with monkeypatch.context() as patch:
            patch.setattr(GuardedAdam, "step", stopped)
            arguments = (f"--outdir={tmp_path / 'stopped'}", f"--data={toy_data(base)}")
            assert call(train, *arguments, *RUN, *options).code == 85
        run_dir = only_run(tmp_path / "stopped")
        assert final_state(run_dir)["progress"]["cur_nimg"] == 8 * num_before
        run(base, tmp_path / "stopped", *options)
    (row,) = read_rows(run_dir / "rollbacks.jsonl")
    assert [row[name] for name in ("from_nimg", "to_nimg")] == places
    assert_equal(run_dir, only_run(tmp_path / "undisturbed"))


def test_two_ranks_go_back_together(base, tmp_path, start_process):
    """The overflow is on one rank alone, whose layer rank 0 names."""
    script = helpers.ROOT / "tests" / "unstable_runs.py"
    found = json.dumps(dict(overflow=[3, 4], one_rank=True))
    args = (
        f"--faults={found}",
        f"--outdir={tmp_path}",
        f"--data={toy_data(base)}",
        *RUN,
        "--snap=100",
    )
    process = start_process(*args, script=script, warm=True, ranks=2)
    output = process.finish()
    assert f"the output of {LAYER} is the first" in output
    (row,) = read_rows(only_run(tmp_path) / "rollbacks.jsonl")
    assert [row[name] for name in ("number", "from_nimg", "to_nimg")] == [1, 40, 24]
    assert len(per_tick(only_run(tmp_path), "Loss/loss")) == 7


def test_a_run_goes_back_no_more_often_than_asked(base, tmp_path):
    with planted(overflow=set(range(3, 9)), always=True):
        args = (f"--outdir={tmp_path}", f"--data={toy_data(base)}", *RUN, "--snap=100")
        result = call(train, *args)
    assert result.code == 1
    assert "2 gradients in a row were not finite" in result.error
    rows = read_rows(only_run(tmp_path) / "rollbacks.jsonl")
    assert [row["to_nimg"] for row in rows] == [24, 24]


def test_without_a_state_a_run_goes_back_to_its_beginning(base, tmp_path):
    with planted(overflow={0}):
        output = run(base, tmp_path, "--skip-limit=1", "--iters=4").output
    assert "Rollback 1: from kimg 0.01 to kimg 0.0," in output
    assert len(per_tick(only_run(tmp_path), "Loss/loss")) == 4


def test_a_spike_is_found_with_the_layer_whose_gradient_grows(base, tmp_path):
    options = ("--iters=72", "--tick=0.08", "--snap=100", "--dump=1", "--lr=1e-4", "--batch=8")
    with planted(spike=set(range(61, 72))):
        output = run(base, tmp_path, *options).output
    assert "The loss is above 5 times the usual one for 5 steps, from step 62 " in output
    assert f"the gradient of {LAYER} has grown most" in output
    (row,) = read_rows(only_run(tmp_path) / "rollbacks.jsonl")
    assert row["to_nimg"] == 61 * 8


def test_the_option_alone_changes_nothing(base, tmp_path):
    folders = []
    for number in (0, 5):
        run(base, tmp_path / str(number), f"--rollback={number}", "--iters=4", "--snap=100")
        folders.append(only_run(tmp_path / str(number)))
    states = [final_state(folder) for folder in folders]
    assert states[1].pop("losses")["in_a_row"] == 0
    for state in states:
        del state["progress"]["elapsed_sec"], state["config"]
    assert differences(*states) == []


def test_single_losses_and_unknown_ones_are_no_spike():
    detector = SpikeDetector()
    assert detector.first([100.0] * 10 + [1.0] * 60) is None
    assert detector.first([100.0, 1.0] * 20) is None
    assert detector.first([float("nan")] * 20) is None
    state = detector.state_dict()
    assert detector.first([1.0, 9.0, 9.0, 9.0]) is None
    assert detector.first([9.0, float("inf"), 9.0]) == -3
    other = SpikeDetector()
    other.load_state_dict(state)
    assert other.first([1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]) == 1
    # A level that stays becomes the usual one.
    assert other.first([9.0] * 200) is None
    assert other.first([1.0] + [10.0] * 9) is None


@pytest.mark.parametrize("num", [1, 2])
def test_every_kind_of_data_comes_in_another_order(num):
    seed = rng.seed_after(0, num)
    assert rng.seed_after(0, 0) == 0
    assert len({0, seed, rng.seed_after(0, 3), rng.seed_after(1, num)}) == 4
    whole = dict(start_nimg=8, batch_size=4, batch_gpu=4, rank=0, world_size=1)
    for kind in (lambda s: PositionSampler(50, **s), lambda s: BucketSampler([20, 30], **s)):
        orders = [[*itertools.islice(kind(dict(whole, seed=own)), 20)] for own in (0, seed, seed)]
        assert orders[0] != orders[1] == orders[2]
    # Sets are drawn by their position, which is their key.
    sets = PRESETS["fsdm-digits"].run
    found = [
        next(iter(of(sets).steps(sets, None, 0, Part(0, 1, 32, count)).sampler))
        for count in (0, num)
    ]
    assert found[0] == [*range(32)]
    assert not {*found[0]} & {*found[1]}


@pytest.mark.parametrize(
    "text", ["{", '{"number": 2, "from_nimg": 1, "to_nimg": 0, "reason": ""}\n', "[]\n", "\xff"]
)
def test_a_damaged_record_is_named(undisturbed, tmp_path, text):
    run_dir = shutil.copytree(undisturbed[0], tmp_path / "00000-run")
    (run_dir / "rollbacks.jsonl").write_text(text)
    message = helpers.fail(train, f"--resume={run_dir}", "--iters=8")
    assert "rollbacks.jsonl: cannot be read (" in message
    assert "restore it, or start a new run" in message


def test_a_lost_record_of_what_the_state_knows_is_an_error(undisturbed, tmp_path):
    run_dir = shutil.copytree(undisturbed[0], tmp_path / "00000-run")
    (run_dir / "rollbacks.jsonl").unlink()
    message = helpers.fail(train, f"--resume={run_dir}", "--iters=40")
    assert "rollbacks.jsonl: rows of rollbacks before the state are missing" in message


def test_a_particular_state_of_a_part_given_up_can_be_continued(undisturbed, tmp_path):
    run_dir = shutil.copytree(undisturbed[0], tmp_path / "00000-run")
    row = dict(number=2, from_nimg=90, to_nimg=8, reason="by hand")
    with open(run_dir / "rollbacks.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    path = find_states(run_dir)[-1]
    succeed(train, f"--resume={path}", "--iters=8")
    assert final_state(run_dir)["progress"]["rollbacks"] == 2


def test_what_overflows_in_the_backward_pass_alone_is_named_too(base, tmp_path, monkeypatch):
    """Also with clipping, which spreads what is no number to all gradients."""
    monkeypatch.setattr(Unstable, "grad_factor", torch.nan)
    with planted(spike={1, 2}):
        output = run(base, tmp_path, "--iters=4", "--clip-grad=1").output
    assert f"from step 2 (kimg 0.01) on: the gradient of {LAYER} is the first" in output


@pytest.mark.parametrize("phase", [(0, 0), (0, 1), (480, 0)])
def test_losses_are_compared_within_a_phase(phase):
    """Also where a run is continued in between."""
    run, network, told = PRESETS["digits"].run, torch.nn.Linear(2, 1), []
    run = run.changed("training", rollback=1, batch=8)
    network(torch.ones(1, 2)).sum().backward()
    make = functools.partial(Monitor, run, Parameters(network), 1)
    telemetry = SimpleNamespace(message=told.append)
    monitor = make(None)
    for step in range(75):
        monitor.add(torch.tensor(1.0 if step < 60 else 50.0))
        norms = torch.tensor([1.0, 1.0] if step < 60 else [10.0, 20.0])
        monitor.end_step(norms, (0, 0) if step < 60 else phase)
        if step in (19, 59, 62, 74):
            monitor.read(8 * (step + 1))
            monitor.judge(8 * (step + 1), 0, lambda: None, telemetry)
            monitor = make(monitor.state_dict())
    if phase != (0, 0):
        assert told == []
    else:
        assert told == [
            "Warning: The loss is above 5 times the usual one for 5 steps, from step 61 (kimg 0.48)"
            " on."
        ]


def test_what_is_looked_at_is_the_network_that_is_trained():
    """The objective may have others, or keep it within another."""

    class Outer(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.inner = network

        def forward(self, images, cond, draws):
            return self.inner(images).sum()

    layers = [torch.nn.Linear(2, 2) for _ in range(3)]
    network = torch.nn.Sequential(*layers)
    network.is_compiled = False
    batch = torch.ones(1, 2), {}, None
    assert first_not_finite(Outer(network), network, batch) is None
    with torch.no_grad():
        layers[1].weight.fill_(torch.inf)
    assert first_not_finite(Outer(network), network, batch) == "the output of 1"
    batch = torch.full((1, 2), torch.nan), {}, None
    assert first_not_finite(Outer(network), network, batch) == "the data"


def test_the_first_spike_of_a_tick_stays_the_first_across_a_stop_within_it():
    losses = [1.0 + 0.01 * (step % 3) for step in range(100)]
    losses[60:66] = losses[80:86] = [9.0] * 6
    run, places = PRESETS["digits"].run.changed("training", batch=1, rollback=1), []
    for stop in (None, 70):
        monitor = Monitor(run, None, 0, None)
        monitor._layer = str
        for step, loss in enumerate(losses):
            monitor.add(torch.tensor(loss))
            monitor.end_step(torch.ones(1), (0, 0))
            if step == stop:
                monitor.read(step + 1)
                monitor = Monitor(run, None, 0, monitor.state_dict())
                monitor._layer = str
        monitor.read(len(losses))
        places.append(monitor.state_dict()["losses"]["spike_nimg"])
    assert places == [60, 60]
