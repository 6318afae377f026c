"""Tests whether a run that is stopped and resumed equals one that is not, on this machine."""

import contextlib
import dataclasses
import gc
import io
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib.typed import parse_json
from torch_utils import distributed
from torch_utils.saver import Saver
from torch_utils.stop_signal import StopSignal
from training import runs
from training.checkpoint import Snapshot, find_states, load_state
from training.config import RunConfig
from training.division import accumulation_rounds
from training.family import Part
from training.family import of as family_of
from training.loop import Job, training_loop

NUM_STEPS = 6
STOP_AFTER = 3
_MAX_NAMED = 8
_CAUSE = "determin"  # In PyTorch's warnings: "nondeterministic" as well as "a deterministic".


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How many of some tensors or numbers differ, and which one by most."""

    total: int
    num_different: int = 0
    largest: float = 0.0
    name: str = ""

    def __str__(self) -> str:
        if not self.num_different:
            return f"equal bit for bit ({self.total} compared)"
        most = f"the largest difference is {self.largest:.3g}, in {self.name}"
        return f"{self.num_different} of {self.total} differ; {most}"


class _NoEvaluator:
    """Makes no pictures and no scores: they would leave no trace in the weights."""

    def save_pictures(self, generator: Any, outputs: Any, cur_nimg: int) -> None:
        pass

    def score(self, generator: Any, outputs: Any, cur_nimg: int) -> None:
        pass


class _StopAfter(StopSignal):
    """Asks every rank to stop after ``num_steps`` steps (None: never), and handles no signals."""

    def __init__(self, num_steps: int | None) -> None:
        super().__init__()
        self._num_steps, self._taken = num_steps, 0

    def agreed(self) -> bool:
        self._taken += 1
        return self._taken == self._num_steps


def shortened(run: RunConfig) -> RunConfig:
    """Return ``run`` with a few steps, each a tick of its own, and without metrics."""
    run = run.changed("training", iters=NUM_STEPS, rollback=0)
    quiet = dict(metrics=(), metrics_ref=None, metrics_ticks=None, wandb=False, board=())
    often = dict(log_interval=1, snap=NUM_STEPS, save_interval=None, dump=None)
    return run.changed("logging", **quiet, **often)


def verify_resume(job: Job, saver: Saver, transfer: Snapshot | None = None) -> bool:
    """Return whether a run of ``job`` that is stopped and resumed equals an uninterrupted one.

    ``job`` is of a run that :func:`shortened` made; ``transfer`` is the snapshot that the run
    starts from, if any. Rank 0 prints what is equal and what is not. If something is not, it also
    prints whether two uninterrupted runs differ too, and which operations PyTorch names as the
    cause. Everything is written to a temporary folder. Collective.
    """
    job = dataclasses.replace(job, evaluator=_NoEvaluator())
    where = f"{distributed.world_size()} rank(s), {job.device.type}"
    distributed.print0(f"Training {NUM_STEPS} steps twice on {where}, once with a stop after")
    distributed.print0(f"step {STOP_AFTER} and a resume from the state that it leaves.")
    with _folders("whole", "stopped", "again") as (whole, stopped, again):
        _train(job, saver, whole, transfer=transfer)
        _train(job, saver, stopped, transfer=transfer, stop_after=STOP_AFTER)
        _train(job, saver, stopped, resume=True)
        found = distributed.on_main(lambda: compare_runs(whole, stopped))
        order = _same_order(job)
        for what, comparison in found.items():
            distributed.print0(f"  {what:<12}{comparison}")
        distributed.print0(f"  {'data order':<12}{'equal' if order else 'not equal'}")
        equal = order and not any(comparison.num_different for comparison in found.values())
        if equal:
            distributed.print0("A run that is stopped here resumes exactly.")
            return True
        causes = _train_for_causes(job, saver, again, transfer)
        repeated = distributed.on_main(lambda: compare_runs(whole, again))
    _explain(repeated, causes, order)
    return False


def _explain(repeated: dict[str, Comparison], causes: list[str], order: bool) -> None:
    """Print the likely cause of a difference."""
    if not order:
        distributed.print0("The resumed run read other data: its order must depend on seed and")
        distributed.print0("position alone.")
    worst = max(repeated.values(), key=lambda comparison: comparison.largest)
    if worst.num_different:
        distributed.print0(f"Two uninterrupted runs differ as well: {worst}. So it is not the")
        distributed.print0("resume that makes the difference, but operations that are not exact.")
    else:
        distributed.print0("Two uninterrupted runs are equal, so the resume causes the difference.")
    for cause in causes[:_MAX_NAMED]:
        distributed.print0(f"  PyTorch says: {cause}")


@contextlib.contextmanager
def _folders(*names: str) -> Iterator[list[Path]]:
    """Make temporary folders on rank 0 and yield their paths. Collective."""
    with contextlib.ExitStack() as held:
        made = None
        if distributed.is_main():
            made = held.enter_context(tempfile.TemporaryDirectory(prefix="verify-resume-"))
            for name in names:
                (Path(made) / name).mkdir()
        base = Path(distributed.broadcast_object(made))
        yield [base / name for name in names]


def _train(
    job: Job,
    saver: Saver,
    run_dir: Path,
    *,
    transfer: Snapshot | None = None,
    stop_after: int | None = None,
    resume: bool = False,
) -> None:
    state = None
    with contextlib.redirect_stdout(io.StringIO()):
        if resume:
            known = (run_dir, None, job.config, job.data, distributed.print0)
            state = runs.load_resume_state(*known)
        start_from = dict(resume_state=state, transfer=transfer)
        training_loop(job, run_dir, saver=saver, stop_signal=_StopAfter(stop_after), **start_from)
        saver.wait()
        distributed.barrier()  # Until every rank has written its part.
    gc.collect()


def _train_for_causes(
    job: Job, saver: Saver, run_dir: Path, transfer: Snapshot | None
) -> list[str]:
    """Train once more; return PyTorch's warnings about operations that are not deterministic."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            _train(job, saver, run_dir, transfer=transfer)
        finally:
            torch.use_deterministic_algorithms(False)
    texts = [str(warning.message).partition(". ")[0].splitlines()[0] for warning in caught]
    return list(dict.fromkeys(text for text in texts if _CAUSE in text.lower()))


