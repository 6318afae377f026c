"""benchmark.py gpu: a dry run of all parts, merged files, time limits and advice."""

import json
import time

import pytest
import torch
from helpers import fail, succeed

import benchmark as script
from benchmarks import gpu, gpu_session, gpu_train
from benchmarks.gpu_report import FORMAT, advice, goals, merged, results_for
from benchmarks.gpu_session import Session
from benchmarks.options import GPU_PARTS, MEASURED

CPU = torch.device("cpu")


@pytest.mark.usefixtures("small_inception")
def test_a_dry_run_measures_every_part_and_writes_results_and_a_table(tmp_path):
    out = tmp_path / "gpu.json"
    output = succeed(script, "gpu", f"--out={out}", "--dry-run").output
    results = json.loads(out.read_text())
    assert results["format"] == FORMAT
    assert results["card"].endswith("(dry run)")
    assert list(results["parts"]) == list(GPU_PARTS)
    for name, part in results["parts"].items():
        assert part["rows"], name
        assert part["torch"] == torch.__version__
        assert 0 < part["seconds"] < part["budget_sec"] == GPU_PARTS[name]
        assert all("flex" in note for note in part["left_out"]), part["left_out"]
    parts = results["parts"]
    assert set(parts["gemm"]["best"]) == {"bf16", "tf32", "fp32"}
    assert max(row["bias_error"] for row in parts["attention"]["rows"]) < 0.05
    assert {row["side"] for row in parts["train"]["rows"]} == {"own", "plain"}
    assert {row["compiled"] for row in parts["train"]["rows"]} == {True, False}
    assert all(row["mfu"] > 0 for row in parts["train"]["rows"])
    assert parts["loading"]["state"]["gigabytes"] > 0
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}" in table for name in GPU_PARTS)
    assert "(goal 95.0%" in output

    # A part measured again replaces that part alone.
    del results["parts"]["train"]
    results["parts"]["gemm"]["rows"] = []
    out.write_text(json.dumps(results))
    succeed(script, "gpu", f"--out={out}", "--dry-run", "--part=gemm")
    again = json.loads(out.read_text())["parts"]
    assert again["gemm"]["rows"]
    assert list(again) == [name for name in GPU_PARTS if name != "train"]
    assert again["metrics"] == results["parts"]["metrics"]


