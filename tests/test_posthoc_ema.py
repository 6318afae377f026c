"""Power-function averages of the weights: while training, in snapshots, and put together later."""

import shutil

import helpers
import numpy as np
import pytest
import torch
from helpers import fail, succeed
from state_files import as_file
from training_runs import TINY, only_run

import fid
import generate
import train
from commands import posthoc_ema
from metrics.rows import read_rows
from torch_utils.parameters import Parameters
from training.checkpoint import (
    find_profiles,
    find_snapshots,
    find_states,
    load_snapshot,
    load_state,
    read_header,
)
from training.ema import PowerEMA
from training.power_ema import posthoc_coefficients, power_beta, power_gamma


def step_weights(gamma, num_steps):
    """Return how much the weights after each step count in the average after the last one."""
    weights = np.zeros(num_steps)
    for step in range(num_steps):
        beta = power_beta(gamma, (step + 1) * 8, 8)
        weights *= beta
        weights[step] = 1 - beta
    return weights


def test_exponents_are_those_of_the_publication():
    assert power_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert power_gamma(12**-0.5 - 1e-3) == pytest.approx(0, abs=0.025)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.288])
def test_an_average_has_the_width_that_was_asked_for(std):
    gamma = power_gamma(std)
    assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(std, rel=1e-9)
    num_steps = 4000
    weights = step_weights(power_gamma(std), num_steps)
    times = (np.arange(num_steps) + 0.5) / num_steps
    mean = weights @ times
    assert weights.sum() == pytest.approx(1)
    assert np.sqrt(weights @ (times - mean) ** 2) == pytest.approx(std, rel=1e-3)


def known_sequence(ema, network, num_steps):
    values = np.sin(np.arange(1, num_steps + 1)) + 2
    for step, value in enumerate(values):
        with torch.no_grad():
            network.weight.fill_(value)
        ema.update((step + 1) * 8, 8)
    return values


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_steps_count_by_the_integral_of_their_power(std):
    network = torch.nn.Linear(1, 1, bias=False)
    ema = PowerEMA(Parameters(network), (std,))
    values = known_sequence(ema, network, 50)
    power = power_gamma(std) + 1
    edges = (np.arange(51) / 50) ** power
    average = ema.state_dict()[str(std)]["weight"].item()
    assert average == pytest.approx(np.diff(edges) @ values, rel=1e-5)


def test_compact_weights_are_halved_but_for_what_would_overflow():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    with torch.no_grad():
        network[0].bias[0] = 1e5
    compact = dict(PowerEMA(Parameters(network), (0.1,)).compact(0.1))
    types = {name: value.dtype for name, value in compact.items()}
    assert types["0.weight"] == types["1.weight"] == torch.float16
    assert types["0.bias"] == types["1.running_var"] == torch.float32
    assert types["1.num_batches_tracked"] == torch.int64
    assert torch.equal(compact["0.bias"], network[0].bias)
    torch.testing.assert_close(compact["0.weight"].float(), network[0].weight, rtol=1e-3, atol=1e-7)


