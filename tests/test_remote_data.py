"""Data at addresses: the same items in the same order as on this machine, whatever happens."""

import io
import itertools
import json
import re
import shutil
import signal
import tarfile
import time
import zipfile

import helpers
import numpy as np
import pytest
import torch
from file_server import serve
from helpers import fail, succeed
from latent_files import encode, tiny_latents
from streamed_files import SHARDS, write_features
from training_runs import (
    TINY,
    differences,
    final_state,
    num_rows,
    only_run,
    per_tick,
)

import benchmark
import benchmarks.remote.loading
import dataset_tool
import train as train_script
from data.features.buckets import Bucket
from data.features.dataset import FeatureDataset
from data.fewshot.config import SetConfig
from data.fewshot.sets import SetDataset
from data.images.archive import open_archive
from data.images.dataset import ImageDataset, MirroredImages
from data.images.decode import ImageError
from data.latents.dataset import LatentDataset
from data.loader import _LookAhead, growing, make_loader
from data.samplers import BucketSampler, PositionSampler, ShardSampler
from dnnlib import addresses
from dnnlib.remote import blocks, ranges
from dnnlib.remote.blocks import BLOCK_BYTES

CPU = torch.device("cpu")
COUNTS = [sum(sizes) for sizes in SHARDS.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A zip, a tar with its index, an .npz, latents and features."""
    base = tmp_path_factory.mktemp("served")
    with zipfile.ZipFile(helpers.toy_data(tmp_path_factory.getbasetemp())) as archive:
        archive.extractall(base / "unpacked")
    shutil.copy(tmp_path_factory.getbasetemp() / "toy.zip", base / "toy.zip")
    with tarfile.open(base / "toy.tar", "w") as tar:
        tar.add(base / "unpacked", ".")
    assert "42 images" in succeed(dataset_tool, "index", base / "toy.tar").output
    tiny_latents(base, "--hflip")
    write_features(base / "numbers")
    return base


@pytest.fixture
def served(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "_WAITS_SEC", ())
    monkeypatch.setattr(ranges, "_FIRST_WAIT_SEC", 0.01)
    with serve(folder) as server:
        yield server


def set_dataset(path):
    config = SetConfig(train_classes=("bar", "dot"), test_classes=("ring",), held_out=4)
    images = ImageDataset(path, use_labels=True)
    return SetDataset(images, config, sample_size=3, seed=0, hflip=True)


KINDS = {
    "toy.zip": lambda path: ImageDataset(path, use_labels=True, max_size=30),
    "toy.tar": lambda path: MirroredImages(ImageDataset(path, use_labels=True)),
    "images.npz": lambda path: ImageDataset(path, use_labels=True, cache=True),
    "latents": lambda path: LatentDataset(path, use_labels=True, hflip=True),
    "numbers": lambda path: FeatureDataset(path, text_lengths=(4, 8, 16)),
    "sets": lambda path: set_dataset(path),
}


def place(base, kind):
    return f"{base}/{'toy.zip' if kind == 'sets' else kind}"


def sampler_of(kind, dataset, *, rank=0, world_size=1, start=0, **settings):
    settings |= dict(rank=rank, world_size=world_size, seed=3, start_nimg=start)
    if kind == "numbers":
        return BucketSampler(dataset.counts, batch_size=4, batch_gpu=2, **settings)
    size = None if kind == "sets" else len(dataset)
    return PositionSampler(size, batch_size=8, batch_gpu=4, **settings)


def take(kind, dataset, num, *, num_workers=0, **settings):
    sampler = sampler_of(kind, dataset, **settings)
    loader = make_loader(dataset, sampler, num_workers=num_workers, device=CPU)
    batches = iter(loader)
    try:
        return list(itertools.islice(batches, num))
    finally:
        if num_workers:
            batches._shutdown_workers()


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for (batch, cond), (wanted, wanted_cond) in zip(found, expected, strict=True):
        assert torch.equal(batch, wanted)
        assert list(cond) == list(wanted_cond)
        assert all(torch.equal(value, wanted_cond[name]) for name, value in cond.items())


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_workers_get_the_batches_of_local_data(kind, folder, served):
    local, remote = KINDS[kind](place(folder, kind)), KINDS[kind](place(served.address, kind))
    assert remote.remote_bytes > 0 == local.remote_bytes
    for name in ("num_images", "content_hash", "class_names", "resolution"):
        assert getattr(remote, name) == getattr(local, name)
    # That of features is the one in their record.
    assert remote.name == ("numbers-of-random" if kind == "numbers" else local.name)
    expected = take(kind, local, 12)
    assert_equal(take(kind, remote, 12), expected)
    assert_equal(take(kind, remote, 12, num_workers=2), expected)
    # Two ranks have a half of every step each: of two micro-batches, one.
    for rank in range(2):
        own = take(kind, remote, 6, rank=rank, world_size=2)
        assert_equal(own, expected[rank::2])
    step = 4 if kind == "numbers" else 8
    assert_equal(take(kind, remote, 6, start=3 * step), expected[6:])


@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_in_turn_are_an_order_by_seed_and_position_too(world_size, monkeypatch):
    monkeypatch.setattr("data.samplers._IMAGES_PER_GROUP", 8)
    sizes = [[4] * 10, [3, 3, 1]]
    counts = list(map(sum, sizes))
    settings = dict(seed=5, batch_size=4, batch_gpu=2, shard_sizes=sizes)

    def order(start=0, num_steps=60):
        parts = [
            itertools.chain.from_iterable(
                itertools.islice(
                    ShardSampler(
                        counts, start_nimg=start, rank=rank, world_size=world_size, **settings
                    ),
                    num_steps * 2 // world_size,
                )
            )
            for rank in range(world_size)
        ]
        rows = [np.array(list(part)).reshape(num_steps, -1) for part in parts]
        return np.concatenate(rows, axis=1)

    whole = order()
    np.testing.assert_array_equal(order(start=4 * 17, num_steps=43), whole[17:])
    large = whole[(whole < 40).all(axis=1)].flatten()
    epochs = large[: len(large) // 40 * 40].reshape(-1, 40)
    assert len(epochs) > 3
    assert (np.sort(epochs) == np.arange(40)).all()
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    shards = epochs // 4
    for epoch in shards:  # Two of the ten shards at a time.
        groups = epoch.reshape(5, 8)
        assert [len(set(group)) for group in groups] == [2] * 5
    pairs = {frozenset(group) for epoch in shards for group in epoch.reshape(5, 8).tolist()}
    assert len(pairs) > 5  # Others in each epoch.
    if world_size == 1:
        plain = BucketSampler(
            counts, start_nimg=0, rank=0, world_size=1, seed=5, batch_size=4, batch_gpu=2
        )
        buckets = [row[0] >= 40 for row in itertools.islice(plain, 120)]
        assert buckets == [row[0] >= 40 for row in whole.reshape(120, 2)]


def test_every_batch_is_named_ahead_once(monkeypatch):
    monkeypatch.setattr("data.loader._AHEAD_BYTES", 50)
    batches = [[2 * number, 2 * number + 1] for number in range(12)]
    requests = list(_LookAhead(batches, 5, 2))
    assert [request.keys for request in requests] == batches
    assert requests[0].soon == batches[:6]  # Of ten bytes each, and the first.
    assert [request.soon for request in requests[1:7]] == [[batch] for batch in batches[6:]]
    assert not any(request.soon for request in requests[7:])
    assert len(next(iter(_LookAhead(iter(batches), 1e6, 3))).soon) == 4
    # Passes of ranks that share unevenly: the second is far larger than the first.
    passes = [[0], list(range(1, 11)), [], [11, 12], list(range(13, 20))]
    requests = list(_LookAhead(passes, 5, 1))
    assert [request.keys for request in requests] == passes
    assert [keys for request in requests for keys in request.soon] == passes
    groups = [list(range(2)), [2, 3], [4, 5, 6, 7], list(range(8, 16)), list(range(16, 24))]
    assert list(growing(batches)) == groups
    assert list(growing([])) == []
    endless = iter(_LookAhead(itertools.repeat([1]), 1, 3))
    assert len(next(endless).soon) == 51


def test_images_are_encoded_as_local_ones_and_fetched_ahead(folder, served, tmp_path, monkeypatch):
    fetched, prefetch = [], ImageDataset.prefetch

    def note(self, indices):
        fetched.extend(indices)
        prefetch(self, indices)

    monkeypatch.setattr(ImageDataset, "prefetch", note)
    sizes = ("--batch=8", "--shard-size=10")  # Batches of 8 and 2 images in turn.
    for name, base in (("local", folder), ("remote", served.address)):
        assert not fetched
        encode(place(base, "toy.zip"), tmp_path / name, folder / "vae", *sizes)
    assert sorted(fetched) == list(range(42))
    hashes = {LatentDataset(tmp_path / name).content_hash for name in ("local", "remote")}
    assert len(hashes) == 1


def test_a_damaged_block_on_the_disk_is_fetched_again(served, tmp_path):
    for kind in ("toy.zip", "toy.tar", "latents", "numbers"):
        dataset = KINDS[kind](place(served.address, kind))
        index = len(dataset) - 1
        expected = dataset.__getitems__([index])
        blocks.close_blocks()
        for path in (tmp_path / "cache").rglob("*.blocks"):
            marks = path.read_bytes()[:4096]
            path.write_bytes(marks + bytes(path.stat().st_size - len(marks)))
        assert_equal([dataset.__getitems__([index])], [expected])


def test_a_damaged_file_is_one_sentence(folder, served):
    for name, address in (("toy.tar", "toy.tar"), ("numbers", "numbers/train/bucket_48x96")):
        path = folder / address / "shard-000000.tar" if name == "numbers" else folder / address
        data = path.read_bytes()
        path.write_bytes(data[:3_000] + bytes(9_000) + data[12_000:])
        try:
            with pytest.raises(ImageError, match=f"{served.address}/.* checksum") as error:
                take(name, KINDS[name](f"{served.address}/{name}?key=secret"), 99)
            assert "secret" not in str(error.value)
        finally:
            path.write_bytes(data)


def test_tars_need_their_own_index(folder, tmp_path):
    tar = shutil.copy(folder / "toy.tar", tmp_path / "toy.tar")
    with pytest.raises(ValueError, match=r"toy\.tar: a tar is read by the index beside it, and"):
        open_archive(tar)
    index = shutil.copy(folder / "toy.tar.index.json", tmp_path / "toy.tar.index.json")
    assert open_archive(tar).names == open_archive(folder / "toy.zip").names
    content = json.loads(index.read_text())
    for change, problem in (
        (dict(num_bytes=content["num_bytes"] + 512), r"is the index of a tar of \d+ bytes, not"),
        (dict(offset=[10**9] * len(content["name"])), "a file lies outside its tar"),
        (dict(crc32=[1]), "its columns differ in length"),
        (dict(name=["a.png"] * len(content["name"])), "it names a file twice"),
    ):
        index.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=rf"index\.json: .*{problem}.*; make it again"):
            open_archive(tar)
    compressed = tmp_path / "toy.tgz.tar"
    with tarfile.open(compressed, "w:gz") as other:
        other.add(tar, "toy.png")
    message = fail(dataset_tool, "index", compressed)
    assert "toy.tgz.tar: cannot be read as a tar" in message
    empty = _tar_of(tmp_path / "x.tar", index)
    assert "holds no images" in fail(dataset_tool, "index", empty)
    (tmp_path / "x.tar.index.json").mkdir()
    assert "x.tar.index.json is a folder" in fail(dataset_tool, "index", empty)


def _tar_of(path, file):
    with tarfile.open(path, "w") as tar:
        tar.add(file, "words.md")
    return path


def test_what_cannot_be_read_is_said_before_training(served, tmp_path):
    image = ("--preset=digits", f"--outdir={tmp_path / 'runs'}", "--dry-run")
    latent = ("--preset=digits-latent", *image[1:])
    features = ("--preset=nanodit-tiny", *image[1:])
    for options, name, reason in (
        (image, "none.zip?key=secret", r"/none.zip: cannot be read (not found)."),
        (image, "none.tar", "none.tar.index.json: cannot be read (not found)"),
        (image, "toy", "a folder cannot be listed there; accepted: a .zip, a .tar with its ind"),
        (latent, "none", "none/latents.json: cannot be read (not found); give the address of a"),
        (features, "none", "none/features.json: cannot be read (not found); give the address of"),
    ):
        message = fail(train_script, *options, f"--data={served.address}/{name}")
        assert reason in message
        assert "secret" not in message
    served.shutdown()
    served.server_close()
    message = fail(train_script, *image, f"--data={served.address}/toy.zip")
    assert "toy.zip: cannot be read (Connection refused)" in message
    message = fail(train_script, *features, f"--data=pipe:touch {tmp_path}/made")
    assert "not an address that can be read; accepted: http://" in message
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "made").exists()


def test_loading_from_a_server_is_measured_beside_local_loading(monkeypatch):
    monkeypatch.setattr(benchmarks.remote.loading, "_NUM_IMAGES", (64, 8, 64, 8))
    monkeypatch.setattr(benchmarks.remote.loading, "_FEATURE_BUCKET", Bucket(64, 64))
    options = ("--preset=cifar10", "--delay=1", "--rounds=1", "--batch=8")
    output = succeed(benchmark, "data", *options).output
    for name in ("32x32 images", "256x256 images", "latents of 256x256", "features of 64x64"):
        found = re.findall(
            rf"^{name} +([01]) +\d+ +\d+( +\d+\.\d\d){{3}} +\d+( +\d+\.\d\d){{2}}$", output, re.M
        )
        assert [row[0] for row in found] == ["0", "1"]
    assert "Goal: 80% of local speed." in output
    for other in ("--data=x.zip", "--batches=3"):
        message = fail(benchmark, "data", other, *options)
        assert f"{other.partition('=')[0]} has no effect beside --delay" in message


# Twelve steps, a tick each, with everything random on.
SHORT = (
    *(*TINY, "--iters=12", "--tick=0", "--snap=12", "--dump=2", "--sample-batch=4", "--hflip"),
    *("--augment=0.3", "--dropout=0.1", "--resume=auto"),
)


def scattered(digits_zip, folder):
    """Write the digits into a tar of many blocks, with its index, and return its name."""
    folder.mkdir()
    with zipfile.ZipFile(digits_zip) as source, tarfile.open(folder / "digits.tar", "w") as tar:
        for number, name in enumerate(source.namelist()):
            for own, data in ((name, source.read(name)), ("padding", bytes(BLOCK_BYTES))):
                if own == name or number % 6 == 0:
                    info = tarfile.TarInfo(own)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    succeed(dataset_tool, "index", folder / "digits.tar")
    return "digits.tar"


def test_a_run_on_remote_images_that_is_killed_equals_one_on_local_images(
    start_process, digits_zip, shared_dir, tmp_path
):
    name = scattered(digits_zip, tmp_path / "served")
    start_process(f"--outdir={tmp_path / 'local'}", *SHORT, warm=True).finish()
    runs = tmp_path / "remote"
    # After what is asked for first, of which a user is to hear at once.
    faults = [None, None, (503,), 100_000, "reset", (500,), None, 0]
    with serve(tmp_path / "served", delay_sec=0.02) as server:
        options = (f"--data={server.address}/{name}", f"--outdir={runs}", *SHORT)
        server.faults = list(faults)
        run = start_process(*options, "--workers=1", warm=True)
        run.wait_until(lambda: num_rows(runs) >= 5)
        run.kill()
        assert not server.faults
        shutil.rmtree(shared_dir / "cache" / "blocks")
        server.faults = list(faults)
        start_process(*options, "--workers=0", warm=True).finish()
        assert not server.faults
    found, reference = only_run(runs), only_run(tmp_path / "local")
    states = [final_state(path) for path in (found, reference)]
    for state in states:
        del state["progress"]["elapsed_sec"], state["config"]
    assert differences(*states) == []
    assert len(per_tick(found, "Loss/loss")) == 12
    for name in ("Loss/loss", "Loss/grad_norm"):
        assert per_tick(found, name) == per_tick(reference, name)


@pytest.mark.parametrize(("fault", "batch_gpu"), [("stall", 8), ((404,), 32)])
def test_steps_of_two_ranks_before_data_that_do_not_come_are_kept(
    start_process, digits_zip, shared_dir, tmp_path, fault, batch_gpu
):
    name, runs = scattered(digits_zip, tmp_path / "served"), tmp_path / "runs"
    with serve(tmp_path / "served") as server:
        options = (f"--data={server.address}/{name}", f"--outdir={runs}", *TINY, "--kimg=1000")
        options = (*options, "--tick=0", "--snap=1000000", "--workers=0", "--no-cache")
        options = (*options, f"--batch-gpu={batch_gpu}")
        run = start_process(*options, ranks=2, warm=True)
        run.wait_until(lambda: num_rows(runs) >= 3)
        num_requests, server.always = len(server.requests), fault
        shutil.rmtree(shared_dir / "cache" / "blocks")
        run.wait_until(lambda: len(server.requests) > num_requests)
        began = time.monotonic()
        if fault == "stall":
            run.send(signal.SIGTERM)
        output = run.finish(0 if fault == "stall" else 1)
        assert time.monotonic() - began < 20  # A stall takes longer.
    by = "SIGTERM" if fault == "stall" else "the data, as told below,"
    assert re.search(rf"Stopped by {by} at kimg [\d.]+; continue with --resume=", output)
    assert output.count("digits.tar: cannot be read (not found)") == (fault != "stall")
    state = final_state(only_run(runs))
    assert state["progress"]["cur_nimg"] == 64 * num_rows(runs)
