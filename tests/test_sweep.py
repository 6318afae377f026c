"""The search of a sweep, its intervals and its grid, on images of which the best cell is known."""

import numpy as np
import pytest
from scipy import stats

from dnnlib.axes import Axes, expand_ranges, options_of, value_text
from evaluation.config import ScoreConfig
from evaluation.sweep.grid import make_grid
from evaluation.sweep.jackknife import NUM_GROUPS, Estimate, jackknife, t_quantile
from evaluation.sweep.search import Plan, search
from evaluation.sweep.store import Store, batches
from metrics.detectors import DetectorOutput
from metrics.frechet import frechet_distance_of_samples
from metrics.metric import METRICS
from metrics.reference import Reference

OUTPUT = DetectorOutput("pixels")
FRECHET = METRICS["fd_pixels"]
NUM_CELLS, NUM_IMAGES, DIM, BEST = 60, 1000, 6, 37


@pytest.fixture(scope="module")
def reference():
    real = np.random.default_rng(0).normal(size=(4000, DIM)).astype(np.float32)
    moments = dict(mu=real.mean(0).astype(float), sigma=np.cov(real, rowvar=False), count=4000)
    return Reference(output=OUTPUT, **moments, vectors=real, num_vectors=len(real))


def cell_vectors(noise, cell):
    """Return the vectors of a cell: those of the best one, moved by a bit per cell beside it.

    Along the first direction all are far too wide, which makes scores vary from seed to seed.
    """
    distance = np.float32(0.04 * abs(cell - BEST))
    return np.concatenate([10 * noise[:, :1], noise[:, 1:] + distance], axis=1)


class Source:
    """Scores cells on their first images, and remembers what it was asked for."""

    def __init__(self, reference, seed, *, is_paired=True):
        self._reference, self._is_paired, self.asked = reference, is_paired, []
        self._noise = np.random.default_rng(seed).normal(size=(NUM_IMAGES, DIM)).astype(np.float32)

    def __call__(self, cells, num):
        self.asked.append((list(cells), num))
        return [jackknife(FRECHET, self._vectors(cell)[:num], self._reference) for cell in cells]

    def _vectors(self, cell):
        noise = self._noise if self._is_paired else np.roll(self._noise, 17 * cell, axis=0)
        return cell_vectors(noise, cell)


def test_a_search_finds_the_best_cell_with_a_tenth_of_the_images(reference):
    plan = Plan.of(NUM_CELLS, NUM_IMAGES, 0.1)
    for seed in range(2):
        source = Source(reference, seed)
        found = search(NUM_CELLS, plan, source)
        true = Source(reference, seed)(range(NUM_CELLS), NUM_IMAGES)
        values = [own.value for own in true]
        behind, _ = true[found.winner].minus(true[np.argmin(values)])
        assert behind <= 2 * min(true, key=lambda own: own.value).error
        assert abs(found.winner - BEST) <= 4
        assert behind < 0.1 * (np.median(values) - min(values))
        assert found.num_images <= plan.budget == 0.1 * NUM_CELLS * NUM_IMAGES
        assert source.asked[0] == (list(range(NUM_CELLS)), plan.counts[0])
        spent, before, left = 0, 0, set(range(NUM_CELLS))
        for (cells, num), own in zip(source.asked, found.rounds, strict=True):
            assert set(cells) <= left, "a cell that was left out came back"
            assert num in (2 * before, NUM_IMAGES) or before == 0
            spent, before, left = spent + len(cells) * (num - before), num, set(own.followed)
            assert own.best in left
        assert spent == found.num_images


def test_cells_are_compared_on_the_same_images(reference):
    """Cells that differ by less than a score does from seed to seed are told apart all the same."""
    plan = Plan.of(NUM_CELLS, NUM_IMAGES, 0.1)
    paired = search(NUM_CELLS, plan, Source(reference, 0)).rounds[0]
    unpaired = search(NUM_CELLS, plan, Source(reference, 0, is_paired=False)).rounds[0]
    assert len(paired.alike) < 0.6 * len(unpaired.alike)
    worst = paired.estimates[paired.alike[-1]]
    difference, error = worst.minus(paired.estimates[paired.best])
    assert error < 0.5 * worst.error
    assert difference < worst.error, "these would be alike without pairs, too"


