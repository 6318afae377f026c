"""From checked options to a finished run: what it starts from, its folder, its parts, the loop."""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib import launcher
from dnnlib.addresses import is_address
from dnnlib.config import to_dict
from dnnlib.errors import refusal
from dnnlib.files import atomic_write, lock_folder, write_json
from models import attention_backend
from torch_utils import cpu_matmul, distributed
from torch_utils.fingerprints import package_versions
from torch_utils.saver import Saver
from torch_utils.stop_signal import StopRequested, StopSignal
from training import runs
from training.config import RunConfig, fit_to_device
from training.family import of as family_of
from training.family import restore_run
from training.loop import Job, training_loop
from training.portable import open_snapshot
from training.reference_curves.reference import Reference
from training.report import changes_from, describe_run, run_facts
from training.saving.wait import wait_for_savers
from training.stability.rollbacks import (
    ROLLBACKS_FILE,
    RollbackRequested,
    add_rollback,
    remove_abandoned,
)
from training.start import Start
from training.watching.reference import place_reference

# A killed process first releases its memory, which takes a while, and then its lock.
_LOCK_PATIENCE_SEC = 10.0
# If all nodes are to stop, a node hears of it at most so much later than another.
_NEWS_SEC = 10.0


def print_plan(config: RunConfig, usual_num_classes: int) -> None:
    """Print what would run, fitted to the data; without them, to ``usual_num_classes`` classes."""
    family, location, note = family_of(config), config.data.data, ""
    if location and (is_address(location) or Path(location).exists()):
        config = family.fit(config, family.open_data(config))
    else:
        config = family.fit(config, None, usual_num_classes)
        if location:
            note = f"{location} does not exist: assuming the preset's usual data."
    world_size = launcher.number("WORLD_SIZE", 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = fit_to_device(config, device.type)
    if config.training.cpu_matmul == "auto":
        backend = cpu_matmul.best() if device.type == "cpu" else "mkl"
        config = config.changed("training", cpu_matmul=backend)
    notes = [note] if note else []
    config = _with_batch(config, world_size, device, notes.append)
    description = describe_run(config, world_size, device, with_forecast=True)
    if launcher.number("RANK") == 0:
        print("\n".join([json.dumps(to_dict(config), indent=2), description, *notes]))


@dataclasses.dataclass(frozen=True)
class Usual:
    """A run's preset without the run's changes, and its reference curves; None if unknown."""

    run: RunConfig | None = None
    reference: Reference | None = None


def launch(config: RunConfig, start: Start, usual: Usual = Usual()) -> int:
    """Train, and return the exit code: 0, or REQUEUE_EXIT_CODE after a requested stop.

    The run's report shows how the run differs from what is ``usual``.
    """
    run_dir, is_new, finished = None, False, False
    with (
        Saver(config.logging.save_rate) as saver,
        StopSignal() as stop_signal,
        contextlib.ExitStack() as held,
    ):
        try:
            # A stop before the first step loses nothing; from there on, training_loop defers it.
            with stop_signal.at_once():
                job = _prepare(config, distributed.init(config.logging.hang_limit))
                # Find or make the run folder.
                snapshot = None if start.source is None else open_snapshot(start.source)
                origin = runs.origin_of(snapshot, start.desc)
                run_dir, exact_state = _find_run(job, start, origin)
                is_new = run_dir is None
                if is_new:
                    desc = runs.describe(job.config, job.data, start.desc)
                    run_dir = runs.make_run_dir(start.outdir, desc)
                with distributed.together():
                    if distributed.is_main():
                        held.enter_context(_lock(run_dir))
                state, num_rollbacks = None, 0
                if not is_new:
                    state, num_rollbacks = _load_state(job, run_dir, exact_state)
                job = _with_cpu_matmul(_as_begun(job, state), state)
                if config.training.batch_gpu == "auto":
                    job = _with_batch_before(job, state)
                if distributed.is_main():
                    if start.continues:
                        _, origin = runs.read_start(run_dir, lambda text: None)
                    _write_start(job, run_dir, origin, usual)
                weights = snapshot if state is None else None
                _check_teacher(job.config, run_dir, state or weights)
                start_from = dict(resume_state=state, transfer=weights, num_rollbacks=num_rollbacks)
                finished = _train(job, run_dir, saver, stop_signal=stop_signal, **start_from)
        except Exception:
            if is_new and run_dir is not None and distributed.is_main():
                runs.remove_unless_begun(run_dir)
            raise
        except StopRequested:
            if is_new and run_dir is not None and distributed.is_main():
                run_dir = runs.remove_unless_described(run_dir)
            where = "" if run_dir is None else f"; continue with --resume={run_dir}"
            distributed.print0(f"Stopped by {stop_signal.name_received()} before a step{where}")
        if not finished and run_dir is not None and distributed.is_main():
            _ask_for_more(run_dir)
        _finish_writing(saver)
        goes_on = not (finished or stop_signal.cut) and _goes_on_without(stop_signal)
    if stop_signal.cut or goes_on:
        # The launcher ends the ranks that have not heard of the stop, or starts this one again.
        return runs.REQUEUE_EXIT_CODE
    distributed.shutdown()
    # All ranks have stopped. torchrun reports any other code as a failure, at length.
    quiet = finished or "TORCHELASTIC_RUN_ID" in os.environ
    return 0 if quiet else runs.REQUEUE_EXIT_CODE


def _check_teacher(config: RunConfig, run_dir: Path, source: Any) -> None:
    """Raise ValueError for a distillation without a ``source`` of its teacher's weights."""
    if source is None and config.distillation.is_on:
        but = f"there is no training state in {run_dir} to take the teacher from"
        raise refusal("--resume", but=but, remedy="start again with --distill")


def _load_state(job: Job, run_dir: Path, exact: Path | None) -> tuple[dict[str, Any] | None, int]:
    """Return the state to continue from, if there is one, and the number of rollbacks. Collective.

    ``exact`` is the path of a particular state, which may be of an abandoned part of the run.
    """
    distributed.on_main(lambda: wait_for_savers(run_dir, print))
    distributed.on_main(lambda: runs.clear_leftovers(run_dir))
    is_exact = exact is not None
    num_rollbacks = distributed.on_main(lambda: remove_abandoned(run_dir, only_count=is_exact))
    settings = (job.config, job.data, distributed.print0)
    state = runs.load_resume_state(run_dir, exact, *settings)
    if state is not None and state["progress"].get("rollbacks", 0) > num_rollbacks:
        but = "rows of rollbacks before the state are missing"
        raise refusal(run_dir / ROLLBACKS_FILE, but=but, remedy="restore it, or start a new run")
    return state, num_rollbacks


def _train(job: Job, run_dir: Path, saver: Saver, **start_from: Any) -> bool:
    """Run :func:`training_loop`, again after each rollback that it requests. Collective."""
    while True:
        try:
            return training_loop(job, run_dir, saver=saver, **start_from)
        except RollbackRequested as error:
            asked = error.with_traceback(None)  # The traceback holds the network.
        start_from["resume_state"] = None
        gc.collect()
        if job.config.training.compile:
            torch.compiler.reset()  # The next network has its own graphs; their number is limited.
        saver.wait()
        distributed.barrier()  # Now every part of every state is written.
        add = functools.partial(add_rollback, run_dir, asked, print)
        start_from["num_rollbacks"] = distributed.on_main(add)
        settings = (job.config, job.data, distributed.print0)
        start_from["resume_state"] = runs.load_resume_state(run_dir, None, *settings)
        if start_from["resume_state"] is not None:
            start_from["transfer"] = None


def _goes_on_without(stop_signal: StopSignal) -> bool:
    """Return whether only other nodes were asked to stop, so that torchrun is to continue.

    If a request reaches this node too, it need not come at the very same time.
    """
    restarts = launcher.number("TORCHELASTIC_MAX_RESTARTS")
    is_last = launcher.number("TORCHELASTIC_RESTART_COUNT") >= restarts
    if launcher.number("GROUP_WORLD_SIZE", 1) == 1 or is_last:
        return False
    deadline = time.monotonic() + _NEWS_SEC
    while stop_signal.received is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if stop_signal.received is None:
        print("Other nodes were asked to stop; torchrun continues with the remaining nodes.")
    return stop_signal.received is None


def _ask_for_more(run_dir: Path) -> None:
    """Write the file that tells a scheduler that the run wants to continue."""
    with atomic_write(run_dir / runs.REQUEUE_FILE, "w") as file:
        file.write(f"{time.time():.0f}\n")


def _finish_writing(saver: Saver) -> None:
    if saver.is_busy:
        distributed.print0("The state is being written; ending this process does not stop that.")
    saver.wait()


def verify(config: RunConfig, start: Start) -> int:
    """Test on a few steps whether a stop and a resume leave no trace; return 0 if so, else 1."""
    from training.verify_resume import shortened, verify_resume

    with Saver() as saver:
        job = _prepare(shortened(config), distributed.init(config.logging.hang_limit))
        snapshot = None if start.source is None else open_snapshot(start.source)
        equal = verify_resume(_with_cpu_matmul(job, None), saver, snapshot)
    distributed.shutdown()
    return 0 if equal else 1


def _lock(run_dir: Path) -> contextlib.AbstractContextManager:
    """Return the lock of a run folder; waits up to 10 seconds for another holder to end."""
    deadline = time.monotonic() + _LOCK_PATIENCE_SEC
    while True:
        try:
            return lock_folder(run_dir, f"{run_dir}: another process is training here")
        except ValueError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _prepare(config: RunConfig, device: torch.device) -> Job:
    """Open the data and everything else that the run needs, and fit the run to them. Collective."""
    attention_backend(config.model, device)
    family = family_of(config)
    data = family.open_data(config)
    config = fit_to_device(family.fit(config, data), device.type)
    config, codec = family.open_codec(config, data, device)
    config = _with_batch(config, distributed.world_size(), device, distributed.print0)
    examples = None if config.distillation.is_on else family.validation(config, data)
    if examples is None and (config.logging.early_stop or config.logging.validation_ticks):
        option = "--early-stop" if config.logging.early_stop else "--validation-ticks"
        but, remedy = "no images are held out to validate on", "give --validation-share=0.1"
        if config.distillation.is_on:
            but, remedy = "students are measured by their scores, not by a loss", "leave it out"
        raise refusal(option, but=but, remedy=remedy)
    evaluator = family.evaluator(config, data, device)
    return Job(
        config=config, data=data, codec=codec, examples=examples, evaluator=evaluator, device=device
    )


def _as_begun(job: Job, state: dict[str, Any] | None) -> Job:
    """Return the job with settings that have no option as they are in the state to continue."""
    if state is None:
        return job
    return dataclasses.replace(job, config=job.config.as_begun(restore_run(state["config"])))


def _with_cpu_matmul(job: Job, state: dict[str, Any] | None) -> Job:
    """Decide the library for float32 matrix products, by the state to continue. Collective."""
    asked, stored = job.config.training.cpu_matmul, None
    if state is not None:
        stored = state["config"]["training"].get("cpu_matmul", "mkl")
    backend = cpu_matmul.agree(asked, stored, job.device)
    if stored is not None and asked not in ("auto", stored):
        distributed.print0(
            f"--cpu-matmul: {stored} in the run so far, {backend} from now on: what follows "
            "differs in the last bits from a run that was never interrupted."
        )
    return dataclasses.replace(job, config=job.config.changed("training", cpu_matmul=backend))


def _with_batch(
    config: RunConfig, world_size: int, device: torch.device, report: Callable[[str], None]
) -> RunConfig:
    """Return ``config`` with ``--batch-gpu=auto`` decided, and report it. Collective."""
    if config.training.batch_gpu != "auto":
        return config
    from training.resources.batch import settle_batch

    return settle_batch(config, world_size, device, report)


def _with_batch_before(job: Job, state: dict[str, Any] | None) -> Job:
    """Return the job with the --batch-gpu of the state to continue, if that fits. Collective.

    Other passes would change sums in the last bits.
    """
    stored = None if state is None else state["config"]["training"].get("batch_gpu")
    if stored in (None, job.config.training.batch_gpu):
        return job
    from training.resources.batch import still_fits

    config = job.config.changed("training", batch_gpu=stored)
    if not still_fits(config, distributed.world_size(), job.device):
        distributed.print0(
            f"--batch-gpu=auto: {stored} per pass in the run so far do not fit here: what follows "
            "differs in the last bits from a run that was never interrupted."
        )
        return job
    distributed.print0(f"--batch-gpu=auto: {stored} per pass, as in the run so far.")
    evaluator = family_of(config).evaluator(config, job.data, job.device)
    return dataclasses.replace(job, config=config, evaluator=evaluator)


def _find_run(job: Job, start: Start, origin: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """Return the run folder to continue, and the state if a particular one is given. Collective."""
    if start.continues:
        return runs.resume_paths(start.resume)
    if start.resume != "auto":
        return None, None
    found = (start.outdir, job.config, origin, print)
    return distributed.on_main(lambda: runs.find_same_run(*found)), None


def _write_start(job: Job, run_dir: Path, origin: dict[str, Any] | None, usual: Usual) -> None:
    config, world_size = job.config, distributed.world_size()
    facts = dict(command=sys.argv, world_size=world_size, device=str(job.device), origin=origin)
    about = dict(
        total_kimg=config.total_nimg / 1000,
        data=dict(
            name=job.data.name,
            num_images=job.data.num_images,
            content_hash=job.data.content_hash,
            class_names=list(job.data.class_names) if job.data.num_classes else None,
        ),
        description=run_facts(config, world_size, job.device),
        changes=None if usual.run is None else changes_from(usual.run, config),
        next_steps=family_of(config).next_steps(config),
    )
    options = {"config": to_dict(config), **facts, "packages": package_versions(), **about}
    write_json(run_dir / "training_options.json", options)
    held_out = ""
    if job.examples is not None:
        what = "images" if config.model.images_per_row == 1 else "sets"
        held_out = f"; the validation loss is of {job.examples.num_items} other {what}"
    what = f"{job.data.name}: {job.data.num_images} images{held_out}"
    print(f"Training on {what}. Writing to {run_dir}")
    print(describe_run(config, world_size, job.device), flush=True)
    print(place_reference(run_dir, config, origin, usual.reference), end="", flush=True)
