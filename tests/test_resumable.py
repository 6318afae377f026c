"""Folders that ranks fill in parts: claims, locks, calls in the background, sentences."""

import threading
import time

import numpy as np
import pytest
import torch
from helpers import positions_of_bars

from data.resumable import (
    BackgroundWriter,
    claim,
    locked,
    memory_for,
    progress_of_ranks,
    share,
    to_float16,
)
from dnnlib.parallel import num_cores_of_rank, thread_map


def test_calls_in_the_background_are_bounded_and_all_done_at_the_end():
    done, gate = [], threading.Event()

    def call(number):
        gate.wait(10)
        done.append(number)

    with BackgroundWriter(1, 2) as writer:
        writer.submit(call, 1)
        writer.submit(call, 2)
        assert done == []
        threading.Timer(0.05, gate.set).start()
        writer.submit(call, 3)  # Waits for the first.
        assert done[:1] == [1]
    assert done == [1, 2, 3]


def test_an_error_in_the_background_comes_up():
    with pytest.raises(ValueError, match="full"), BackgroundWriter(1, 4) as writer:
        writer.submit(_fail)
    writer = BackgroundWriter(1, 4)
    writer.submit(_fail)
    writer.__exit__(KeyError)  # An error of the block counts more.


def _fail():
    raise ValueError("full")


def test_a_map_over_threads_keeps_order_and_looks_ahead_a_bounded_number():
    started = []

    def square(number):
        started.append(number)
        time.sleep(0.001 * (number % 3))
        return number**2

    results = thread_map(square, range(20), 4, 6)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(started) <= 6
    assert list(results) == [number**2 for number in range(1, 20)]


def test_a_claim_refuses_another_making_by_the_names_that_differ(tmp_path):
    file = tmp_path / "claim.json"
    claim(file, {"--seed": 1, "model": (1, 2)}, "--outdir", "images")
    claim(file, {"--seed": 1, "model": [1, 2]}, "--outdir", "images")
    with pytest.raises(ValueError, match="holds images made with another --seed; choose another"):
        claim(file, {"--seed": 2, "model": [1, 2]}, "--outdir", "images")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"claim\.json: cannot be read"):
        claim(file, {}, "--outdir", "images")


def test_a_locked_folder_is_rid_of_what_killed_writes_left(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.shard.tar.xyz.tmp").write_text("half")
    (tmp_path / "a/shard.tar").write_text("whole")
    with locked(tmp_path, "filling"):
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["shard.tar"]


def test_values_that_float16_cannot_hold_and_want_of_memory_are_one_sentence():
    values = torch.tensor([[1.0], [1e6]])
    np.testing.assert_array_equal(to_float16(values[:1], str, "x", "y"), [[1]])
    with pytest.raises(ValueError, match=r"image 1: its latent has values .* vae does not fit"):
        to_float16(values, lambda row: f"image {row}", "latent has", "vae")
    with (
        pytest.raises(ValueError, match="--batch: no memory for 3 images"),
        memory_for(3, "images"),
    ):
        raise torch.OutOfMemoryError


def test_ranks_take_turns_and_show_how_far_all_are(monkeypatch):
    shown = positions_of_bars(monkeypatch)
    assert share([1, 2, 3]) == [1, 2, 3]
    with progress_of_ranks(10, 4, "Encoding") as on_done:
        for _ in range(4):
            on_done()
    assert shown == [2, 5, 8, 10, 10]


def test_progress_is_complete_at_the_end_if_all_was_done_by_other_ranks(monkeypatch):
    shown = positions_of_bars(monkeypatch)
    with progress_of_ranks(10, 0, "Encoding"):
        assert not shown
    assert shown == [10]


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("dnnlib.parallel.num_usable_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [num_cores_of_rank(2), num_cores_of_rank(16)] == [2, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert num_cores_of_rank(16) == 1
