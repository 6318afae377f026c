"""Snapshots and training states: what they hold, and what is refused without being executed."""

import dataclasses
import errno
import importlib.metadata
import os
import pickle
import platform
import random
import zipfile

import pytest
import torch
from PIL import Image
from state_files import empty_state, write_state_file

from configs import get_preset
from dnnlib.config import to_dict
from models import build_network
from training import checkpoint
from training.checkpoint import (
    DataSummary,
    find_profiles,
    find_snapshots,
    find_states,
    load_snapshot,
    load_state,
    profile_path,
    save_weights,
    snapshot_path,
    state_path,
    superfluous_states,
)
from training.saving.state_folder import IntactError, remove_incomplete_states
from training.transfer import transfer_weights

DATA = DataSummary(
    name="digits",
    resolution=8,
    img_channels=1,
    num_images=30,
    content_hash="abc",
    class_names=("zero", "one"),
    class_counts=(10, 20),
)
PROGRESS = dict(cur_nimg=1234, cur_tick=5, elapsed_sec=1.5)


def tiny_config(**changes):
    run = get_preset("digits").run
    model = dataclasses.replace(
        run.model, num_classes=2, base_dim=8, hidden_dim=8, time_dim=8, **changes
    )
    return dataclasses.replace(run, model=model)


def write_snapshot(path, config=None, data=DATA):
    config = config or tiny_config()
    torch.manual_seed(0)
    network = build_network(config.model)
    save_weights(path, network.state_dict(), config, data, PROGRESS)
    return network


@pytest.fixture
def snapshot(tmp_path):
    path = tmp_path / "network-snapshot-000001.pkl"
    write_snapshot(path)
    return path


def edit(path, **changes):
    """Rewrite a snapshot with other entries; an entry of None is removed."""
    payload = torch.load(path, weights_only=True)
    payload.update(changes)
    torch.save({name: value for name, value in payload.items() if value is not None}, path)


def refusal(function, path):
    with pytest.raises(ValueError) as caught:
        function(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message


def test_a_snapshot_returns_with_all_that_sampling_and_scoring_need(tmp_path):
    path = tmp_path / "network.pkl"
    network = write_snapshot(path)
    loaded = load_snapshot(path)
    assert loaded.config == tiny_config()
    assert loaded.data == DATA
    assert loaded.progress == PROGRESS
    assert loaded.packages["torch"] == importlib.metadata.version("torch")
    assert loaded.packages["python"] == platform.python_version()
    built = loaded.build()
    assert not built.training
    assert not any(param.requires_grad for param in built.parameters())
    expected = network.state_dict()
    assert built.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in built.state_dict().items())


def test_a_snapshot_is_a_file_of_plain_containers_and_tensors(snapshot):
    payload = torch.load(snapshot, weights_only=True)
    assert payload["format"] == "setdiffit-snapshot"
    assert payload["version"] == 2
    assert payload["config"] == to_dict(tiny_config())
    assert set(payload) == {"format", "version", "config", "data", "progress", "packages", "ema"}

    def check(node):
        if isinstance(node, dict):
            assert type(node) is dict
            assert all(isinstance(key, str) for key in node)
            [check(child) for child in node.values()]
        elif isinstance(node, list | tuple):
            [check(child) for child in node]
        else:
            assert node is None or type(node) in (str, int, float, bool, torch.Tensor)

    check(payload)


def test_equal_weights_have_an_equal_hash_whatever_else_the_file_says(tmp_path, snapshot):
    other = tmp_path / "other.pkl"
    write_snapshot(other, data=dataclasses.replace(DATA, name="renamed"))
    assert other.read_bytes() != snapshot.read_bytes()
    assert load_snapshot(other).sha256 == load_snapshot(snapshot).sha256
    weights = torch.load(snapshot, weights_only=True)["ema"]
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1e-6
    edit(other, ema=weights)
    assert load_snapshot(other).sha256 != load_snapshot(snapshot).sha256


