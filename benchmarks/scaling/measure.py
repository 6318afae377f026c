"""benchmark.py scaling --measure: steps and sums of 1, 2, 4 and 8 processes of this host."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from benchmarks.kinds import make_pictures
from benchmarks.measure import device_name
from benchmarks.scaling.host import FITTED, PREDICTED, Measured, StepTime, SumTime, fit
from configs.presets import get_preset
from dnnlib.files import write_json
from dnnlib.parallel import num_usable_cores
from dnnlib.progress import progress
from models import build_network
from torch_utils.misc import count_parameters

_ROOT = Path(__file__).resolve().parents[2]
# Wide enough for sums to take a share of the step that can be seen.
_PRESET, _WIDTHS = "digits", dict(base_dim=96, hidden_dim=288)
BATCH = 64
# Of one process, for what a row takes.
_OTHER_BATCHES = (16, 32)
_STEPS_PER_TICK, _NUM_TICKS = 3, 8


def measure(path: Path) -> Measured:
    """Measure this host into a file, with the prediction for eight processes before the last."""
    model = dataclasses.replace(get_preset(_PRESET).run.model, **_WIDTHS)
    with torch.device("meta"):
        network = build_network(model)
    options = [f"--preset={_PRESET}"]
    options += [f"--{name.replace('_', '-')}={width}" for name, width in _WIDTHS.items()]
    measured = Measured(
        hardware=f"{device_name(torch.device('cpu'))}, torch {torch.__version__}",
        num_cores=num_usable_cores(),
        command=" ".join(["train.py", *options, f"--batch={BATCH}"]),
        weight_bytes=4 * count_parameters(network),
        parts=len(list(model.sharded_parts(network.backbone))),
        sums=(),
        steps=(),
        predicted={},
    )
    tasks = [(num, shard) for num in FITTED for shard in ("none", "full")]
    with (
        tempfile.TemporaryDirectory() as folder,
        progress(total=len(tasks) + 2, label="Measuring", unit="run") as bar,
    ):
        data = make_pictures(Path(folder), model, 512)
        for num, shard in tasks:
            measured = _with_steps(measured, data, options, num, shard)
            bar.update(1)
        measured = _predict(measured)
        write_json(path, dataclasses.asdict(measured))
        for shard in ("none", "full"):
            measured = _with_steps(measured, data, options, PREDICTED, shard)
            bar.update(1)
    write_json(path, dataclasses.asdict(measured))
    for shard, seconds in measured.predicted.items():
        (found,) = measured.of(PREDICTED, shard)
        error = seconds / found.seconds - 1
        click.echo(f"--shard={shard}: measured {found.seconds * 1e3:.0f} ms, error {error:+.0%}")
    return measured


def _predict(measured: Measured) -> Measured:
    constants, rows = fit(measured), BATCH // PREDICTED
    predicted = {
        shard: constants.step(measured, PREDICTED, rows, shard) for shard in ("none", "full")
    }
    for shard, seconds in predicted.items():
        click.echo(f"Predicted for {PREDICTED} processes, --shard={shard}: {seconds * 1e3:.0f} ms")
    return dataclasses.replace(measured, predicted=predicted)


def _with_steps(
    measured: Measured, data: Path, options: Sequence[str], num: int, shard: str
) -> Measured:
    """Return ``measured`` with the steps of ``num`` processes, and once for each, their sums."""
    if num == 1 and shard == "full":  # Nothing is divided.
        return measured
    batches = (*_OTHER_BATCHES, BATCH) if num == 1 else (BATCH,)
    steps, sums = list(measured.steps), list(measured.sums)
    for batch in batches:
        seconds = time_steps(data, [*options, f"--batch={batch}", f"--shard={shard}"], num)
        steps.append(StepTime(num, shard, batch // num, seconds))
    if num > 1 and shard == "none" and num in FITTED:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "sums.json"
            _run_ranks(num, ["-m", "benchmarks.scaling.traffic", str(file)])
            sums += [SumTime(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    return dataclasses.replace(measured, steps=tuple(steps), sums=tuple(sums))


def time_steps(data: Path, options: Sequence[str], num: int) -> float:
    """Return the median seconds of an optimizer step of train.py on ``num`` processes."""
    ticks = [f"--log-interval={_STEPS_PER_TICK}", f"--iters={_STEPS_PER_TICK * _NUM_TICKS + 1}"]
    quiet = ["--snap=1000000", "--board=none", "--workers=0", "--steps=1", "--sample-batch=8"]
    with tempfile.TemporaryDirectory() as outdir:
        where = [f"--data={data}", f"--outdir={outdir}"]
        _run_ranks(num, ["train.py", *options, *ticks, *quiet, *where])
        (stats,) = Path(outdir).glob("*/stats.jsonl")
        rows = [json.loads(line) for line in stats.read_text(encoding="utf-8").splitlines()]
    # The first tick is a step, and the second is beside the first state's writing.
    times = [row["Timing/sec_per_tick"]["mean"] / _STEPS_PER_TICK for row in rows[2:]]
    return statistics.median(times)


def _run_ranks(num: int, command: Sequence[str]) -> None:
    """Run a script or module on so many processes with a thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ValueError(f"{' '.join(command[:2])} on {num} processes failed: {''.join(last)}")
