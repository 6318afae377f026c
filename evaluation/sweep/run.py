"""Images, detector outputs and scores of the cells of a sweep, divided among ranks."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.resumable import map_of_ranks, memory_for, progress_of_ranks, share
from diffusion.precond import make_precond
from diffusion.samplers import num_evaluations
from dnnlib.config import to_dict
from dnnlib.progress import progress
from evaluation.config import ScoreConfig
from evaluation.images import Making, SnapshotImages
from evaluation.scoring import score_images
from evaluation.sweep.grid import Grid
from evaluation.sweep.jackknife import Estimate, jackknife
from evaluation.sweep.networks import Networks
from evaluation.sweep.search import Plan
from evaluation.sweep.store import Store, batches
from evaluation.sweep.stored import StoredDetector, StoredImages
from metrics.detectors import Detector, DetectorOutput
from metrics.metric import MetricSpec, needed_outputs
from metrics.reference import References
from sampling.images import cached_snapshot
from torch_utils import distributed
from training.checkpoint import Snapshot
from training.family import of as family_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How images are scored. Cells are ranked by the first metric."""

    metrics: Sequence[MetricSpec]
    references: References
    detectors: Mapping[str, Detector]
    device: torch.device
    warnings: Sequence[str] = ()

    def outputs(self) -> dict[str, list[str]]:
        """Return the names of the detector outputs that the metrics use, by detector."""
        found: dict[str, list[str]] = {}
        for output in needed_outputs(self.metrics):
            found.setdefault(output.detector, []).append(output.name)
        return found


@dataclasses.dataclass(frozen=True)
class Images:
    """The first images of a cell.

    Attributes:
        cell: Number of the cell.
        num: Number of images.
        first_seed: Seed of the first image.
    """

    cell: int
    num: int
    first_seed: int