def test_cells_that_cannot_be_told_apart_are_kept_and_named(reference):
    noise = np.random.default_rng(0).normal(size=(NUM_IMAGES, DIM)).astype(np.float32)

    def estimate(cells, num):
        # The first two are equal, the third is far from both.
        return [jackknife(FRECHET, noise[:num] + (cell == 2), reference) for cell in cells]

    found = search(3, Plan.of(3, NUM_IMAGES, 0.5), estimate)
    assert [own.alike for own in found.rounds] == [(0, 1)] * len(found.rounds)
    assert found.rounds[-1].num_images == NUM_IMAGES
    assert (found.winner, found.alike()) == (0, [1])
    assert found.behind(2)[0] > 1


def test_a_cell_that_is_left_out_for_want_of_images_counts_as_alike():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, NUM_GROUPS))
    noise -= noise.mean(axis=1, keepdims=True)

    def estimate(cells, num):
        return [Estimate(1e-4 * cell, 1e-4 * cell + noise[cell]) for cell in cells]

    plan = Plan.of(40, 4000, 0.1)
    found = search(40, plan, estimate)
    assert len(found.rounds[1].estimates) < 40
    assert found.winner == 0
    assert found.alike() == list(range(1, 40))
    assert found.num_images <= plan.budget


def test_a_small_grid_is_compared_on_all_images():
    plan = Plan.of(3, 500, 0.1)
    assert (plan.counts, plan.budget) == ((500,), 1500)


def test_quantiles_are_those_of_the_t_distribution():
    for probability in (0.9, 0.975, 0.9999):
        expected = stats.t.ppf(probability, NUM_GROUPS - 1)
        assert t_quantile(probability) == pytest.approx(expected, rel=1e-3)


def test_errors_and_values_are_those_of_many_repetitions(reference):
    rng = np.random.default_rng(1)
    found = [jackknife(FRECHET, rng.normal(0.2, 1, (300, DIM)), reference) for _ in range(120)]
    spread = np.std([own.value for own in found])
    assert np.sqrt(np.mean([own.error**2 for own in found])) == pytest.approx(spread, rel=0.2)
    true = np.mean([own.value for own in found])
    inside = [low <= true <= high for low, high in (own.interval(0.95) for own in found)]
    assert 0.9 <= np.mean(inside) <= 0.99


def test_a_score_of_few_images_foretells_that_of_many(reference):
    rng = np.random.default_rng(1)
    few, foretold = [], []
    for _ in range(40):
        found = jackknife(FRECHET, rng.normal(0, 1.2, (60, DIM)), reference)
        few.append(found.value)
        foretold.append(found.at(50).value)
    many = jackknife(FRECHET, rng.normal(0, 1.2, (3000, DIM)), reference).value
    assert np.mean(few) > 1.5 * many
    assert np.mean(foretold) == pytest.approx(many, rel=0.15)
    assert found.at(1).value == found.value


def test_few_images_do_not_favour_cells_whose_images_vary_less(reference):
    """Those of a cell of less variance are nearer to the real ones as long as there are few."""
    raw, foretold = [], []
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=(40, DIM))
        found = [jackknife(FRECHET, (0.7 + 0.05 * c) * noise, reference) for c in range(12)]
        raw.append(np.argmin([own.value for own in found]))
        plan = Plan(counts=(40, NUM_IMAGES), budget=0)
        first = search(12, plan, lambda cells, num, found=found: [found[cell] for cell in cells])
        foretold.append(first.rounds[0].best)
    assert np.mean(foretold) == pytest.approx(6, abs=0.4)  # That one has the real variance.
    assert np.mean(raw) < 5.5


