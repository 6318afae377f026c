"""Nearest training images of generated images, to find copies (memorisation)."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from data.images.dataset import ImageDataset
from dnnlib.errors import refusal
from dnnlib.files import write_json
from evaluation.images import ImageSource, read_images, shape_of, size_text
from evaluation.scoring import dataset_references
from metrics.detectors import Detector, DetectorOutput
from metrics.manifold import nearest_neighbours
from metrics.reference_cache import MAX_VECTORS
from metrics.statistics import Batch, collect_outputs
from torch_utils import distributed
from torch_utils.charts import check_charts, new_figure, picture_of
from torch_utils.pictures import Titles, image_grid, save_image

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)
_HELD_OUT_SEED = 0
_FEW_HELD_OUT = 100
# An image counts as a copy up to this share of the median held-out distance. It is not 0, because
# features of equal images differ by rounding if their batches differ.
_COPY = 1e-3
_MIN_HELD_OUT = 1000
_MIN_TILE = 88
_CHART_SIZE = (640, 400)
_NUM_BINS = 50


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Nearest training images of generated images, by the outputs of a detector."""

    distances: np.ndarray  # [N, k], from each generated image, ascending.
    indices: np.ndarray  # [N, k], indices of those training images.
    held_out: np.ndarray  # [M], from each held-out real image to its nearest training image.
    held_out_source: str  # Description of the held-out images.
    detector: Detector

    def summary(self) -> dict[str, Any]:
        """Return quantiles of the nearest distances of both sides, and a comparison of them."""
        nearest = self.distances[:, 0]
        closer = {
            f"{quantile:g}": float((nearest < np.quantile(self.held_out, quantile)).mean())
            for quantile in QUANTILES
        }
        return dict(
            detector=self.detector.name,
            detector_hash=self.detector.hash,
            num_images=len(nearest),
            num_held_out=len(self.held_out),
            held_out_source=self.held_out_source,
            quantiles=list(QUANTILES),
            generated=np.quantile(nearest, QUANTILES).tolist(),
            held_out=np.quantile(self.held_out, QUANTILES).tolist(),
            share_closer_than_quantile_of_held_out=closer,
            num_copies=int((nearest <= _COPY * np.median(self.held_out)).sum()),
        )


def check_neighbours(
    source: ImageSource,
    num_images: int,
    data: ImageDataset,
    num_neighbours: int,
    held_out: ImageDataset | None,
) -> None:
    """Raise ValueError for too few images, differing shapes, and a missing charts package."""
    check_charts("--outdir")
    available = source.num_images
    if available is not None and num_images > available:
        raise refusal("--num-images", f"{num_images:,}", but=f"there are {available:,} images")
    if len(data) <= num_neighbours:
        but = f"{data.name} has {len(data)} images, too few for {num_neighbours} neighbours of each"
        raise refusal("--data", but=but, remedy="choose fewer with --neighbours")
    shape = size_text(data)
    if held_out is not None and size_text(held_out) != shape:
        but = f"{held_out.name} has images of {size_text(held_out)}"
        raise refusal("--held-out", but=f"{but}, but --data has {shape}")
    if source.image_shape != shape_of(data):
        but = f"{data.name} has images of {shape}"
        but += f", but the generated ones are {size_text(source.image_shape)}"
        raise refusal("--data", but=but)


def find_neighbours(
    source: ImageSource,
    data: ImageDataset,
    detector: Detector,
    device: torch.device,
    *,
    num_images: int,
    num_neighbours: int,
    batch: int,
    held_out: ImageDataset | None = None,
) -> Neighbours | None:
    """Return the nearest training images of the first ``num_images`` generated images, on rank 0.

    Other ranks return None. All of ``data`` is searched. Collective.

    Args:
        source: Generated images.
        data: Training images, more than ``num_neighbours``.
        held_out: Real images that were not trained on. Without any, at least 1,000 training images
            (or all) are each compared with all others, as if they had been held out.
    """
    output = DetectorOutput(detector.name)
    needs, detectors = {output: ("vectors",)}, {detector.name: detector}

    def vectors(batches: Iterable[Batch]) -> np.ndarray | None:
        return collect_outputs(detectors, needs, batches, device)[output].vectors.array

    def vectors_of(dataset: ImageDataset, label: str) -> np.ndarray | None:
        if len(dataset) <= MAX_VECTORS:
            return dataset_references(dataset, needs, detectors, device, batch)[output].vectors
        return vectors(read_images(dataset, batch, label))

    real = vectors_of(data, "Training images")
    unseen = None if held_out is None else vectors_of(held_out, "Held-out images")
    fake = vectors(source.batches(range(num_images)))
    with distributed.together():
        if not distributed.is_main():
            return None
        distances, indices = nearest_neighbours(fake, real, num_neighbours, device=device)
        if unseen is not None:
            nearest, _ = nearest_neighbours(unseen, real, 1, device=device)
            held_out_source = f"{held_out.name}: {len(held_out):,} images"
        else:
            order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(real))
            own = np.sort(order[: max(num_images, _MIN_HELD_OUT)])
            nearest, _ = nearest_neighbours(real[own], real, 1, device=device, own=own)
            held_out_source = f"{len(nearest):,} training images, each against all the others"
        return Neighbours(distances, indices, nearest[:, 0], held_out_source, detector)


