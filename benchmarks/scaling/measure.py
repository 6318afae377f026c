"""benchmark.py scaling --measure: times steps and sums of 1, 2, 4 and 8 processes on this host."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch

from benchmarks.measure import device_name
from benchmarks.scaling.host import FITTED, PREDICTED, Measured, StepTime, SumTime, fit
from benchmarks.scaling.ranks import PRESET, WIDTHS, model_config
from dnnlib.files import write_json
from dnnlib.parallel import num_usable_cores
from dnnlib.progress import progress
from models import build_network
from torch_utils.misc import count_parameters

_ROOT = Path(__file__).resolve().parents[2]
BATCH = 64
# Further batches of one process, to find the time per row.
_OTHER_BATCHES = (16, 32)


def measure(path: Path) -> Measured:
    """Measure this host, write the results to a file, and return them.

    The prediction for eight processes is written before these are measured.
    """
    model = model_config()
    with torch.device("meta"):
        network = build_network(model)
    widths = [f"--{name.replace('_', '-')}={width}" for name, width in WIDTHS.items()]
    measured = Measured(
        hardware=f"{device_name(torch.device('cpu'))}, torch {torch.__version__}",
        num_cores=num_usable_cores(),
        command=" ".join([f"--preset={PRESET}", *widths, f"--batch={BATCH}"]),
        weight_bytes=4 * count_parameters(network),
        parts=len(list(model.sharded_parts(network.backbone))),
        sums=(),
        steps=(),
        predicted={},
    )
    with progress(total=len(FITTED) + 1, label="Measuring", unit="run") as bar:
        for num in FITTED:
            measured = _with_times(measured, num)
            bar.update(1)
        measured = _predict(measured)
        write_json(path, dataclasses.asdict(measured))
        measured = _with_times(measured, PREDICTED)
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


def _with_times(measured: Measured, num: int) -> Measured:
    """Return ``measured`` with the steps and sums of ``num`` processes of one thread added."""
    batches = (*_OTHER_BATCHES, BATCH) if num == 1 else (BATCH,)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num}"]
        task = ["-m", "benchmarks.scaling.ranks", str(file), ",".join(map(str, batches))]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, *task],
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise ValueError(f"Steps on {num} processes failed: {''.join(last)}")
        found = json.loads(file.read_text(encoding="utf-8"))
    steps = measured.steps + tuple(StepTime(**row) for row in found["steps"])
    sums = measured.sums + tuple(SumTime(**row) for row in found["sums"])
    return dataclasses.replace(measured, steps=steps, sums=sums)
