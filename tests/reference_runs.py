"""For tests: runs of several seeds as training leaves them, made without training."""

import json
import math

import numpy as np
from report_runs import score_row, stat, write_rows

import families
from configs import get_preset
from dnnlib.config import to_dict

STEP, TICK = 128, 8_000  # Images of a step of digits, and of its ticks at least.
SIGMAS = ("Loss/sigma_0-0.11", "Loss/sigma_0.11-0.22", "Loss/sigma_0.81-inf")


def tick_ends(num_ticks, tick=TICK):
    """Return kimg at the ends of ticks, as the loop makes them: the first is a step."""
    ends = [STEP]
    while len(ends) < num_ticks:
        ends.append(ends[-1] + math.ceil(tick / STEP) * STEP)
    return [nimg / 1000 for nimg in ends]


def loss_at(kimg):
    return 0.4 + math.exp(-kimg / 20)


def mean_loss(start, end):
    """Return the mean of :func:`loss_at` over images."""
    return 0.4 + 20 * (math.exp(-start / 20) - math.exp(-end / 20)) / (end - start)


def write_run(run_dir, seed, *, num_ticks=12, tick=TICK, change=None, data=None, **training):
    """Write the files of a run of preset digits whose curves vary by 1% from seed to seed.

    ``change(name, kimg)`` is a factor of a statistic; ``training`` replaces settings.
    """
    rng = np.random.default_rng(seed)
    family = families.of(get_preset("digits").run)
    config = family.fit(get_preset("digits").run, None, 10).changed(
        "training", seed=seed, cpu_matmul="mkl", **training
    )
    facts = dict(name="digits", num_images=1797, content_hash="v2-a")
    facts["class_names"] = list("0123456789")
    options = dict(
        config=to_dict(config),
        command=["/x/train.py", "--preset=digits", f"--seed={seed}"],
        packages=dict(torch="2.13"),
        total_kimg=154,
        data=facts | (data or {}),
    )
    run_dir.mkdir(parents=True)
    (run_dir / "training_options.json").write_text(json.dumps(options))
    ends = tick_ends(num_ticks, tick)
    noise = 0.01 * (TICK / tick) ** 0.5
    rows = []
    for index, kimg in enumerate(ends):
        value = mean_loss(ends[index - 1] if index else 0, kimg)
        means = dict.fromkeys(("Loss/loss", *SIGMAS), value) | {"Loss/grad_norm": 50 * value}
        means |= {"Loss/learning_rate": 0.002, "Timing/sec_per_tick": 8.0}
        for name in means:
            means[name] *= math.exp(noise * rng.normal())
            means[name] *= change(name, kimg) if change else 1.0
        means |= {"Progress/kimg": kimg, "Progress/tick": index}
        rows.append({name: stat(mean) for name, mean in means.items()})
    write_rows(run_dir / "stats.jsonl", rows)
    snapshots = [kimg for index, kimg in enumerate(ends) if index % 5 == 0]
    factor = change("fd_pixels", 0) if change else 1.0
    scores = [math.exp(0.02 * rng.normal()) * factor / (1 + kimg) for kimg in snapshots]
    write_rows(
        run_dir / "metric-fd_pixels.jsonl",
        [score_row(kimg, value) for kimg, value in zip(snapshots, scores, strict=True)],
    )
    return run_dir


def write_seeds(folder, num=5, **how):
    return [write_run(folder / f"seed-{seed}", seed, **how) for seed in range(num)]
