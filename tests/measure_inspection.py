"""Measure how often the inspection of a run finds planted faults, and how often it is wrong.

  python tests/measure_inspection.py OUTDIR --seeds=20            # A row for each fault and preset.
  python tests/measure_inspection.py OUTDIR --preset=digits --clean

Every row is of runs with that many seeds, none of which trains: each is inspected as before its
first step, and then at the end of ten ticks of one step. OUTDIR holds the data that are made first.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from faults.data import ALL, FAULTS  # noqa: E402

from configs.presets import get_preset  # noqa: E402
from data.features.config import FeatureConfig  # noqa: E402
from demos.images import encode_digits  # noqa: E402
from demos.photographs import write_encoders, write_photographs  # noqa: E402
from demos.steps import convert, execute  # noqa: E402
from models import build_network  # noqa: E402
from torch_utils import rng  # noqa: E402
from training.config import fit_to_device  # noqa: E402
from training.family import Part  # noqa: E402
from training.family import of as family_of  # noqa: E402
from training.loop import Job  # noqa: E402
from training.watching.inspection.draws import DrawsWatcher  # noqa: E402
from training.watching.inspection.inspect import inspect  # noqa: E402

_NUM_TICKS = 10
_NUM_PHOTOGRAPHS = 72  # As many as have captions of their own.


def data_of(preset: str, outdir: Path) -> Path:
    """Return the data of a preset, made if they are not there."""
    if preset != "nanodit-tiny":
        digits = convert(outdir, "digits")
        return encode_digits(outdir, digits) if preset == "digits-latent" else digits
    images, features = outdir / "photographs", outdir / "features"
    if not features.exists():
        write_photographs(images, num=_NUM_PHOTOGRAPHS)
        args = (f"--source={images}", f"--dest={features}", "--buckets=128x128,160x96")
        args = (*args, "--validation-share=0", *write_encoders(outdir / "encoders"))
        execute("Prepare features", "dataset_tool.py", "features", *args)
    return features


def open_job(preset: str, data: Path, seed: int) -> Job:
    """Return a run of a preset that is ready to be inspected."""
    run = get_preset(preset).run
    run = run.changed("data", data=str(data), cache=False).changed("training", seed=seed)
    if preset == "nanodit-tiny":
        run = dataclasses.replace(run, features=FeatureConfig(text_lengths=(8,)))
    device, family = torch.device("cpu"), family_of(run)
    dataset = family.open_data(run)
    run, codec = family.open_codec(fit_to_device(family.fit(run, dataset), "cpu"), dataset, device)
    return Job(config=run, data=dataset, codec=codec, evaluator=None, device=device)


def found_at_ticks(job: Job) -> list[list]:
    """Return what the watcher of draws finds after each of the first steps, without training."""
    run, family = job.config, family_of(job.config)
    objective = family.objective(run, build_network(run.model).train(), job.codec)
    batch = run.training.batch
    steps = family.steps(run, job.data, 0, Part(rank=0, world_size=1, batch_gpu=batch))
    watcher, found = DrawsWatcher(run, job.data), []
    for number, keys in zip(range(_NUM_TICKS), steps.sampler, strict=False):
        cur_nimg = number * run.step_nimg
        shape = steps.shape_at(cur_nimg)
        draws = objective.draw(rng.Step(run.training.seed, cur_nimg, batch, shape, job.device))
        given = objective.prepare(*job.data.__getitems__(keys), draws, job.device)
        found.append(watcher.findings(objective, *given, draws))
    return found


def _measure(preset: str, data: Path, seed: int, fault, queue) -> None:
    torch.set_num_threads(1)
    if fault is not None:
        fault.plant()
    job = open_job(preset, data, seed)
    start = time.perf_counter()
    before = inspect(job)
    elapsed = time.perf_counter() - start
    ticks = found_at_ticks(job)
    queue.put((elapsed, before, ticks))


def measure(preset: str, data: Path, seed: int, fault) -> tuple:
    """Return seconds of the inspection, its findings and those of each tick, in a new process."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure, args=(preset, data, seed, fault, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{preset}, seed {seed}: the process ended with {process.exitcode}.")
    return queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--preset", choices=ALL)
    parser.add_argument("--clean", action="store_true", help="Plant nothing.")
    parser.add_argument("--fault", help="Plant this one alone.")
    options = parser.parse_args()
    options.outdir.mkdir(parents=True, exist_ok=True)
    print("| preset | planted | named | other findings | seconds of the inspection |")
    print("|---|---|---|---|---|")
    for preset in ALL if options.preset is None else (options.preset,):
        data = data_of(preset, options.outdir)
        of_preset = [f for f in FAULTS if preset in f.presets and f.ranks == 1]
        if options.fault:
            of_preset = [f for f in of_preset if f.name == options.fault]
        for fault in [*([] if options.fault else [None]), *([] if options.clean else of_preset)]:
            named, others, seconds, message = 0, {}, [], ""
            for seed in range(options.seeds):
                elapsed, before, ticks = measure(preset, data, seed, fault)
                seconds.append(elapsed)
                found = {f.name: f for f in (*before, *(f for tick in ticks for f in tick))}
                if fault is not None and fault.expects in found:
                    named += 1
                    message = found.pop(fault.expects).message
                for name, other in found.items():
                    others[name] = others.get(name, 0) + 1
                    message = message or other.message
            what = "nothing" if fault is None else fault.name
            told = "" if fault is None else f"{named} of {options.seeds}"
            also = ", ".join(f"{name} {num}" for name, num in others.items()) or "none"
            print(f"| {preset} | {what} | {told} | {also} | {max(seconds):.1f} |", flush=True)
            if message:
                print(f"<!-- {message} -->", flush=True)


if __name__ == "__main__":
    main()
