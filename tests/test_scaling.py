"""The cost model of docs/scaling.md: its page, its limits, its fit, and its clocks."""

import dataclasses
import json
import math
import random
import statistics

import helpers
import pytest

import benchmark as script
from benchmarks.scaling import cost, hardware, host
from benchmarks.scaling.cost import Plan, efficiency, reliability, step, with_growing_batch
from benchmarks.scaling.facts import LARGE, facts_of, read_facts
from benchmarks.scaling.hardware import GPUS
from benchmarks.scaling.host import Fit, Measured, StepTime, SumTime, read_measured
from benchmarks.scaling.page import NUMBERS, PAGE, page
from configs.presets import get_preset
from training.resources.memory import step_traffic

H100 = GPUS["h100"]


@pytest.fixture(scope="module")
def facts():
    return read_facts()


def test_the_page_is_what_the_code_computes(facts):
    text = (helpers.ROOT / PAGE).read_text(encoding="utf-8")
    assert text == page(read_measured(), facts), "Run: python benchmark.py scaling --write"


def test_what_the_page_knows_of_presets_is_what_they_are(facts):
    assert list(facts) == LARGE
    assert facts["fsdm-depth6"] == facts_of("fsdm-depth6")
    # The preset's run, which has no labels, though its data have.
    assert f"{facts['fsdm-depth6'].parameters:,}" in helpers.dry_run("--preset=fsdm-depth6")[1]


def test_one_gpu_has_nothing_to_wait_for(facts):
    own = facts["imagenet256"]
    took = step(own, H100, Plan(1, 32, 32))
    assert (took.traffic, took.stragglers, took.launches) == (0, 0, 0)
    assert took.rows == 3 * own.flops * 32 / (0.4 * 989e12)
    assert efficiency(own, H100, Plan(1, 32, 32), Plan(1, 32, 32)) == 1


def test_traffic_is_that_of_rings_and_only_what_the_backward_pass_does_not_hide(facts):
    own, busy = facts["imagenet256"], Plan(8, 10_000, 10_000)
    run = get_preset("imagenet256").run.changed("training", batch=80_000)
    bandwidth = 0.8 * H100.nvlink_rate
    own_bytes = step_traffic(run, 8)
    whole = cost.all_reduce(own.weight_bytes, H100, 8)
    assert whole == pytest.approx(own_bytes / bandwidth, rel=0.02)
    # Of a long pass the last bucket is left; with hardly a row, all of it.
    buckets = math.ceil(own.weight_bytes / hardware.BUCKET_BYTES)
    last = cost.all_reduce(own.weight_bytes / buckets, H100, 8)
    assert step(own, H100, busy).traffic == last
    bare = dataclasses.replace(own, operators=0)
    assert step(bare, H100, Plan(8, 1e-6, 1)).traffic == pytest.approx(buckets * last, rel=1e-3)


def test_sharded_traffic_is_two_gathers_and_a_scatter(facts):
    own = dataclasses.replace(facts["imagenet256"], operators=0)
    took = step(own, H100, Plan(8, 1e-6, 1, "full")).traffic
    # In bf16, in bf16 and in float32, each of seven eighths.
    expected = 2 * own.weight_bytes * 7 / 8 / (0.8 * H100.nvlink_rate)
    expected += 3 * own.parts * (hardware.CALL_SEC + 7 * hardware.NVLINK_STEP_SEC)
    assert took == pytest.approx(expected, rel=1e-3)
    # On several nodes a group of one of them leaves an eighth to sum over the network.
    one, many = (step(own, H100, Plan(num, 1e-6, 1, "hybrid")).traffic for num in (8, 512))
    between = cost.all_reduce_between(own.weight_bytes / 8, H100, 64)
    assert many - one == pytest.approx(between, rel=1e-3)