def test_a_failed_save_leaves_the_old_snapshot(tmp_path, snapshot, monkeypatch):
    before = snapshot.read_bytes()

    def half(payload, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(snapshot)
    assert snapshot.read_bytes() == before
    assert list(tmp_path.iterdir()) == [snapshot]


class Payload:
    """What a hostile file would hold: reading it as a pickle runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("reader", [load_snapshot, load_state])
@pytest.mark.parametrize("form", ["bare", "bare, old", "archive", "inside a snapshot"])
def test_a_file_that_would_execute_code_is_refused_and_not_executed(
    form, reader, tmp_path, snapshot
):
    marker, path = tmp_path / "executed", tmp_path / "evil.pkl"
    hostile = Payload(marker)
    if form == "bare":
        path.write_bytes(pickle.dumps(hostile))
    elif form == "bare, old":
        path.write_bytes(pickle.dumps(hostile, protocol=0))
    elif form == "archive":
        torch.save(hostile, path)
    else:
        payload = torch.load(snapshot, weights_only=True)
        torch.save({**payload, "progress": hostile}, path)
    message = refusal(reader, path)
    assert "refused" in message
    assert "execute code" in message
    if "bare" not in form:
        assert "(posix.system)" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(hostile))  # The payload is a working one.
    assert marker.exists()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["no such file"]),
        (lambda path: path.mkdir(), ["is a folder"]),
        (lambda path: path.touch(), ["not a snapshot, or cut off"]),
        (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), ["not a snapshot"]),
        (lambda path: path.write_text("hello"), ["not a snapshot"]),
        (lambda path: torch.save({"a": 1}, path), ["not a snapshot of this project"]),
        (lambda path: torch.save([1, 2], path), ["not a snapshot of this project"]),
        (
            lambda path: write_state_file(path, dict(net={}, ema={}), tiny_config()),
            ["not a snapshot of this project"],
        ),
    ],
    ids=[
        "missing",
        "folder",
        "empty",
        "picture",
        "text",
        "other-dict",
        "other-list",
        "training-state",
    ],
)
def test_another_kind_of_file_is_refused_by_name(make, parts, tmp_path):
    path = tmp_path / "network.pkl"
    make(path)
    message = refusal(load_snapshot, path)
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_a_snapshot_is_no_training_state(snapshot):
    assert "not a training state of this project" in refusal(load_state, snapshot)


def test_a_file_that_the_disk_does_not_give_is_not_called_damaged(snapshot, monkeypatch):
    def fail_to_read(archive):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail_to_read)
    with pytest.raises(IntactError, match="cannot be read now \\(Input/output error\\)"):
        load_snapshot(snapshot)


def test_a_file_of_a_newer_version_asks_for_an_update(snapshot):
    edit(snapshot, version=3)
    message = refusal(load_snapshot, snapshot)
    assert "format version 3" in message
    assert "reads up to 2; update the software" in message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (dict(version=None), "format version None"),
        (dict(version="x"), "format version x"),
        (dict(config=None), "'config'"),
        (dict(config=5), "cannot be read|this version can read"),
        (dict(config={"preset": "a", "model": {"family": "later"}}), "Unknown family 'later'"),
        (dict(data={"title": 1}), "title"),
        (dict(ema={"a": "text"}), "this version can read"),
        (dict(ema=[1]), "this version can read"),
    ],
    ids=str,
)
def test_a_snapshot_of_another_making_is_refused_with_the_reason(changes, part, snapshot):
    edit(snapshot, **changes)
    message = refusal(load_snapshot, snapshot)
    assert any(one in message for one in part.split("|"))


def test_weights_of_another_network_are_refused_when_they_are_used(snapshot):
    edit(snapshot, config=to_dict(tiny_config(num_heads=1, mlp_ratio=2.0)))
    assert "weights and configuration disagree" in refusal(
        lambda path: load_snapshot(path).build(), snapshot
    )


def test_a_damaged_file_is_refused_or_reads_the_same(snapshot, tmp_path):
    content, sound = snapshot.read_bytes(), load_snapshot(snapshot)
    path, rng = tmp_path / "damaged.pkl", random.Random(0)
    messages = []
    for place in [rng.randrange(len(content)) for _ in range(120)] + list(range(-90, -1)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_snapshot(path)
        except ValueError as error:
            messages.append(str(error))
        else:  # A byte of padding, of a timestamp.
            assert loaded.sha256 == sound.sha256
            assert (loaded.config, loaded.data) == (sound.config, sound.data)
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert len(messages) > 120


def test_a_file_that_ends_early_is_refused(snapshot, tmp_path):
    content = snapshot.read_bytes()
    path = tmp_path / "short.pkl"
    for length in (1, 2, 30, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "not a snapshot, or cut off" in refusal(load_snapshot, path)


def test_names_of_less_than_a_kimg_count_images(tmp_path):
    """As a short run on a laptop writes them; names from 1 kimg on are those of before."""
    for nimg in (256, 1024, 64, 2000, 0):
        empty_state(state_path(tmp_path, nimg))
    assert [path.name for path in find_states(tmp_path)] == [
        *("training-state-000002", "training-state-000001", "training-state-000000.256"),
        *("training-state-000000.064", "training-state-000000"),
    ]
    assert snapshot_path(tmp_path, 256).name == "network-snapshot-000000.256.pkl"
    assert profile_path(tmp_path, 256, 0.05).name == "network-snapshot-0000000.256-0.050.pkl"
    profile_path(tmp_path, 256, 0.05).touch()
    snapshot_path(tmp_path, 256).touch()
    assert find_profiles(tmp_path) == [profile_path(tmp_path, 256, 0.05)]
    assert find_snapshots(tmp_path) == [snapshot_path(tmp_path, 256)]


def test_states_are_found_newest_first_and_the_oldest_are_superfluous(tmp_path):
    for kimg in (2, 10):
        empty_state(state_path(tmp_path, kimg * 1000))
    for kimg in (1, 3):  # As versions before wrote them.
        write_state_file(tmp_path / f"training-state-{kimg:06d}.pt", dict(net={}), tiny_config())
    (tmp_path / "training-state-latest").touch()
    (tmp_path / "training-state-000011").mkdir()  # Without a manifest.
    states = find_states(tmp_path)
    names = ["training-state-000010", "training-state-000003.pt", "training-state-000002"]
    assert [path.name for path in states] == [*names, "training-state-000001.pt"]
    assert all(load_state(path)["net"] == {} for path in states)
    assert superfluous_states(tmp_path, states[0], keep=2) == states[2:]
    assert superfluous_states(tmp_path, states[1], keep=2) == [states[0], states[3]]
    assert superfluous_states(tmp_path, states[1], keep=2, later_ones=False) == states[3:]
    to_come = state_path(tmp_path, 2500)
    assert superfluous_states(tmp_path, to_come, keep=3) == states[:2]
    assert superfluous_states(tmp_path, state_path(tmp_path, 3000), keep=1) == states
    remove_incomplete_states(tmp_path)
    assert not (tmp_path / "training-state-000011").exists()


def test_a_transfer_loads_what_fits_and_names_the_rest(snapshot):
    wider = build_network(tiny_config(mlp_ratio=2.0, img_channels=3, augment_dim=9).model)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    given = load_snapshot(snapshot)
    report = str(transfer_weights(wider, given))
    first, *rest = report.splitlines()
    assert first.startswith(f"Transfer from {snapshot}: ")
    assert any(line.startswith("  Missing (kept as initialised): conditioner") for line in rest)
    assert any("Mismatched" in line and "backbone.head.weight" in line for line in rest)
    mismatched = next(line for line in rest if "Mismatched" in line)
    for name, tensor in wider.state_dict().items():
        taken = name in given.state_dict and name not in mismatched.split(": ")[1].split(", ")
        expected = given.state_dict[name] if taken else before[name]
        assert torch.equal(tensor, expected), name
    narrower = build_network(tiny_config(num_stages=1).model)
    assert "Unexpected (not used): " in str(transfer_weights(narrower, given))


def test_a_transfer_between_unrelated_networks_is_an_error(snapshot):
    unrelated = torch.nn.Linear(1, 1)
    unrelated.config = tiny_config().model
    with pytest.raises(ValueError, match="shares no weights with this model"):
        transfer_weights(unrelated, load_snapshot(snapshot))
