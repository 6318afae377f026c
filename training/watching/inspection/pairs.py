"""Whether labels, sets and captions belong to their images."""

from collections.abc import Callable

import torch
from torch import Tensor

from training.watching.finding import Finding
from training.watching.inspection.relation import (
    Relation,
    appearance,
    likeness,
    relation,
    standardised,
)
from training.watching.inspection.sample import Batch, Sample

_P = 0.01  # A larger p-value shows no relation; that of shuffled data is larger in 99% of cases.
# With fewer items a relation could go unnoticed. Captions need fewer, as all of them differ.
_MIN_LABELLED, _MIN_CAPTIONED = 192, 48
_MIN_OF_A_GROUP = 2

_TITLES = "the titles of reals.png show which image has which"


def find_unrelated(draw: Callable[[int], Sample]) -> list[Finding]:
    """Return findings on labels, sets and captions that say nothing about their images.

    ``draw(0)`` and ``draw(1)`` return samples. A finding needs both to show no relation; the second
    and larger one is drawn only if the first shows none.
    """
    findings = []
    for test in (labels_relation, captions_relation):
        found = _twice(test, draw)
        if found is not None:
            findings.append(_describe(test, draw(1), found))
    return findings


def _twice(
    test: Callable[[Sample, int], Relation | None], draw: Callable[[int], Sample]
) -> Relation | None:
    """Return the result of a test on the second sample if neither shows a relation, else None."""
    found = None
    for number in range(2):
        found = test(draw(number), number)
        if found is None or found.p <= _P:
            return None
    return found


def _describe(test: Callable, sample: Sample, found: Relation) -> Finding:
    if test is captions_relation:
        return Finding(
            name="captions_shuffled",
            message=f"Texts say nothing about their images: of {found.num} images, those that look "
            f"alike have texts no more alike than any (permutation test, p = {found.p:.2g})",
            remedy="see whether the captions of a few images fit them, and prepare the features "
            "again with dataset_tool.py features if they do not",
        )
    shares = f"{found.measured:.1%} of the nearest neighbours of {found.num} images"
    chance = f"{found.expected:.1%} by chance (permutation test, p = {found.p:.2g})"
    if sample.groups_name == "sets":
        return Finding(
            name="labels_shuffled",
            message="Images of a set are no more alike than images of different sets: "
            f"{shares} are of the same set, {chance}",
            remedy="see in reals.png, a set a row, whether its images are of one class; convert "
            "the data again, with the right labels, if they are not",
        )
    return Finding(
        name="labels_shuffled",
        message=f"Labels say nothing about the images: {shares} have the same label, {chance}",
        remedy=f"see whether images and labels fit each other ({_TITLES}); convert the data again "
        "with the right labels, or train with --cond=False",
    )


def labels_relation(sample: Sample, number: int) -> Relation | None:
    """Return how strongly labels or sets relate to the look of images; None with too few images."""
    looks, others = [], []
    for batch in sample.batches:
        if batch.groups is None:
            continue
        rows = _rows_of_groups(batch)
        looks.append(appearance(batch.stored[rows]))
        groups = batch.groups[rows]
        others.append((groups[:, None] == groups[None]).to(torch.float32))
    if sum(map(len, looks)) < _MIN_LABELLED:
        return None
    return relation(looks, others, _generator(number))


def _rows_of_groups(batch: Batch) -> Tensor:
    """Return which rows of a batch share their group with another row, bool [N]."""
    _, which, counts = batch.groups.unique(return_inverse=True, return_counts=True)
    return counts[which] >= _MIN_OF_A_GROUP


def captions_relation(sample: Sample, number: int) -> Relation | None:
    """Return how strongly texts relate to images; None if they are all equal, too few or absent."""
    looks, others = [], []
    for batch in sample.batches:
        if "text" not in batch.cond or len(batch.x) < 4:
            continue
        seen = [standardised(batch.cond[name]) for name in sample.visual if name in batch.cond]
        looks.append(torch.cat([appearance(batch.x), *seen], dim=1))
        text = standardised(mean_of_text(batch))
        if not text.any():  # All texts are the same.
            return None
        others.append(likeness(text)[0])
    if sum(map(len, looks)) < _MIN_CAPTIONED:
        return None
    return relation(looks, others, _generator(number))


def mean_of_text(batch: Batch) -> Tensor:
    """Return the mean feature of the tokens of each text, float32 [N, T], without padding."""
    mask = batch.cond["text_mask"].to(torch.float32)[..., None]
    return (batch.cond["text"] * mask).sum(1) / mask.sum(1).clamp(min=1)


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)
