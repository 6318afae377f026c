"""Validation of a feature-conditioned model on held-out images: score rows and pictures."""

import collections
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from data.features.dataset import FeatureDataset
from dnnlib.progress import progress
from encoders.text import TextEncoder
from encoders.visual import VisualEncoder
from evaluation.validation.config import METRIC_PREFIX, ValidationConfig
from evaluation.validation.trials import (
    FEATURE_TESTS,
    MAX_CONTROL,
    Bench,
    FeatureTest,
    Items,
    Missing,
    Outcome,
    network_of,
)
from evaluation.validation.word_edits import edit_caption
from metrics.lpips import LPIPS
from sampling.features import FeatureGenerator
from torch_utils import distributed
from torch_utils.fingerprints import package_versions
from torch_utils.pictures import Titles, mixed_grid


def validate(
    generator: FeatureGenerator,
    dataset: FeatureDataset,
    *,
    config: ValidationConfig,
    lpips: LPIPS | Missing,
    visual: VisualEncoder | Missing,
    text: TextEncoder | Missing,
    progress_label: str = "Validation",
) -> tuple[list[dict[str, Any]], dict[str, PIL.Image.Image]]:
    """Return a row for each test of ``config``, on every rank, and its picture, on rank 0.

    Collective: the images are divided among ranks, but results do not depend on the number of
    ranks. Images are generated one at a time.

    A row contains metric, value (the main one), values (all), num and buckets (how many images or
    pairs, of which sizes), ``per_item`` (the values of each by name), how images were generated and
    measured, and warnings. Pictures are by name of the metric, with a row per item: [truth, made,
    from its text alone] for ``reconstruction``, [A, A with B's reference, B] for ``swap``, [truth,
    made, edited] for ``text_edit``, [truth, own text, another's text] for ``text_only``, and [by
    text, by reference, by both] for ``divergence``.

    Args:
        generator: Generates the images, a :class:`~sampling.features.FeatureGenerator`.
        dataset: Held-out images.
        config: Which tests, and on how many images, spread evenly over sizes.
        lpips, visual, text: The networks that measure. Values that need a missing one are None, and
            ``missing`` in the row gives the reason, as does ``reason`` for the main value. The
            encoders must be those with which the dataset was made.
        progress_label: Label of the progress bar.
    """
    bench = Bench(generator=generator, dataset=dataset, lpips=lpips, visual=visual, text=text)
    rows, pictures = [], {}
    for name in config.tests:
        row, picture = _run_test(name, bench, config, progress_label)
        rows.append(row)
        if picture is not None:
            pictures[row["metric"]] = picture
    return rows, pictures


def _run_test(
    name: str, bench: Bench, config: ValidationConfig, label: str
) -> tuple[dict[str, Any], PIL.Image.Image | None]:
    start_sec = time.monotonic()
    test = FEATURE_TESTS[name]
    with distributed.together():
        items = test.choose(bench.dataset, config.sizes[name])
    reason = _reason_for_none(name, test, bench, items)
    if reason is not None:
        items = []
    num_shown = min(config.num_shown, len(items))
    shown = np.linspace(0, len(items) - 1, num_shown).round().astype(int).tolist()
    if not any(_has(bench, network) for network in _networks(test)):
        items = [items[place] for place in shown]
        shown = list(range(len(items)))
    outcomes = _share(bench, test, items, frozenset(shown), f"{label}: {name.replace('_', ' ')}")
    row = _make_row(name, bench, test, items, outcomes, reason)
    row["seconds"] = round(distributed.broadcast_object(time.monotonic() - start_sec), 3)
    picture = None
    if shown and distributed.is_main():
        names = [bench.dataset.caption(items[place][0]) for place in shown]
        titles = Titles(columns=test.columns, rows=names)
        picture = mixed_grid([outcomes[place].images for place in shown], titles=titles)
    return row, picture


def _networks(test: FeatureTest) -> set[str]:
    """Return the names of the networks that measure the values of a test."""
    return {network_of(column) for column, _ in test.measures.values()}


def _has(bench: Bench, name: str) -> bool:
    return not isinstance(getattr(bench, name), Missing)