def test_a_run_averages_the_weights_after_each_of_its_steps(digits_zip, tmp_path):
    options = "--batch=1000 --iters=4 --tick=0 --dump=1 --keep-states=9 --lr=0.01 --lr-rampup=0"
    args = (f"--outdir={tmp_path}", f"--data={digits_zip}", *TINY, *options.split(), "--workers=0")
    succeed(train, *args, "--ema-stds=0.05,0.25")
    states = [load_state(path) for path in reversed(find_states(only_run(tmp_path)))]
    assert [state["progress"]["cur_nimg"] for state in states] == [1000, 2000, 3000, 4000]
    for std in (0.05, 0.25):
        weights = step_weights(power_gamma(std), 4)
        average = states[-1]["ema_profiles"][str(std)]
        for name, found in average.items():
            expected = sum(w * state["net"][name] for w, state in zip(weights, states, strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


NIMG = [2000, 4000, 6000, 8000] * 2
STDS = [0.05] * 4 + [0.1] * 4


def test_the_error_is_that_of_the_response_at_each_time():
    coefficients, error = posthoc_coefficients(NIMG, STDS, 8000, 0.2)
    times = (np.arange(200_000) + 0.5) / 200_000 * 8000

    def response(nimg, std):
        gamma = power_gamma(std)
        return np.where(times < nimg, (gamma + 1) * (times / nimg) ** gamma / nimg, 0)

    wanted = response(8000, 0.2)
    given = np.stack([response(*profile) for profile in zip(NIMG, STDS, strict=True)])
    made = coefficients @ given
    assert coefficients.sum() == pytest.approx(1)
    found = np.sqrt(np.mean((made - wanted) ** 2) / np.mean(wanted**2))
    assert error == pytest.approx(found, rel=1e-3)
    assert 0.1 < error < 0.3
    # No other coefficients of that sum come much closer.
    rng = np.random.default_rng(0)
    for _ in range(20):
        change = rng.normal(size=len(NIMG))
        change *= 0.05 / np.linalg.norm(change)
        near = (coefficients + change) / (1 + change.sum())
        assert np.mean((near @ given - wanted) ** 2) > np.mean((made - wanted) ** 2) * 0.9


@pytest.mark.parametrize("index", [3, 7])
def test_a_profile_that_is_there_is_made_of_itself(index):
    coefficients, error = posthoc_coefficients(NIMG, STDS, 8000, STDS[index])
    np.testing.assert_allclose(coefficients, np.eye(8)[index], atol=1e-10)
    assert error < 1e-6


def test_more_snapshots_come_closer():
    errors = []
    for num in (2, 4, 8, 16, 256):
        nimg = list(np.arange(1, num + 1) * 1000.0)
        coefficients, error = posthoc_coefficients(
            nimg * 2, [0.05] * num + [0.1] * num, nimg[-1], 0.15
        )
        errors.append(error)
        assert np.linalg.norm(coefficients) < 2
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_equal_profiles_and_impossible_widths_are_refused():
    with pytest.raises(ValueError, match="are equal"):
        posthoc_coefficients([1, 1], [0.1, 0.1], 1, 0.2)
    with pytest.raises(ValueError, match=r"relative std of 0\.3; accepted: 0\.001 to 0\.288"):
        power_gamma(0.3)


# A real run of 125 steps with three profiles, and a snapshot of each every 512 images.


@pytest.fixture(scope="module")
def run_dir(digits_zip, tmp_path_factory):
    outdir = tmp_path_factory.mktemp("profiles")
    options = "--kimg=8 --tick=0.5 --snap=2 --lr=0.01 --lr-rampup=0 --workers=0"
    args = (f"--outdir={outdir}", f"--data={digits_zip}", *TINY, *options.split())
    succeed(train, *args, "--ema-stds=0.05,0.10,0.15")
    return only_run(outdir)


@pytest.fixture
def run_copy(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / run_dir.name)


def distance(first, second):
    return sum((first[name] - second[name]).square().sum() for name in first).sqrt().item()


def norm(weights):
    return sum(value.square().sum() for value in weights.values()).sqrt().item()


def exact(run_dir, std):
    return load_state(find_states(run_dir)[0])["ema_profiles"][str(std)]


def test_compact_snapshots_hold_the_averages_of_the_training_state(run_dir):
    last = find_profiles(run_dir)[:3]
    assert sorted(path.name for path in last) == [
        f"network-snapshot-0000008-0.{name}.pkl" for name in ("050", "100", "150")
    ]
    for path, std in zip(sorted(last), (0.05, 0.1, 0.15), strict=True):
        stored = torch.load(path, weights_only=True)["ema"]
        assert {value.dtype for value in stored.values()} == {torch.float16}
        config, info = read_header(path)
        assert (info["ema_std"], info["cur_nimg"]) == (std, 8000)
        assert config.training.ema_stds == (0.05, 0.1, 0.15)
        weights = load_snapshot(path).state_dict
        assert distance(weights, exact(run_dir, std)) < 1e-3 * norm(weights)
        # The averages are not one another.
        for other in {0.05, 0.1, 0.15} - {std}:
            assert distance(weights, exact(run_dir, other)) > 0.01 * norm(weights)


def test_the_usual_snapshots_are_found_beside_those_of_profiles(run_dir):
    found = find_snapshots(run_dir)
    assert [path.name for path in found[:2]] == [
        "network-snapshot-000008.pkl",
        "network-snapshot-000007.pkl",
    ]
    assert len(found) == 9
    assert len(find_profiles(run_dir)) == 27


def test_a_profile_that_was_kept_returns(run_dir, tmp_path):
    result = succeed(posthoc_ema, run_dir, "--std=0.05,0.10", f"--outdir={tmp_path}")
    assert result.output.count("from 27 snapshots, error 0.00%") == 2
    for std in (0.05, 0.1):
        made = load_snapshot(tmp_path / f"network-snapshot-0000008-{std:.3f}-posthoc.pkl")
        kept = load_snapshot(run_dir / f"network-snapshot-0000008-{std:.3f}.pkl")
        assert distance(made.state_dict, kept.state_dict) < 1e-5 * norm(kept.state_dict)
        assert {value.dtype for value in made.state_dict.values()} == {torch.float32}


def test_a_profile_that_was_left_out_is_nearly_regained(run_dir, tmp_path):
    args = (run_dir, f"--outdir={tmp_path}", "--std=0.15")
    result = succeed(posthoc_ema, *args, "--snapshots=*-0.050.pkl,*-0.100.pkl")
    assert "std 0.15 from 18 snapshots, error 3.0" in result.output
    (path,) = tmp_path.iterdir()
    made, wanted = load_snapshot(path).state_dict, exact(run_dir, 0.15)
    assert distance(made, wanted) < 0.05 * distance(exact(run_dir, 0.1), wanted)


def test_an_average_can_end_at_an_earlier_snapshot(run_dir, tmp_path):
    succeed(posthoc_ema, run_dir, "--std=0.1,0.12", "--kimg=5", f"--outdir={tmp_path}")
    made = load_snapshot(tmp_path / "network-snapshot-0000005-0.100-posthoc.pkl")
    kept = load_snapshot(run_dir / "network-snapshot-0000005-0.100.pkl")
    assert made.progress["cur_nimg"] == kept.progress["cur_nimg"]
    assert distance(made.state_dict, kept.state_dict) < 1e-5 * norm(kept.state_dict)


def test_too_few_snapshots_for_a_width_are_warned_of(run_dir, tmp_path):
    args = (run_dir, f"--outdir={tmp_path}", "--std=0.25", "--snapshots=*-0000008-*")
    result = succeed(posthoc_ema, *args)
    assert "Warning: no combination of these snapshots is close to std 0.25" in result.error
    succeeded = succeed(posthoc_ema, run_dir, "--std=0.12", f"--outdir={tmp_path}")
    assert "Warning" not in succeeded.error


def test_all_kinds_are_sampled_and_scored_and_say_which_average_they_are(run_copy, digits_zip):
    succeed(posthoc_ema, run_copy, "--std=0.07")
    assert len(find_profiles(run_copy)) == 27  # The result is none of the next one's sources.
    names = ("000008", "0000008-0.050", "0000008-0.070-posthoc")
    averages, hashes = [], set()
    for name in names:
        network = run_copy / f"network-snapshot-{name}.pkl"
        out = run_copy / name
        succeed(generate, f"--network={network}", f"--outdir={out}", "--seeds=0-3")
        assert len(list(out.glob("*.png"))) == 4
        score = run_copy / f"{name}.json"
        args = (f"--network={network}", f"--ref={digits_zip}", "--metrics=fd_pixels")
        succeed(fid, "calc", *args, "--num-images=20", f"--json={score}")
        (row,) = read_rows(score)
        averages.append(row["ema"])
        hashes.add(row["snapshot_hash"])
        assert row["snapshot_hash"] == load_snapshot(network).sha256
    assert averages[0] == dict(halflife_kimg=10, rampup=0.05)
    assert averages[1] == dict(std=0.05)
    assert averages[2]["std"] == 0.07
    made = averages[2]["posthoc"]
    assert (made["stds"], made["num_snapshots"]) == ([0.05, 0.1, 0.15], 27)
    assert 0 < made["error"] < 0.01
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("RUN", ["Missing option '--std'"]),
        ("absent --std=0.1", ["absent", "does not exist"]),
        ("RUN --std=wide", ["--std: got 'wide'; accepted: numbers from 0.001 to 0.288"]),
        ("RUN --std=0.05,0.289", ["--std: got '0.05,0.289'; accepted"]),
        ("RUN --std=0", ["--std: got '0'"]),
        ("RUN --std=nan", ["--std: got 'nan'"]),
        ("RUN --std=0.07,0.0701", ["two of which agree in their first three decimals"]),
        ("RUN --std=0.1 --kimg=9", ["--kimg: got 9, but the last compact snapshot is of kimg 8."]),
        ("RUN --std=0.1 --snapshots=*7-* --kimg=4", ["--kimg: got 4", "the nearest: 7."]),
        ("RUN --std=0.1 --snapshots=*8-0.050*", ["holds 1 compact snapshots to use"]),
        ("EMPTY --std=0.1", ["holds 0 compact snapshots to use", "train with --ema-stds="]),
        ("RUN --std=0.1 --outdir=RUN/log.txt", ["--outdir", "is a file"]),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(args, parts, run_dir, tmp_path):
    before = set(run_dir.iterdir())
    text = args.replace("RUN", str(run_dir)).replace("EMPTY", str(tmp_path))
    message = fail(posthoc_ema, *text.split())
    for part in parts:
        assert part in message
    assert set(run_dir.iterdir()) == before


def rewrite(path, change):
    payload = torch.load(path, weights_only=True)
    change(payload)
    torch.save(payload, path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda payload: payload["config"]["training"].update(seed=1), "with another seed"),
        (lambda payload: payload["config"]["model"].update(base_dim=32), "with another model"),
        (lambda payload: payload["config"]["precond"].update(precond="vp"), "preconditioner"),
        (lambda payload: payload["progress"].pop("ema_std"), "not a compact snapshot"),
        (lambda payload: payload["ema"].popitem(), "are not those of its model"),
    ],
)
def test_a_snapshot_of_another_run_is_named_and_refused(run_copy, change, part):
    path = run_copy / "network-snapshot-0000004-0.100.pkl"
    rewrite(path, change)
    message = fail(posthoc_ema, run_copy, "--std=0.1")
    assert f"{path}: " in message
    assert part in message
    assert not list(run_copy.glob("*-posthoc.pkl"))


