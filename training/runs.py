"""Run folders: making, finding and resuming them."""

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib.config import identity
from dnnlib.errors import refusal
from dnnlib.files import file_sizes
from dnnlib.typed import parse_json
from torch_utils import distributed
from training import family
from training.checkpoint import Snapshot, find_states, load_state
from training.config import RunConfig, with_absolute_data
from training.distillation.stages import stages_of
from training.division import group_size
from training.family import TrainingData
from training.run_report.files import WATCH_FILE
from training.run_report.write import REPORT_FILE
from training.saving.state_folder import IntactError, is_state_folder, remove_incomplete_states
from training.stability.rollbacks import ROLLBACKS_FILE

REQUEUE_FILE = "requeue"
REQUEUE_EXIT_CODE = 85
_MADE = ("training-state-*", "network-snapshot-*.pkl", "stats.jsonl", "metric-*.jsonl")
_SHOWN = ("*-[0-9]*.png", "conditioning-*.jsonl", "reals.png", REPORT_FILE, WATCH_FILE)
_RECORDS = ("training_options.json", "prediction.json", "reference.json", "warm-start.json")
_RUN_FILES = (*_MADE, *_SHOWN, *_RECORDS, ROLLBACKS_FILE, REQUEUE_FILE)


def describe(run: RunConfig, data: TrainingData, desc: str | None) -> str:
    """Return the readable part of a run folder's name."""
    size = f"ranks{distributed.world_size()}-batch{run.training.batch}"
    parts = [data.name, *family.of(run).describe_data(data), run.preset, size]
    return "-".join([*parts, run.training.precision, *([desc] if desc else [])])


def resume_paths(resume: str) -> tuple[Path, Path | None]:
    """Return ``(run folder, state or None)`` for ``--resume=RUN_DIR`` or ``--resume=STATE``.

    Raises ValueError if the path is neither.
    """
    path, accepted = Path(resume), "a run folder, a state (training-state-KIMG), or auto"
    if is_state_folder(path):
        return path.parent, path
    if path.is_dir():
        return path, None
    if not path.is_file():
        but = f"{path} {'is not a file' if path.exists() else 'does not exist'}"
        raise refusal("--resume", but=but, accepted=accepted)
    if path.suffix != ".pt":
        raise refusal("--resume", but=f"{path} is not a training state", accepted=accepted)
    return path.parent, path


def make_run_dir(outdir: Path, desc: str) -> Path:
    """Make and return a folder ``outdir/00000-desc``, numbered after the last one. Collective."""

    def make() -> Path:
        outdir.mkdir(parents=True, exist_ok=True)
        numbers = [int(match.group()) for path in outdir.iterdir() if (match := _number(path))]
        for number in itertools.count(max(numbers, default=-1) + 1):
            run_dir = outdir / f"{number:05d}-{desc}"
            with contextlib.suppress(FileExistsError):  # Taken by another run that starts now.
                run_dir.mkdir()
                return run_dir

    return distributed.on_main(make)


def remove_unless_begun(run_dir: Path) -> None:
    """Remove a run folder that holds nothing that training made."""
    made = itertools.chain.from_iterable(run_dir.glob(name) for name in _MADE)
    if not any(size for path in made for size in file_sizes(path).values()):
        shutil.rmtree(run_dir)


def remove_unless_described(run_dir: Path) -> Path | None:
    """Remove a run folder without ``training_options.json``, or return it if it has that."""
    if (run_dir / "training_options.json").is_file():
        return run_dir
    shutil.rmtree(run_dir)
    return None


def _number(path: Path) -> re.Match | None:
    return re.match(r"\d+", path.name) if path.is_dir() else None


def read_start(
    run_dir: Path, report: Callable[[str], None]
) -> tuple[RunConfig, dict[str, Any] | None]:
    """Return a run's configuration and its origin (see :func:`origin_of`; None if unknown).

    If ``training_options.json`` is missing or damaged, a message to ``report`` says so, and the
    configuration in the newest readable training state is used. Raises ValueError without any.
    """
    path = run_dir / "training_options.json"
    try:
        options = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(options, dict) or not isinstance(options.get("config"), dict):
            raise ValueError("it holds no configuration")
        config = with_absolute_data(family.restore_run(options["config"]))
        return config, options.get("origin")
    except FileNotFoundError:
        reason = "is missing"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"cannot be read ({error})"
    for state_file in find_states(run_dir):
        try:
            config = with_absolute_data(family.restore_run(load_state(state_file)["config"]))
        except (ValueError, KeyError, TypeError):
            continue
        report(f"{path}: {reason}; the configuration in {state_file.name} is used.")
        return config, None
    if reason == "is missing":
        raise ValueError(f"{run_dir}: not a run folder (no training_options.json).")
    raise ValueError(f"{path}: {reason}.")