def _reason_for_none(name: str, test: FeatureTest, bench: Bench, items: Items) -> str | None:
    """Return the reason why no image of a test can be generated; None if there is none."""
    for needed in test.needs:
        if not _has(bench, needed):
            return getattr(bench, needed).reason
    if items:
        return None
    if not len(bench.dataset.ids):
        return f"{bench.dataset.path} has no images of the split {bench.dataset.split}"
    if name == "swap":
        return "no size has two held-out images"
    return "no two held-out images have different texts"


def _share(
    bench: Bench, test: FeatureTest, items: Items, shown: frozenset[int], label: str
) -> list[Outcome]:
    """Return the outcomes of all items in order, on every rank. Collective."""
    mine = range(distributed.rank(), len(items), distributed.world_size())
    found: dict[int, Outcome] = {}
    bar = progress(total=len(mine), label=label, disable=not distributed.is_main(), transient=True)
    with distributed.together(), bar, torch.no_grad():
        for place in mine:
            found[place] = test.run(bench, items[place], place in shown)
            bar.update(1)
    every = dict(collections.ChainMap(*distributed.gather_objects(found)))
    return [every[place] for place in range(len(items))]


def _make_row(
    name: str,
    bench: Bench,
    test: FeatureTest,
    items: Items,
    outcomes: Sequence[Outcome],
    reason: str | None,
) -> dict[str, Any]:
    dataset = bench.dataset
    values: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for key, (column, summary) in test.measures.items():
        found = [outcome.values[column] for outcome in outcomes if column in outcome.values]
        if reason is None and len(found) == len(items):
            values[key] = float(summary(np.array(found)))
        else:
            values[key] = None
            missing[key] = reason or getattr(bench, network_of(column)).reason
    buckets = dict.fromkeys((bucket.name for bucket in dataset.buckets), 0)
    for item in items:
        buckets[dataset.buckets[dataset.bucket_index(item[0])].name] += 1
    names = [[dataset.ids[index] for index in item] for item in items]
    row: dict[str, Any] = dict(
        metric=METRIC_PREFIX + name,
        value=values[test.value],
        values=values,
        num=len(items),
        buckets=buckets,
        split=dataset.split,
        data_hash=dataset.content_hash,
        items_hash=hashlib.sha256(repr(names).encode()).hexdigest(),
        noise="seed of each image's name",
        **_protocol(bench, test),
        **bench.generator.protocol(),
        packages=package_versions(),
        per_item=[
            dict(id="+".join(own), **outcome.values)
            for own, outcome in zip(names, outcomes, strict=True)
        ],
        warnings=_warnings(name, bench, items, values),
    )
    if missing:
        row["missing"] = missing
    if row["value"] is None:
        row["reason"] = missing[test.value]
    return row


def _protocol(bench: Bench, test: FeatureTest) -> dict[str, Any]:
    """Return what a row states about the networks that measured, and the test's constants."""
    found = dict(test.protocol)
    if _has(bench, "lpips"):  # All tests use it.
        found.update(lpips=bench.lpips.net, lpips_hash=bench.lpips.hash)
    for name in ("visual", "text"):
        if name in _networks(test).union(test.needs) and _has(bench, name):
            found[f"{name}_hash"] = getattr(bench, name).sha256
    return found


def _warnings(name: str, bench: Bench, items: Items, values: dict[str, float | None]) -> list[str]:
    found = []
    control = values.get("lpips_control")
    if control is not None and control > MAX_CONTROL:
        found.append(
            f"an unchanged text, encoded again, changes an image by an LPIPS of {control:.3f} (at "
            f"most {MAX_CONTROL} is expected): is this the encoder of the dataset's texts?"
        )
    if name == "text_edit":
        plain = sum(edit_caption(bench.dataset.caption(item[0]))[1][0][0] == "+" for item in items)
        if plain:
            found.append(
                f"{plain} text(s) contain no word to replace, so words were put before them"
            )
    named = zip(bench.dataset.buckets, bench.dataset.counts, strict=True)
    alone = [bucket.name for bucket, count in named if count == 1]
    if name == "swap" and items and alone:
        found.append(f"left out, with a single image: {', '.join(alone)}")
    return found
