"""Steps as functions of (seed, position): ranks and accumulation change nothing."""

import pytest
import torch
from helpers import fail, succeed
from training_runs import (
    ROOT,
    TINY,
    differences,
    final_state,
    only_run,
    per_tick,
)

import train as train_script
from dnnlib.config import from_dict
from families import image as families
from models import build_network
from training.config import RunConfig

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

# Ten steps of 32 images, a record of each.
TEN_STEPS = (
    *TINY,
    "--base-dim=32",
    "--hidden-dim=32",
    "--batch=32",
    "--iters=10",
    "--tick=0",
    "--snap=100",
    "--lr=1e-3",
    "--lr-rampup=0",
    "--workers=0",
)


def final_outputs(run_dir):
    """Return what the network at the end of a run makes of fixed inputs, [8, 1, 8, 8]."""
    state = final_state(run_dir)
    network = build_network(from_dict(RunConfig, state["config"]).model).eval()
    network.load_state_dict(state["net"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 8, 8, generator=generator)
    with torch.no_grad():
        context = network.context({"label": torch.arange(8)}, num=8)
        return network(x, torch.linspace(-1, 1, 8), context)


def test_losses_depend_on_neither_ranks_nor_accumulation(train, digits_zip, tmp_path):
    def options(name, batch_gpu):
        return (f"--outdir={tmp_path / name}", *TEN_STEPS, f"--batch-gpu={batch_gpu}")

    output = train(*options("two", 8), ranks=2, warm=True).finish()
    assert "8 per pass x 2 pass(es) x 2 rank(s)" in output
    for name, batch_gpu in (("one", 8), ("four", 4)):
        succeed(train_script, *options(name, batch_gpu), f"--data={digits_zip}")

    reference = only_run(tmp_path / "one")
    losses = per_tick(reference, "Loss/loss")
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    outputs = final_outputs(reference)
    for name in ("two", "four"):
        run_dir = only_run(tmp_path / name)
        torch.testing.assert_close(
            per_tick(run_dir, "Loss/loss"), losses, rtol=1e-5, atol=0, msg=name
        )
        torch.testing.assert_close(final_outputs(run_dir), outputs, rtol=1e-4, atol=1e-5, msg=name)


# Six steps; the weights that a step finds are those of the step before, if that was skipped.
FAULTY = (
    *TINY,
    "--batch=32",
    "--tick=0",
    "--snap=100",
    "--lr-rampup=0",
    "--workers=0",
)


class FaultyObjective(families.Objective):
    """The objective of training, whose gradient is not a number at the steps ``faults``."""

    faults = frozenset()

    def forward(self, *args):
        self.step = getattr(self, "step", -1) + 1
        loss = super().forward(*args)
        return loss * torch.nan if self.step in self.faults else loss


def test_a_step_without_a_finite_gradient_changes_nothing_but_the_counts(
    digits_zip, tmp_path, monkeypatch
):
    monkeypatch.setattr(families, "Objective", FaultyObjective)
    states = []
    for num_steps, faults in ((4, {1}), (6, {1, 4, 5})):
        monkeypatch.setattr(FaultyObjective, "faults", faults)
        outdir = tmp_path / str(num_steps)
        args = (f"--outdir={outdir}", f"--data={digits_zip}", *FAULTY, f"--iters={num_steps}")
        output = succeed(train_script, *args).output
        states.append(final_state(only_run(outdir)))
    assert [state["progress"]["cur_nimg"] for state in states] == [128, 192]
    assert [state["optimizer"].pop("counters").tolist() for state in states] == [[1, 0], [3, 2]]
    for name in ("net", "ema", "optimizer"):
        assert differences(states[0][name], states[1][name]) == []
    assert per_tick(only_run(outdir), "Loss/skipped_steps") == [0, 1, 1, 1, 2, 3]
    last_line = next(line for line in output.splitlines() if line.startswith("tick 5"))
    assert last_line.endswith(" skipped 3 non-finite")


RANK_SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import test_ranks
import train
from torch_utils import distributed
from families import image as families

class Faulty(test_ranks.FaultyObjective):
    @property
    def faults(self):
        return {{1, 4, 5}} if distributed.rank() == 1 else set()

families.Objective = Faulty
train.run(train.main)
"""


def test_ranks_skip_together_and_stop_together_at_the_limit(
    train, digits_zip, tmp_path, monkeypatch
):
    script = tmp_path / "faulty.py"
    script.write_text(RANK_SCRIPT.format(paths=[str(ROOT), str(ROOT / "tests")]))
    args = (*FAULTY, "--iters=8", "--skip-limit=2")
    process = train(f"--outdir={tmp_path / 'two'}", *args, ranks=2, script=script, warm=True)
    output = process.finish(None)
    message = "Error: 2 gradients in a row were not finite (at kimg 0."
    assert message in output
    assert "--skip-limit=2 set this limit" in output
    two = only_run(tmp_path / "two")
    assert per_tick(two, "Loss/skipped_steps") == [0, 1, 1, 1, 2, 3]

    monkeypatch.setattr(families, "Objective", FaultyObjective)
    monkeypatch.setattr(FaultyObjective, "faults", {1, 4, 5})
    one_args = (f"--outdir={tmp_path / 'one'}", f"--data={digits_zip}", *args)
    assert message in fail(train_script, *one_args)
    losses = [per_tick(path, "Loss/loss") for path in (only_run(tmp_path / "one"), two)]
    finite = [[row[step] for step in (0, 2, 3)] for row in losses]
    torch.testing.assert_close(*finite, rtol=1e-5, atol=0)
    # Statistics are of finite values alone: here of none, there of those of rank 0.
    assert losses[0][1] is None
    assert losses[1][1] is not None


def test_a_batch_that_ranks_and_passes_cannot_share_is_an_error(digits_zip, tmp_path, monkeypatch):
    args = (f"--outdir={tmp_path / 'runs'}", f"--data={digits_zip}", *TINY)
    message = fail(train_script, *args, "--batch-gpu=7")
    assert "--batch-gpu: got 7" in message
    assert "use a divisor of 64, such as 8" in message
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = fail(train_script, *args, "--dry-run")
    assert "--batch: got 64, which 3 ranks cannot share evenly" in message
    assert not (tmp_path / "runs").exists()
