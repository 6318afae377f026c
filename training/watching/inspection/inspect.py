"""Inspection of a run's data, and of the order of its batches, before the first step."""

import functools
import itertools
from typing import TYPE_CHECKING

import numpy as np

from training.family import Part
from training.family import of as family_of
from training.watching.finding import Finding
from training.watching.inspection.order import find_unshuffled
from training.watching.inspection.pairs import find_unrelated
from training.watching.inspection.patches import find_shifted_patches
from training.watching.inspection.sample import Sample
from training.watching.inspection.scale import find_wrong_scale

if TYPE_CHECKING:
    from training.loop import Job

_ORDERED_ROWS = 128  # Rows of each epoch whose order is judged.


def inspect(job: "Job") -> list[Finding]:
    """Return what is likely wrong with the data of a run and with their order.

    Reads a few hundred images, at most 16 MB per sample, chosen by the seed of the run, in less
    than a second. Not collective: one rank may call it alone.
    """
    family = family_of(job.config)

    @functools.cache
    def draw(number: int) -> Sample:
        return family.inspected(job.config, job.data, job.codec, job.device, number)

    return [
        *find_wrong_scale(draw(0)),
        *find_unrelated(draw),
        *find_shifted_patches(draw(0)),
        *find_unshuffled(_places_in_order(job)),
    ]


def _places_in_order(job: "Job") -> list[np.ndarray]:
    """Return the places in the data of the rows in the first steps of epochs one and two."""
    config, family = job.config, family_of(job.config)
    batch = config.training.batch
    whole = Part(rank=0, world_size=1, batch_gpu=batch)
    second = -(-job.data.num_images // config.step_nimg) * config.step_nimg
    places = []
    for start_nimg in (0, second):
        steps = family.steps(config, job.data, start_nimg, whole)
        for keys in itertools.islice(steps.sampler, max(_ORDERED_ROWS // batch, 1)):
            places.append(family.places(job.data, keys))
    return places
