"""The tests of a feature-conditioned model: what each generates and measures.

Distances are LPIPS, in pixels of uint8 at the image's own size; truth is the image as the
autoencoder decodes it. Noise is a function of the image's name, so that two images of a test differ
by their conditions alone, and images of two networks by the networks.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from data.features.dataset import FeatureDataset, pad_texts
from data.images.dataset import Cond
from diffusion.config import DualGuidanceConfig
from encoders.text import TextEncoder
from encoders.visual import VisualEncoder
from evaluation.in_loop.features import seed_of_item
from evaluation.validation.word_edits import edit_caption
from metrics.lpips import LPIPS
from sampling.features import FeatureGenerator
from torch_utils.pictures import fit_tile, to_pil

TEXT, VISUAL = ("text", "text_mask"), ("cls", "patches")
# Upper limits of the LPIPS of a reconstruction, by what people find of it.
BANDS = {"excellent": 0.3, "good": 0.5, "blurry": 0.7, "poor": np.inf}
MAX_CONTROL = 0.01  # Of encoding an unchanged text again: only rounding is left.
MIN_EFFECT = 0.05  # From which on an edit is taken to show.
MIN_DIVERGENCE = 0.1
# What one condition alone is guided by; ``seed`` is the form in which the other one is left out.
TEXT_GUIDANCE = DualGuidanceConfig(text_scale=4.0, visual_scale=0.0, guidance_form="seed")
VISUAL_GUIDANCE = DualGuidanceConfig(text_scale=0.0, visual_scale=2.0, guidance_form="seed")


@dataclasses.dataclass(frozen=True)
class Missing:
    """In place of a network that is not there: what depends on it is absent, for this reason."""

    reason: str


class Outcome(NamedTuple):
    """Of one item: measured values, by name, and pictures to show, as small as they are shown."""

    values: dict[str, float]
    images: Sequence[PIL.Image.Image] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A model, held-out images and the networks that measure."""

    generator: FeatureGenerator
    dataset: FeatureDataset
    lpips: LPIPS | Missing
    visual: VisualEncoder | Missing
    text: TextEncoder | Missing

    def item(self, index: int) -> tuple[torch.Tensor, Cond]:
        """Return the image [1, 3, H, W] uint8 of an item, and its conditions."""
        latents, cond = self.dataset.__getitems__([index])
        return self.generator.codec.pictures(latents), cond

    def make(
        self, index: int, cond: Cond, guidance: DualGuidanceConfig | None = None
    ) -> torch.Tensor:
        """Return an image [1, 3, H, W] uint8 of an item's size, with its noise."""
        bucket = self.dataset.buckets[self.dataset.bucket_index(index)]
        seeds = [seed_of_item(self.dataset.ids[index])]
        return self.generator.generate(seeds, cond, bucket, guidance=guidance)

    def distances(self, **pairs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        """Return the LPIPS of each pair of images, by its name; nothing without weights."""
        if isinstance(self.lpips, Missing):
            return {}
        return {name: self.lpips.distance(*pair).item() for name, pair in pairs.items()}

    def with_texts(self, cond: Cond, captions: Sequence[str]) -> list[Cond]:
        """Return conditions with the features of other texts, in the format of stored ones."""
        hidden, mask, _ = self.text.encode(list(captions))
        found = []
        for row in range(len(captions)):
            own = hidden[row, mask[row]].float().cpu().numpy()
            text, valid = map(torch.from_numpy, pad_texts([own], self.dataset.text_lengths))
            found.append({**cond, "text": text, "text_mask": valid})
        return found


def only(cond: Cond, names: Sequence[str]) -> Cond:
    """Return the conditions of these names, and the size."""
    return {name: value for name, value in cond.items() if name in (*names, "size")}


def _row(*images: torch.Tensor) -> list[PIL.Image.Image]:
    return [fit_tile(to_pil(image[0])) for image in images]


def reconstruct(bench: Bench, item: Sequence[int], shown: bool) -> Outcome:
    """Make an image from its own conditions: how far is it, and are its parts in their places?

    ``layout`` is the mean cosine of the patch features of both images, place by place.
    """
    truth, cond = bench.item(item[0])
    made = bench.make(item[0], cond)
    values = bench.distances(lpips=(made, truth))
    if not isinstance(bench.visual, Missing):
        _, patches = bench.visual.encode(made)
        stored = cond["patches"].to(patches.device, torch.float32)
        cosine = torch.nn.functional.cosine_similarity(patches.float(), stored, dim=2)
        values["layout"] = cosine.mean().item()
    if not shown:
        return Outcome(values)
    return Outcome(values, _row(truth, made, bench.make(item[0], only(cond, TEXT))))


def swap(bench: Bench, item: Sequence[int], shown: bool) -> Outcome:
    """Make the first image of a pair with the second's reference: is it nearer to the second?"""
    first, cond = bench.item(item[0])
    second, other = bench.item(item[1])
    made = bench.make(item[0], {**cond, **only(other, VISUAL)})
    values = bench.distances(lpips_own=(made, first), lpips_reference=(made, second))
    if values:
        values["transferred"] = float(values["lpips_reference"] < values["lpips_own"])
    return Outcome(values, _row(first, made, second))


def edit_text(bench: Bench, item: Sequence[int], shown: bool) -> Outcome:
    """Replace words of an image's text: does the image change?

    As a control its unchanged text is encoded again, which should change nothing.
    """
    truth, cond = bench.item(item[0])
    caption = bench.dataset.caption(item[0])
    same, other = bench.with_texts(cond, [caption, edit_caption(caption)[0]])
    made, control, changed = (bench.make(item[0], c) for c in (cond, same, other))
    values = bench.distances(lpips=(made, changed), lpips_control=(made, control))
    if values:
        values["applied"] = float(values["lpips"] > max(MIN_EFFECT, values["lpips_control"]))
    return Outcome(values, _row(truth, made, changed))


def text_alone(bench: Bench, item: Sequence[int], shown: bool) -> Outcome:
    """Make an image from its text alone, and from another's: is its own nearer to the truth?"""
    truth, cond = bench.item(item[0])
    _, other = bench.dataset.__getitems__([item[1]])
    matched = bench.make(item[0], only(cond, TEXT))
    shuffled = bench.make(item[0], {**only(other, TEXT), **only(cond, ())})
    values = bench.distances(lpips=(matched, truth), lpips_shuffled=(shuffled, truth))
    if values:
        values["matched_better"] = float(values["lpips"] < values["lpips_shuffled"])
    return Outcome(values, _row(truth, matched, shuffled))


def diverge(bench: Bench, item: Sequence[int], shown: bool) -> Outcome:
    """Guide by the text alone and by the reference alone: do two images come of it?"""
    _, cond = bench.item(item[0])
    by_text = bench.make(item[0], cond, TEXT_GUIDANCE)
    by_visual = bench.make(item[0], cond, VISUAL_GUIDANCE)
    values = bench.distances(lpips=(by_text, by_visual))
    if values:
        values["diverged"] = float(values["lpips"] > MIN_DIVERGENCE)
    if not shown:
        return Outcome(values)
    return Outcome(values, _row(by_text, by_visual, bench.make(item[0], cond)))


Items = list[tuple[int, ...]]
# Of a value of a test: which measured number it sums up, and how.
Measures = Mapping[str, tuple[str, Callable[[np.ndarray], float]]]


@dataclasses.dataclass(frozen=True)
class FeatureTest:
    """One test."""

    # Returns up to a number of items, each with the item that it is paired with, if there is one.
    choose: Callable[[FeatureDataset, int], Items]
    # Makes and measures one item; the last argument tells whether its images are shown.
    run: Callable[[Bench, Sequence[int], bool], Outcome]
    value: str  # The name among its measures of the one that stands for all.
    measures: Measures
    columns: tuple[str, ...]  # What the pictures of an item are.
    needs: tuple[str, ...] = ()  # Networks without which nothing at all can be made.
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # Its constants.


def spread(counts: Sequence[int], num: int) -> list[list[int]]:
    """Return rows of every bucket, ``num`` in all or as many as there are.

    Buckets have equal parts as far as they go, and rows lie evenly within a bucket; if there are
    more buckets than ``num``, those with a row lie evenly among them.
    """
    filled = [bucket for bucket, count in enumerate(counts) if count]
    if num < len(filled):
        places = np.linspace(0, len(filled) - 1, num).round().astype(int)
        filled = [filled[place] for place in places]
    parts = dict.fromkeys(range(len(counts)), 0)
    left = min(num, sum(counts[bucket] for bucket in filled))
    while left:
        for bucket in filled:
            if left and parts[bucket] < counts[bucket]:
                parts[bucket] += 1
                left -= 1
    return [
        [(2 * row + 1) * count // (2 * parts[bucket]) for row in range(parts[bucket])]
        for bucket, count in enumerate(counts)
    ]


def _items(dataset: FeatureDataset, num: int, counts: Sequence[int] | None = None) -> list[int]:
    firsts = np.cumsum([0, *dataset.counts]).tolist()
    parts = spread(dataset.counts if counts is None else counts, num)
    return [firsts[bucket] + row for bucket, rows in enumerate(parts) for row in rows]


def choose_items(dataset: FeatureDataset, num: int) -> Items:
    """Return items spread over all buckets."""
    return [(index,) for index in _items(dataset, num)]


def choose_pairs(dataset: FeatureDataset, num: int) -> Items:
    """Return items of buckets of at least two, each with the next of its bucket."""
    counts = [count if count > 1 else 0 for count in dataset.counts]
    return [(index, _following(dataset, index)[0]) for index in _items(dataset, num, counts)]


def choose_other_texts(dataset: FeatureDataset, num: int) -> Items:
    """Return items spread over all buckets, each with one of another text.

    That is the next such one of its bucket, if there is one, else the next of all.
    """
    pairs = []
    for index in _items(dataset, num):
        own, total = dataset.caption(index), sum(dataset.counts)
        others = (*_following(dataset, index), *((index + n) % total for n in range(1, total)))
        found = next((other for other in others if dataset.caption(other) != own), None)
        if found is not None:
            pairs.append((index, found))
    return pairs


def _following(dataset: FeatureDataset, index: int) -> list[int]:
    """Return the other items of an item's bucket, beginning with the one after it."""
    bucket = dataset.bucket_index(index)
    first, count = sum(dataset.counts[:bucket]), dataset.counts[bucket]
    return [first + (index - first + step) % count for step in range(1, count)]


def network_of(column: str) -> str:
    """Return which network gives a measured number."""
    return "visual" if column == "layout" else "lpips"


def _means(**columns: str) -> Measures:
    return {name: (column, np.mean) for name, column in columns.items()}


def _spread_of(column: str) -> Measures:
    """Return mean and quantiles of a column."""
    percentiles = (10, 50, 90)
    quantiles = {
        f"{column}_p{q}": (column, functools.partial(np.quantile, q=q / 100)) for q in percentiles
    }
    return {column: (column, np.mean), **quantiles}


def _bands() -> Measures:
    def share(low: float, high: float) -> Callable[[np.ndarray], float]:
        return lambda values: ((values >= low) & (values < high)).mean()

    edges = itertools.pairwise((0.0, *BANDS.values()))
    return {
        f"share_{name}": ("lpips", share(*limits))
        for name, limits in zip(BANDS, edges, strict=True)
    }


FEATURE_TESTS: dict[str, FeatureTest] = {
    "reconstruction": FeatureTest(
        choose_items,
        reconstruct,
        "lpips",
        {**_spread_of("lpips"), **_bands(), **_spread_of("layout")},
        ("image", "of its text and image", "of its text alone"),
    ),
    "swap": FeatureTest(
        choose_pairs,
        swap,
        "share_transferred",
        _means(
            share_transferred="transferred",
            lpips_own="lpips_own",
            lpips_reference="lpips_reference",
        ),
        ("A", "text of A, image of B", "B"),
    ),
    "text_edit": FeatureTest(
        choose_items,
        edit_text,
        "share_applied",
        {
            **_means(share_applied="applied", lpips="lpips"),
            "lpips_control": ("lpips_control", np.max),
        },
        ("image", "of its text and image", "of its text, edited"),
        needs=("text",),
        protocol=dict(min_effect=MIN_EFFECT, max_control=MAX_CONTROL),
    ),
    "text_only": FeatureTest(
        choose_other_texts,
        text_alone,
        "lpips",
        {
            **_spread_of("lpips"),
            **_means(lpips_shuffled="lpips_shuffled", share_matched_better="matched_better"),
        },
        ("image", "of its text alone", "of another text"),
    ),
    "divergence": FeatureTest(
        choose_items,
        diverge,
        "lpips",
        _means(lpips="lpips", share_diverged="diverged"),
        ("guided by the text", "guided by the image", "by both"),
        protocol=dict(min_divergence=MIN_DIVERGENCE, scales=[[4.0, 0.0], [0.0, 2.0]], form="seed"),
    ),
}
