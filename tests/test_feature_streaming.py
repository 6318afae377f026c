"""Features streamed from shards: schedule, order, faults, and stores behind addresses."""

import io
import itertools
import os
import pickle
import re
import shutil
import socket
import sys
import tarfile
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as registry
from helpers import fail, on_ranks, succeed
from latent_files import tiny_autoencoder
from streamed_files import SHARDS, npy, store, write_features
from training_runs import only_run, per_tick

import train as train_script
from data.features.dataset import FeatureDataset
from data.features.shards import from_npy
from data.features.streaming import StreamedFeatures, StreamSampler
from data.images.decode import ImageError
from data.loader import make_loader
from data.samplers import BucketSampler
from dnnlib import addresses
from dnnlib.addresses import AddressError, open_address, read_range, under
from dnnlib.downloads import fetch
from encoders.autoencoder import load_autoencoder

LENGTHS = (4, 8, 16)
COUNTS = [sum(sizes) for sizes in SHARDS.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "numbers")


@pytest.fixture
def own_folder(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "own")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(addresses, "_WAITS_SEC", (0, 0))


def sampler_of(kind=StreamSampler, *, rank=0, world_size=1, batch_gpu=4, start=0):
    return kind(
        COUNTS,
        seed=3,
        start_nimg=start,
        batch_size=8,
        batch_gpu=batch_gpu,
        rank=rank,
        world_size=world_size,
    )


def take(path, num, *, num_workers=0, **kwargs):
    """Return the first batches of a rank's loader."""
    dataset = StreamedFeatures(path, text_lengths=LENGTHS)
    sampler = sampler_of(**kwargs)
    loader = make_loader(dataset, sampler, num_workers=num_workers, device=torch.device("cpu"))
    batches = iter(loader)
    try:
        return list(itertools.islice(batches, num))
    finally:
        if num_workers:
            # An error's traceback keeps them, and their garbage collection waits for seconds.
            batches._shutdown_workers()


def numbers(batches):
    """Return which samples each batch has."""
    return [cond["cls"][:, 0].int().tolist() for _, cond in batches]


def bucket_of(cond, sizes=tuple(SHARDS)):
    return sizes.index(tuple(cond["size"].tolist()))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_schedule_of_buckets_is_that_of_the_exact_loader(world_size):
    for rank, start in itertools.product(range(world_size), (0, 80)):
        settings = dict(rank=rank, world_size=world_size, start=start, batch_gpu=2)
        exact = itertools.islice(sampler_of(BucketSampler, **settings), 200)
        streamed = itertools.islice(sampler_of(**settings), 200)
        ends = np.cumsum(COUNTS)
        for indices, draw in zip(exact, streamed, strict=True):
            assert {int(np.searchsorted(ends, i, side="right")) for i in indices} == {draw.bucket}
            assert draw.num == len(indices)


def test_batches_keep_the_schedule_with_any_number_of_workers(folder):
    wanted = [draw.bucket for draw in itertools.islice(sampler_of(), 30)]
    assert set(wanted) == {0, 1, 2}
    for num_workers in (0, 2):
        batches = take(folder, 30, num_workers=num_workers)
        assert [bucket_of(cond) for _, cond in batches] == wanted


