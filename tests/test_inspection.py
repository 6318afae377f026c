"""What is found out about data, order and draws before and while a run trains."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults.data import ALL, FAULTS
from feature_files import photographs
from measure_inspection import measure
from scipy.stats import binom
from training_runs import TINY, only_run
from warm_start import ROOT

from data.samplers import PositionSampler
from training.watching.inspection.draws import DrawsWatcher, is_unlikely
from training.watching.inspection.order import find_unshuffled
from training.watching.inspection.pairs import find_unrelated
from training.watching.inspection.patches import SHIFTS, find_shifted_patches
from training.watching.inspection.relation import relation
from training.watching.inspection.sample import (
    Batch,
    Sample,
    num_items,
    random_rows,
    rows_of_few_classes,
)
from training.watching.inspection.scale import find_wrong_scale


def names_of(findings):
    return [finding.name for finding in findings]


def crops(num, size=32, seed=0):
    """Return crops of two photographs, uint8 [num, 3, size, size], and of which each is."""
    rng = np.random.default_rng(seed)
    images, labels = [], rng.integers(0, 2, num)
    for label in labels:
        photograph = np.asarray(photographs()[label])
        edge = int(rng.integers(size, 200))
        top, left = (int(rng.integers(side - edge)) for side in photograph.shape[:2])
        crop = torch.tensor(photograph[top : top + edge, left : left + edge]).permute(2, 0, 1)
        images.append(torch.nn.functional.interpolate(crop[None].float(), size)[0])
    return torch.stack(images).to(torch.uint8), torch.tensor(labels)


def labelled(images, labels, **settings):
    batch = Batch(stored=images, x=images.float() / 127.5 - 1, cond={}, groups=labels)
    return Sample(batches=(batch,), **settings)


# Labels, sets and captions.


def test_the_test_of_a_relation_is_as_often_wrong_as_it_says():
    values = torch.Generator().manual_seed(0)
    ps = []
    for number in range(120):
        look = torch.randn(24, 5, generator=values)
        labels = torch.randint(3, [24], generator=values)
        same = (labels[:, None] == labels[None]).float()
        found = relation([look - look.mean(0)], [same], torch.Generator().manual_seed(number))
        ps.append(found.p)
    for level in (0.1, 0.3, 0.5):
        hits = sum(p <= level for p in ps)
        assert min(binom.cdf(hits, 120, level), binom.sf(hits - 1, 120, level)) > 1e-3


def test_labels_of_photographs_are_silent_and_shuffled_ones_are_named():
    def draw(number):
        return labelled(*crops(240, seed=number))

    def draw_shuffled(number):
        images, labels = crops(240, seed=number)
        order = torch.randperm(240, generator=torch.Generator().manual_seed(number))
        return labelled(images, labels[order])

    assert find_unrelated(draw) == []
    (found,) = find_unrelated(draw_shuffled)
    assert found.name == "labels_shuffled"
    assert "240 images" in found.message


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (crops(150)[0], torch.arange(150) % 2),  # Too few to tell.
        (torch.full((240, 3, 32, 32), 7, dtype=torch.uint8), torch.arange(240) % 2),
        (crops(240)[0], torch.zeros(240, dtype=torch.int64)),
        (crops(240)[0], torch.arange(240)),
        (crops(1)[0], torch.zeros(1, dtype=torch.int64)),
        (crops(240)[0], None),
    ],
    ids=["few", "constant", "one class", "a class each", "one image", "no labels"],
)
def test_nothing_is_said_where_labels_cannot_be_judged(images, labels):
    assert find_unrelated(lambda number: labelled(images, labels)) == []


def captioned(num, seed, shuffled):
    """Return images of a few things with features of texts that name them, in two sizes."""
    rng, batches = torch.Generator().manual_seed(seed), []
    for height in (8, 12):
        things = torch.randint(6, [num // 2], generator=rng)
        words = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
        looks = torch.randn(6, 4, height, 8, generator=torch.Generator().manual_seed(2))
        x = looks[things] + torch.randn(num // 2, 4, height, 8, generator=rng)
        text = words[things] + torch.randn(num // 2, 16, generator=rng)
        if shuffled:
            text = text.roll(1, 0)
        mask = torch.ones(num // 2, 1, dtype=torch.bool)
        cond = dict(text=text[:, None], text_mask=mask, cls=x.flatten(1)[:, :9])
        batches.append(Batch(stored=x, x=x, cond=cond))
    return Sample(batches=tuple(batches), visual=("cls",))


def test_shuffled_captions_are_named_where_there_are_enough():
    assert find_unrelated(lambda number: captioned(64, number, shuffled=False)) == []
    found = find_unrelated(lambda number: captioned(64, number, shuffled=True))
    assert names_of(found) == ["captions_shuffled"]
    assert find_unrelated(lambda number: captioned(32, number, shuffled=True)) == []


# Patches.


def fields(num, down=0, right=0, seed=0, coupling=1.0):
    """Return latents [num, 4, 16, 16] and patches of them, as far from their place as said."""
    rng = torch.Generator().manual_seed(seed)
    cells = torch.nn.functional.avg_pool2d(torch.randn(num, 6, 10, 10, generator=rng), 3, 1)
    mixed = torch.einsum("oc,nchw->nohw", torch.randn(4, 6, generator=rng), cells)
    latents = torch.nn.functional.interpolate(mixed, scale_factor=2)
    noise = torch.randn(latents.shape, generator=rng)
    seen = torch.einsum("oc,nchw->nohw", torch.randn(32, 6, generator=rng), cells)
    moved = coupling * seen.roll((down, right), (2, 3)).flatten(2).mT
    moved = moved + 0.1 * torch.randn(moved.shape, generator=rng)
    batch = Batch(stored=latents, x=latents + 0.1 * noise, cond={"patches": moved}, grid=(8, 8))
    return Sample(batches=(batch,), visual=("patches",))


@pytest.mark.parametrize("shift", [shift for shift in SHIFTS if shift != (0, 0)])
def test_a_shift_of_the_patches_is_named(shift):
    (found,) = find_shifted_patches(fields(16, *shift))
    assert found.name == "patches_shifted"
    for by, (back, forth) in zip(shift, (("up", "down"), ("left", "right")), strict=True):
        assert (f"1 {forth}" in found.message, f"1 {back}" in found.message) == (by > 0, by < 0)


@pytest.mark.parametrize("coupling", [0.0, 0.05, 1.0])
def test_patches_in_place_or_without_any_bearing_are_silent(coupling):
    for seed in range(10):
        assert find_shifted_patches(fields(16, seed=seed, coupling=coupling)) == []


# Scale.


@pytest.mark.parametrize(("std", "num", "far"), [(0.5, 64, 0), (0.85, 64, 0), (0.1, 64, 1)])
def test_sigma_data_is_compared_with_the_data(std, num, far):
    x = std * torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.3
    sample = Sample(batches=(Batch(stored=x, x=x, cond={}),), std=0.5)
    found = find_wrong_scale(sample)
    assert names_of(found) == ["sigma_data_wrong"] * far
    assert all("0.1, but --sigma-data is 0.5" in finding.message for finding in found)


def test_few_or_constant_data_have_no_scale():
    for x in (torch.randn(4, 3, 8, 8), torch.ones(64, 3, 8, 8)):
        assert find_wrong_scale(Sample(batches=(Batch(stored=x, x=x, cond={}),), std=9.0)) == []


def test_features_have_to_be_normalised():
    x = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = dict(cls=8 * x.flatten(1), patches=x.flatten(2).mT)
    sample = Sample(batches=(Batch(stored=x, x=4 * x, cond=cond),), std=1.0, std_from="latents")
    assert names_of(find_wrong_scale(sample)) == ["latents_scale"]
    sample = Sample(batches=(Batch(stored=x, x=x, cond=cond),), visual=("cls", "patches"))
    (found,) = find_wrong_scale(sample)
    assert found.name == "features_scale"
    assert "CLS" in found.message


# Order.


def places(num, seed, batch=32, **settings):
    whole = dict(start_nimg=0, batch_gpu=batch, rank=0, world_size=1)
    sampler = PositionSampler(num, seed=seed, batch_size=batch, **whole)
    return [np.array(keys) for keys in itertools.islice(sampler, 256 // batch)]


@pytest.mark.parametrize("num", [1, 2, 10, 200, 5000])
def test_a_random_order_is_silent(num):
    for seed in range(10):
        assert find_unshuffled(places(num, seed)) == []


def test_the_order_of_files_is_named():
    (found,) = find_unshuffled(np.arange(256).reshape(-1, 32))
    assert found.name == "unshuffled"
    assert "256 images" in found.message
    assert find_unshuffled([np.arange(8)]) == []  # Too few to tell.


# What is read.


def test_a_sample_is_small_and_of_few_classes():
    assert [num_items(8 * 8, number) for number in (0, 1)] == [200, 512]
    assert num_items(256 * 256 * 3, 1) * 256 * 256 * 3 < 17e6
    labels = np.repeat(np.arange(1000), 50)
    rows = rows_of_few_classes(labels, 512, 0, 0)
    assert len(rows) == len(set(rows.tolist())) == 500
    assert np.unique(labels[rows], return_counts=True)[1].tolist() == [50] * 10
    assert len(rows_of_few_classes(np.arange(30), 512, 0)) == 10
    assert sorted(random_rows(512, 7, 3)) == list(range(7))


# Draws.


@pytest.mark.parametrize(("hits", "num", "share"), [(30, 30, 0.1), (0, 250, 0.1), (12, 128, 0.1)])
def test_unlikely_is_what_has_a_chance_below_one_in_a_billion(hits, num, share):
    tail = min(binom.cdf(hits, num, share), binom.sf(hits - 1, num, share))
    assert is_unlikely(hits, num, share) == (tail < 1e-9)


def test_rare_draws_of_small_batches_are_silent():
    assert not is_unlikely(8, 8, 0.1)
    assert not is_unlikely(0, 0, 0.1)
    assert is_unlikely(1, 8, 0.0)
    assert is_unlikely(7, 8, 1.0)
    assert not is_unlikely(8, 8, 1.0)
    assert not is_unlikely(0, 8, 0.0)


def watched(cond, data=None, num=32):
    """Return what two ticks find on a batch with given conditions and nothing else to see."""
    data = data or SimpleNamespace(num_classes=2, class_counts=[50, 50])
    watcher, found = DrawsWatcher(None, data), []
    objective = SimpleNamespace(dropped=lambda draws: {}, contexts=lambda *args: {})
    for _ in range(2):
        draws = SimpleNamespace(noise=torch.randn(num, 1, 4, 4))
        found.append(names_of(watcher.findings(objective, torch.randn(num, 3), cond, draws)))
    return found


def test_equal_conditions_are_named_once_enough_rows_have_them():
    text = torch.randn(32, 3, 4)
    assert watched(dict(text=text)) == [[], []]
    assert watched(dict(text=text[:1].expand(8, -1, -1)), num=8) == [[], ["condition_constant"]]
    constant = [["condition_constant"]] * 2
    assert watched(dict(cls=torch.zeros(32, 4))) == constant
    assert watched(dict(label=torch.ones(64, dtype=torch.int64)), num=64) == constant
    one_class = SimpleNamespace(num_classes=1, class_counts=[100])
    common = SimpleNamespace(num_classes=2, class_counts=[99, 1])
    for data in (one_class, common, SimpleNamespace(num_classes=0, class_counts=[])):
        assert watched(dict(label=torch.ones(64, dtype=torch.int64)), data, 64) == [[], []]


def test_noise_that_repeats_is_named():
    watcher = DrawsWatcher(None, SimpleNamespace(num_classes=0, class_counts=[]))
    objective = SimpleNamespace(dropped=lambda draws: {}, contexts=lambda *args: {})
    draws = SimpleNamespace(noise=torch.randn(4, 1, 4, 4))
    found = [watcher.findings(objective, torch.randn(4, 3), {}, draws) for _ in range(2)]
    assert [names_of(part) for part in found] == [[], ["noise_repeats"]]


# Whole runs.


@pytest.mark.parametrize("preset", ["digits", "fsdm-digits"])
def test_faults_of_digits_are_named_and_clean_data_are_silent(preset, digits_zip):
    named = {}
    for fault in [None, *(f for f in FAULTS if preset in f.presets and f.ranks == 1)]:
        _, before, ticks = measure(fault, preset, digits_zip, 0, 4)
        found = {*names_of(before), *names_of(itertools.chain.from_iterable(ticks))}
        named["" if fault is None else fault.name] = found
        assert fault is None or fault.expects in found, fault.name
    assert named[""] == set()


PLANTED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from faults.data import FAULTS
next(fault for fault in FAULTS if fault.name == {name!r}).plant()
import train
from dnnlib.program import run
run(train.main)
"""


@pytest.mark.parametrize(("name", "ranks"), [("shuffle_labels", None), ("share_noise", 2)])
def test_a_run_says_what_is_wrong_and_goes_on(name, ranks, train, tmp_path):
    script = tmp_path / "planted.py"
    text = PLANTED.format(root=str(ROOT), tests=str(ROOT / "tests"), name=name)
    script.write_text(text)
    args = (*TINY, "--kimg=0.256", "--tick=0.128", f"--outdir={tmp_path / 'runs'}")
    train(*args, script=script, warm=True, ranks=ranks).finish()
    log = (only_run(tmp_path / "runs") / "log.txt").read_text()
    warnings = [line for line in log.splitlines() if "Warning: " in line]
    words = {
        "shuffle_labels": "Labels say nothing",
        "share_noise": "ranks, of which there are 2, have the same",
    }
    assert [words[name] in line for line in warnings] == [True]


def test_every_preset_has_faults():
    assert all(any(preset in fault.presets for fault in FAULTS) for preset in ALL)
    assert all(math.isfinite(fault.ranks) and fault.plant.__doc__ for fault in FAULTS)
