"""Processes that meet, stop or vanish: the others find them, or end and say which one it was."""

import os
import re
import signal
import threading
import time

import pytest
import torch
from helpers import succeed
from training_runs import ROOT, TINY

import train as train_script
from torch_utils import distributed, heartbeat
from torch_utils.heartbeat import Heartbeat
from torch_utils.meeting import meet


class Store:
    """What one process keeps for threads that stand for processes."""

    def __init__(self):
        self.values, self.is_gone, self.answers = {}, False, threading.Event()
        self.answers.set()

    def set(self, key, value):
        self.answers.wait()
        self.values[key] = value.encode()

    def get(self, key):
        return self.multi_get([key])[0]

    def check(self, keys):
        return all(key in self.values for key in keys)

    def multi_get(self, keys):
        if self.is_gone:
            raise RuntimeError("connection closed")
        return [self.values[key] for key in keys]


def meet_all(store, ranks, world_size, timeout_sec=10):
    """Return what each rank gets from the meeting: a name, or the text of an error."""
    found = {}

    def attend(rank):
        try:
            found[rank] = meet(store, rank, world_size, time.monotonic() + timeout_sec)
        except TimeoutError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=attend, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_that_start_again_share_a_name_that_is_new():
    store, names = Store(), set()
    for _ in range(5):
        found = meet_all(store, (2, 0, 1), world_size=3)
        assert len(set(found.values())) == 1
        names.update(found.values())
    assert len(names) == 5


def test_a_meeting_says_who_did_not_come():
    store = Store()
    meet_all(store, range(4), world_size=4)  # What an earlier one left convinces nobody.
    found = meet_all(store, (0, 2), world_size=4, timeout_sec=0.5)
    assert found[0] == "missing: rank 1, 3"
    assert meet_all(store, (1,), 2, timeout_sec=0.2) == {1: "rank 0 does not answer"}


# What ends in place of the process is a thread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def ended(monkeypatch):
    """The errors that ranks which ended told torchrun."""
    messages = []

    def stop(code):
        assert code == 1
        raise SystemExit  # Ends the thread that stands for the process.

    monkeypatch.setattr(os, "_exit", stop)
    monkeypatch.setattr(heartbeat.launcher, "record_error", messages.append)
    return messages


@pytest.fixture
def start_hearts(ended):
    started = []

    def start(store, num):
        name = meet_all(store, range(num), num)[0]
        settings = dict(limit_sec=0.5, host="torchrun at here:1")
        hearts = [Heartbeat(store, name, rank, num, **settings) for rank in range(num)]
        started.extend(hearts)
        return hearts

    yield start
    for heart in started:
        heart.stop()


def fall_silent(heart):
    """Stop a heart without a word."""

    def stop(seconds):
        raise SystemExit

    heart._stop.wait = stop


def wait_for_text(capsys, part):
    """Return what was printed once that has a part."""
    text = ""
    deadline = time.monotonic() + 10
    while part not in text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        text += capsys.readouterr().err
    return text


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_that_fall_silent_are_named_to_all(ended, start_hearts):
    hearts = start_hearts(Store(), 4)
    time.sleep(1)
    assert ended == []
    for heart in hearts[2:]:
        fall_silent(heart)
    wait_for(lambda: len(ended) == 2)
    assert len(set(ended)) == 1
    assert "from rank 2 (on " in ended[0]
    assert ", rank 3 (on " in ended[0]
    assert "rank 1" not in ended[0]


def test_a_rank_that_lives_but_keeps_the_others_waiting_is_named(ended, start_hearts, monkeypatch):
    monkeypatch.setattr(heartbeat, "STALL_SEC", 0.8)
    hearts = start_hearts(Store(), 3)
    for step in range(30):  # All go on, one slower than the others.
        for heart in hearts[:2] if step % 3 else hearts:
            with heart.together():
                time.sleep(0.02)
    for heart in hearts[:2]:  # Nobody waits for what is not there yet.
        with heart.together():
            pass
    time.sleep(1.5)
    assert ended == []
    with hearts[0].together(), hearts[1].together():
        wait_for(lambda: len(ended) == 3)
    assert len(set(ended)) == 1
    assert "Others have waited 0.0133333 minutes for rank 2 (on " in ended[0]
    assert "rank 1" not in ended[0]


