"""Replays the search of fid.py sweep on a grid of which all images are known.

    python demo.py --latent
    python train.py --outdir=demo-out/sweep-runs --data=demo-out/digits-latents \\
        --preset=digits-latent --kimg=100 --ema-stds=0.05,0.10 --tick=10 --snap=1
    python tests/replay_sweep.py --network=demo-out/sweep-runs/00000-x --ref=demo-out/digits.zip

Makes every image of 245 cells once and keeps what the detector gives for them: seven guidance
scales, five averages of the weights and seven numbers of steps. The true score of a cell is that of
all its images. Each draw gives every class of image other seeds out of those that were made, the
same in all cells, and the search of fid.py sweep runs on them as it would on new ones. The table
says which cell it ends in, how far its true score is from the best cell's, and what two standard
errors are. docs/sweep.md has the figures. Start again to continue, on any number of ranks.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

for _name, _value in (("OMP_NUM_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", "")):
    os.environ.setdefault(_name, _value)  # Before torch is imported.
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402

import families  # noqa: E402, F401 (registers them)
from dnnlib.axes import Axes  # noqa: E402
from evaluation.config import ScoreConfig  # noqa: E402
from evaluation.images import Making  # noqa: E402
from evaluation.sweep.grid import make_grid  # noqa: E402
from evaluation.sweep.jackknife import jackknife  # noqa: E402
from evaluation.sweep.run import Images  # noqa: E402
from evaluation.sweep.search import Plan, search  # noqa: E402
from evaluation.sweep.start import Wanted, open_cells  # noqa: E402
from metrics.config import DetectorConfig  # noqa: E402
from metrics.metric import get_metric  # noqa: E402
from torch_utils import distributed  # noqa: E402

SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
STDS = (0.04, 0.06, 0.09, 0.13, 0.19)
STEPS = (2, 3, 4, 5, 6, 8, 10)


def make_outputs(args):
    """Return what is known of each cell: outputs [245, N, D], and classes [N], names, reference."""
    axes = {("guidance", "cfg_scale"): SCALES, ("sampling", "steps"): STEPS}
    axes["sampling", "sampler"] = (args.sampler,)
    grid = make_grid(Axes(ScoreConfig.of_snapshot(args.network), axes), STDS)
    metric = get_metric(args.metric)
    wanted = Wanted(args.network, STDS, [metric], args.ref, DetectorConfig(), args.num_images)
    making, device = Making(batch=args.batch), distributed.init()
    with open_cells(grid, wanted, making, args.folder, device) as (cells, num):
        images = [Images(cell, num, 0) for cell in range(len(grid.cells))]
        cells.make(images)
        vectors = [cells.vectors(own) for own in images]
        labels = cells.labels(num)
        reference = cells.scoring.references[metric.output]
    return vectors, labels, [cell.name for cell in cells.grid.cells], metric, reference


def draw_order(labels, seed):
    """Return an order of the images in which every place keeps its class."""
    rng, order = np.random.default_rng(seed), np.arange(len(labels))
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        order[places] = rng.permutation(places)
    return order


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", required=True, help="run with compact snapshots")
    parser.add_argument("--ref", required=True, help="real images")
    parser.add_argument("--folder", type=Path, default=Path("sweep-grid"), help="for outputs")
    parser.add_argument("--metric", default="fd_pixels")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--num-images", type=int, default=800, help="of each cell")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--unpaired", action="store_true", help="other seeds in every cell")
    args = parser.parse_args()

    vectors, labels, names, metric, reference = make_outputs(args)
    if not distributed.is_main():
        return
    num = len(labels)
    true = [jackknife(metric, own, reference) for own in vectors]
    best = min(range(len(true)), key=lambda cell: true[cell].value)
    two_errors = 2 * true[best].error
    values = sorted(own.value for own in true)
    near = sum(own.value - true[best].value <= two_errors for own in true)
    print(f"{len(names)} cells, {num} images each; best: {names[best]}, {metric.name}", end=" ")
    print(f"{true[best].value:.4f}; median {values[len(values) // 2]:.4f}, worst {values[-1]:.4f}")
    print(f"{near} cells are within two standard errors ({two_errors:.4f}) of the best")
    print("| draw | cell | true score | behind the best | paired two errors | rank | images |")
    print("|---|---|---|---|---|---|---|")
    plan, num_right = Plan.of(len(names), num, args.share), 0
    for seed in range(args.draws):
        cells = len(names) if args.unpaired else 1
        orders = [draw_order(labels, seed * len(names) + cell) for cell in range(cells)]

        def estimate(cells, count, orders=orders):
            firsts = [vectors[c][orders[c % len(orders)][:count]] for c in cells]
            return [jackknife(metric, own, reference) for own in firsts]

        found = search(len(names), plan, estimate)
        own = true[found.winner]
        behind, error = own.minus(true[best])
        num_right += behind <= two_errors
        rank = values.index(own.value) + 1
        share = found.num_images / (num * len(names))
        cells = (seed, names[found.winner], f"{own.value:.4f}", f"{behind:.4f}")
        cells += (f"{2 * error:.4f}", rank, f"{share:.1%}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"{num_right} of {args.draws} draws end within two standard errors of the best cell")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
