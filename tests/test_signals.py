"""Runs that a signal stops: what they leave, and that they continue as if nothing had happened."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from helpers import call, succeed
from training_runs import (
    FULL,
    ROOT,
    TINY,
    assert_same_run,
    final_state,
    num_rows,
    only_run,
    per_tick,
    read_rows,
)

import train as train_script
from data.images.dataset import ImageDataset
from data.images.decode import ImageError
from diffusion.denoiser import Denoiser
from dnnlib.text import format_kimg
from evaluation.in_loop import images as in_loop
from torch_utils.stop_signal import StopRequested, StopSignal
from training import launch
from training.batches import Batches
from training.optimizer import GuardedAdam


@pytest.mark.parametrize("ranks", [None, 2], ids=["python", "torchrun"])
def test_a_signalled_run_stops_with_a_state_and_equals_the_uninterrupted_one(
    train, uninterrupted, tmp_path, ranks
):
    command = (f"--outdir={tmp_path}", *FULL, "--workers=1", "--resume=auto")
    torchrun = ("--standalone", "--signals-to-handle=SIGTERM,SIGUSR1")

    def start(warm=False):
        return train(*command, ranks=ranks, torchrun=torchrun, warm=warm)

    def expect_stop(process, number, code):
        run_dir = only_run(tmp_path)
        assert not (run_dir / "requeue").exists()
        # Twice, and to the process of the loader as well, as schedulers do.
        for _ in range(2):
            if ranks is None:
                os.killpg(process.pid, number)
            else:
                process.send(number)
        output = process.finish(code)
        assert "Error" not in output.split("torch/distributed")[0]
        assert (run_dir / "requeue").is_file()
        stopped = final_state(run_dir)["progress"]["cur_nimg"] / 1000
        assert per_tick(run_dir, "Progress/kimg")[-1] <= stopped < 4
        who = f"({signal.Signals(number).name}|a signal to another rank)"
        message = (
            f"Stopped by {who} at kimg {format_kimg(stopped)}; continue with --resume={run_dir}"
        )
        assert re.search(message, output)
        assert re.search(message, (run_dir / "log.txt").read_text())
        return run_dir

    first = start()
    # The first state is followed by the first score, which the signal cuts short.
    first.wait_until(lambda: list(tmp_path.glob("*/training-state-*/manifest.json")))
    run_dir = expect_stop(first, signal.SIGTERM, 85 if ranks is None else None)
    second = start(warm=True)
    second.wait_until(lambda: num_rows(tmp_path) >= 4)
    # To torchrun, a stop that all ranks agreed on is no failure.
    assert expect_stop(second, signal.SIGUSR1, 85 if ranks is None else 0) == run_dir
    assert "tick 0 " not in second.output

    start(warm=True).finish()
    assert not (run_dir / "requeue").exists()
    assert_same_run(run_dir, uninterrupted(ranks))


def test_a_signal_cuts_a_score_short_which_is_made_up_for(
    one_cpu_thread, restored_handlers, digits_zip, tmp_path, monkeypatch
):
    args = (f"--outdir={tmp_path}", f"--data={digits_zip}", *TINY, "--iters=2", "--tick=0")
    args += ("--snap=1", "--workers=0", "--metrics=fd_pixels", "--sample-batch=50")
    num_batches = 0

    def signalled(*args, **kwargs):
        nonlocal num_batches
        for batch in generate_for_rank(*args, **kwargs):
            num_batches += 1
            os.kill(os.getpid(), signal.SIGUSR1)
            yield batch

    generate_for_rank = in_loop.generate_for_rank
    with monkeypatch.context() as patch:
        patch.setattr(in_loop, "generate_for_rank", signalled)
        assert call(train_script, *args).code == 85
    assert num_batches == 1
    # Launcher and scheduler may both have sent it: the second must not hurt what is being written.
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    run_dir = only_run(tmp_path)
    assert (run_dir / "requeue").is_file()
    assert final_state(run_dir)["progress"]["cur_nimg"] == 64
    scores = run_dir / "metric-fd_pixels.jsonl"
    assert not scores.exists()

    output = succeed(train_script, *args, "--resume=auto").output
    assert "tick 0 " not in output
    assert [row["kimg"] for row in read_rows(scores)] == [0.064, 0.128]
    assert not (run_dir / "requeue").exists()


def test_pictures_of_an_earlier_snapshot_of_that_name_do_not_pass_for_those_of_the_last(
    one_cpu_thread, restored_handlers, digits_zip, tmp_path, monkeypatch
):
    """Snapshots and states come at kimg 0.512, 1.024, 1.536 and 2.048."""
    args = (f"--data={digits_zip}", *TINY, "--batch=512", "--iters=4", "--tick=0", "--snap=1")
    args = (*args, "--dump=1", "--workers=0", "--no-watch", "--resume=auto")
    succeed(train_script, f"--outdir={tmp_path / 'whole'}", *args)
    step, num_steps = GuardedAdam.step, []

    def stopped(*args):
        num_steps.append(None)
        if len(num_steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(GuardedAdam, "step", stopped)
        assert call(train_script, f"--outdir={tmp_path / 'runs'}", *args).code == 85
    run, whole = only_run(tmp_path / "runs"), only_run(tmp_path / "whole")
    assert final_state(run)["progress"]["cur_nimg"] == 1536
    assert not (run / "fakes-000001.png").exists()
    succeed(train_script, f"--outdir={tmp_path / 'runs'}", *args)
    assert_same_run(run, whole)
    for path in whole.glob("fakes-*.png"):
        assert (run / path.name).read_bytes() == path.read_bytes()


def test_a_killed_process_that_loads_data_is_told_in_a_sentence(start_process, tmp_path):
    options = (f"--outdir={tmp_path}", *TINY, "--kimg=1000", "--tick=0", "--snap=1000000")
    run = start_process(*options, "--workers=1", warm=True)
    run.wait_until(lambda: num_rows(tmp_path) >= 3)
    savers = [found for found in run.processes() if "dnnlib.sav" in " ".join(found.cmdline())]
    (loader,) = {*run.processes()} - {*savers} - {psutil.Process(run.pid)}
    loader.kill()
    output = run.finish(1)
    assert (
        "Error: A process that loads data was killed, perhaps because memory ran out; use" in output
    )
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_stop_in_the_pictures_leaves_a_state_and_they_are_made_up_for(
    one_cpu_thread, restored_handlers, digits_zip, tmp_path, monkeypatch, number
):
    for each in (number, signal.SIGINT):  # A shell may have them ignored.
        signal.signal(each, signal.default_int_handler)
    args = (f"--outdir={tmp_path}", f"--data={digits_zip}", *TINY, "--iters=3", "--tick=0")
    args += ("--snap=1", "--dump=2", "--workers=0", "--steps=9")
    num_late = 0

    def signalled(*args):
        nonlocal num_late
        if len(list(tmp_path.glob("*/network-snapshot-*.pkl"))) == 2:
            num_late += 1
            assert num_late <= 3, "sampling went on after the signal"
            if num_late == 3:
                os.kill(os.getpid(), number)
        return denoise(*args)

    denoise = Denoiser.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "__call__", signalled)
        assert call(train_script, *args).code == 85
    run_dir = only_run(tmp_path)
    assert num_late == 3
    assert final_state(run_dir)["progress"]["cur_nimg"] == 128  # Though none was due yet.
    pictures = run_dir / "fakes-000000.128.png"
    assert not pictures.exists()
    assert (run_dir / "requeue").is_file()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # A second Ctrl-C ends at once.

    assert "tick 0 " not in succeed(train_script, *args, "--resume=auto").output
    assert pictures.is_file()


def test_a_stop_before_the_first_step_ends_a_start(
    one_cpu_thread, restored_handlers, digits_zip, tmp_path, monkeypatch
):
    monkeypatch.setattr(launch, "describe_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    args = (f"--outdir={tmp_path}", f"--data={digits_zip}", *TINY, "--iters=2")
    result = call(train_script, *args)
    assert result.code == 85
    assert "Stopped by SIGTERM before a step" in result.output
    assert (only_run(tmp_path) / "requeue").is_file()


def test_a_stop_is_heard_while_others_are_waited_for(
    one_cpu_thread, restored_handlers, digits_zip, tmp_path, monkeypatch
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    args = (f"--outdir={tmp_path}", f"--data={digits_zip}", *TINY, "--iters=1")
    for rank in (1, 0):  # The latter holds the store, which the former does not find.
        monkeypatch.setenv("RANK", str(rank))
        timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        assert call(train_script, *args).code == 85
        assert time.monotonic() - began < 10
        timer.cancel()
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.mark.parametrize(("tick", "num_passes"), [("0", 1), ("100", 2)])
@pytest.mark.parametrize("fault", ["silence", "error"])
def test_steps_before_data_that_do_not_come_are_kept(
    one_cpu_thread, restored_handlers, digits_zip, tmp_path, monkeypatch, fault, tick, num_passes
):
    read, calls = ImageDataset.__getitems__, []

    def fail(dataset, indices):
        if any(tmp_path.glob("runs/*")) and num_rows(tmp_path / "runs"):
            calls.append(indices)
        if len(calls) == 2 + num_passes:  # The first batch of the third step.
            if fault == "error":
                raise ImageError("digits.zip/7.png: cannot be read (gone).")
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            assert not threading.Event().wait(60)
        return read(dataset, indices)

    args = (f"--data={digits_zip}", *TINY, f"--tick={tick}", "--iters=6", "--workers=0")
    args = (*args, f"--batch-gpu={64 // num_passes}", "--dump=2", "--resume=auto")
    broken = (f"--outdir={tmp_path / 'runs'}", *args)
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "__getitems__", fail)
        result = call(train_script, *broken)
    assert time.monotonic() - began < 30
    by = "SIGTERM" if fault == "silence" else "the data, as told below,"
    assert re.search(rf"Stopped by {by} at kimg [\d.]+; continue with --resume=", result.output)
    assert result.code == (85 if fault == "silence" else 1)
    assert ("7.png: cannot be read (gone)." in result.error) == (fault == "error")
    run = only_run(tmp_path / "runs")
    state = final_state(run)
    assert state["progress"]["cur_nimg"] == 2 * state["config"]["training"]["batch"]
    assert call(train_script, *broken).code == 0
    assert call(train_script, f"--outdir={tmp_path / 'whole'}", *args).code == 0
    assert_same_run(run, only_run(tmp_path / "whole"))


def test_the_end_of_a_pipe_that_another_thread_meets_stops_the_one_that_waits(restored_handlers):
    with StopSignal() as stop:
        threading.Timer(0.2, stop._hang_up).start()
        assert stop.wait_for(lambda: threading.Event().wait(60)) is None
        assert (stop.name_received(), stop.cut) == ("SIGPIPE", False)


def test_a_stop_that_comes_within_a_finaliser_is_heard_after_it(restored_handlers):
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # Python looks for signals here.

    def work():
        Finalised()
        return threading.Event().wait(30)

    began = time.monotonic()
    with StopSignal() as stop:
        assert stop.wait_for(work) is None
    assert time.monotonic() - began < 20
    assert stop.name_received() == "SIGTERM"


def test_a_stop_lets_a_loader_start_whole(restored_handlers):
    class Loader:
        is_whole = False

        def __iter__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # Python looks for signals here.
            self.is_whole = True
            return iter([1])

    loader = Loader()
    with StopSignal() as stop, pytest.raises(StopRequested), stop.at_once():
        Batches(loader, 1, 1, is_remote=False, stop_signal=stop)
    assert loader.is_whole


def test_a_stop_is_heard_after_an_error_in_a_block_that_defers_it(restored_handlers):
    def fail_in_a_block_and_go_on(stop):
        with contextlib.suppress(KeyError), stop.deferred():
            raise KeyError
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    with StopSignal() as stop, pytest.raises(StopRequested), stop.at_once():
        fail_in_a_block_and_go_on(stop)


INTERRUPTED_AT_THE_END = """
import atexit, click, os, signal, time
from dnnlib.program import run
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(1)))
run(click.command(lambda: print("Done.")))
"""


def test_ctrl_c_when_all_is_done_prints_no_traceback():
    command = [sys.executable, "-c", INTERRUPTED_AT_THE_END]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "Done.\n", "")


def test_a_stop_that_all_ranks_agreed_on_is_no_failure_to_torchrun(
    one_cpu_thread, restored_handlers, digits_zip, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    step = GuardedAdam.step
    monkeypatch.setattr(
        GuardedAdam, "step", lambda *_: os.kill(os.getpid(), signal.SIGUSR1) or step(*_)
    )
    args = (f"--outdir={tmp_path}", f"--data={digits_zip}", *TINY, "--iters=3", "--workers=0")
    result = call(train_script, *args)
    assert (result.code, "Stopped by SIGUSR1" in result.output) == (0, True)
    assert (only_run(tmp_path) / "requeue").is_file()


def test_a_closed_pipe_is_a_request_to_stop(restored_handlers, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with StopSignal() as stop:
            print("to nobody", flush=True)
            assert stop.agreed()
            assert stop.name_received() == "SIGPIPE"
            print("to nobody", flush=True)


AGREEMENT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from torch_utils import distributed
from torch_utils.stop_signal import StopRequested, StopSignal

distributed.init()
with StopSignal() as stop:
    for step in range(1000):
        if step == 10 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.agreed():
            break
text = f"<rank {{distributed.rank()}} at {{step}}: {{stop.name_received()}}>"
sys.stdout.write("".join(distributed.gather_objects(text)) + "\\n")  # In one piece.
distributed.shutdown()
"""


def test_ranks_agree_on_the_step_at_which_a_signal_to_one_of_them_stops_all(train, tmp_path):
    script = tmp_path / "agreement.py"
    script.write_text(AGREEMENT.format(root=str(ROOT)))
    output = train(ranks=2, script=script, warm=True).finish()
    expected = "<rank 0 at 11: a signal to another rank><rank 1 at 11: SIGTERM>"
    assert set(re.findall("<rank.*>", output)) == {expected}
