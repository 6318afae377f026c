"""Opening what a sweep needs: networks, detectors, real images and the folder of outputs."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from data.resumable import locked
from dnnlib.errors import refusal
from evaluation.images import Making
from evaluation.scoring import Comparison, RealImages, make_detectors
from evaluation.sweep.grid import Grid
from evaluation.sweep.jackknife import NUM_GROUPS
from evaluation.sweep.networks import open_networks
from evaluation.sweep.run import Cells, Scoring, images_of
from evaluation.sweep.store import Store
from metrics.config import DetectorConfig
from metrics.metric import MetricSpec, needed_outputs
from sampling.images import cached_snapshot
from torch_utils import distributed
from training.asked import GeneratorOptions
from training.checkpoint import Snapshot
from training.family import of as family_of


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to sweep, and with which metrics.

    Attributes:
        network: A snapshot, or the folder of a run.
        stds: Relative stds of the averages; empty for the snapshot alone.
        metrics: The metrics; cells are ranked by the first one.
        ref: Location of the real images or their statistics; None without any.
        detectors: Settings of the detectors.
        num_images: Images of a cell in the last round; None for that of the first metric.
    """

    network: str
    stds: Sequence[float]
    metrics: Sequence[MetricSpec]
    ref: str | None
    detectors: DetectorConfig
    num_images: int | None


@contextlib.contextmanager
def open_cells(
    grid: Grid, wanted: Wanted, making: Making, folder: Path, device: torch.device
) -> Iterator[tuple[Cells, int]]:
    """Yield the cells that can be sampled, and the number of images in the last round. Collective.

    The folder is locked meanwhile. Raises ValueError for a model that generates images only from
    what it is given, such as prompts; for a folder with outputs that were made differently; for
    too few images; and for fewer than two cells that can be sampled.
    """
    snapshot = cached_snapshot(wanted.network)
    networks = open_networks(wanted.network, snapshot, wanted.stds)
    grid = _possible(grid, snapshot, making)
    source = images_of(snapshot, grid.cells[0].config, making, device)
    real = None if wanted.ref is None else RealImages(wanted.ref)
    checked = Comparison(
        metrics=wanted.metrics,
        real=real,
        detectors=wanted.detectors,
        num_images=wanted.num_images,
        batch=making.batch,
    )
    warnings = checked.check(source)
    names = sorted({spec.output.detector for spec in wanted.metrics})
    detectors = make_detectors(names, wanted.detectors, source.image_shape, device)
    needs = needed_outputs(wanted.metrics, of_reference=True)
    references = {} if real is None else real.references(needs, detectors, device, making.batch)
    first = wanted.metrics[0]
    num_images = first.image_count(references.get(first.output), wanted.num_images)
    least = max(2 * NUM_GROUPS, *(spec.at_least for spec in wanted.metrics))
    if num_images < least:
        raise refusal("--num-images", num_images, accepted=f"at least {least}, for intervals")
    scoring = Scoring(
        metrics=wanted.metrics,
        references=references,
        detectors=detectors,
        device=device,
        warnings=warnings,
    )
    store = Store(folder)
    with locked(folder, "sweeping into", "--outdir"):
        cells = Cells(grid, networks, making, scoring, store)
        distributed.on_main(lambda: store.claim(cells.claim()))
        found = distributed.on_main(lambda: networks.make(wanted.stds, folder))
        for warning in found:
            distributed.print0(f"Warning: {warning}")
        yield cells, num_images


def _possible(grid: Grid, snapshot: Snapshot, making: Making) -> Grid:
    """Return the grid without the cells that the model does not support; warn about these."""
    family, refused = family_of(snapshot.config), {}
    for number, cell in enumerate(grid.cells):
        try:
            family.check_sampling(snapshot, GeneratorOptions.of(making, cell.config))
        except ValueError as error:
            refused[number] = error
    if len(grid.cells) - len(refused) < 2:
        raise next(iter(refused.values()))
    if refused:
        first, error = next(iter(refused.items()))
        distributed.print0(
            f"Warning: {len(refused)} cells are left out, as {grid.cells[first].name}: {error}"
        )
    return grid.without(refused)
