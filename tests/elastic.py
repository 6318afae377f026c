"""Loses and regains nodes at random while runs train, and compares them with undisturbed ones.

    python tests/elastic.py --minutes=10 --seed=1

Up to four torchruns ("nodes") of one rank each train a tiny run together, as with --nnodes=1:4. At
random moments one is killed with its rank, a rank alone is killed, one is asked to stop, or one
comes. Nobody else does anything: those that are left have to go on by themselves. At the end of
each run every step must have had the data, and every tick the loss (to 1e-6), of a run in a
single process that was left alone. docs/reliability.md has the figures.

The nodes are forked from this process, which has imported everything, and find each other by a
file.
"""

import argparse
import collections
import contextlib
import faulthandler
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from datetime import timedelta
from pathlib import Path

for _name, _value in (
    ("OMP_NUM_THREADS", "1"),
    ("CUDA_VISIBLE_DEVICES", ""),
    ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1"),
    ("TORCH_ELASTIC_WORKER_IDENTICAL", "1"),
):
    os.environ[_name] = _value  # Before torch is imported.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import chaos_runs  # noqa: E402
import psutil  # noqa: E402

# torch imports this late. A stop in the middle of it would leave half of it to all later ranks.
import torch._dynamo  # noqa: E402, F401
from helpers import TINY  # noqa: E402
from torch.distributed import FileStore  # noqa: E402
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402
from training_runs import read_rows  # noqa: E402

from training.checkpoint import find_states, load_state  # noqa: E402

NUM_NODES = 4
TOLERANCE = 1e-6
_DEADLINE_SEC = 400  # Without a step.
BATCH = 14
# 14 rows, which neither three ranks nor four can share evenly. A step a tick, and a state every
# fourth.
ARGS = (
    *(*TINY, "--data=images.zip", "--cond", "--label-drop=0.2", "--hflip", "--augment=0.3"),
    *("--num-stages=1", "--base-dim=8", "--time-dim=8", "--hidden-dim=8", "--mlp-ratio=1"),
    *(f"--batch={BATCH}", "--batch-gpu=2", "--tick=0", "--snap=1000", "--dump=4", "--resume=auto"),
    *("--sample-batch=4", "--lr=1e-4", "--precision=fp32"),
)


class ElasticError(Exception):
    """A run was not what it promises."""