@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_damaged_snapshot_is_named_and_refused(run_copy, place):
    path = run_copy / "network-snapshot-0000004-0.100.pkl"
    data = bytearray(path.read_bytes())
    position = int(len(data) * place)
    data[position : position + 200] = bytes(byte ^ 0xFF for byte in data[position : position + 200])
    path.write_bytes(data)
    assert f"{path}: " in fail(posthoc_ema, run_copy, "--std=0.1")
    assert not list(run_copy.glob("*-posthoc.pkl"))


def test_a_header_with_any_damage_is_named_or_reads_as_it_was(run_dir, tmp_path):
    source = find_profiles(run_dir)[0]
    data, expected = source.read_bytes(), read_header(source)
    path = tmp_path / "spoilt.pkl"
    random = np.random.default_rng(0)
    header = data.index(b"PK\x03\x04", 4)  # The first part of the archive; others are tensors.
    named = []
    for _ in range(100):
        spoilt = bytearray(data)
        spoilt[random.integers(header)] ^= 1 << random.integers(8)
        path.write_bytes(spoilt)
        try:
            found = read_header(path)
        except ValueError as error:
            named.append(str(error).startswith(f"{path}: "))
        else:
            assert found == expected
    assert all(named)
    assert len(named) > 50


def test_a_run_without_profiles_goes_on_without_and_not_with_them(digits_zip, tmp_path):
    result = helpers.train_tiny(tmp_path, digits_zip, "--iters=1")
    state = as_file(find_states(result.run_dir)[0])
    rewrite(state, lambda payload: payload["config"]["training"].pop("ema_stds"))
    message = fail(train, f"--resume={state}", "--iters=2", "--ema-stds=0.1")
    assert "averages of --ema-stds=none, not of 0.1, and none can start in the middle" in message
    output = succeed(train, f"--resume={state}", "--iters=2").output
    assert "other settings: training.iters" not in output
    assert "ema_stds" not in output


def test_help_shows_what_to_type():
    output = succeed(posthoc_ema, "--help").output
    assert "[OPTIONS] RUN_DIR\n" in output
    assert "  python -m training.posthoc_ema runs/00000-x --std=0.07,0.15\n" in output
