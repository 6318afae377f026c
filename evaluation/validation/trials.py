"""The tests of a feature-conditioned model: what each generates and measures.

Distances are LPIPS of uint8 images at their own size. The truth is an image as the autoencoder
decodes it. Noise is a function of the image's name, so that two images of a test differ only by
their conditions, and images of two networks only by the networks.
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
# Upper limits of the LPIPS of a reconstruction, by how people judge it.
BANDS = {"excellent": 0.3, "good": 0.5, "blurry": 0.7, "poor": np.inf}
MAX_CONTROL = 0.01  # Largest LPIPS that rounding explains if an unchanged text is encoded again.
MIN_EFFECT = 0.05  # LPIPS above which an edit counts as applied.
MIN_DIVERGENCE = 0.1  # LPIPS above which two images count as different.
# Guidance by one condition alone; form ``seed`` leaves the other one out.
TEXT_GUIDANCE = DualGuidanceConfig(text_scale=4.0, visual_scale=0.0, guidance_form="seed")
VISUAL_GUIDANCE = DualGuidanceConfig(text_scale=0.0, visual_scale=2.0, guidance_form="seed")


@dataclasses.dataclass(frozen=True)
class Missing:
    """Takes the place of a network that is not available; results that need it are left out."""

    reason: str


class Outcome(NamedTuple):
    """The result of a test on one item: values by name, and pictures reduced to display size."""

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
        """Return the decoded image of an item, uint8 [1, 3, H, W], and its conditions."""
        latents, cond = self.dataset.__getitems__([index])
        return self.generator.codec.pictures(latents), cond

    def make(
        self, index: int, cond: Cond, guidance: DualGuidanceConfig | None = None
    ) -> torch.Tensor:
        """Return an image generated with an item's size and noise, uint8 [1, 3, H, W]."""
        bucket = self.dataset.buckets[self.dataset.bucket_index(index)]
        seeds = [seed_of_item(self.dataset.ids[index])]
        return self.generator.generate(seeds, cond, bucket, guidance=guidance)

    def distances(self, **pairs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        """Return the LPIPS of each pair of images, by name; nothing if LPIPS is missing."""
        if isinstance(self.lpips, Missing):
            return {}
        return {name: self.lpips.distance(*pair).item() for name, pair in pairs.items()}

    def with_texts(self, cond: Cond, captions: Sequence[str]) -> list[Cond]:
        """Return, for each caption, ``cond`` with the features of that caption as its text.

        They are padded or cut to one of the lengths that the stored features have.
        """
        hidden, mask, _ = self.text.encode(list(captions))
        found = []
        for row in range(len(captions)):
            own = hidden[row, mask[row]].float().cpu().numpy()
            text, valid = map(torch.from_numpy, pad_texts([own], self.dataset.text_lengths))
            found.append({**cond, "text": text, "text_mask": valid})
        return found


def only(cond: Cond, names: Sequence[str]) -> Cond:
    """Return the conditions with these names, and the size."""
    return {name: value for name, value in cond.items() if name in (*names, "size")}


def _row(*images: torch.Tensor) -> list[PIL.Image.Image]:
    return [fit_tile(to_pil(image[0])) for image in images]


def reconstruct(bench: Bench, item: Sequence[int], shown: bool) -> Outcome:
    """Make an image from its own conditions: how far is it from the truth?

    ``lpips`` is that distance, ``layout`` the mean cosine of the patch features of both images at
    the same places.
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
    """Make an image again with words of its text replaced: does it change?

    As a control, the unchanged text is encoded again, which should change nothing.
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
    """Make an image from its text alone, and from another text: is its own nearer to the truth?"""
    truth, cond = bench.item(item[0])
    _, other = bench.dataset.__getitems__([item[1]])
    matched = bench.make(item[0], only(cond, TEXT))
    shuffled = bench.make(item[0], {**only(other, TEXT), **only(cond, ())})
    values = bench.distances(lpips=(matched, truth), lpips_shuffled=(shuffled, truth))
    if values:
        values["matched_better"] = float(values["lpips"] < values["lpips_shuffled"])
    return Outcome(values, _row(truth, matched, shuffled))


def diverge(bench: Bench, item: Sequence[int], shown: bool) -> Outcome:
    """Make an image guided by its text alone, and one by its reference alone: do they differ?"""
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
# For each value of a test: the measured number that it summarises over items, and how.
Measures = Mapping[str, tuple[str, Callable[[np.ndarray], float]]]


@dataclasses.dataclass(frozen=True)
class FeatureTest:
    """A test: how items are chosen, generated and measured."""

    # Returns up to a number of items, each with the item that it is paired with, if any.
    choose: Callable[[FeatureDataset, int], Items]
    # Generates and measures one item; the last argument tells whether its images are shown.
    run: Callable[[Bench, Sequence[int], bool], Outcome]
    value: str  # The name of the main measure.
    measures: Measures
    columns: tuple[str, ...]  # Titles of the pictures of an item.
    needs: tuple[str, ...] = ()  # Networks without which no image can be generated.
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # Constants of the test.


def spread(counts: Sequence[int], num: int) -> list[list[int]]:
    """Return rows of each bucket, at most ``num`` in all; ``counts`` are the rows that there are.

    Buckets get equal numbers of rows as far as they have them, evenly spaced within a bucket. If
    there are more buckets than ``num``, evenly spaced buckets get one row each.
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
    """Return up to ``num`` items, spread over all buckets."""
    return [(index,) for index in _items(dataset, num)]


def choose_pairs(dataset: FeatureDataset, num: int) -> Items:
    """Return up to ``num`` items of buckets with two or more, each with the next in its bucket."""
    counts = [count if count > 1 else 0 for count in dataset.counts]
    return [(index, _following(dataset, index)[0]) for index in _items(dataset, num, counts)]


def choose_other_texts(dataset: FeatureDataset, num: int) -> Items:
    """Return up to ``num`` items, spread over all buckets, each with one that has another text.

    That is the next such item in its bucket or, if there is none, in the dataset.
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
    """Return the other items in an item's bucket, cyclically from the one after it."""
    bucket = dataset.bucket_index(index)
    first, count = sum(dataset.counts[:bucket]), dataset.counts[bucket]
    return [first + (index - first + step) % count for step in range(1, count)]


def network_of(column: str) -> str:
    """Return the name of the network that measures a column of values."""
    return "visual" if column == "layout" else "lpips"


def _means(**columns: str) -> Measures:
    return {name: (column, np.mean) for name, column in columns.items()}


def _spread_of(column: str) -> Measures:
    """Return the mean and the 10%, 50% and 90% quantiles of a column as measures."""
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