def compare_runs(first: Path, second: Path) -> dict[str, Comparison]:
    """Return how the last states and the recorded losses of two run folders compare."""
    states = [load_state(find_states(run_dir)[0]) for run_dir in (first, second)]
    parts = dict(weights=("net",), averages=("ema", "ema_profiles"), optimizer=("optimizer",))
    found = {
        what: compare(*({name: state[name] for name in names} for state in states))
        for what, names in parts.items()
    }
    found["losses"] = compare(*map(_losses, (first, second)))
    return found


def _losses(run_dir: Path) -> dict[str, float]:
    lines = (run_dir / "stats.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [parse_json(line) for line in lines]
    names = [name for name in rows[0] if name.startswith("Loss/")]
    return {f"step {i + 1}: {n}": row[n]["mean"] for i, row in enumerate(rows) for n in names}


def compare(first: Any, second: Any) -> Comparison:
    """Return how two trees of tensors and numbers, of the same form, compare bit for bit."""
    pairs = dict(_leaves(first)), dict(_leaves(second))
    assert pairs[0].keys() == pairs[1].keys()
    different = {}
    for name, own in pairs[0].items():
        other = pairs[1][name]
        if not torch.equal(_bits(own), _bits(other)):
            gap = (own.double() - other.double()).abs().nan_to_num(torch.inf)
            different[name] = float(gap.max())
    if not different:
        return Comparison(len(pairs[0]))
    name = max(different, key=different.get)
    return Comparison(len(pairs[0]), len(different), different[name], name)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, child in items:
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, torch.Tensor):
        yield prefix, tree
    elif isinstance(tree, int | float):
        yield prefix, torch.tensor(tree, dtype=torch.float64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _same_order(job: Job) -> bool:
    """Return whether every rank reads the same data after the stop as without. Collective."""
    family, run = family_of(job.config), job.config
    batch_gpu, num_rounds = accumulation_rounds(run.training, distributed.world_size())
    part = Part(distributed.rank(), distributed.world_size(), batch_gpu)
    with contextlib.redirect_stdout(io.StringIO()):
        whole = family.steps(run, job.data, 0, part).sampler
        resumed = family.steps(run, job.data, STOP_AFTER * run.step_nimg, part).sampler
    stop, end = STOP_AFTER * num_rounds, NUM_STEPS * num_rounds
    keys = list(itertools.islice(whole, end))[stop:]
    return all(distributed.gather_objects(keys == list(itertools.islice(resumed, end - stop))))
