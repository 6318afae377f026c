"""Sets by (seed, position), splits of classes, hybrids and episodes."""

import pickle
import re

import helpers
import numpy as np
import pytest
import torch

from data.fewshot.classes import split_classes, transform_images
from data.fewshot.config import SetConfig
from data.fewshot.episodes import draw_episodes, episodes_of_dataset, episodes_of_run
from data.fewshot.sets import SetDataset
from data.images.dataset import ImageDataset
from data.samplers import PositionSampler
from demos.digits import ClassShare, class_shares
from evaluation.fewshot import copying, support_distances


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """14 images each of bars, dots and rings, 8x8 RGB."""
    return ImageDataset(helpers.toy_data(tmp_path_factory.getbasetemp()), use_labels=True)


def make(images, *, sample_size=3, seed=0, use_labels=False, hflip=False, **changes):
    settings = dict(train_classes=("bar", "dot"), test_classes=("ring",), held_out=4)
    config = SetConfig(**{**settings, **changes})
    return SetDataset(
        images, config, sample_size=sample_size, seed=seed, use_labels=use_labels, hflip=hflip
    )


def test_a_set_depends_on_seed_and_position_alone(images):
    sets = make(images, hybrids=0.5, min_sample_size=1, hflip=True)
    whole, cond = sets.__getitems__(range(20))
    copy = pickle.loads(pickle.dumps(sets))
    for positions in ([7], [19, 3, 3], range(5, 12)):
        part, part_cond = copy.__getitems__(positions)
        assert torch.equal(part, whole[list(positions)])
        for name, value in part_cond.items():
            assert torch.equal(value, cond[name][list(positions)])
    assert len({own.numpy().tobytes() for own in whole}) == 20
    other, _ = make(images, hybrids=0.5, min_sample_size=1, seed=1).__getitems__(range(20))
    assert not torch.equal(other, whole)