def neighbours_picture(
    neighbours: Neighbours | None, source: ImageSource, data: ImageDataset, num_rows: int
) -> PIL.Image.Image | None:
    """Return a picture of generated images beside their neighbours, on rank 0, else None.

    A row shows a generated image and its nearest training images with their distances, nearest
    first. The rows are those of the ``num_rows`` generated images that are nearest to any training
    image. Collective, because these images are generated again.
    """
    nearest = np.zeros(0) if neighbours is None else neighbours.distances[:, 0]
    chosen = np.argsort(nearest, kind="stable")[:num_rows].tolist()
    made: dict[int, torch.Tensor] = {}
    for indices, images in source.batches(distributed.broadcast_object(chosen)):
        for index, image in zip(indices.tolist(), images, strict=True):
            made[index] = image.to("cpu", copy=True)
    made = dict(collections.ChainMap(*distributed.gather_objects(made)))
    if neighbours is None:
        return None
    tiles, captions = [], []
    for index in chosen:
        numbers, distances = neighbours.indices[index], neighbours.distances[index]
        real, _ = data.__getitems__(numbers.tolist())
        tiles += [made[index], *real]
        captions += [f"image {index}"]
        captions += [f"{d:.3g} (#{number})" for d, number in zip(distances, numbers, strict=True)]
    num_neighbours = neighbours.indices.shape[1]
    columns = ["Generated", "Nearest", *(f"{n}. nearest" for n in range(2, num_neighbours + 1))]
    titles = Titles(columns=columns, captions=captions)
    return image_grid(torch.stack(tiles), 1 + num_neighbours, titles, min_tile=_MIN_TILE)


def distances_picture(neighbours: Neighbours) -> PIL.Image.Image:
    """Return a picture of the histograms of nearest distances of generated and held-out images."""
    sides = {"generated": neighbours.distances[:, 0], "held out": neighbours.held_out}
    highest = max(float(values.max()) for values in sides.values()) or 1.0
    figure = new_figure(*_CHART_SIZE)
    axes = figure.add_subplot()
    for (name, values), colour in zip(sides.items(), ("#eb783c", "#3f7fc4"), strict=True):
        axes.hist(
            values,
            bins=_NUM_BINS,
            range=(0, highest),
            weights=np.full(len(values), 1 / len(values)),
            histtype="step",
            linewidth=1.5,
            color=colour,
            label=f"{name}: {len(values):,} images, median {np.median(values):.3g}",
        )
    axes.set_xlim(0, highest)
    axes.set_xlabel("distance to the nearest training image")
    axes.set_ylabel("share of the images")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return picture_of(figure)


def describe_neighbours(summary: Mapping[str, Any]) -> str:
    """Return the summary of :class:`Neighbours` as a small table with a conclusion."""
    rows = [["quantile", *(f"{100 * q:g}%" for q in summary["quantiles"])]]
    for name in ("generated", "held_out"):
        rows.append([name.replace("_", " "), *(f"{value:.4g}" for value in summary[name])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["Distance to the nearest training image:"]
    for row in rows:
        cells = (cell.rjust(size) for cell, size in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells))
    share = summary["share_closer_than_quantile_of_held_out"]["0.01"]
    lines.append(
        f"{100 * share:.1f}% of {summary['num_images']:,} generated images are closer to a "
        f"training image than 99% of held-out reals are (1% would be expected); "
        f"{summary['num_copies']} are copies (a thousandth of the median held-out distance away, "
        f"or less). Held out: {summary['held_out_source']}."
    )
    if summary["num_held_out"] < _FEW_HELD_OUT:
        lines.append(f"  warning: {summary['num_held_out']} held-out images are too few to tell.")
    return "\n".join(lines)


def write_report(
    neighbours: Neighbours | None,
    outdir: Path,
    source: ImageSource,
    data: ImageDataset,
    *,
    num_images: int,
    num_rows: int,
) -> None:
    """Write pictures and ``neighbours.json`` into ``outdir``, and print a summary. Collective."""
    picture = neighbours_picture(neighbours, source, data, num_rows)
    if neighbours is None:
        return
    summary = neighbours.summary()
    outdir.mkdir(parents=True, exist_ok=True)
    save_image(picture, outdir / "neighbours.png")
    save_image(distances_picture(neighbours), outdir / "distances.png")
    report = dict(
        **summary,
        data=str(data.path),
        data_hash=data.content_hash,
        **source.passport(range(num_images)),
        distances=neighbours.distances.tolist(),
        neighbours=[[data.file_label(index) for index in row] for row in neighbours.indices],
    )
    write_json(outdir / "neighbours.json", report)
    print(describe_neighbours(summary))
    print(f"Pictures: {outdir / 'neighbours.png'}, {outdir / 'distances.png'}")
