"""Training runs for chaos.py: tiny ones of every kind, started from a warm process or a cold one.

A warm process has imported everything. What it forks begins where ``train.py`` reads its options,
and tells through shared memory in which stage each rank is.
"""

import contextlib
import importlib
import mmap
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import psutil
import torch
from golden_files import GOLDEN
from helpers import TINY, TINY_FEATURES, TINY_LATENT, TINY_SETS
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training_runs import ROOT, leaves

import dnnlib.program
import train
from dnnlib import launcher
from evaluation.in_loop import features, images, sets
from training import launch, loop
from training.optimizer import GuardedAdam

STAGES = ("import", "start", "tick", "save", "pictures", "scores", "end")
TARGETS = ("process", "rank", "all", "launcher")
DEADLINE_SEC = 120  # Of anything that takes seconds.

# Seven ticks of a step; a state each, a snapshot with pictures every second, scores every third.
# What is random in a step is on. Of an option that is there twice, the last counts.
_SCHEDULE = (
    *("--iters=7", "--tick=0", "--snap=2", "--dump=1", "--resume=auto"),
    *("--sample-batch=4", "--hidden-dim=8", "--mlp-ratio=1"),
)
_SCORES = ("--metrics=fd_pixels", "--metrics-ticks=3")
KINDS = {
    "image": (
        *(*TINY, *_SCHEDULE, *_SCORES, "--data=images.zip", "--cond", "--label-drop=0.2"),
        *("--num-stages=1", "--base-dim=8", "--time-dim=8", "--hflip"),
        *("--augment=0.3", "--dropout=0.1", "--ema-stds=0.05", "--validation-share=0.2"),
    ),
    "latent": (
        *(*TINY_LATENT, *_SCHEDULE, *_SCORES, "--metrics-ref=images.zip"),
        *("--data=latents", "--label-drop=0.2"),
    ),
    "sets": (
        *(*TINY_SETS, *_SCHEDULE, "--data=images.zip", "--mode-conditioning=lag", "--gate=none"),
        *("--context-drop=0.2", "--held-out=2", "--hybrids=0.3", "--class-transforms=rotations"),
        *("--skip-transforms=dot:2", "--patch-size=4"),
    ),
    "features": (*TINY_FEATURES, *_SCHEDULE, "--data=features"),
}


def unpack_data(base):
    """Unpack what the runs train on."""
    with tarfile.open(GOLDEN / "files.tar.xz") as archive:
        archive.extractall(base, filter="data")


def command_of(kind, outdir):
    """Return the options of a run of a kind of model; the data are in the current folder."""
    return [f"--outdir={outdir}", *KINDS[kind]]


