"""What multiplies float32 matrices on CPUs: which is chosen, that it is exact, where it is kept."""

import contextlib
import json

import helpers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import families  # noqa: F401 (registers them)
from diffusion.denoiser import autocast
from torch_utils import cpu_matmul, parameters
from torch_utils.reuse import fixed_weights
from training.checkpoint import find_states, load_snapshot, load_state

CPU = torch.device("cpu")


@pytest.fixture
def back_to_mkl():
    yield
    cpu_matmul.use("mkl")


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", {"avx2", "avx512f"}, "onednn"),
        ("AuthenticAMD", {"avx2"}, "mkl"),
        ("AuthenticAMD", {"avx2", "avx512f", "amx_tile"}, "mkl"),
        ("GenuineIntel", {"avx2", "avx512f"}, "mkl"),
        ("", set(), "mkl"),
    ],
)
def test_auto_follows_from_the_model_of_the_cpu(vendor, flags, expected, monkeypatch):
    monkeypatch.delenv("SETDIFFIT_CPU_MATMUL")
    monkeypatch.setattr(cpu_matmul, "_cpu", lambda: (vendor, frozenset(flags)))
    assert cpu_matmul.best() == expected


def test_a_backend_that_rounds_is_refused_or_replaced_by_mkl(monkeypatch, capsys, back_to_mkl):
    monkeypatch.setattr(cpu_matmul, "_relative_error", lambda: 2e-3)
    with pytest.raises(ValueError, match="--cpu-matmul: got onednn, but it rounds to bfloat16"):
        cpu_matmul.agree("onednn", None, CPU)
    assert cpu_matmul.agree("auto", "onednn", CPU) == cpu_matmul.in_use() == "mkl"
    assert "not the same bit for bit" in capsys.readouterr().out
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_a_gpu_multiplies_by_itself():
    assert cpu_matmul.agree("onednn", None, torch.device("cuda")) == "mkl"


def python(*args):
    """Return what a new process prints: oneDNN settles on instructions at its first use."""
    done = helpers.run_warm(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_multiplies_is_kept_in_states_snapshots_and_protocols(tmp_path):
    data = helpers.toy_data(tmp_path)
    options = [*helpers.TINY, f"--data={data}"]
    losses, runs = {}, {}
    for backend in ("mkl", "onednn"):
        outdir = tmp_path / backend
        text = python("train.py", *options, f"--cpu-matmul={backend}", f"--outdir={outdir}")
        assert f"cpu matmul    {backend}" in text
        runs[backend] = next(outdir.iterdir())
        rows = (runs[backend] / "stats.jsonl").read_text().splitlines()
        losses[backend] = json.loads(rows[-1])["Loss/loss"]["mean"]
        state = load_state(find_states(runs[backend])[0])
        assert state["config"]["training"]["cpu_matmul"] == backend
    assert losses["onednn"] == pytest.approx(losses["mkl"], rel=1e-5)

    snapshot = max(runs["onednn"].glob("network-snapshot-*.pkl"))
    assert load_snapshot(snapshot).config.training.cpu_matmul == "onednn"
    images = tmp_path / "images"
    python("generate.py", f"--network={snapshot}", "--num=1", "--steps=2", f"--outdir={images}")
    assert '"cpu_matmul": "onednn"' in (images / "generation.json").read_text()

    text = python("train.py", f"--resume={runs['onednn']}", "--iters=3")
    assert "cpu matmul    onednn" in text
    text = python("train.py", f"--resume={runs['onednn']}", "--iters=4", "--cpu-matmul=mkl")
    assert "--cpu-matmul: onednn in the run so far, mkl from now on" in text


_CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


class _CountCasts(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _CASTS and args[0].shape == (5, 4):
            self.num += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_are_cast_once_and_nothing_else_changes(frozen):
    layer, x = torch.nn.Linear(4, 5).requires_grad_(not frozen), torch.randn(3, 4)

    def passes():
        for _ in range(3):
            with autocast(CPU, torch.bfloat16):
                yield layer(x)

    with torch.set_grad_enabled(not frozen):
        expected = list(passes())
        with _CountCasts() as count, fixed_weights(layer):
            found = list(passes())
    assert count.num == 1
    assert all(map(torch.equal, found, expected))
    assert layer.weight.requires_grad != frozen
    with torch.no_grad():
        layer.weight.zero_()  # And no cast outlives the block.
    with autocast(CPU, torch.bfloat16):
        assert torch.equal(layer(x), layer.bias.to(torch.bfloat16).expand(3, 5))


@pytest.mark.parametrize("extra", ["--checkpointing", "--clip-grad=1"])
def test_a_run_in_bf16_is_the_same_whether_casts_are_kept_or_not(extra, tmp_path, monkeypatch):
    options = ("--precision=bf16", "--batch-gpu=2", "--iters=3", extra)
    data, states = helpers.toy_data(tmp_path), []
    for name in ("kept", "anew"):
        if name == "anew":
            monkeypatch.setattr(parameters, "fixed_weights", contextlib.nullcontext)
        run_dir = helpers.train_tiny(tmp_path / name, data, *options).run_dir
        states.append(load_state(find_states(run_dir)[0]))
    for own in ("net", "ema", "optimizer"):
        torch.testing.assert_close(states[0][own], states[1][own], rtol=0, atol=0)


def test_two_ranks_that_keep_casts_compute_what_one_does(tmp_path):
    data, states = helpers.toy_data(tmp_path), []
    for num_ranks in (1, 2):
        options = [*helpers.TINY, f"--data={data}", "--precision=bf16", "--batch-gpu=2"]
        helpers.train_on(num_ranks, *options, f"--outdir={tmp_path / str(num_ranks)}")
        (run_dir,) = (tmp_path / str(num_ranks)).iterdir()
        states.append(load_state(find_states(run_dir)[0]))
    torch.testing.assert_close(states[0]["net"], states[1]["net"], rtol=1e-3, atol=2e-3)
