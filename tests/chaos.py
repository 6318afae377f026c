"""Kills training runs at random moments, continues them, and compares them with undisturbed ones.

    python tests/chaos.py --kills=300 --seed=1

Tiny runs of every kind of model, in one process and under torchrun with two ranks, are killed with
SIGKILL: one rank, all ranks, or torchrun. After each kill no process may be left and every file
must be readable; the same command continues. In the end files, losses and the data of every step
are equal bit for bit to those of a run that was left alone. docs/reliability.md has the figures.

Half of the kills come at a moment drawn from the duration of a run, the others in a stage that was
drawn first, as saves are short. Most processes are forked from this one, which has imported
everything; a share are started as users do, because imports are killed, too.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

for _name, _value in (("OMP_NUM_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", "")):
    os.environ[_name] = _value  # Before torch is imported.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import chaos_runs  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from training_runs import differences  # noqa: E402

from training.checkpoint import find_states, load_snapshot, load_state  # noqa: E402

_COLD_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill: of what, when, and how long it took until nothing was left."""

    kind: str
    ranks: int
    target: str
    stage: str
    cold: bool
    seconds: float  # Until the last process had gone.


class ChaosError(Exception):
    """A run was not what it promises."""


class Reference:
    """A run that nobody disturbed, and how long its stages took."""

    def __init__(self, base, kind, ranks):
        self.outdir, self.order = base / f"{kind}{ranks}", base / f"{kind}{ranks}-order"
        args = chaos_runs.command_of(kind, self.outdir)
        self._watch(args, ranks, self.order)
        self.run_dir, self.data = run_dir_of(self.outdir), read_order(self.order)
        # Once more, now that this process has imported all that such a run needs.
        chaos_runs.learn_modules()
        again, order = base / f"{kind}{ranks}-again", base / f"{kind}{ranks}-again-order"
        warm = self._watch(chaos_runs.command_of(kind, again), ranks, order)
        check_equal(run_dir_of(again), order, self)
        num_imports = 1 if ranks == 1 else 1 + ranks
        self.seconds = {False: warm, True: warm + num_imports * import_seconds()}

    def _watch(self, args, ranks, order):
        """Run to the end, note how long each stage took, and return the seconds."""
        self.spans = collections.defaultdict(list)
        run = chaos_runs.Started(args, ranks, f"{order}.log", order, cold=False)
        before, began = chaos_runs.BOARD.stage(0), 0.0
        while run.poll() is None:
            if (now := chaos_runs.BOARD.stage(0)) != before:
                self.spans[before[0]].append(run.seconds - began)
                before, began = now, run.seconds
            time.sleep(0.0005)
        self.spans[before[0]].append(run.seconds - began)
        seconds = run.seconds
        if run.wait() != 0:
            raise ChaosError(f"a run that was left alone failed:\n{run.output()}")
        return seconds


@functools.cache
def import_seconds():
    """Return how long a process takes that only imports what training needs."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import train"], check=True, cwd=chaos_runs.ROOT)
    return time.monotonic() - began


def run_dir_of(outdir):
    """Return the run folder; None before there is one. Empty folders are none."""
    found = [path for path in outdir.glob("0*") if (path / "training_options.json").is_file()]
    if len(found) > 1:
        raise ChaosError(f"one command made several runs: {found}")
    return found[0] if found else None


def read_order(order):
    """Return the checksum of the data of each step and rank; a line may be cut off at the end."""
    found = {}
    for path in order.parent.glob(f"{order.name}.[0-9]*"):
        for line in path.read_text().splitlines():
            position, rank, checksum = [*line.split(" "), "", ""][:3]
            if not checksum:
                continue
            key = int(position), int(rank)
            if found.setdefault(key, checksum) != checksum:
                raise ChaosError(
                    f"{path}: step at image {key[0]} had other data in another attempt"
                )
    return found


def check_readable(run_dir):
    """Raise ChaosError if a kill left a file that cannot be read."""
    states = find_states(run_dir)
    for path in run_dir.glob("[!.]*"):
        try:
            if path in states:
                load_state(path)
            elif path.suffix == ".pkl":
                load_snapshot(path)
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                *lines, _ = path.read_text().split("\n")  # A row may be cut off.
                [json.loads(line) for line in lines]
        except (ValueError, OSError) as error:
            raise ChaosError(f"{path} cannot be read: {error}") from error


def rows_of(path):
    """Return the rows of a JSONL file without what is about times and machines."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    about = ("Timing/", "Resources/", "timestamp", "seconds", "packages")
    return [{k: v for k, v in row.items() if not k.startswith(about)} for row in rows]


