"""For tests: training runs of a tiny model in processes of their own, and what they leave."""

import contextlib
import functools
import json
import subprocess
import sys
import time

import psutil
import torch
from warm_start import ROOT, WarmProcess, WarmRanks, quiet_environment

from training.checkpoint import find_snapshots, find_states, load_state

TIMEOUT_SEC = 240  # Of anything that takes seconds on an idle machine.

# A model small enough for 10 ms a step, samples that cost two evaluations.
TINY = (
    "--preset=digits",
    "--num-stages=1",
    "--base-dim=16",
    "--hidden-dim=16",
    "--time-dim=32",
    "--batch=64",
    "--sampler=euler",
    "--steps=2",
)

# Everything random in a step is on. 63 steps in ten ticks, of which every fourth has a snapshot and
# a score; a state a tick. The 200 images are passed through twenty times.
FULL = (
    *TINY,
    "--kimg=4",
    "--tick=0.4",
    "--snap=4",
    "--dump=1",
    "--sample-batch=16",
    "--dropout=0.1",
    "--augment=0.3",
    "--metrics=fd_pixels",
    "--ema-stds=0.05,0.10",
)


def environment(cache):
    """Return the environment of a training process."""
    return quiet_environment(SETDIFFIT_CACHE=str(cache), PYTHONUNBUFFERED="1")


class TrainProcess:
    """``train.py`` started by python (``ranks`` is None) or by torchrun.

    With ``warm`` it is forked from a process that has loaded it, and nobody watches over ranks.
    """

    def __init__(
        self,
        args,
        env,
        log,
        ranks=None,
        torchrun=("--standalone",),
        script=ROOT / "train.py",
        warm=False,
    ):
        self._log = log
        log.touch()
        if warm:
            forked = WarmProcess if ranks is None else functools.partial(WarmRanks, ranks)
            self._process = forked([script, *args], env, log)
            return
        command = [sys.executable]
        if ranks is not None:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *torchrun]
        command += [str(script), *map(str, args)]
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def pid(self):
        return self._process.pid

    @property
    def output(self):
        return self._log.read_text(errors="replace")

    def processes(self):
        """Return this process and all that descend from it, while it runs."""
        if self._process.poll() is not None:
            return []
        started = getattr(self._process, "ranks", [self._process])
        tops = [psutil.Process(found.pid) for found in started if found.returncode is None]
        return [*tops, *(child for top in tops for child in top.children(recursive=True))]

    def finish(self, code=0):
        """Wait for the end, require an exit code (or any failure for None), return the output."""
        found = self._process.wait(TIMEOUT_SEC)
        assert found == code if code is not None else found != 0, (found, self.output)
        return self.output

    def wait_until(self, condition):
        """Wait until ``condition()`` is true while the process runs; return its value."""
        deadline = time.monotonic() + TIMEOUT_SEC
        while not (value := condition()):
            assert self._process.poll() is None, f"ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"waited too long:\n{self.output}"
            time.sleep(0.02)
        return value

    def send(self, number):
        self._process.send_signal(number)

    def kill(self):
        """End everything that is left of it."""
        kill_all(self.processes())
        self._process.wait(TIMEOUT_SEC)


def kill_all(processes):
    """End the descendants first, so that none is lost sight of."""
    for process in reversed(processes):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def only_run(outdir):
    """Return the one run folder in ``outdir``."""
    (run_dir,) = [path for path in outdir.iterdir() if path.is_dir()]
    return run_dir


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def num_rows(outdir):
    """Return the number of ticks that the newest run in ``outdir`` has recorded so far."""
    paths = sorted(outdir.glob("*/stats.jsonl"))
    return len(paths[-1].read_text().splitlines()) if paths else 0


def per_tick(run_dir, name):
    return [row[name]["mean"] for row in read_rows(run_dir / "stats.jsonl")]


def leaves(tree, prefix=""):
    """Return ``{path: tensor or plain value}`` of nested dicts and lists."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, child in items for k, v in leaves(child, f"{prefix}/{key}").items()}
    return {prefix: tree}


def differences(first, second):
    """Return the paths at which two trees are not equal bit for bit."""
    first, second = leaves(first), leaves(second)
    assert first.keys() == second.keys()
    return [
        path
        for path, value in first.items()
        if not (
            torch.equal(value, second[path])
            if isinstance(value, torch.Tensor)
            else value == second[path]
        )
    ]


def final_state(run_dir):
    return load_state(find_states(run_dir)[0])


def assert_same_run(run_dir, reference):
    """Require that two finished runs left the same weights, averages, optimizer and records."""
    states = [final_state(path) for path in (run_dir, reference)]
    for state in states:
        del state["progress"]["elapsed_sec"], state["config"]["logging"]
    assert differences(*states) == []
    ema = torch.load(find_snapshots(run_dir)[0], weights_only=True)["ema"]
    assert differences(ema, {**states[0]["ema"]}) == []
    for path in reference.glob("network-snapshot-*.pkl"):
        files = (run_dir / path.name, path)
        assert differences(*[torch.load(file, weights_only=True)["ema"] for file in files]) == []
    for name in ("Progress/tick", "Progress/kimg", "Loss/loss", "Loss/grad_norm"):
        found, expected = per_tick(run_dir, name), per_tick(reference, name)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, msg=f"{name}: {found}")
    for path in reference.glob("metric-*.jsonl"):
        found, expected = read_rows(run_dir / path.name), read_rows(path)
        assert [row["kimg"] for row in found] == [row["kimg"] for row in expected]
        # How many pictures are made may change on resume, and with it what is measured of them.
        same = [
            (own["value"], other["value"])
            for own, other in zip(found, expected, strict=True)
            if own["num_images"] == other["num_images"]
        ]
        assert same
        torch.testing.assert_close([a for a, _ in same], [b for _, b in same])