def test_other_files_are_refused_and_left_alone(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps(dict(format=FORMAT, card="NVIDIA L4", parts={})))
    message = fail(script, "gpu", f"--out={out}", "--dry-run", "--part=gemm")
    assert "NVIDIA L4" in message
    assert "give a file of its own for each card" in message
    out.write_text("{}")
    message = fail(script, "gpu", f"--out={out}", "--dry-run")
    assert "no results of benchmark.py gpu" in message
    assert out.read_text() == "{}"
    assert "JSON" in fail(script, "gpu", f"--out={tmp_path / 'gpu.md'}", "--dry-run")
    assert not list(tmp_path.glob("*.md"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_named(tmp_path):
    assert "--dry-run" in fail(script, "gpu", f"--out={tmp_path / 'gpu.json'}")


def test_merging_keeps_the_other_parts(tmp_path):
    results = results_for(tmp_path / "none.json", "card")
    results = merged(merged(results, "gemm", dict(rows=[1])), "train", dict(rows=[2]))
    results = merged(results, "gemm", dict(rows=[3]))
    assert results["parts"] == dict(gemm=dict(rows=[3]), train=dict(rows=[2]))


# Attempts.


def test_attempts_end_in_time_and_say_why_there_is_nothing(monkeypatch):
    monkeypatch.setattr(gpu_session, "_LEAST_SEC", 0.01)

    def run_out():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    session = Session(device=CPU, tiny=True, budget_sec=100)
    assert session.attempt("fine", lambda: 3) == 3
    start = time.monotonic()
    assert session.attempt("slow", lambda: time.sleep(20), 0.2) is None
    assert time.monotonic() - start < 10
    session.attempt("large", run_out)
    session.attempt("odd", lambda: 1 / 0)
    session.budget_sec = 0
    session.attempt("late", lambda: 3)
    assert session.left_out == [
        "slow: took longer than 0 s",
        "large: out of memory",
        "odd: ZeroDivisionError: division by zero",
        "late: this part ran out of time",
    ]


def test_a_batch_without_memory_is_halved(monkeypatch):
    def step(session, run, dataset, variant):
        if run.training.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict(step_ms=1.0)

    monkeypatch.setattr(gpu_train, "_time", step)
    session = Session(device=CPU, tiny=True, budget_sec=100)
    run = gpu_train.gpu_run("digits", session)
    row = gpu_train._measure_variant(session, (run, None), ("own", "bf16", False), 8)
    assert row["batch"] == 2
    assert len(session.left_out) == 2


# Advice.


def trained(preset, rate, arithmetic="bf16", *, compiled=False, side="own", mfu=None):
    row = dict(preset=preset, images_per_sec=rate, arithmetic=arithmetic, mfu=mfu)
    return dict(row, compiled=compiled, side=side)


def test_advice_names_the_defaults_that_are_slower_with_the_numbers():
    times = dict(sdpa=2.0, explicit=4.0)
    faster = {"sdpa": 3.0, "sdpa, compiled": 2.9, "flex, compiled": 1.5}
    attention = [
        *(dict(arithmetic="bf16", tokens=16, way=way, ms=ms) for way, ms in times.items()),
        *(dict(arithmetic="bf16", tokens=256, way=way, ms=ms) for way, ms in faster.items()),
    ]
    train = [
        trained("cifar10", 100, "fp32"),
        trained("cifar10", 300, "tf32"),
        trained("cifar10", 250, "bf16"),
        trained("cifar10", 104, "fp32", compiled=True),
        trained("cifar10", 1000, "fp32", side="plain"),
        trained("imagenet256", 500, compiled=True),
        trained("imagenet256", 600),
        trained("ffhq64", 600),
    ]
    presets = {
        "cifar10": dict(arithmetic="fp32", compiled=False),
        "imagenet256": dict(arithmetic="bf16", compiled=True),
        "ffhq64": dict(arithmetic="fp32", compiled=False),
    }
    parts = dict(attention=dict(rows=attention), train=dict(rows=train))
    assert advice(parts, "sdpa", presets) == [
        "--attention=auto at 256 tokens in bf16: flex, compiled instead of sdpa "
        "(sdpa takes 2.9 ms, flex, compiled 1.5 ms).",
        "cifar10: --tf32 (100 -> 300 images/s, 3.00 times).",
        "cifar10: --precision=bf16 (100 -> 250 images/s, 2.50 times).",
        "imagenet256: --no-compile (500 -> 600 images/s, 1.20 times).",
    ]
    assert advice({}, "sdpa", presets) == []


def test_goals_stand_beside_measurements():
    train = [
        trained("imagenet256", 1, compiled=True, mfu=0.52),
        trained("cifar10", 80, compiled=True),
        trained("cifar10", 40, "fp32", side="plain"),
    ]
    assert goals(dict(train=dict(rows=train), metrics=dict(rows=[]))) == [
        "imagenet256, bf16, compiled: MFU 52.0% (goal 50.0%, met)",
        "cifar10: speed, plain baseline = 1 2.00 (goal 3.00, missed)",
    ]


def test_the_most_important_defaults_are_among_the_variants():
    defaults = gpu_train.defaults_of_presets()
    assert set(defaults) == set(MEASURED)
    for name, default in defaults.items():
        now = ("own", default["arithmetic"], default["compiled"])
        few = gpu_train._few_variants(name)
        assert now in few
        if name in gpu_train.FIRST:
            assert now in gpu_train._VARIANTS
    assert sum(GPU_PARTS.values()) <= 18 * 60
    assert max(GPU_PARTS.values()) <= 8 * 60
    assert set(gpu._PARTS) == set(GPU_PARTS)
