"""For tests: folders of runs as training leaves them, made without training."""

import json
import math

import numpy as np
from PIL import Image

LEVELS = ("0-0.11", "0.11-0.22", "0.22-0.4", "0.4-0.81", "0.81-inf")


def stat(mean):
    return dict(num=1, mean=mean, std=0.0)


def tick_row(tick, kimg, **changes):
    """Return a row of stats.jsonl; ``changes`` are means by the last part of a name."""
    means = {
        "Loss/loss": 0.4 + math.exp(-kimg / 20),
        "Loss/grad_norm": 50 + 10 * math.sin(tick),
        "Loss/learning_rate": 0.002 * min(kimg / 5, 1),
        "Loss/skipped_steps": 0,
        "Timing/total_sec": 3.0 * kimg,
        "Timing/images_per_sec": 330 + 20 * math.cos(tick),
        "Timing/maintenance_sec": 0.1,
        "Resources/cpu_mem_gb": 0.5,
        "Resources/peak_gpu_mem_gb": 2.5,
        "Progress/tick": tick,
        "Progress/kimg": kimg,
    }
    for place, ends in enumerate(LEVELS):
        means[f"Loss/sigma_{ends}"] = 0.3 + 0.1 * place + math.exp(-kimg / (10 + 5 * place))
    means = {name: changes.get(name.rpartition("/")[2], mean) for name, mean in means.items()}
    return {name: stat(mean) for name, mean in means.items()} | {"timestamp": 1.7e9 + kimg}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_picture(path, shade, size=(160, 120)):
    rng = np.random.default_rng(shade)
    pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    pixels[..., shade % 3] = 255 * shade // 20
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(path)


def score_row(kimg, value, **changes):
    row = dict(metric="fd_pixels", value=value, values=dict(fd_pixels=value), num_images=400)
    row |= dict(kimg=kimg, snapshot=f"network-snapshot-{int(kimg):06d}.pkl", warnings=[])
    return row | changes


def options_of(preset="digits", kimg=80, **changes):
    return dict(
        config=dict(
            family="image",
            preset=preset,
            model=dict(family="diffit", resolution=8),
            training=dict(kimg=kimg, iters=None, batch=128, lr=0.002, ema_stds=[]),
        ),
        command=["train.py", "--preset=digits"],
        world_size=1,
        device="cpu",
        packages=dict(python="3.11", torch="2.13"),
        total_kimg=kimg,
        data=dict(name="digits", num_images=1797),
        description=dict(parameters="407,783", device="cpu"),
        changes=[dict(setting="training.kimg", option="--kimg", preset=154.0, run=kimg)],
        next_steps={"Generate 64 images": "python generate.py --network={network} --outdir={run}"},
        **changes,
    )


def condition_rows(network):
    rows = []
    for condition in ("text", "patches"):
        for change in ("dropped", "shuffled"):
            for sigma in ("all", 0.1, 0.5, 2.0):
                values = dict(output_change=0.3, output_change_se=0.02, loss_change=0.1)
                values |= dict(loss_change_se=0.01, worse_share=0.8)
                row = dict(metric="conditioning", panel="photos, 16 images", network=network)
                rows.append(row | dict(condition=condition, change=change, sigma=sigma, value=0.3))
                rows[-1]["values"] = values
    for layer in range(4):
        values = dict(text=0.2 + 0.1 * layer, cls=0.1, patches=0.7 - 0.1 * layer)
        row = dict(metric="conditioning_attention", layer=layer, value=None, values=values)
        rows.append(row | dict(panel="photos, 16 images", network=network))
    return rows


def make_run(run_dir, num_ticks=40, snapshots=(0, 8, 16, 32, 64), **options):
    """Write the files of a run of two kimg a tick; return its folder."""
    run_dir.mkdir(parents=True)
    (run_dir / "training_options.json").write_text(json.dumps(options_of(**options)))
    rows = [tick_row(tick, 2.0 * (tick + 1)) for tick in range(num_ticks)]
    write_rows(run_dir / "stats.jsonl", rows)
    (run_dir / "log.txt").write_text("tick 3     kimg 8.0       loss 0.5\n")
    for place, kimg in enumerate(snapshots):
        write_picture(run_dir / f"fakes-{kimg:06d}.png", place)
        (run_dir / f"network-snapshot-{kimg:06d}.pkl").write_bytes(b"weights")
    if snapshots:
        write_picture(run_dir / "reals.png", 15)
        scores = [score_row(kimg, 5 / (1 + kimg)) for kimg in snapshots]
        write_rows(run_dir / "metric-fd_pixels.jsonl", scores)
        network = f"{run_dir}/network-snapshot-{snapshots[-1]:06d}.pkl"
        write_rows(run_dir / "conditions.jsonl", condition_rows(network))
        band = dict(mean=0.1, std=0.01, min=0.09, max=0.11, values=[0.1, 0.09, 0.11])
        row = score_row(64, 0.1, num_images=100, noise_band=dict(fd_pixels=band, seeds=[]))
        (run_dir / "score.json").write_text(json.dumps(dict(rows=[row])))
    return run_dir
