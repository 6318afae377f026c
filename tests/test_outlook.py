"""What a run foresees of itself, and how that is compared with what it was."""

import json
import re
import time

import pytest
import torch
from helpers import TINY, call, toy_data, train_tiny
from report_runs import stat, write_rows

import families
import train
from configs import get_preset
from dnnlib.config import to_dict
from training.resources import outlook as module
from training.resources.memory import predict_memory
from training.resources.memory_process import MemoryProcess
from training.resources.outlook import Outlook, Prediction, compare, describe

CPU = torch.device("cpu")
RUN = get_preset("digits").run  # 128 images a step, ticks of 8 kimg, 154 kimg.


class Clock:
    """A clock that stands still but for :meth:`add`, in place of the module ``time``."""

    def __init__(self):
        self.now = 1000.0

    def add(self, seconds):
        self.now += seconds

    def time(self):
        return self.now

    monotonic = perf_counter = time


class Log(list):
    def message(self, text):
        self.append(text)


class Answer:
    """In place of a process that foresees memory: the second time it is asked, it knows."""

    def __init__(self, run_dir):
        self.answers = [None, 500_000_000]

    def poll(self):
        return self.answers.pop(0)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "MemoryProcess", Answer)
    return clock


def start(tmp_path, log, cur_nimg=0, config=RUN, start_sec=1000.0):
    return Outlook(config, tmp_path, CPU, log, cur_nimg=cur_nimg, start_sec=start_sec)


def train_for(outlook, clock, num_steps, sec, cur_nimg, step_nimg=128):
    for _ in range(num_steps):
        clock.add(sec)
        cur_nimg += step_nimg
        outlook.step(cur_nimg)
    return cur_nimg


def test_the_probe_leaves_out_the_first_steps_and_counts_what_comes_between(tmp_path, clock):
    log = Log()
    outlook = start(tmp_path, log)
    assert re.fullmatch(r"Predicted: disk [\d.]+MB\.", log[0])
    nimg = train_for(outlook, clock, 1, 30.0, 0)  # Compiles.
    with outlook.timed("pictures"):
        clock.add(4)
    with outlook.timed("scores"):
        clock.add(6)
    clock.add(1)
    outlook.tick(128, 30.0, nimg, 11.0)
    nimg = train_for(outlook, clock, 2, 5.0, nimg)
    nimg = train_for(outlook, clock, 10, 0.5, nimg)
    left = (154_000 - nimg) / 256 + 2 * 11  # Snapshots at kimg 80 and 154.
    text = "Predicted after 10 steps: 256 images/s, 10m 17s until the end at kimg 154.0, with "
    text += "pictures in 8s and scores in 12s."
    assert log[1:] == [text]
    found = Prediction(**json.loads((tmp_path / "prediction.json").read_text()))
    assert (found.images_per_sec, found.probe_nimg, found.probe_sec) == (256, nimg, 56)
    assert found.total_sec == pytest.approx(56 + left)
    # Only the first prediction of the run is kept.
    again = start(tmp_path, log, cur_nimg=nimg, start_sec=clock.now)
    train_for(again, clock, 13, 1.0, nimg)
    assert log[-1].startswith("Predicted after 10 steps: 128 images/s")
    assert Prediction(**json.loads((tmp_path / "prediction.json").read_text())) == found
    # But not for another duration.
    longer = RUN.changed("training", kimg=300)
    start(tmp_path, log, config=longer)
    assert json.loads((tmp_path / "prediction.json").read_text())["images_per_sec"] is None


def test_short_ticks_are_put_together_for_a_probe(tmp_path, clock):
    log = Log()
    outlook = start(tmp_path, log)
    nimg = train_for(outlook, clock, 1, 30.0, 0)
    outlook.tick(128, 30.0, nimg, 1.0)
    for _ in range(4):
        assert not log[1:]
        nimg = train_for(outlook, clock, 3, 2.0, nimg)
        outlook.tick(3 * 128, 6.0, nimg, 1.0)
        clock.add(1)
    assert log[1].startswith("Predicted after 10 steps: 64 images/s")