def test_a_rank_for_which_others_wait_is_told_before_it_ends_them(ended, start_hearts, capsys):
    hearts = start_hearts(Store(), 3)
    for heart in hearts:
        heart.finish_step("kimg 7")
        with heart.together():
            pass
    told = "Warning: Others have waited 0.00833333 minutes for rank 2 (on "
    with hearts[0].together(), hearts[1].together():
        text = wait_for_text(capsys, told)
        time.sleep(1)
        assert told not in capsys.readouterr().err  # Once.
    assert "rank 2 was after the step that ends at kimg 7 in\n" in text
    assert " wait_for_text\n" in text.split("rank 2 was")[1]  # Where this thread is.
    with hearts[2].together():  # Now it has come as far.
        pass
    with hearts[0].together(), hearts[1].together(), hearts[2].together():
        text = wait_for_text(capsys, "Warning: All ranks have been in the same operation")
    assert "rank 0, rank 1, rank 2 was after" in text
    assert ended == []


def test_a_silent_rank_0_and_a_silent_store_are_named_by_the_others(ended, start_hearts):
    hearts = start_hearts(Store(), 3)
    fall_silent(hearts[0])
    wait_for(lambda: len(ended) == 2)
    assert all("from rank 0 (on " in message for message in ended)

    ended.clear()
    store = Store()
    start_hearts(store, 2)
    store.answers.clear()
    wait_for(lambda: len(ended) == 2)
    assert all("from torchrun at here:1" in message for message in ended)
    store.answers.set()


def test_who_leaves_is_not_missed(ended, start_hearts):
    hearts = start_hearts(Store(), 4)
    for rank in (0, 2):
        hearts[rank].stop()
    time.sleep(1)
    assert ended == []


def test_nobody_is_accused_when_the_store_ends_with_its_process(ended, start_hearts):
    store = Store()
    hearts = start_hearts(store, 2)
    store.is_gone = True
    time.sleep(1)
    assert ended == []
    assert all(heart._stop.is_set() for heart in hearts)


def test_a_run_watches_with_the_limit_of_its_option(
    one_cpu_thread, digits_zip, tmp_path, monkeypatch
):
    limits = []
    monkeypatch.setattr(
        distributed, "init", lambda limit: limits.append(limit) or torch.device("cpu")
    )
    args = (f"--outdir={tmp_path}", f"--data={digits_zip}", *TINY, "--iters=1", "--workers=0")
    succeed(train_script, *args, "--hang-limit=2")
    succeed(train_script, *args)
    assert limits == [2, 5]


HANG = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from torch_utils import distributed

distributed.init(hang_limit=0.03)
distributed.barrier()
distributed.finish_step("kimg 7")
print("ready", flush=True)
while not os.path.exists("{go}"):
    time.sleep(0.05)
if distributed.rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
distributed.barrier()
"""


def test_a_stopped_rank_ends_the_run_within_the_limit_and_is_named(train, tmp_path):
    script, go = tmp_path / "hang.py", tmp_path / "go"
    script.write_text(HANG.format(root=str(ROOT), go=go))
    process = train(ranks=2, script=script, warm=True)
    process.wait_until(lambda: process.output.count("ready") == 2)
    ranks = process.processes()
    # A pause of all, as when a laptop sleeps or a scheduler suspends a job, is no reason to end.
    for number, seconds in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 0.5)):
        for found in ranks:
            found.send_signal(number)
        time.sleep(seconds)
    assert "Error" not in process.output

    go.touch()
    began = time.monotonic()
    message = "Error: No sign of life for 0.03 minutes from rank 1 (on "
    process.wait_until(lambda: message in process.output)
    assert time.monotonic() - began < 20  # Three seconds on an idle machine.
    process.wait_until(lambda: "<module>" in process.output)
    where = process.output.split("rank 1 was after the step that ends at kimg 7 in\n")[1]
    assert re.match(r"    \S*hang.py:\d+ <module>", where)
    ranks[1].kill()  # As torchrun does 30 seconds later.
    process.finish(None)