def test_a_batch_has_the_form_and_values_of_the_exact_loader(folder):
    exact = FeatureDataset(folder, text_lengths=LENGTHS)
    index_of = {int(exact[i][1]["cls"][0]): i for i in range(len(exact))}
    for latents, cond in take(folder, 20):
        wanted_latents, wanted = exact.__getitems__(
            [index_of[number] for (number,) in zip(*numbers([(latents, cond)]), strict=True)]
        )
        torch.testing.assert_close(latents, wanted_latents, rtol=0, atol=0)
        assert list(cond) == list(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(cond[name], value, rtol=0, atol=0, msg=name)


def test_all_samples_of_a_bucket_are_equally_frequent(folder):
    seen = {bucket: Counter() for bucket in range(3)}
    for batch in take(folder, 700, num_workers=2):
        seen[bucket_of(batch[1])].update(*numbers([batch]))
    exact = FeatureDataset(folder, text_lengths=LENGTHS)
    for bucket, count in enumerate(COUNTS):
        assert len(seen[bucket]) == count
        share = np.array(list(seen[bucket].values())) / seen[bucket].total() * count
        assert share.min() > 0.75
        assert share.max() < 1.25
    held_out = exact.of_split("validation")
    of_training = {int(exact[i][1]["cls"][0]) for i in range(len(exact))}
    assert set().union(*seen.values()) == of_training
    assert not of_training & {int(held_out[i][1]["cls"][0]) for i in range(len(held_out))}


def test_ranks_workers_and_starts_have_orders_of_their_own(folder):
    first = numbers(take(folder, 40, world_size=2))
    assert numbers(take(folder, 40, world_size=2)) == first
    assert numbers(take(folder, 40, world_size=2, rank=1)) != first
    # Of one bucket's batches, those of a worker alone would be those of the process alone.
    assert numbers(take(folder, 40, world_size=2, num_workers=2)) != first
    both = take(folder, 400, world_size=2, num_workers=2)
    large = [[row for row in both[w::2] if bucket_of(row[1]) == 0] for w in range(2)]
    assert numbers(large[0])[:8] != numbers(large[1])[:8]
    # A run that goes on does not see again what it began with.
    start = next(step for step in range(1, 99) if sampler_of().bucket_at(8 * step) == 0)
    begun = next(cond for _, cond in take(folder, 99, batch_gpu=8) if bucket_of(cond) == 0)
    resumed = take(folder, 1, batch_gpu=8, start=8 * start)
    assert bucket_of(resumed[0][1]) == 0
    assert sorted(numbers(resumed)[0]) != sorted(numbers([(None, begun)])[0])


def test_processes_do_not_share_the_open_files_of_the_one_that_began_them(folder):
    dataset = StreamedFeatures(folder, text_lengths=LENGTHS)
    for num_workers in (0, 2):
        loader = make_loader(
            dataset, sampler_of(), num_workers=num_workers, device=torch.device("cpu")
        )
        found = numbers(itertools.islice(loader, 60))
        assert found == numbers(take(folder, 60, num_workers=num_workers))


def test_what_is_known_of_the_data_is_the_record(folder):
    exact, streamed = FeatureDataset(folder), StreamedFeatures(folder)
    for name in ("record", "buckets", "counts", "content_hash", "num_images", "name", "resolution"):
        assert getattr(streamed, name) == getattr(exact, name)
    assert streamed.summary() == exact.summary()


@pytest.mark.parametrize("knows_parts", [True, False])
def test_a_store_gives_what_its_folder_gives(folder, knows_parts):
    with store(folder.parent, knows_parts=knows_parts) as server:
        address = f"{server.address}/numbers/"
        assert numbers(take(address, 20)) == numbers(take(folder, 20))
        assert all(part is None for _, part in server.requests)
        local, remote = FeatureDataset(folder), StreamedFeatures(f"{address}?key=secret")
        assert remote.name == "numbers-of-random"
        for split in ("train", "validation"):
            ours, theirs = local.of_split(split), remote.of_split(split)
            for index in (0, len(ours) - 1):
                assert torch.equal(ours[index][0], theirs[index][0])
                assert torch.equal(ours.latents(index), theirs.latents(index))
                assert ours.caption(index) == theirs.caption(index)
        assert server.requests[-1][0].endswith(".tar?key=secret")


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "shard-000000.tar"
    # More than a connection holds before it is read, which is lost where it breaks.
    data = np.random.default_rng(0).bytes(4_000_000)
    path.write_bytes(data)
    monkeypatch.setattr(addresses, "_WAITS_SEC", (0,) * 4)
    for knows_parts in (True, False):
        with store(path.parent, knows_parts=knows_parts) as server:
            server.faults = [(503,), 2_000_000, 3_500_000, (500,)]
            if knows_parts:
                server.faults[2] = 1_000_000
            with open_address(f"{server.address}/{path.name}") as stream:
                assert stream.read() == data
            assert len(server.requests) == 5
            starts = [int(part[6:-1]) for _, part in server.requests[2:] if part is not None]
            assert starts == sorted(starts)
            assert len(starts) == (3 if knows_parts else 0)
            assert all(start > 1_000_000 for start in starts)
            assert read_range(f"{server.address}/{path.name}", 700, 900) == data[700:1600]
            server.faults = [(503,), 1_500_000]
            assert fetch(f"{server.address}/{path.name}").read_bytes() == data
    with store(path.parent) as server:
        server.faults = [(403,), (404,)]
        for reason in ("403 Forbidden", "not found"):
            with pytest.raises(AddressError, match=rf"000\.tar: cannot be read \({reason}"):
                open_address(f"{server.address}/{path.name}?key=secret").read()
        assert len(server.requests) == 2
        server.faults = [(503,)] * 9
        with pytest.raises(AddressError, match="503") as error:
            open_address(f"{server.address}/{path.name}?key=secret").read()
        assert len(server.requests) == 7
        assert "secret" not in str(error.value)


class Store(MemoryFileSystem):
    """An object store within this process, of addresses of s3 and gs."""

    protocol = ("s3", "gs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.partition("://")[2] or path)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_the_packages_of_stores_read_their_addresses(folder, monkeypatch, scheme):
    package = {"s3": "s3fs", "gs": "gcsfs"}[scheme]
    address = f"{scheme}://numbers"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}, which is not installed: pip install "):
        StreamedFeatures(address)
    monkeypatch.setitem(registry, scheme, Store)
    Store().put(str(folder), "numbers", recursive=True)
    assert numbers(take(address, 4)) == numbers(take(folder, 4))
    assert FeatureDataset(address).caption(25) == FeatureDataset(folder).caption(25)
    with pytest.raises(AddressError, match=r"none: cannot be read \(not found"):
        open_address(f"{address}/none").read()


def test_no_address_is_a_command(tmp_path):
    for address in (f"pipe:touch {tmp_path}/made", "file:///etc/passwd", "ftp://host/x"):
        with pytest.raises(ValueError, match="accepted: http://, https://, s3://, gs://, "):
            StreamedFeatures(address)
    assert not any(tmp_path.iterdir())
    assert under("s3://a/b?c", "d", "e.tar") == "s3://a/b?c/d/e.tar"
    assert under("https://a/b/?c", "d") == "https://a/b/d?c"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rewrite(folder, key, name, data):
    """Write the shard of the smallest bucket again, with another member in place of one."""
    shard = folder / "train" / "bucket_48x96" / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    assert any(own.endswith(f".{key}") for own, _ in members)
    with tarfile.open(shard, "w") as tar:
        for own, content in members:
            sample, _, own_key = own.partition(".")
            if own_key == key:
                own, content = f"{sample}.{name}", content if data is None else data
            info = tarfile.TarInfo(own)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return shard


def fault_of(folder, num_workers=0):
    """Return what is said of a folder that cannot be read."""
    try:
        take(folder, 60, num_workers=num_workers)
    except ImageError as error:
        return str(error)
    return "none"


def test_a_pickle_in_a_shard_is_not_executed(folder, tmp_path):
    made = tmp_path / "made"
    evil = np.empty((), object)
    evil[()] = Payload(made)
    pickled = pickle.dumps(Payload(made))
    for key, name, data in (
        ("dinov3.npy", "dinov3.npy", npy(evil)),
        ("vae.npy", "vae.npy", pickled),
        ("t5h.npy", "t5h.pyd", pickled),
        ("json", "pickle", pickled),
    ):
        copy = shutil.copytree(folder, tmp_path / name)
        shard = rewrite(copy, key, name, data)
        if name == "pickle":
            expected = "holds 18 members of samples where the manifest counts 15"
        else:
            expected = f"{key} differs from its checksum" if key == name else f"has no {key}"
            with pytest.raises(ValueError):
                from_npy(data)  # Nor would it be with the right checksum.
        assert re.match(f"{shard}: .*{expected}", fault_of(copy))
    assert not made.exists()
    pickle.loads(pickled)
    assert made.exists()


def test_a_flipped_byte_of_a_shard_is_noticed_in_training(folder, own_folder):
    shard = own_folder / "train" / "bucket_64x64" / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b".dinov3.npy") // 512 * 512 + 512 + 130] ^= 1  # A value, not the header.
    shard.write_bytes(data)
    assert "dinov3.npy differs from its checksum" in fault_of(own_folder)
    exact = FeatureDataset(own_folder, text_lengths=LENGTHS)
    with pytest.raises(ImageError, match=r"\.dinov3\.npy differs from its checksum"):
        list(map(exact.__getitem__, range(COUNTS[0])))