class Cells:
    """The cells of a grid with their images, which are generated on demand.

    All methods that generate or score images are collective.
    """

    def __init__(
        self, grid: Grid, networks: Networks, making: Making, scoring: Scoring, store: Store
    ) -> None:
        self.grid, self.networks, self.scoring, self.store = grid, networks, scoring, store
        self._making = making
        self._last: tuple[float | None, SnapshotImages] | None = None

    @property
    def first_seed(self) -> int:
        return self._making.first_seed

    def plan(self, num_images: int, share: float, confidence: float) -> Plan:
        """Return the plan of a search over these cells, see :meth:`Plan.of`."""
        return Plan.of(len(self.grid.cells), num_images, share, confidence)

    def network(self, cell: int) -> Path:
        """Return the path of the snapshot of a cell."""
        return self.networks.path(self.grid.cells[cell].std, self.store.folder)

    def claim(self) -> dict[str, Any]:
        """Return what determines detector outputs besides the cell, by names that users know."""
        making, scoring = self._making, self.scoring
        guide = None if making.guide is None else cached_snapshot(making.guide).sha256
        detectors = {
            f"{name}/{output}": scoring.detectors[name].hash
            for name, outputs in scoring.outputs().items()
            for output in outputs
        }
        hashes = {str(own.output): own.hash for own in scoring.references.values()}
        how = dict(precision=making.precision, cpu_matmul=making.cpu_matmul, vae=making.vae)
        how |= dict(compile=making.compile, tf32=torch.backends.cuda.matmul.allow_tf32)
        return {
            "network": self.networks.identity,
            "reference": hashes,
            "detector": detectors,
            "--seed": making.first_seed,
            "--guide": guide,
            **{f"--{name.replace('_', '-')}": value for name, value in how.items()},
        }

    def estimates(self, cells: Sequence[int], num: int) -> list[Estimate]:
        """Return the scores of cells on their first ``num`` images, where lower is better."""
        self.make([Images(cell, num, self.first_seed) for cell in cells])
        return self.scores([Images(cell, num, self.first_seed) for cell in cells])

    def scores(self, wanted: Sequence[Images]) -> list[Estimate]:
        """Return the scores by the first metric, negated if higher is better in the metric."""
        metric, device = self.scoring.metrics[0], self.scoring.device
        reference = self.scoring.references.get(metric.output)
        sign = -1 if metric.higher_is_better else 1

        def score(images: Images) -> Estimate:
            found = jackknife(metric, self.vectors(images), reference, device)
            return Estimate(sign * found.value, sign * found.without)

        if metric.needs == "moments":
            return map_of_ranks(score, wanted, 1, "Scoring", "cells")

        def score_all() -> list[Estimate]:
            found = []
            with progress(total=len(wanted), label="Scoring", unit="cells") as bar:
                for images in wanted:
                    found.append(score(images))
                    bar.update()
            return found

        # Only rank 0 has the vectors of real images.
        return distributed.on_main(score_all)

    def vectors(self, images: Images) -> np.ndarray:
        """Return the stored detector output that the first metric uses, float32 [N, D]."""
        return self.store.read(self._key(images), self.scoring.metrics[0].output, images.num)

    def labels(self, num: int) -> np.ndarray | None:
        """Return the classes of a cell's first images, int64 [num]; None without classes.

        They are the same for all cells.
        """
        return self._source(self.grid.cells[0].std).labels(range(num))

    def make(self, wanted: Sequence[Images]) -> None:
        """Generate the images that are missing, and store their detector outputs."""
        # Only rank 0 decides what is missing, as ranks that are ahead already write files.
        jobs = distributed.on_main(lambda: self._jobs(wanted))
        costs = {std: [self._cost(*job) for job in own] for std, own in jobs.items()}
        total = sum(map(sum, costs.values()))
        mine = sum(sum(share(own)) for own in costs.values())
        label = f"Sampling {len(wanted)} cells"
        with progress_of_ranks(total, mine, label, "evaluations") as on_done:
            for std, own in jobs.items():
                source = self._source(std)
                with distributed.together():
                    for (images, part), cost in zip(share(own), share(costs[std]), strict=True):
                        self._make_batch(source, images, part)
                        on_done(cost)

    def rows(self, images: Images) -> list[dict[str, Any]]:
        """Return a score row of every metric, with all facts on how it was computed."""
        cell = self.grid.cells[images.cell]
        source = self._source(cell.std).sampled_by(cell.config, images.first_seed)
        key, scoring = self._key(images), self.scoring
        read = functools.partial(self.store.read, key, stop=images.num)
        detectors = {name: StoredDetector(own, read) for name, own in scoring.detectors.items()}
        rows = score_images(
            scoring.metrics,
            StoredImages(source),
            scoring.references,
            detectors,
            scoring.device,
            num_images=images.num,
        )
        return [{**row, "warnings": [*scoring.warnings, *row["warnings"]]} for row in rows]

    def _jobs(self, wanted: Sequence[Images]) -> dict[float | None, list[tuple[Images, range]]]:
        """Return the batches that are to be generated, by the std of the average."""
        jobs: dict[float | None, list[tuple[Images, range]]] = {}
        for images in wanted:
            missing = self.store.missing(self._key(images), images.num)
            own = jobs.setdefault(self.grid.cells[images.cell].std, [])
            own += [(images, part) for part in batches(missing, self._making.batch)]
        return {std: own for std, own in jobs.items() if own}

    def _make_batch(self, source: SnapshotImages, images: Images, part: range) -> None:
        cell = self.grid.cells[images.cell]
        with memory_for(len(part), "images"):
            made = source.sampled_by(cell.config, images.first_seed).make(part)
            outputs = {}
            with torch.inference_mode():
                for name, wanted in self.scoring.outputs().items():
                    found = self.scoring.detectors[name](made, wanted)
                    outputs |= {DetectorOutput(name, key): value for key, value in found.items()}
        arrays = {own: value.to("cpu", torch.float32).numpy() for own, value in outputs.items()}
        self.store.write(self._key(images), part, arrays)

    def _cost(self, images: Images, part: range) -> int:
        """Return the network evaluations of a batch, summed over its images."""
        config, run = self.grid.cells[images.cell].config, self.networks.snapshot.config
        is_guided = to_dict(config.guidance)["cfg_scale"] != 1.0
        per_image = num_evaluations(config.sampling, make_precond(run.precond))
        return len(part) * per_image * (1 + is_guided)

    def _key(self, images: Images) -> str:
        """Return the name of the folder with the outputs of a cell's images."""
        cell = self.grid.cells[images.cell]
        own = [cell.std, to_dict(cell.config.sampling), to_dict(cell.config.guidance)]
        name = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]
        is_first = images.first_seed == self.first_seed
        return name if is_first else f"{name}-{images.first_seed}"

    def _source(self, std: float | None) -> SnapshotImages:
        """Return the images of an average under the protocol of its first cell."""
        if self._last is not None and self._last[0] == std:
            return self._last[1]
        self._last = None  # Frees the last network: only one is in memory at a time.
        snapshot = cached_snapshot(str(self.networks.path(std, self.store.folder)))
        config = next(cell.config for cell in self.grid.cells if cell.std == std)
        source = images_of(snapshot, config, self._making, self.scoring.device)
        self._last = std, source
        return source


def images_of(
    snapshot: Snapshot, config: ScoreConfig, making: Making, device: torch.device
) -> SnapshotImages:
    """Return the images that a snapshot generates under a protocol.

    Raises ValueError for a model that generates images only from what it is given, such as prompts.
    """

    def generator() -> Any:
        return making.generator(snapshot, config, device)

    family = family_of(snapshot.config)
    return family.images(snapshot, generator, making.first_seed, making.batch)