@pytest.mark.parametrize(("world_size", "batch_gpu", "start"), [(1, 8, 0), (2, 2, 16), (4, 1, 8)])
def test_ranks_and_accumulation_read_the_same_global_batches(world_size, batch_gpu, start):
    per_rank = 8 // world_size
    ranks = [
        iter(
            PositionSampler(
                None,
                seed=0,
                start_nimg=start,
                batch_size=8,
                batch_gpu=batch_gpu,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    for step in range(3):
        found = [
            position
            for rank in ranks
            for _ in range(per_rank // batch_gpu)
            for position in next(rank)
        ]
        assert found == list(range(start + 8 * step, start + 8 * step + 8))


def test_a_set_holds_different_images_of_one_class_that_are_not_held_out(images):
    sets = make(images)
    held_out = {int(i) for rows in sets.held_out.values() for i in rows}
    assert len(held_out) == 8
    counts = np.zeros(2, int)
    seen = set()
    for position in range(300):
        drawn = sets.draw(position)
        (rows,) = drawn.rows
        assert len(set(rows.tolist())) == 3
        assert {images.class_names[c] for c in images.labels[rows]} == {
            sets.set_classes[drawn.labels[0]]
        }
        assert not held_out & set(rows.tolist())
        seen |= set(rows.tolist())
        counts[drawn.labels[0]] += 1
    assert len(seen) == 20  # Everything else is trained on.
    assert abs(counts[0] - 150) < 45  # Five standard deviations.
    pixels, cond = sets.__getitems__([5])
    drawn = sets.draw(5)
    assert torch.equal(pixels[0], images.__getitems__(drawn.rows[0].tolist())[0])
    assert cond["label"].tolist() == drawn.labels
    assert "mask" not in cond


def test_smaller_sets_say_which_images_they_have(images):
    sets = make(images, min_sample_size=1)
    pixels, cond = sets.__getitems__(range(60))
    sizes = cond["mask"].sum(1)
    assert set(sizes.tolist()) == {1, 2, 3}
    for own, mask in zip(pixels, cond["mask"], strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert (own[~mask] == 0).all()
        assert (own[mask].flatten(1) != 0).any(1).all()
    small = make(images, sample_size=11)  # Ten images a class are left.
    assert small.is_ragged
    assert small.__getitems__([0])[1]["mask"].sum() == 10


@pytest.mark.parametrize("transform", range(8))
def test_transforms_are_quarter_turns_after_a_mirror_image(transform):
    image = np.arange(12).reshape(1, 1, 3, 4)
    expected = np.rot90(image[..., ::-1] if transform >= 4 else image, transform % 4, (-2, -1))
    found = transform_images(torch.from_numpy(image.copy()), transform)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_turned_and_mirrored_classes_are_classes_of_their_own(images):
    sets = make(images, class_transforms="dihedral", skip_transforms=("bar:2", "1:7"))
    names = {f"{name}{t}" for name in ("bar", "dot") for t in ("", *(f":{k}" for k in range(1, 8)))}
    assert set(sets.set_classes) == names - {"bar:2", "dot:7"}
    assert sets.num_images == 14 * 10
    for position in range(40):
        drawn = sets.draw(position)
        plain = images.__getitems__(drawn.rows[0].tolist())[0]
        name, _, transform = sets.set_classes[drawn.labels[0]].partition(":")
        expected = transform_images(plain, int(transform or 0))
        assert torch.equal(sets.__getitems__([position])[0][0], expected)
        assert images.class_names[images.labels[drawn.rows[0][0]]] == name


def test_hybrids_have_halves_of_the_same_two_classes_throughout_a_set(images):
    sets = make(images, hybrids=1.0)
    halves = {}
    for position in range(40):
        drawn = sets.draw(position)
        first, second = (images.__getitems__(rows.tolist())[0] for rows in drawn.rows)
        assert len(set(drawn.labels)) == 2
        found, cond = sets.__getitems__([position])
        assert cond["label"].tolist() == [2]  # None of the two classes.
        own = (found[0] == second).all(1)  # [n, H, W], where the second class may be
        area = torch.zeros(8, 8, dtype=torch.bool)
        area[drawn.half(8)] = True
        assert area.sum() == 32
        assert own[:, area].all()
        assert torch.equal(found[0][:, :, ~area], first[:, :, ~area])
        halves[tuple(area.flatten().tolist())] = True
    assert len(halves) == 4
    whole = sets.of_classes([2])  # Validation is on classes as they are.
    assert all(whole.draw(position).half is None for position in range(10))
    share = np.mean([make(images, hybrids=0.3).draw(p).half is not None for p in range(400)])
    assert 0.2 < share < 0.4


def test_mirror_images_are_drawn_for_each_image(images):
    sets = make(images, hflip=True)
    drawn = [sets.draw(position) for position in range(50)]
    assert 0.3 < np.mean([d.mirrored.mean() for d in drawn]) < 0.7
    for position, it in enumerate(drawn[:5]):
        plain = images.__getitems__(it.rows[0].tolist())[0]
        found = sets.__getitems__([position])[0][0]
        for own, before, mirrored in zip(found, plain, it.mirrored[0], strict=True):
            assert torch.equal(own, before.flip(-1) if mirrored else before)


# Splits of classes.


def test_classes_are_split_by_lists_fractions_or_as_the_data_say(images):
    lists = SetConfig(train_classes=("0-1",), test_classes=("ring",))
    assert split_classes(lists, images) == split_classes(
        SetConfig(train_classes=("bar", "1"), test_classes=("2",)), images
    )
    split = split_classes(lists, images)
    assert (split.train, split.val, split.test) == ((0, 1), (), (2,))
    thirds = [
        split_classes(SetConfig(split_fractions=(0.34, 0.33, 0.33), split_seed=seed), images)
        for seed in range(6)
    ]
    for found in thirds:
        assert sorted(found.train + found.val + found.test) == [0, 1, 2]
        assert len(found.train) == len(found.val) == len(found.test) == 1
    assert len({found.train for found in thirds}) > 1
    part = images.subset(range(len(images)))
    part.class_splits = {"train": (2,), "test": (0,)}
    found = split_classes(SetConfig(), part)
    assert (found.train, found.val, found.test) == ((2,), (), (0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_classes=("cube",)), "--train-classes: no class 'cube'"),
        (dict(train_classes=("0-7",)), "--train-classes: got 0-7; accepted: .* from 0 to 2"),
        (dict(train_classes=("1-0",)), "--train-classes: got 1-0"),
        (dict(val_classes=("ring",)), "class 'ring' is in --val-classes too"),
        (dict(train_classes=()), "no class is left to train on"),
        (dict(split_fractions=(0.5, 0.2, 0.2)), "has no effect with lists of classes"),
        (dict(held_out=13), "class 'bar' has 14 images, of which 13 .* 1 are left"),
        (dict(min_sample_size=4), "--min-sample-size: got 4; accepted: at most --sample-size"),
        (
            dict(class_transforms="rotations", skip_transforms=("bar",)),
            "--skip-transforms: got 'bar'; accepted: class:transform",
        ),
        (
            dict(class_transforms="rotations", skip_transforms=("bar:5",)),
            "--skip-transforms: got bar:5, which is not a class of this run",
        ),
        (
            dict(class_transforms="rotations", skip_transforms=("ring:1",)),
            "--skip-transforms: got ring:1, which is not a class of this run",
        ),
        (dict(class_transforms="dihedral", hflip=True), "--hflip puts mirror images into classes"),
        (
            dict(class_transforms="rotations", skip_transforms=("cube:1",)),
            "--skip-transforms: no class 'cube'",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message, images):
    with pytest.raises(ValueError, match=message):
        make(images, **changes)


def test_a_class_of_one_image_is_refused_whatever_is_held_out(images):
    one_ring = images.subset(np.flatnonzero(np.cumsum(images.labels == 2) < 2))
    message = f"{images.path}: class 'ring' has fewer than the two images that a set needs"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(one_ring).of_classes([2])
    with pytest.raises(ValueError, match=re.escape(message)):
        make(one_ring, train_classes=("ring",), test_classes=("bar",))


def test_fractions_above_one_and_unlabelled_data_are_refused(images):
    with pytest.raises(ValueError, match=r"which sum to 1\.5"):
        split_classes(SetConfig(split_fractions=(0.5, 0.5, 0.5)), images)
    bare = ImageDataset(images.path)
    with pytest.raises(ValueError, match="has no class labels, which sets are formed by"):
        make(bare)


# Episodes.


def test_supports_are_disjoint_from_each_other_and_from_the_reals(images):
    pools = {0: np.flatnonzero(images.labels == 0), 2: np.flatnonzero(images.labels == 2)}
    episodes = draw_episodes(images, pools, support_size=2, source="x", num_per_class=3)
    used = episodes.indices.flatten().tolist()
    assert len(set(used)) == len(used) == 12
    assert set(used) | set(episodes.reals.tolist()) == set(np.concatenate([*pools.values()]))
    assert not set(used) & set(episodes.reals.tolist())
    assert images.labels[episodes.indices].tolist() == [[c, c] for c in episodes.classes]
    # Eight images of each class are left, for three episodes.
    assert episodes.counts == (3, 3, 2, 3, 3, 2)
    pixels = images.__getitems__(used)[0].unflatten(0, (6, 2))
    assert torch.equal(pixels, episodes.supports)
    again = draw_episodes(images, pools, support_size=2, source="x", num_per_class=3, seed=1)
    assert not torch.equal(again.supports, episodes.supports)
    with pytest.raises(ValueError, match=r"Class 'bar' has 14 x images, too few for 8"):
        draw_episodes(images, pools, support_size=2, source="x", num_per_class=8)


def test_a_preview_is_the_first_sets_of_a_run_each_a_row(images):
    sets = make(images, sample_size=3)
    rows = sets.preview(10).rows
    assert [len(row) for row in rows] == [3, 3, 3, 3]
    batch, _ = sets.__getitems__(range(4))
    assert torch.equal(torch.stack([torch.stack(row) for row in rows]), batch)
    assert sets.summary() is None


def test_protocols_take_their_own_classes_and_images(images):
    sets = make(images, use_labels=True)
    seen = episodes_of_run(sets, "seen", support_size=2)
    assert {images.class_names[c] for c in seen.classes} == {"bar", "dot"}
    held_out = {int(i) for rows in sets.held_out.values() for i in rows}
    assert set(seen.indices.flatten()) | set(seen.reals) == held_out
    assert seen.labels.tolist() == [0, 1]
    unseen = episodes_of_run(sets, "unseen", support_size=2)
    assert {images.class_names[c] for c in unseen.classes} == {"ring"}
    assert unseen.labels.tolist() == [2]  # Of no class that the model knows.
    with pytest.raises(ValueError, match="The run has no val classes"):
        episodes_of_run(sets, "val", support_size=2)
    with pytest.raises(ValueError, match="held out no images"):
        episodes_of_run(make(images, held_out=0), "seen", support_size=2)
    every = episodes_of_dataset(images, support_size=2)
    assert len(every) == 3
    part = images.subset(range(len(images)))
    part.class_splits = {"train": (0, 1), "test": (2,)}
    assert set(episodes_of_dataset(part, support_size=2).classes.tolist()) == {2}


def test_the_distance_to_the_nearest_support_tells_copies(images):
    pools = {0: np.flatnonzero(images.labels == 0)}
    episodes = draw_episodes(images, pools, support_size=2, source="x", num_per_class=2)
    own = episodes.supports[:, 1]
    assert support_distances(own, episodes, [0, 1]).tolist() == [0, 0]
    shifted = (own.int() + torch.where(own > 127, -51, 51)).to(torch.uint8)
    found = support_distances(shifted, episodes, [0, 1])
    direct = [
        min(
            ((image.double() - other.double()) / 255).square().mean().sqrt().item()
            for other in episodes.supports[row]
        )
        for row, image in enumerate(shifted)
    ]
    assert found.tolist() == pytest.approx(direct, rel=1e-5)
    copies = copying(np.zeros(10), episodes, images)
    assert copies["share_nearer"] == 1
    assert copying(np.full(10, 9.0), episodes, images)["share_nearer"] == 0


def test_class_shares_compare_with_images_of_other_supports():
    predictions = {
        0: np.array([0, 0, 0, 1]),
        1: np.array([1, 0, -1, -1]),
        2: np.array([2, 2, 2, 0]),
    }
    first, second, third = class_shares(predictions, ["a", "b", "c"])
    assert (first.hits, first.num, first.control_hits, first.control_num) == (3, 4, 2, 8)
    assert (second.hits, second.num, second.control_hits, second.control_num) == (1, 4, 1, 8)
    assert (third.name, third.hits, third.control_hits) == ("c", 3, 0)


def test_the_p_value_is_that_of_the_hypergeometric_distribution():
    from scipy.stats import hypergeom

    share = ClassShare(name="x", hits=9, num=40, control_hits=12, control_num=200)
    assert share.p_value == pytest.approx(hypergeom(240, 21, 40).sf(8), rel=1e-9)