def test_a_shard_that_is_missing_or_damaged_is_one_sentence(folder, own_folder):
    assert fault_of(folder) == "none"
    shard = own_folder / "train" / "bucket_64x64" / "shard-000001.tar"
    data = shard.read_bytes()
    # A header in the middle that is no header is to tarfile the end of the file.
    middle = data.index(b".vae.npy", len(data) // 2) // 512 * 512
    shard.write_bytes(data[:middle] + b"\xff" * 512 + data[middle + 512 :])
    pattern = f"{shard}: damaged, it holds 2[0-9] members of samples where the manifest counts 40;"
    assert re.match(pattern, fault_of(own_folder))
    for part in (data[:3000], data[: len(data) // 2 + 100], b"no tar" * 1000, b""):
        shard.write_bytes(part)
        pattern = f"{shard}: (cannot be read as a shard|damaged, it holds 1 members) [^\n]+"
        assert re.fullmatch(pattern, fault_of(own_folder))
    shard.unlink()
    for num_workers in (0, 2):
        message = fault_of(own_folder, num_workers)
        assert message == f"{shard}: cannot be read as a shard (No such file or directory)."


def test_what_a_stream_needs_is_said_before_training(folder, tmp_path, monkeypatch):
    options = ("--preset=nanodit-tiny", f"--outdir={tmp_path / 'runs'}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/numbers"
    message = fail(train_script, *options, f"--data={closed}")
    assert message == f"Error: --data: got {closed}; add --streaming, which reads addresses."
    message = fail(train_script, *options, f"--data={closed}", "--streaming")
    assert f"{closed}/features.json: cannot be read (Connect call failed" in message
    message = fail(train_script, *options, f"--data=pipe:touch {tmp_path}/made", "--streaming")
    assert "not an address that can be read; accepted: http://" in message
    with store(folder) as server:
        data = f"--data={server.address}/elsewhere"
        message = fail(train_script, *options, data, "--streaming", "--dry-run")
    assert "elsewhere/features.json: cannot be read (not found); give the address" in message
    monkeypatch.setitem(sys.modules, "webdataset", None)
    message = fail(train_script, *options, f"--data={folder}", "--streaming")
    assert "--streaming needs the package webdataset, which is not installed: pip" in message
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "made").exists()


def test_two_ranks_train_from_a_store_and_go_on(tmp_path):
    vae = tiny_autoencoder(tmp_path / "vae", num_stages=4, scaling_factor=1.0)
    sha256 = load_autoencoder(str(vae), "cpu").sha256
    root = write_features(tmp_path / "numbers", vae=(vae, sha256))
    options = (
        "--preset=nanodit-tiny --hidden-dim=32 --num-blocks=1 --batch=8 --batch-gpu=2 --tick=0"
    )
    options += " --steps=2 --workers=1 --streaming"
    with store(root) as server:
        settings = (f"--data={server.address}", *options.split(), "--iters=3")
        output = on_ranks(2, "train.py", f"--outdir={tmp_path / 'runs'}", *settings)
        assert StreamedFeatures.notice in output
        run_dir = only_run(tmp_path / "runs")
        result = succeed(train_script, f"--resume={run_dir}", "--iters=5")
        assert StreamedFeatures.notice in result.output
    losses = per_tick(run_dir, "Loss/loss")
    assert len(losses) == 5
    assert all(1 < loss < 4 for loss in losses)
    assert (run_dir / "reals.png").is_file()
    assert list(run_dir.glob("fakes-*.png"))