def origin_of(transfer: Snapshot | None, desc: str | None) -> dict[str, Any]:
    """Return what identifies a run besides its configuration: first weights and description."""
    return dict(transfer=None if transfer is None else transfer.sha256, desc=desc)


def clear_leftovers(run_dir: Path) -> None:
    """Remove the requeue request, half-written files and savers' locks of an earlier process."""
    for path in (run_dir / REQUEUE_FILE, *run_dir.glob(".saver-*.lock")):
        path.unlink(missing_ok=True)
    remove_incomplete_states(run_dir)
    for name in _RUN_FILES:
        for path in run_dir.glob(f".{name}.*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_same_run(
    outdir: Path, config: RunConfig, origin: dict[str, Any], report: Callable[[str], None]
) -> Path | None:
    """Return the newest run folder in ``outdir`` with the same identity and origin, None without.

    A folder of unknown origin counts as the same. Messages to ``report`` name the folders that
    cannot be compared.
    """
    if not outdir.is_dir():
        return None
    for path in sorted(outdir.iterdir(), reverse=True):
        if _number(path) and (find_states(path) or (path / "training_options.json").is_file()):
            try:
                other, other_origin = read_start(path, report)
            except ValueError as error:
                report(f"Skipped: {error}")
                continue
            if identity(other) == identity(config) and other_origin in (None, origin):
                return path
    return None


def load_resume_state(
    run_dir: Path,
    exact: Path | None,
    config: RunConfig,
    data: TrainingData,
    report: Callable[[str], None],
) -> dict[str, Any] | None:
    """Return the newest readable training state of a run folder, None without any. Collective.

    A damaged state is reported and the one before it is used, unless ``exact`` asks for a
    particular state. Differences from the settings and data of the state are reported. Raises
    ValueError if the state is of another model, holds other averages of the weights or has other
    stages of a distillation, or if it cannot be read now but may be intact.
    """

    is_sharded = group_size(config.training, distributed.world_size()) > 1

    def load() -> tuple[dict[str, Any] | None]:
        if exact is not None:
            return (load_state(exact, lazily=is_sharded),)
        for path in find_states(run_dir):
            try:
                state = load_state(path, lazily=is_sharded)
            except IntactError:
                raise  # A run from the state before it would in the end replace this state.
            except ValueError as error:
                report(f"Skipped: {error} Trying the state before it.")
                continue
            report(f"Resuming from {path}")
            return (state,)
        report(f"{run_dir} holds no readable training state: starting from the beginning.")
        return (None,)

    loaded = distributed.on_main_tree(load, is_sharded)[0]
    if loaded is not None:
        saved = with_absolute_data(family.restore_run(loaded["config"]))
        _check_same_model(config, saved, report)
        stored = loaded["progress"].get("data_hash")
        if stored is not None and not distributed.on_main(lambda: data.is_same_as(stored)):
            report(
                "The training data are not those that the run began with: what follows differs "
                "from a run that was never interrupted."
            )
    return loaded


def _check_same_model(config: RunConfig, saved: RunConfig, report: Callable[[str], None]) -> None:
    """Raise ValueError if a state has another model, averages or stages; report other changes."""
    own, there = identity(config), identity(saved)
    changed = [name for name in own | there if own.get(name) != there.get(name)]
    listed = {name: f"{name} {there.get(name)} there, {own.get(name)} here" for name in changed}
    fixed = [n for n in changed if n.startswith(("model.", "precond.")) and n != "model.dropout"]
    if fixed:
        details = "; ".join(listed[name] for name in fixed)
        raise ValueError(f"--resume: the state is of another model ({details}).")
    stds, stds_there = (sorted(settings["training.ema_stds"]) for settings in (own, there))
    if stds != stds_there:
        shown, shown_there = (",".join(map(str, s)) or "none" for s in (stds, stds_there))
        raise ValueError(
            f"--resume: the state holds the averages of --ema-stds={shown_there}, not of {shown}, "
            "and none can start in the middle of a run; leave --ema-stds as it was, or start a "
            "new run."
        )
    if config.distillation.is_on or saved.distillation.is_on:
        stages, stages_there = stages_of(config), stages_of(saved)
        if (config.distillation, stages) != (saved.distillation, stages_there):
            raise ValueError(
                "--resume: the stages of a distillation follow from its duration, --batch and "
                "--distill options, which cannot change in the middle of it; leave them as they "
                "were, or start a new run."
            )
    if changed:
        report(f"This continues a run with other settings: {'; '.join(listed.values())}.")
