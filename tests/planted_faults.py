"""Plants faults in training runs, and counts which are named, and how often clean runs alarm.

    python tests/planted_faults.py --folder=faults --clean=50 --seeds=3
    python tests/planted_faults.py --folder=faults --statistics
    python tests/planted_faults.py --folder=faults --write

Clean runs of the four small presets have seeds 0, 1, ...: thresholds are set on the first ten, and
judged on the others. Each fault of tests/faults/ is planted in each of its presets with seeds from
200 on, and has to be named, by the right name, within the first tenth of the run, where it ends.
A run has a row in FOLDER/results; those that are there are not made again. --statistics shows what
the measured values reach; --write puts the table in docs/watching.md.
"""

import argparse
import concurrent.futures
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

for _name, _value in (("OMP_NUM_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", "")):
    os.environ[_name] = _value  # Before torch is imported.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from dnnlib.files import atomic_write  # noqa: E402
from dnnlib.progress import progress  # noqa: E402

TABLE = "docs/watching.md"
MARKS = ("<!-- faults: begin -->", "<!-- faults: end -->")
FIRST_FAULT_SEED = 200  # On seed 100 thresholds were adjusted.
NUM_CALIBRATION = 10  # Clean runs on which thresholds were set.
SHARE = 0.1  # Of a run, within which a fault has to be named.
# What of a preset is trained; a tenth of it has at least three ticks.
COMMON = ("--board=none", "--snap=10", "--log-interval=20")
RUNS = {
    "digits": ("digits.zip", ("--kimg=12", "--batch=16", "--lr-rampup=1", "--ema-kimg=1")),
    "fsdm-digits": ("digits.zip", ("--kimg=120", "--lr-rampup=10", "--ema-kimg=10")),
    "digits-latent": ("digits-latents", ("--kimg=80", "--ema-kimg=4")),
    "nanodit-tiny": (
        "features",
        ("--kimg=8", "--text-lengths=8", "--ema-kimg=0.3"),
    ),
}


def all_faults():
    """Return the faults by name, of every module of tests/faults/ that has some."""
    modules = sorted(path.stem for path in (ROOT / "tests/faults").glob("[a-z]*.py"))
    found = [importlib.import_module(f"faults.{name}").FAULTS for name in modules]
    return {fault.name: fault for faults in found for fault in faults}


def prepare(folder):
    """Make the data of all presets, as far as they are not there."""
    from measure_inspection import data_of

    for preset, (name, _) in RUNS.items():
        assert data_of(preset, folder) == folder / name


def run_one(folder, name, preset, seed):
    """Train in this process, with a fault planted; return its row."""
    import train
    from training.telemetry import Telemetry

    fault = all_faults().get(name)
    data, options = RUNS[preset]
    outdir = folder / "runs" / f"{name}-{preset}-{seed}"
    record, total = Telemetry.record, []

    def recorded(self, stats, cur_nimg):
        record(self, stats, cur_nimg)
        options = json.loads((self._run_dir / "training_options.json").read_text())
        total[:] = [options["total_kimg"]]
        if fault is not None and cur_nimg >= SHARE * 1000 * total[0]:
            os.kill(os.getpid(), signal.SIGTERM)  # The tenth is over; it ends as a user's stop.

    if fault is not None:
        fault.plant()
        options = (*options, *fault.options)
        Telemetry.record = recorded
    start, args = time.monotonic(), (f"--data={folder / data}", f"--preset={preset}", *options)
    args = [f"--outdir={outdir}", f"--seed={seed}", *COMMON, *args]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            train.main(args, standalone_mode=False)
            error = None
        except (click.ClickException, FloatingPointError) as reason:
            error = str(reason)
    (run_dir,) = outdir.iterdir()
    stats = (run_dir / "stats.jsonl").read_text().splitlines()
    (folder / "results" / f"{outdir.name}.stats.jsonl").write_text("\n".join(stats) + "\n")
    watched = run_dir / "watch.jsonl"
    found = (
        [json.loads(row) for row in watched.read_text().splitlines()] if watched.exists() else []
    )
    kimg = json.loads((run_dir / "training_options.json").read_text())["total_kimg"]
    row = dict(fault=name, preset=preset, seed=seed, total_kimg=kimg, findings=found, error=error)
    return dict(row, seconds=round(time.monotonic() - start, 1))


def result_path(folder, name, preset, seed):
    return folder / "results" / f"{name}-{preset}-{seed}.json"


def cells_of(clean, seeds):
    """Return name, preset and seed of every run: ``clean`` ones in all, and of every fault."""
    presets = list(RUNS)
    cells = [("clean", presets[seed % len(presets)], seed) for seed in range(clean)]
    for fault in all_faults().values():
        for preset in fault.presets:
            cells += [(fault.name, preset, FIRST_FAULT_SEED + seed) for seed in range(seeds)]
    return cells


def make(folder, cell):
    """Make one run in a process of its own, unless its row is there."""
    if result_path(folder, *cell).exists():
        return
    shutil.rmtree(folder / "runs" / "-".join(map(str, cell)), ignore_errors=True)
    fault = all_faults().get(cell[0])
    start = [sys.executable]
    if fault is not None and fault.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={fault.ranks}"]
    command = [*start, __file__, f"--folder={folder}", "--one", *map(str, cell)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cell} failed:\n{done.stderr}")


def read_results(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]


def is_named(row, fault):
    """Return whether a run with a fault named it, within its first tenth."""
    limit = SHARE * row["total_kimg"] + 1e-9
    names = {found["name"] for found in row["findings"] if found["kimg"] <= limit}
    return fault.expects in names


