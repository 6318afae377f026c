"""What a run needs of memory, disk and network, against what runs take and closed forms."""

import dataclasses

import helpers
import pytest
from peak_memory import measured_peak, run_of

from models import build_network
from training.resources.memory import (
    pass_bytes,
    predict_disk,
    predict_memory,
    step_traffic,
    weight_bytes,
)
from training.runs import read_start


@pytest.mark.parametrize(
    ("preset", "batch"),
    [
        ("digits", 16),
        ("digits-latent", 16),
        ("fsdm-digits", 2),
        ("cifar10", 4),
        ("fsdm-cifar100-film", 1),
    ],
)
def test_passes_take_what_is_predicted(preset, batch):
    run = run_of(preset, batch=batch)
    assert pass_bytes(run, batch) == pytest.approx(measured_peak(run, batch), rel=0.1)


@pytest.mark.parametrize(
    ("preset", "batch", "changes"),
    [("digits", 32, {}), ("digits-latent", 64, dict(hidden_dim=256))],
)
def test_sharded_passes_and_what_they_gather_take_what_is_predicted(preset, batch, changes):
    output = helpers.on_ranks(2, "tests/peak_memory.py", preset, batch, repr(changes))
    run = run_of(preset, batch=batch, shard="full")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))
    assert pass_bytes(run, batch // 2, 2) == pytest.approx(int(output.split()[-1]), rel=0.1)


def test_the_memory_of_weights_is_divided_by_sharding():
    size = weight_bytes(run_of("digits"))
    network = build_network(run_of("digits").model)
    assert size == sum(param.nbytes for param in network.parameters())
    run = run_of("digits", ema_stds=(0.1,), batch=16)
    whole = predict_memory(run, 4, "cuda")
    assert (whole.weights, whole.gradients, whole.moments) == (size, size, 2 * size)
    assert whole.averages == 2 * size
    assert whole.gathered == 0
    sharded = predict_memory(run.changed("training", shard="full"), 4, "cuda")
    assert (sharded.weights, sharded.averages) == (size // 4, 2 * (size // 4))
    assert 0 < sharded.gathered < 4 * size
    assert sharded.passes == whole.passes
    # On a CPU the copy of what a rank writes is resident, too.
    assert predict_memory(run, 4, "cpu").copy == size * 5 // 4


def test_passes_grow_with_their_rows_and_shrink_with_checkpointing():
    def passes(**training):
        return predict_memory(run_of("digits-latent", **training), 1, "cuda").passes

    small, large = passes(batch=256), passes(batch=512)
    assert large == pytest.approx(2 * small, rel=0.1)
    assert passes(batch=512, batch_gpu=256) == pytest.approx(small, rel=0.05)


def test_traffic_is_that_of_rings():
    size = weight_bytes(run_of("digits"))
    run = run_of("digits", batch=16)
    assert step_traffic(run, 1) == 0
    assert step_traffic(run, 4) == size * 2 * 3 // 4
    # Two gathers and one scatter, each of three quarters.
    assert step_traffic(run.changed("training", shard="full"), 4) == size * 3 * 3 // 4


def test_files_are_counted_as_a_run_leaves_them(tmp_path):
    options = ("--ema-stds=0.1", "--snap=2", "--tick=0.064", "--iters=7", "--keep-states=2")
    result = helpers.train_tiny(tmp_path, helpers.toy_data(tmp_path), "--batch=64", *options)
    run_dir = result.run_dir
    config = read_start(run_dir, print)[0]
    disk = predict_disk(config)
    snapshots = list(run_dir.glob("network-snapshot-*.pkl"))
    states = list(run_dir.glob("training-state-*"))
    assert 2 * disk.num_snapshots == len(snapshots)
    assert disk.num_states == len(states)
    tensors = sum(path.stat().st_size for path in states[0].glob("*.safetensors"))
    assert disk.state == pytest.approx(tensors, rel=0.25)  # Headers count in a model so small.