class Nodes:
    """Torchruns that train one run, as many as there are at the time."""

    def __init__(self, base, name, num_steps):
        self.base, self.name, self.num_steps = base, name, num_steps
        self.outdir, self.found, self.leaving = base / name, {}, set()
        self.num_started = self.meeting = 0

    def start(self):
        """Have a node come."""
        self.num_started += 1
        log = self.base / f"{self.name}-{self.num_started}.log"
        pid = os.fork()
        if pid == 0:
            self._be_node(log)
        self.found[pid] = log, self.meeting

    def _be_node(self, log):
        code = 1
        try:
            os.setsid()
            faulthandler.register(signal.SIGUSR1)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            c10d_rendezvous_backend._create_file_store = _impatient_file_store
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=NUM_NODES,
                nproc_per_node=1,
                rdzv_backend="c10d",
                rdzv_endpoint=str(self.base / f"{self.name}-meeting.{self.meeting}"),
                rdzv_configs=dict(
                    store_type="file",
                    last_call_timeout=1,
                    keep_alive_interval=1,
                    keep_alive_max_attempt=3,
                    timeout=600,
                ),
                run_id=f"{self.name}.{self.meeting}",
                local_addr="127.0.0.1",
                start_method="fork",
                monitor_interval=0.1,
                max_restarts=1000,
            )
            args = command_of(self.outdir, self.num_steps)
            elastic_launch(config, _run_rank)(args, str(self.outdir) + "-data")
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def alive(self):
        """Return the processes of the nodes that there are."""
        return list(self.found)

    def restart_failed(self):
        """Start nodes that gave up by themselves again, as examples/elastic.sh does."""
        failed = 0
        for pid in list(self.found):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                log, meeting = self.found.pop(pid)
                if "RendezvousClosedError" in log.read_text(errors="replace"):
                    self.meeting = meeting + 1
                if pid not in self.leaving and os.waitstatus_to_exitcode(status):
                    self.start()
                    failed += 1
        return failed

    def strike(self, generator):
        """Do something to a random node; return what."""
        staying = [pid for pid in self.alive() if pid not in self.leaving]
        if not staying:
            return "nothing"
        pid = generator.choice(staying)
        what = generator.choice(("node killed", "rank killed", "node asked to stop"))
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(pid)
            if what == "node killed":
                self.leaving.add(pid)
                node.kill()  # The kernel ends its rank.
            elif what == "node asked to stop":
                self.leaving.add(pid)
                node.terminate()
            else:
                for rank in node.children():
                    rank.kill()
        return what

    def show_stacks(self):
        """Have all nodes write into their logs what they are doing."""
        for pid in self.alive():
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1)

    def end(self):
        """Kill all that is left."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def output(self):
        logs = sorted(self.base.glob(f"{self.name}-*.log"))
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')}" for path in logs)

    def steps(self):
        """Return how many steps the run has recorded."""
        paths = list(self.outdir.glob("*/stats.jsonl"))
        return len(paths[0].read_text().splitlines()) if paths else 0


def _impatient_file_store(params):
    """Open the file by which nodes meet.

    A node that waits for the word of one that was killed while they met does so for 5 minutes. Less
    here, as they meet most of the time.
    """
    store = FileStore(params.endpoint)
    store.set_timeout(timedelta(seconds=15))
    return store


def command_of(outdir, num_steps):
    return [f"--outdir={outdir}", *ARGS, f"--iters={num_steps}"]


def _run_rank(args, data):
    note_rows(f"{data}.{os.getpid()}")
    chaos_runs._run_rank_of_agent(args, data)


def note_rows(path):
    """Have this process write down the checksum of each row of each step that it trains on."""
    file = open(path, "a")

    def note(cur_nimg, rows, batch, cond):
        for row, image, label in zip(rows, batch, cond["label"], strict=True):
            checksum = zlib.crc32(image.numpy().tobytes() + label.numpy().tobytes())
            file.write(f"{cur_nimg} {row} {checksum}\n")
        file.flush()

    chaos_runs.note_batches(note)


def rows_of(outdir):
    """Return the checksum of every row of every step that processes have written down."""
    found = {}
    for path in outdir.parent.glob(f"{outdir.name}-data.*"):
        for line in path.read_text().splitlines():
            parts = line.split(" ")
            if len(parts) < 3 or not parts[2]:
                continue  # Cut off by a kill.
            key = int(parts[0]), int(parts[1])
            if found.setdefault(key, parts[2]) != parts[2]:
                raise ElasticError(f"{path}: row {key} was another one in another attempt")
    return found


def losses_of(outdir):
    (path,) = outdir.glob("*/stats.jsonl")
    return [(row["Progress/kimg"]["mean"], row["Loss/loss"]["mean"]) for row in read_rows(path)]


def is_complete(nodes):
    """Return whether a run has recorded its last step, and its last state is there."""
    if nodes.steps() < nodes.num_steps:
        return False
    (stats,) = nodes.outdir.glob("*/stats.jsonl")
    states = find_states(stats.parent)
    return load_state(states[0])["progress"]["cur_nimg"] == nodes.num_steps * BATCH


def check_equal(nodes, reference):
    """Raise ElasticError if a finished run had other data or losses; return the largest error."""
    there, rows = rows_of(reference), rows_of(nodes.outdir)
    wrong = [key for key, checksum in there.items() if rows.get(key) not in (checksum, None)]
    if wrong:
        raise ElasticError(f"{nodes.name}: other data in rows {wrong[:5]}")
    expected, found = losses_of(reference), losses_of(nodes.outdir)
    if [kimg for kimg, _ in found] != [kimg for kimg, _ in expected]:
        raise ElasticError(f"{nodes.name}: records of other steps")
    errors = [
        abs(loss - other) / other for (_, loss), (_, other) in zip(found, expected, strict=True)
    ]
    if max(errors) > TOLERANCE:
        first = next(i for i, error in enumerate(errors) if error > TOLERANCE)
        raise ElasticError(f"{nodes.name}: the loss of step {first} is off by {errors[first]:.1e}")
    return max(errors)


def train_alone(base, num_steps):
    """Train in a process of its own without nodes; return the folder of runs."""
    outdir = base / "reference"
    pid = os.fork()
    if pid == 0:
        note_rows(f"{outdir}-data.0")
        os.dup2(os.open(base / "reference.log", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        try:
            chaos_runs._run_rank(command_of(outdir, num_steps), base / "order")
        except SystemExit as stop:
            os._exit(stop.code or 0)
        finally:
            os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise ElasticError((base / "reference.log").read_text())
    return outdir


def disturb(nodes, reference, generator, pause, deadline):
    """Lose and regain nodes until a run is complete; return what was done, and the error."""
    done = collections.Counter()
    for _ in range(generator.randint(1, NUM_NODES)):
        nodes.start()
    last, progressed = 0, time.monotonic()
    strike_at = time.monotonic() + generator.uniform(*pause)
    while not is_complete(nodes):
        time.sleep(0.05)
        done["node gave up and was started again"] += nodes.restart_failed()
        now, steps, alive = time.monotonic(), nodes.steps(), nodes.alive()
        if steps != last:
            last, progressed = steps, now
        if now > progressed + _DEADLINE_SEC:
            nodes.show_stacks()
            raise ElasticError(f"{nodes.name} does not move on:\n{nodes.output()}")
        if not alive:
            nodes.start()
            done["start when none was left"] += 1
        elif now > strike_at and now < deadline:
            if len(alive) < NUM_NODES and generator.random() < 0.5:
                nodes.start()
                done["node came"] += 1
            else:
                done[nodes.strike(generator)] += 1
            strike_at = now + generator.uniform(*pause)
    time.sleep(0.5)
    nodes.end()
    return done, check_equal(nodes, reference)


def sizes_of(output):
    """Return with how many ranks a run was trained, start by start."""
    return [int(size) for size in re.findall(r"per optimizer step .*?(\d+) rank", output)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--pause", default="1:8", help="seconds from one disturbance to the next")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="elastic-"))
    chaos_runs.unpack_data(base)
    os.chdir(base)
    pause = tuple(float(part) for part in options.pause.split(":"))
    generator, counts, num_runs, largest = (
        random.Random(options.seed),
        collections.Counter(),
        0,
        0.0,
    )
    sizes = collections.Counter()
    reference = train_alone(base, options.steps)
    deadline = time.monotonic() + 60 * options.minutes
    nodes = None
    try:
        while time.monotonic() < deadline:
            nodes = Nodes(base, f"run{num_runs}", options.steps)
            done, error = disturb(nodes, reference, generator, pause, deadline)
            counts += done
            sizes.update(sizes_of(nodes.output()))
            num_runs, largest = num_runs + 1, max(largest, error)
            print(f"{nodes.name}: equal, {dict(done)}, largest error {error:.1e}", flush=True)
    except ElasticError as error:
        nodes and nodes.end()
        print(f"{error}\nThe runs are in {base}.")
        return 1
    print(
        f"{num_runs} runs equal the undisturbed one, {dict(counts)}; starts by ranks: "
        f"{dict(sorted(sizes.items()))}; largest relative difference of a loss {largest:.1e}."
    )
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