def content_of(path):
    """Return what a state or a snapshot holds, without what is about time and place."""
    content = load_state(path) if path.is_dir() else torch.load(path, weights_only=True)
    del content["progress"]["elapsed_sec"]
    content.pop("packages", None)  # Those that the process has imported.
    return content


def check_equal(run_dir, order, reference):
    """Raise ChaosError if a finished run is not that of the reference bit for bit."""
    left = [path.name for path in run_dir.glob(".*") if path.name != ".lock"]
    if left:
        raise ChaosError(f"{run_dir}: left behind: {left}")
    patterns = ("training-state-*", "*.pkl", "*.png", "*.jsonl")
    names = [{p.name for n in patterns for p in d.glob(n)} for d in (run_dir, reference.run_dir)]
    if names[0] != names[1]:
        raise ChaosError(f"{run_dir}: other files than the reference: {names[0] ^ names[1]}")
    for name in sorted(names[0]):
        paths = run_dir / name, reference.run_dir / name
        if name.startswith(("training-state-", "network-snapshot-")):
            wrong = differences(*map(content_of, paths))
        elif name.endswith(".jsonl"):
            wrong = [] if rows_of(paths[0]) == rows_of(paths[1]) else ["rows"]
        else:
            wrong = [] if paths[0].read_bytes() == paths[1].read_bytes() else ["pixels"]
        if wrong:
            raise ChaosError(f"{paths[0]} differs from {paths[1]}: {wrong[:5]}")
    data = read_order(order)
    if any(reference.data.get(key) != checksum for key, checksum in data.items()):
        raise ChaosError(f"{run_dir}: the steps had other data than those of the reference")


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: some seconds after the start, or after a stage begins for the n-th time."""

    delay: float
    stage: str | None = None
    number: int = 0


def draw_moment(generator, reference, cold):
    """Return a random moment of a run."""
    if cold or generator.random() < 0.5:
        return Moment(generator.uniform(0, reference.seconds[cold]))
    stage = generator.choice([name for name in chaos_runs.STAGES[1:] if reference.spans[name]])
    spans = reference.spans[stage]
    longest = spans[0] if stage == "start" else 1.1 * max(spans)
    number = generator.randint(1, max(len(spans) // 2, 1))
    return Moment(generator.uniform(0, longest), stage, number)


def wait_for(moment, run):
    """Return whether the moment came before the end of the run."""
    before, entered, begin = chaos_runs.BOARD.stage(0), 0, None if moment.stage else 0.0
    while run.poll() is None:
        now = chaos_runs.BOARD.stage(0)
        if begin is None and now != before:
            before = now
            entered += now[0] == moment.stage
            begin = run.seconds if entered == moment.number else None
        if begin is not None and run.seconds >= begin + moment.delay:
            return True
        if run.seconds > chaos_runs.DEADLINE_SEC:
            raise TimeoutError(f"a run does not end ({run.log})")
        time.sleep(0.0005)
    return False


def stage_of_cold(run):
    """Return the stage of a run that tells nobody but its reader."""
    output = run.output()
    if "Training on" not in output:
        return "import"
    return "tick" if "\ntick" in output else "start"


def strike(run, target, cold, generator):
    """Kill, and return what was hit and the stage that it was in."""
    workers = run.workers() if run.ranks > 1 else []
    victims, rank = [psutil.Process(run.pid)], 0
    if target in ("rank", "all") and len(workers) < run.ranks:
        target = "launcher"
    if target == "rank":
        rank = generator.randrange(run.ranks)
        victims = [workers[rank]]
    elif target == "all":
        victims = workers
    stage = stage_of_cold(run) if cold else chaos_runs.BOARD.stage(rank)[0]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    return target, "start" if stage == "import" and not cold else stage


class Chaos:
    """The runs and the kills of one call."""

    def __init__(self, base, seed, kinds, report):
        self.base, self.generator = base, random.Random(seed)
        self.kinds, self.report, self.num_runs = kinds, report, 0
        each = {1: ["process"], 2: ["rank", "all", "launcher"]}
        self.targets = {ranks: itertools.cycle(targets) for ranks, targets in each.items()}

    @functools.cache  # noqa: B019
    def reference(self, kind, ranks):
        return Reference(self.base, kind, ranks)

    def disturb(self, kind, ranks, num_kills):
        """Kill a run so many times, let it end, and compare it."""
        reference, number = self.reference(kind, ranks), self.num_runs
        self.num_runs += 1
        outdir, order = self.base / f"run{number}", self.base / f"run{number}-order"
        log = self.base / f"run{number}.log"
        args = chaos_runs.command_of(kind, outdir)
        for attempt in range(num_kills + 1):
            cold = attempt < num_kills and self.generator.random() < _COLD_SHARE
            run = chaos_runs.Started(args, ranks, log, order, cold=cold)
            moment = draw_moment(self.generator, reference, cold)
            if attempt == num_kills or not wait_for(moment, run):
                if run.wait() != 0:
                    raise ChaosError(f"{args} failed:\n{run.output()}")
                break
            target = next(self.targets[ranks])
            target, stage = strike(run, target, cold, self.generator)
            began = time.monotonic()
            run.wait()
            seconds = time.monotonic() - began
            if run_dir_of(outdir) is not None:
                check_readable(run_dir_of(outdir))
            self.report(Kill(kind, ranks, target, stage, cold, round(seconds, 2)))
        check_equal(run_dir_of(outdir), order, reference)
        for path in self.base.glob(f"run{number}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def table(kills):
    """Return the kills counted by stage, target, kind and ranks, as Markdown."""
    heads = ["killed", "1 rank", "2: one rank", "2: all ranks", "2: torchrun", "all"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    targets = ("process", "rank", "all", "launcher")

    def add(name, chosen):
        counts = [sum(kill.target == target for kill in chosen) for target in targets]
        lines.append("| " + " | ".join([name, *map(str, counts), str(len(chosen))]) + " |")

    for stage in chaos_runs.STAGES:
        add(f"stage: {stage}", [kill for kill in kills if kill.stage == stage])
    for kind in chaos_runs.KINDS:
        add(f"model: {kind}", [kill for kill in kills if kill.kind == kind])
    add("started cold", [kill for kill in kills if kill.cold])
    add("all", kills)
    return "\n".join(lines)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300, help="Number of kills.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of what is killed, and when.")
    parser.add_argument("--per-run", type=int, default=12, help="Most kills of one run.")
    parser.add_argument("--kinds", default=",".join(chaos_runs.KINDS), help="Kinds of models.")
    parser.add_argument("--ranks", default="1,2", help="Numbers of ranks.")
    parser.add_argument(
        "--record",
        type=lambda text: Path(text).absolute(),
        help="File to which kills are appended; the table is of all that it holds.",
    )
    parser.add_argument("--base", type=Path, help="Folder for the runs, kept after a failure.")
    return parser.parse_args()


def main():
    options = parse_arguments()
    base = options.base.absolute() if options.base else Path(tempfile.mkdtemp(prefix="chaos-"))
    base.mkdir(parents=True, exist_ok=True)
    os.environ["SETDIFFIT_CACHE"] = str(base / "cache")
    torch.set_num_threads(1)
    chaos_runs.unpack_data(base)
    os.chdir(base)
    chaos_runs.instrument()
    began, kills = time.monotonic(), []

    def report(kill):
        kills.append(kill)
        passed = time.monotonic() - began
        left = passed / len(kills) * (options.kills - len(kills))
        print(f"{len(kills):4d} {passed:5.0f} s, {left:5.0f} s left: {kill}", flush=True)
        if options.record:
            with open(options.record, "a") as file:
                file.write(json.dumps(dataclasses.asdict(kill)) + "\n")

    chaos = Chaos(base, options.seed, options.kinds.split(","), report)
    places = [(kind, int(ranks)) for kind in chaos.kinds for ranks in options.ranks.split(",")]
    while len(kills) < options.kills:
        kind, ranks = places[chaos.num_runs % len(places)]
        num_kills = min(chaos.generator.randint(1, options.per_run), options.kills - len(kills))
        try:
            chaos.disturb(kind, ranks, num_kills)
        except (ChaosError, TimeoutError) as error:
            sys.exit(f"Failed after {len(kills)} kills, see {base}: {error}")
    if options.record:
        kills = [Kill(**json.loads(line)) for line in options.record.read_text().splitlines()]
    slowest = max(kill.seconds for kill in kills)
    print(table(kills))
    print(
        f"{chaos.num_runs} runs equal their references. After a kill the last process ended "
        f"within {slowest:.1f} s. {time.monotonic() - began:.0f} s in all."
    )
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