def describe(rows):
    """Return the lines of the table: what was named of each fault, and the alarms of clean runs."""
    faults, by_fault = all_faults(), {}
    for row in rows:
        by_fault.setdefault(row["fault"], []).append(row)
    lines = ["| fault | has to be named | " + " | ".join(RUNS) + " |", "|---" * 6 + "|"]
    for name, fault in faults.items():
        cells = []
        for preset in RUNS:
            own = [row for row in by_fault.get(name, []) if row["preset"] == preset]
            named = sum(is_named(row, fault) for row in own)
            cells.append(f"{named} of {len(own)}" if own else "")
        lines.append(f"| `{name}` | `{fault.expects}` | {' | '.join(cells)} |")
    clean = by_fault.get("clean", [])
    for title, first, last in (
        (f"the {NUM_CALIBRATION} clean runs on which thresholds were set", 0, NUM_CALIBRATION),
        ("the other clean runs", NUM_CALIBRATION, FIRST_FAULT_SEED),
    ):
        own = [row for row in clean if first <= row["seed"] < last]
        alarms = [f"{found['name']} in {row['preset']}" for row in own for found in row["findings"]]
        told = f": {', '.join(alarms)}" if alarms else ""
        lines += ["", f"Alarms in {title}: {len(alarms)} in {len(own)}{told}."]
    return lines


# Statistics that thresholds are about, by which end of them tells a fault.
EXTREMES = (
    ("update_ratio", max),
    ("update_ratio", min),
    ("gradient_alignment", max),
    ("rounded_weights", max),
    ("lost_updates", max),
    ("average_step", min),
    ("average_gap", max),
    ("context_gap", max),
    ("activation", max),
    ("gain", max),
    ("logit", max),
    ("gradient", min),
)


def extremes(folder, rows):
    """Return what the statistics of some runs reach in their second worst tick, by name."""
    found = {}
    for row in rows:
        path = result_path(folder, row["fault"], row["preset"], row["seed"])
        text = path.with_suffix(".stats.jsonl").read_text()
        for name, worst in EXTREMES:
            ticks = []
            for stats in map(json.loads, text.splitlines()):
                own = {key: stat["mean"] for key, stat in stats.items() if isinstance(stat, dict)}
                scale = own["Watch/loss"] if name.endswith("_gap") and "Watch/loss" in own else 1
                values = [
                    value / scale
                    for key, value in own.items()
                    if value is not None and f"{key}/".startswith(f"Watch/{name}/")
                ]
                ticks += [worst(values)] if values else []
            ordered = sorted(ticks, reverse=worst is max)
            if len(ordered) > 1:
                key = f"{worst.__name__} {name}"
                found[key] = worst(found.get(key, ordered[1]), ordered[1])
    return found


def describe_statistics(folder, rows):
    """Return a table of the extremes in the clean runs for thresholds, and with each fault."""
    groups = {}
    for row in rows:
        if row["fault"] != "clean" or row["seed"] < NUM_CALIBRATION:
            groups.setdefault((row["fault"], row["preset"]), []).append(row)
    names = [f"{worst.__name__} {name}" for name, worst in EXTREMES]
    lines = [" ".join(["fault, preset".ljust(36), *(name.rjust(22) for name in names)])]
    for (fault, preset), own in sorted(groups.items()):
        found = extremes(folder, own)
        cells = [f"{found[name]:.3g}" if name in found else "-" for name in names]
        title = f"{fault}, {preset}".ljust(36)
        lines.append(" ".join([title, *(cell.rjust(22) for cell in cells)]))
    return lines


def write_table(lines):
    path = ROOT / TABLE
    text = path.read_text(encoding="utf-8")
    pattern = f"(?<={re.escape(MARKS[0])}\n).*(?={re.escape(MARKS[1])})"
    made = re.sub(pattern, lambda found: "\n".join(lines) + "\n", text, flags=re.DOTALL)
    path.write_text(made, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for data, runs and their rows")
    parser.add_argument("--clean", type=int, default=50, help="clean runs in all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each fault and preset")
    parser.add_argument("--only", default="", help="names of runs to make, separated by commas")
    parser.add_argument("--parallel", type=int, default=2, help="runs at the same time")
    parser.add_argument("--one", nargs=3, help="name, preset and seed of a run to make here")
    parser.add_argument("--statistics", action="store_true", help="show what thresholds are about")
    parser.add_argument("--write", action="store_true", help=f"put the table into {TABLE}")
    options = parser.parse_args()
    folder = options.folder.resolve()
    (folder / "results").mkdir(parents=True, exist_ok=True)
    if options.one:
        name, preset, seed = options.one
        row = run_one(folder, name, preset, int(seed))
        if os.environ.get("RANK", "0") != "0":
            return 0
        with atomic_write(result_path(folder, name, preset, seed), "w") as file:
            file.write(json.dumps(row) + "\n")
        return 0
    if options.statistics:
        print("\n".join(describe_statistics(folder, read_results(folder))))
        return 0
    prepare(folder)
    chosen = [own for own in options.only.split(",") if own]
    cells = [c for c in cells_of(options.clean, options.seeds) if not chosen or c[0] in chosen]
    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
        jobs = [pool.submit(make, folder, cell) for cell in cells]
        with progress(total=len(jobs), label="Runs", unit="run") as bar:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
                bar.update()
    lines = describe(read_results(folder))
    print("\n".join(lines))
    if options.write:
        write_table(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
