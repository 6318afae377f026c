"""Measure how often the inspection of a run finds planted faults, and how often it is wrong.

  python tests/measure_inspection.py OUTDIR --seeds=20            # A row for each fault and preset.
  python tests/measure_inspection.py OUTDIR --preset=digits --clean
  python tests/measure_inspection.py OUTDIR --labels --seeds=100    # Photographs, labels wrong.

Every row is of runs with that many seeds, none of which trains: each is inspected as before its
first step, and then at the end of ten ticks of one step. OUTDIR holds the data that are made first.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

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
from training.watching.inspection.pairs import find_unrelated  # noqa: E402
from training.watching.inspection.sample import Batch, Sample  # noqa: E402

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


def open_job(preset: str, data: Path, seed: int, held_out: int | None = None) -> Job:
    """Return a run of a preset that is ready to be inspected.

    ``held_out`` is how many images of each class sets leave out, if not as the preset does.
    """
    run = get_preset(preset).run
    run = run.changed("data", data=str(data), cache=False).changed("training", seed=seed)
    if preset == "nanodit-tiny":
        run = dataclasses.replace(run, features=FeatureConfig(text_lengths=(8,)))
    if held_out is not None and preset == "fsdm-digits":
        run = run.changed("sets", held_out=held_out)
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


def _measure(fault, queue, *settings) -> None:
    torch.set_num_threads(1)
    if fault is not None:
        fault.plant()
    job = open_job(*settings)
    start = time.perf_counter()
    before = inspect(job)
    elapsed = time.perf_counter() - start
    ticks = found_at_ticks(job)
    queue.put((elapsed, before, ticks))


def measure(fault, *settings) -> tuple:
    """Return seconds of the inspection, its findings and those of each tick, in a new process.

    ``settings`` are those of :func:`open_job`.
    """
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure, args=(fault, queue, *settings))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{settings}: the process ended with {process.exitcode}.")
    return queue.get()


def crops_of_places(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return small crops, uint8 [num, 3, 32, 32], of ten places in two photographs, and which.

    Each is taken near its place, at any size, mirrored at times, in other light.
    """
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(seed)
    labels, crops = rng.integers(0, 10, num), []
    for label in labels.tolist():
        photograph, place = photographs[label % 2], label // 2
        edge = int(rng.integers(60, 200))
        middle = rng.normal((60 + 80 * place, 210), 60)
        left, top = (
            int(np.clip(at - edge / 2, 0, side - edge - 1))
            for at, side in zip(middle, photograph.shape[1::-1], strict=True)
        )
        crop = Image.fromarray(photograph[top : top + edge, left : left + edge]).resize((32, 32))
        pixels = np.asarray(crop).astype(np.float32)[:, :: rng.choice([-1, 1])]
        pixels = pixels * rng.uniform(0.5, 1.5) + rng.uniform(-60, 60, 3)
        crops.append(torch.tensor(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1))
    return torch.stack(crops), torch.tensor(labels)


def alarms(share: float, seed: int) -> bool:
    """Return whether labels are called unrelated of which a share is right, the others random."""
    rng = np.random.default_rng(seed)

    def draw(number: int) -> Sample:
        images, labels = crops_of_places((200, 512)[number], 2 * seed + number)
        random = torch.tensor(rng.integers(0, 10, len(labels)))
        labels = torch.where(torch.tensor(rng.random(len(labels)) < share), labels, random)
        batch = Batch(stored=images, x=images.float(), cond={}, groups=labels)
        return Sample(batches=(batch,))

    return bool(find_unrelated(draw))


def measure_labels(seeds: int) -> None:
    """Print how often labels of photographs are called unrelated, by how many of them are."""
    print("| labels that are right | called unrelated |")
    print("|---|---|")
    for share in (1.0, 0.5, 0.3, 0.2, 0.1, 0.0):
        hits = sum(alarms(share, seed) for seed in range(seeds))
        print(f"| {share:.0%} | {hits} of {seeds} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--preset", choices=ALL)
    parser.add_argument("--clean", action="store_true", help="Plant nothing.")
    parser.add_argument("--labels", action="store_true", help="Judge labels of photographs alone.")
    parser.add_argument("--fault", help="Plant this one alone.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.labels:
        measure_labels(options.seeds)
        return
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
                elapsed, before, ticks = measure(fault, preset, data, seed)
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