@pytest.mark.parametrize("name", ["fd_pixels", "kid_pixels", "pr_pixels"])
def test_an_estimate_is_the_metric_with_and_without_each_group(name, reference):
    fake = np.random.default_rng(2).normal(0.3, 1, (87, DIM)).astype(np.float32)
    few = Reference(output=OUTPUT, vectors=reference.vectors[:200], num_vectors=200)
    few = few if name != "fd_pixels" else reference
    found = jackknife(METRICS[name], fake, few)

    def value(vectors):
        if name == "fd_pixels":
            return frechet_distance_of_samples(vectors, reference.vectors)
        from metrics.metric import Comparison

        values = METRICS[name].compute(Comparison(fake=vectors, real=few.vectors))
        return next(iter(values.values()))

    assert found.value == pytest.approx(value(fake), rel=1e-5)
    edges = [i * 87 // NUM_GROUPS for i in range(NUM_GROUPS + 1)]
    for group in (0, 4, 9):
        rest = np.delete(fake, slice(edges[group], edges[group + 1]), axis=0)
        assert found.without[group] == pytest.approx(value(rest), rel=1e-5)


def test_ranges_hold_their_ends_and_round_decimals():
    assert expand_ranges("1:4:0.5") == "1.0,1.5,2.0,2.5,3.0,3.5,4.0"
    assert expand_ranges("0.03:0.06:0.01,0.2") == "0.03,0.04,0.05,0.06,0.2"
    assert expand_ranges("1:1:0.3") == "1.0"
    assert expand_ranges("1:2:0.3") == "1.0,1.3,1.6,1.9"
    for wrong in (
        "1:2",
        "1:2:0",
        "2:1:1",
        "2:1.6:1",
        "1:2:x",
        "0:1:1e-9",
        "1:2:-1",
        "nan:2:1",
        "1:inf:1",
    ):
        with pytest.raises(ValueError, match=wrong):
            expand_ranges(wrong)


SCALE, INTERVAL = ("guidance", "cfg_scale"), ("guidance", "cfg_interval")


def test_settings_without_effect_make_no_cells_of_their_own():
    axes = Axes(ScoreConfig(), {SCALE: (1.0, 2.0), INTERVAL: (None, (0.2, 5.0))})
    grid = make_grid(axes, [])
    assert [cell.name for cell in grid.cells] == [
        "cfg-scale=1 cfg-interval=none",
        "cfg-scale=2 cfg-interval=none",
        "cfg-scale=2 cfg-interval=0.2,5",
    ]
    with pytest.raises(ValueError, match="--cfg-interval has no effect"):
        make_grid(Axes(ScoreConfig(), {INTERVAL: (None, (0.2, 5.0))}), [])
    with pytest.raises(ValueError, match="at least two cells"):
        make_grid(Axes(ScoreConfig(), {SCALE: (2.0,)}), [])
    stds = make_grid(axes, [0.05, 0.1])
    assert len(stds.cells) == 6
    assert list(stds.axes) == ["ema-std", "cfg-scale", "cfg-interval"]
    assert list(stds.without([0, 1, 2]).axes) == ["cfg-scale", "cfg-interval"]


def test_options_give_a_protocol_to_the_last_digit():
    values = {SCALE: (1 / 3,), INTERVAL: ((0.1 + 0.2, 5.0),)}
    (config,) = Axes(ScoreConfig(), values).configs()
    options = options_of(config, ScoreConfig(), ("sampling", "guidance"))
    assert options == [f"--cfg-scale={1 / 3!r}", f"--cfg-interval={0.1 + 0.2!r},5"]
    assert (value_text(1e-7), value_text(None), value_text(True)) == ("1e-07", "none", "True")


def test_outputs_are_kept_in_parts_and_missing_ones_known(tmp_path):
    store, vectors = Store(tmp_path), np.arange(60, dtype=np.float32).reshape(20, 3)
    assert store.missing("a", 20) == [range(20)]
    for part in (range(10, 15), range(4)):
        store.write("a", part, {OUTPUT: vectors[part.start : part.stop]})
    assert store.missing("a", 20) == [range(4, 10), range(15, 20)]
    assert store.missing("a", 12) == [range(4, 10)]
    assert batches(store.missing("a", 20), 4) == [
        range(4, 8),
        range(8, 10),
        *batches([range(15, 20)], 4),
    ]
    for part in (range(4, 10), range(15, 20)):
        store.write("a", part, {OUTPUT: vectors[part.start : part.stop]})
    assert np.array_equal(store.read("a", OUTPUT, 13), vectors[:13])
    (tmp_path / "outputs/a/00000004-00000010.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"00000004-00000010.npz: damaged"):
        store.read("a", OUTPUT, 20)