def test_more_gpus_are_never_more_efficient(facts):
    for own in facts.values():
        alone = with_growing_batch(own, 1)
        plans = [with_growing_batch(own, num) for num in NUMBERS]
        shares = [efficiency(own, H100, plan, alone) for plan in plans]
        assert shares == sorted(shares, reverse=True), own.preset
        # Rings of all GPUs have ever more steps; groups of a node do not.
        full, hybrid = (with_growing_batch(own, 4096, shard) for shard in ("full", "hybrid"))
        assert efficiency(own, H100, full, alone) < 0.5 * efficiency(own, H100, hybrid, alone)


def test_the_expected_maximum_is_that_of_drawn_numbers():
    draws = random.Random(0)
    for num in (2, 8, 64):
        found = statistics.mean(max(draws.gauss() for _ in range(num)) for _ in range(4000))
        assert cost.expected_maximum(num) == pytest.approx(found, rel=0.05)


def test_the_interval_between_states_is_the_best_one(facts):
    own = facts["imagenet256"]
    for num in (8, 512, 4096):
        found = reliability(own, num)
        others = [reliability(own, num, found.interval * scale) for scale in (0.8, 1.25)]
        assert min(other.lost for other in others) > found.lost
    assert reliability(own, 512).failures_per_hour == pytest.approx(512 * 419 / (16384 * 54 * 24))


def test_a_fit_finds_the_constants_that_times_were_made_with():
    true = Fit(2, 0.03, 0.002, 1.2, 0.05, 1e-9, 4e-5, 0.01)
    about = Measured("a CPU", 2, "train.py", 20_000_000, 6, (), (), {})
    sums = [SumTime(n, size, true.sum(n, size)) for n in (2, 4) for size in (1 << 12, 1 << 22)]
    places = [(1, "none", 16), (1, "none", 32), (1, "none", 64), (2, "none", 32), (4, "none", 16)]
    places += [(2, "full", 32), (4, "full", 16)]
    steps = [StepTime(n, s, rows, true.step(about, n, rows, s)) for n, s, rows in places]
    measured = dataclasses.replace(about, sums=tuple(sums), steps=tuple(steps))
    found = host.fit(measured)
    for name, value in vars(true).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name
    # What is measured at eight does not change the prediction for it.
    eight = StepTime(8, "none", 8, 100.0)
    assert host.fit(dataclasses.replace(measured, steps=(*steps, eight))) == found


def test_the_prediction_on_file_was_made_from_the_points_before(facts):
    measured = read_measured()
    assert set(measured.predicted) == {"none", "full"}
    before = [time for time in measured.steps if time.num in host.FITTED]
    fitted = host.fit(dataclasses.replace(measured, steps=tuple(before)))
    for shard, seconds in measured.predicted.items():
        (found,) = measured.of(host.PREDICTED, shard)
        assert fitted.step(measured, host.PREDICTED, found.rows, shard) == pytest.approx(seconds)


def test_a_preset_is_predicted_on_request():
    output = helpers.succeed(script, "scaling", "--preset=digits", "--gpu=a100").output
    tables = output.split("rows for each GPU")
    assert "A batch of 128, shared by all GPUs" in tables[0]
    assert "| 128 | 1 |" in tables[0]
    assert "| 256 |" not in tables[0]
    assert "| 4,096 | 16 |" in tables[1]


def test_steps_and_sums_are_timed_on_real_ranks(tmp_path):
    file = tmp_path / "times.json"
    helpers.on_ranks(2, "benchmarks/scaling/ranks.py", file, "4")
    found = json.loads(file.read_text())
    assert [(row["num"], row["shard"], row["rows"]) for row in found["steps"]] == [
        (2, "none", 2),
        (2, "full", 2),
    ]
    assert all(row["seconds"] > 0 for row in found["steps"])
    assert [row["num"] for row in found["sums"]] == [2] * len(found["sums"])
    assert found["sums"][-1]["seconds"] > found["sums"][0]["seconds"] > 0