class Board:
    """Memory that ranks write their stage into, and this process reads."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 64)

    def clear(self):
        self._memory[:] = bytes(64)

    def put(self, rank, stage):
        place = 8 * rank
        self._memory[place] = STAGES.index(stage)
        self._memory[place + 1] = (self._memory[place + 1] + 1) % 256

    def stage(self, rank):
        """Return the stage of a rank, and a number that changes when it enters one."""
        stage, count = self._memory[8 * rank : 8 * rank + 2]
        return STAGES[stage], count


BOARD = Board()
_orders = None  # The file of this rank for the data of its steps.


def _rank():
    return launcher.number("RANK")


def _within(stage, function):
    def wrapped(*args, **kwargs):
        before = BOARD.stage(_rank())[0]
        BOARD.put(_rank(), stage)
        try:
            return function(*args, **kwargs)
        finally:
            BOARD.put(_rank(), before)

    return wrapped


def instrument():
    """Have the processes that this one forks tell their stage, and write down their data."""
    loop.Writer.write = _within("save", loop.Writer.write)
    loop.Writer.finish = _within("save", loop.Writer.finish)
    for owner in (images.ImageEvaluator, sets.SetEvaluator, features.FeatureEvaluator):
        owner.save_pictures = _within("pictures", owner.save_pictures)
        owner.score = _within("scores", owner.score)
    step, train_whole = GuardedAdam.step, launch.training_loop

    def counted_step(*args):
        BOARD.put(_rank(), "tick")
        return step(*args)

    def note(cur_nimg, rows, batch, cond):
        found = leaves([batch, cond])
        tensors = [found[key] for key in sorted(found)]
        checksum = 0
        for tensor in tensors:
            checksum = zlib.crc32(torch.as_tensor(tensor).numpy().tobytes(), checksum)
        _orders.write(f"{cur_nimg} {_rank()} {checksum}\n")
        _orders.flush()

    def whole(*args, **kwargs):
        try:
            return train_whole(*args, **kwargs)
        finally:
            BOARD.put(_rank(), "end")
            if _rank() == 0:
                Path("modules").write_text("\n".join(sys.modules))

    GuardedAdam.step, launch.training_loop = counted_step, whole
    note_batches(note)


def note_batches(note):
    """Have ``note(cur_nimg, rows, batch, cond)`` called for each batch of each step that begins."""
    of_pass, draw, passes_of = loop.Batches.of_pass, loop.rng.Step, loop.rank_passes
    place, passes = [0, 0], []  # Images before the step, passes in it.

    def noted_draw(seed, cur_nimg, *args):
        place[:] = cur_nimg, 0
        return draw(seed, cur_nimg, *args)

    def noted_passes(*args):
        passes[:] = passes_of(*args)
        return passes

    def noted_batch(batches):
        found, (cur_nimg, number) = of_pass(batches), place
        place[1] += 1
        note(cur_nimg, passes[number], *found)
        return found

    loop.Batches.of_pass, loop.rng.Step, loop.rank_passes = noted_batch, noted_draw, noted_passes


def learn_modules():
    """Import what the last run to end had imported: what is forked later starts faster."""
    for name in Path("modules").read_text().splitlines():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _run_rank(args, order):
    """Train as a rank in this process, which somebody has forked, and end it."""
    global _orders
    launcher.die_with_launcher(signal.SIGTERM)  # As the import of train.py does.
    _orders = open(f"{order}.{_rank()}", "a")
    BOARD.put(_rank(), "start")
    sys.argv = ["train.py", *args]
    dnnlib.program.run(train.main)


def _run_agent(args, order, num_ranks):
    """Be the torchrun of ranks that are forked from this process."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"chaos-{os.getpid()}",
        start_method="fork",
        monitor_interval=0.05,
        max_restarts=0,
    )
    elastic_launch(config, _run_rank_of_agent)(args, str(order))


def _run_rank_of_agent(args, order):
    # As in a process of torchrun's that is not forked: none of its handlers, and no wait for a word
    # of torchrun at the end, which would wait for a process that was killed in there.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    multiprocessing.synchronize.Event.wait = lambda event, timeout=None: True
    try:
        _run_rank(args, order)
    except SystemExit as stop:
        if stop.code:
            os._exit(stop.code)  # Torchrun takes it for a failure only this way.


class Started:
    """A training run in processes of its own: one, or ranks under torchrun; warm or cold."""

    def __init__(self, args, ranks, log, order, *, cold):
        self.ranks, self.log, self._begin = ranks, log, time.monotonic()
        BOARD.clear()
        self._is_child = not cold
        if cold:
            command = [sys.executable]
            if ranks > 1:
                command += [
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc_per_node={ranks}",
                ]
            with open(log, "w") as file:
                done = subprocess.Popen(
                    [*command, str(ROOT / "train.py"), *args],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._popen, self.pid = done, done.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                self._be_child(args, order)
        self._code = None

    def _be_child(self, args, order):
        code = 1
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            if self.ranks > 1:
                _run_agent(args, order, self.ranks)
            else:
                _run_rank(args, order)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def poll(self):
        """Return the exit code, None while it runs."""
        if self._code is None:
            if self._is_child:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            else:
                self._code = self._popen.poll()
        return self._code

    @property
    def seconds(self):
        return time.monotonic() - self._begin

    def workers(self):
        """Return the processes of the ranks, in their order, as far as they have started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.pid)
            return sorted(top.children(), key=lambda p: p.pid) if self.ranks > 1 else [top]
        return []

    def everyone(self):
        """Return all processes of the session that this one began."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait(self):
        """Return the exit code once no process is left; raise TimeoutError if one stays."""
        deadline = time.monotonic() + DEADLINE_SEC
        while self.poll() is None or self.everyone():
            if time.monotonic() > deadline:
                left = [process.pid for process in self.everyone()]
                raise TimeoutError(f"processes {left} of a run are left ({self.log})")
            time.sleep(0.01)
        return self._code

    def output(self):
        return Path(self.log).read_text(errors="replace")
