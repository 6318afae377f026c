"""Sharded training: the losses of whole weights, states that any number of ranks goes on from."""

import json
import shutil

import pytest
import torch
from feature_files import tiny_features
from helpers import (
    ROOT,
    TINY,
    TINY_FEATURES,
    TINY_LATENT,
    TINY_SETS,
    fail,
    on_ranks,
    run_warm,
    succeed,
    toy_data,
    train_on,
)
from latent_files import tiny_latents
from state_files import as_file
from training_runs import only_run

import train
from torch_utils.states import Part, Pieces, put_together, take_apart
from training.checkpoint import find_snapshots, find_states, load_snapshot, load_state
from training.config import TrainingConfig
from training.division import group_size

USUAL = (
    "--lr=2e-4",
    "--batch=8",
    "--batch-gpu=2",
    "--clip-grad=0.5",
    "--board=none",
    "--weight-decay=0.1",
)
KINDS = {
    "image": (toy_data, TINY, "--cond --label-drop=0.3 --dropout=0.1 --ema-stds=0.1"),
    "latent": (tiny_latents, TINY_LATENT, "--num-blocks=3 --checkpointing --label-drop=0.3"),
    "sets": (
        toy_data,
        TINY_SETS,
        "--num-blocks=2 --diagnostics --context-drop=0.2 --hidden-dim=24",
    ),
    "features": (
        lambda base: tiny_features(base / "features"),
        TINY_FEATURES,
        "--num-blocks=2 --batch=8",
    ),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def run(base, outdir, kind, ranks, *options):
    """Train a few steps on so many ranks; return the run folder."""
    data, tiny, own = KINDS[kind]
    arguments = (*tiny, *USUAL, *own.split(), f"--data={data(base)}", f"--outdir={outdir}")
    train_on(ranks, *arguments, *options)
    return only_run(outdir)


def losses(run_dir):
    """Return every loss, norm and diagnostic of a run, by name and tick."""
    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    found = {}
    for number, row in enumerate(rows):
        for name, stat in row.items():
            # Ranges of noise levels without an image have no mean.
            if name.startswith(("Loss/", "debug/", "Flow/")) and stat["mean"] is not None:
                found[f"{name} {number}"] = stat["mean"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_losses_norms_and_weights_are_those_of_whole_weights(base, tmp_path, kind):
    options = ("--iters=6", "--log-interval=1", "--snap=100", "--lr=1e-3")
    whole = run(base, tmp_path / "none", kind, 2, *options)
    sharded = run(base, tmp_path / "full", kind, 2, *options, "--shard=full")
    expected = losses(whole)
    assert len(expected) >= 6 * 3
    assert losses(sharded) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    own, there = (load_snapshot(find_snapshots(folder)[0]) for folder in (sharded, whole))
    for name, weights in there.state_dict.items():
        torch.testing.assert_close(own.state_dict[name], weights, rtol=1e-4, atol=1e-5)
    assert (max(sharded.glob("fakes-*.png"))).is_file()
    report = (sharded / "report.html").read_text()
    assert find_states(sharded)[0].name in report
    assert "cannot be written" not in (sharded / "log.txt").read_text()


# Dropout draws for every rank by itself.
FOUR_STEPS = ("--log-interval=1", "--snap=2", "--iters=4", "--batch-gpu=1", "--dropout=0")


def test_groups_of_ranks_hold_a_copy_each(base, tmp_path):
    whole = run(base, tmp_path / "none", "image", 1, *FOUR_STEPS)
    options = (*FOUR_STEPS, "--shard=hybrid", "--shard-size=2")
    hybrid = run(base, tmp_path / "hybrid", "image", 4, *options)
    assert losses(hybrid) == pytest.approx(losses(whole), rel=1e-5, abs=1e-7)
    # Each row is written once, by the ranks of the first group.
    state = find_states(hybrid)[0]
    assert sorted(path.name for path in state.iterdir()) == [
        "manifest.json",
        "part-00000.safetensors",
        "part-00001.safetensors",
    ]


@pytest.fixture(scope="module")
def sharded(base, tmp_path_factory):
    """The folder of a run of two ranks, with states in parts of its second and fourth step."""
    outdir = tmp_path_factory.mktemp("sharded")
    return run(base, outdir, "image", 2, *FOUR_STEPS, "--batch=6", "--shard=full")


def copy_of(run_dir, folder):
    return shutil.copytree(run_dir, folder / run_dir.name)


def test_a_state_in_parts_goes_on_on_any_number_of_ranks(sharded, tmp_path):
    expected = losses(sharded)
    states = find_states(sharded)
    assert [path.is_dir() for path in states] == [True, True]
    first = states[1]

    def tail(ranks, shard, place):
        copy = copy_of(sharded, tmp_path / place)
        train_on(ranks, f"--resume={copy / first.name}", f"--shard={shard}")
        return copy

    same = tail(2, "full", "same")
    assert losses(same) == expected
    assert_equal_states(load_state(find_states(same)[0]), load_state(states[0]))
    for ranks, shard in ((1, "none"), (3, "full")):
        other = tail(ranks, shard, f"{shard}{ranks}")
        assert losses(other) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    # And back: a file of whole weights, as earlier versions wrote it, goes on in parts.
    file = as_file(find_states(tmp_path / "none1" / sharded.name)[0])
    on_ranks(2, "train.py", f"--resume={file}", "--shard=full", "--iters=5")


def assert_equal_states(first, second):
    def compare(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                if key not in ("elapsed_sec", "config"):
                    compare(a[key], b[key])
        elif isinstance(a, list | tuple):
            for own, there in zip(a, b, strict=True):
                compare(own, there)
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b

    compare(first, second)


def test_a_damaged_part_is_named_and_the_state_before_is_used(sharded, tmp_path):
    run_dir = copy_of(sharded, tmp_path)
    newest, before = find_states(run_dir)
    part = newest / "part-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)
    output = on_ranks(2, "train.py", f"--resume={run_dir}", "--shard=full", "--iters=4")
    assert f"Skipped: {part}: damaged" in output
    assert f"Resuming from {before}" in output
    newest = find_states(run_dir)[0]
    part.unlink()
    assert part.name in fail(train, f"--resume={newest}")
    (newest / "manifest.json").unlink()
    assert newest not in find_states(run_dir)
    succeed(train, f"--resume={run_dir}", "--iters=5")
    assert not newest.exists()  # What is no state is cleared away.


def test_parts_are_taken_apart_and_put_together():
    whole = torch.arange(10.0).reshape(5, 2)
    tree = {
        "a": [1, (2.5, None)],
        3: {"w": whole},
        "plain": torch.ones(2),
        "scalar": torch.tensor(3),
    }
    files, encoded = [], None
    for rank, rows in enumerate(((0, 3), (3, 5), (5, 5))):
        part = Part(whole[slice(*rows)], (5, 2), rows[0], is_written=True)
        encoded, own, first_rows = take_apart({**tree, 3: {"w": part}}, (0,), rank)
        encoded = json.loads(json.dumps(encoded))
        files.append((own, first_rows))
    assert [len(own) for own, _ in files] == [3, 1, 0]

    def find(key):
        return [(rows[key], own[key]) for own, rows in files if key in own]

    found = put_together(encoded, find)
    assert found["a"] == [1, (2.5, None)]
    assert torch.equal(found[3]["w"].whole(), whole)
    assert found["scalar"].whole() == 3
    for pieces in (((0, whole[:3]),), ((3, whole[3:]),), ((0, whole[:2]), (3, whole[3:]))):
        with pytest.raises(ValueError, match="of a tensor are missing"):
            Pieces((5, 2), pieces).check()


def test_the_size_of_groups_divides_the_ranks():
    training = TrainingConfig(shard="hybrid", shard_size=3)
    assert group_size(training, 6) == 3
    with pytest.raises(ValueError, match="use one of 1, 2, 4"):
        group_size(training, 4)
    assert group_size(TrainingConfig(), 4) == 1
    assert group_size(TrainingConfig(shard="full"), 4) == 4


def test_a_model_that_does_not_fit_on_one_rank_trains_on_four(base, tmp_path):
    # 16 million parameters: 320 MB of weights, gradients, moments and average. A step takes 370 MB
    # with all of them, 250 MB with a quarter.
    script = tmp_path / "limited.py"
    script.write_text(
        "import re, resource, runpy, sys\n"
        "found = re.search(r'VmData:\\s+(\\d+) kB', open('/proc/self/status').read())\n"
        "limit = 1024 * int(found[1]) + (310 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    large = ("--num-blocks=4", "--hidden-dim=512", "--num-heads=8", "--batch=4", "--steps=1")
    data = f"--data={tiny_latents(base)}"
    arguments = ("--preset=digits-latent", *large, data, "--iters=1", "--workers=0", "--board=none")
    whole = run_warm(script, *arguments, f"--outdir={tmp_path / 'none'}")
    assert whole.returncode != 0
    assert "Not enough memory" in whole.stdout + whole.stderr
    on_ranks(4, script, *arguments, f"--outdir={tmp_path / 'full'}", "--shard=full")
    run_dir = only_run(tmp_path / "full")
    assert load_snapshot(find_snapshots(run_dir)[0]).progress["cur_nimg"] == 4