def test_memory_is_told_when_it_is_known_of_long_runs_alone(tmp_path, clock, monkeypatch):
    log = Log()
    outlook = start(tmp_path, log)
    nimg = train_for(outlook, clock, 12, 0.5, 0)
    for _ in range(3):
        outlook.tick(12 * 128, 6.0, nimg, 1.0)
    assert log[2:] == ["Predicted: memory 500.00MB a rank."]
    assert json.loads((tmp_path / "prediction.json").read_text())["memory"] == 500_000_000
    monkeypatch.setattr(module, "MemoryProcess", None)  # Is not called.
    short = RUN.changed("training", kimg=8)
    train_for(start(tmp_path, log, config=short), clock, 12, 0.5, 0)
    # A run that begins with a damaged file begins anew.
    (tmp_path / "prediction.json").write_text("[")
    start(tmp_path, log)
    assert log[-1].startswith("Predicted: disk")


def test_the_process_that_foresees_memory_says_what_a_dry_run_does(tmp_path):
    run = families.of(RUN).fit(RUN.changed("training", batch=32), None, 10)
    options = dict(config=to_dict(run), world_size=1, device="cpu")
    (tmp_path / "training_options.json").write_text(json.dumps(options))
    process = MemoryProcess(tmp_path)
    deadline = time.monotonic() + 120
    found = None
    while found is None and time.monotonic() < deadline:
        time.sleep(0.1)
        found = process.poll()
    expected = predict_memory(run, 1, "cpu")
    own = expected.total - expected.libraries
    assert 100e6 < found - own < 700e6
    # It ends with what started it, whose end of the pipe is closed then.
    other = MemoryProcess(tmp_path)
    other._process.stdin.close()
    assert other._process.wait(60) == 1
    other.close()


def test_what_was_foreseen_is_compared_with_what_was(tmp_path):
    rows = [
        {"Progress/kimg": stat(kimg), "Timing/sec_per_tick": stat(seconds)}
        for kimg, seconds in ((0.128, 60.0), (8.128, 40.0), (16.128, 40.0))
    ]
    write_rows(tmp_path / "stats.jsonl", rows)
    (tmp_path / "network-snapshot-000016.pkl").write_bytes(b"x" * 1000)
    (tmp_path / "training-state-000016").mkdir()
    (tmp_path / "training-state-000016" / "part-0.safetensors").write_bytes(b"x" * 3000)
    run = RUN.changed("training", kimg=16.128)
    prediction = Prediction(16_128, 5000, 10**9, 220.0, 1000, 100.0, 200.0)
    found = compare(prediction, run, tmp_path, CPU, 16_128)
    assert found["images/s"] == (220, 200)
    assert found["disk"][1] == 4000
    assert found["memory"][1] > 1e8
    assert describe("images/s", *found["images/s"]) == "220, 200 (+10.0%)"
    assert prediction.seconds_until(1000) is None
    assert prediction.seconds_until(16_128) == 200
    assert prediction.seconds_until(8564) == 150


def test_a_run_says_what_it_foresaw_and_what_it_was_and_a_stopped_one_too(tmp_path):
    data = toy_data(tmp_path)
    args = (*TINY, "--iters=40", "--log-interval=20", "--snap=1")
    done = train_tiny(tmp_path / "runs", data, *args)
    log = (done.run_dir / "log.txt").read_text()
    assert re.search(r"^Predicted: disk [\d.]+[kM]B\.$", log, re.M)
    assert re.search(
        r"^Predicted after 10 steps: [\d,.e+]+ images/s, \d+s until the end", log, re.M
    )
    pattern = r"^Predicted and actual: disk .*\([+-][\d.]+%\); images/s .*; duration \d+s, \d+s"
    assert re.search(pattern, log, re.M)
    first = json.loads((done.run_dir / "prediction.json").read_text())
    assert first["images_per_sec"] > 0
    # A run that is complete makes no step, and has nothing to compare.
    assert call(train, f"--resume={done.run_dir}").code == 0
    assert (done.run_dir / "log.txt").read_text().count("Predicted and actual") == 1
    assert json.loads((done.run_dir / "prediction.json").read_text()) == first
    disk = re.search(r"actual: disk [\d.]+MB, [\d.]+MB \(([+-][\d.]+)%\)", log)
    assert abs(float(disk[1])) < 30
