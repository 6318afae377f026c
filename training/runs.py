"""Run folders: making, finding and resuming them."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.features.dataset import FeatureDataset
from data.fewshot.sets import SetDataset
from data.images.augment import NUM_LABELS
from data.latents.dataset import LatentDataset
from diffusion.precond import make_precond
from diffusion.samplers import sampling_sigmas
from dnnlib.config import from_dict, to_dict
from dnnlib.files import atomic_write
from encoders.autoencoder import Autoencoder, check_autoencoder
from families.sets import check_classes
from models import ScaledLatentConfig
from models.feature_dit import FeatureDiTConfig
from models.set_dit import SetDiTConfig
from torch_utils import distributed
from training.checkpoint import Snapshot, find_states, load_state
from training.config import RunConfig, check_guidance, check_guided_channels
from training.inputs import TrainingData, check_resolution

REQUEUE_FILE = "requeue"
REQUEUE_EXIT_CODE = 85
_RUN_FILES = (
    *("training-state-*.pt", "network-snapshot-*.pkl", "fakes-*.png", "reals.png"),
    *("stats.jsonl", "metric-*.jsonl", "training_options.json", REQUEUE_FILE),
)
_DEFAULT_LABEL_DROP = 0.1  # As in classifier-free guidance's experiments (arXiv 2207.12598).
# Settings that change how fast or how long a run computes, but not what.
_SPEED_SECTIONS = ("logging", "sampling", "guidance", "dual_guidance")
SPEED_SETTINGS = {
    "model": ("checkpointing", "attention", "vae", "visual", "text"),
    "data": ("cache",),
    "sets": ("num_eval_batches", "compute_fid", "fid_num_samples", "diagnostics"),
    "training": ("kimg", "iters", "skip_limit", "compile", "batch_gpu", "tf32", "cudnn_benchmark"),
}


def fit_to_data(config: RunConfig, dataset: TrainingData) -> RunConfig:
    """Return ``config`` with the model's channels and classes taken from the data.

    The latents of an archive bring their normalisation and, unless the run names one, their
    autoencoder. Raises ValueError if the resolution or the latents' shape differs, or if the run
    asks for what the data cannot give.
    """
    if isinstance(dataset, FeatureDataset):
        return with_data_facts(_fit_to_features(config, dataset), 3, 0)
    check_resolution(config, dataset.resolution)
    if isinstance(dataset, LatentDataset):
        config = _fit_to_latents(config, dataset)
    if isinstance(dataset, SetDataset):
        check_classes(config, dataset)
    return with_data_facts(config, dataset.img_channels, dataset.num_classes)


def _fit_to_latents(config: RunConfig, dataset: LatentDataset) -> RunConfig:
    model = config.model
    if dataset.latent_shape != model.input_shape:
        shapes = ["x".join(map(str, shape)) for shape in (model.input_shape, dataset.latent_shape)]
        raise ValueError(
            f"--data: {config.data.data} holds latents of {shapes[1]}, but this run expects "
            f"{shapes[0]} for {model.resolution}x{model.resolution} images; give "
            f"--latent-channels={dataset.latent_shape[0]} and "
            f"--latent-downsampling={dataset.resolution // dataset.latent_shape[1]}, or encode "
            "the images with another --vae."
        )
    if model.vae is None and model.latent_scale not in (None, dataset.scale):
        raise ValueError(
            f"--data: {config.data.data} holds latents of scale {dataset.scale:g}, but preset "
            f"{config.preset} is of latents of scale {model.latent_scale:g}; encode with the "
            f"autoencoder that it is meant for, or give --vae={dataset.vae} to train on these."
        )
    model = dataclasses.replace(
        model,
        vae=model.vae or dataset.vae,
        vae_hash=dataset.vae_hash,
        latent_scale=dataset.scale,
        latent_shift=dataset.shift,
    )
    return dataclasses.replace(config, model=model)


def _fit_to_features(config: RunConfig, dataset: FeatureDataset) -> RunConfig:
    record = dataset.record
    if not dataset.num_images:
        raise ValueError(f"--data: {config.data.data} holds no image to train on.")
    edge = config.model.patch_size * record.vae["downsampling"]
    for bucket in dataset.buckets:
        if bucket.width % edge or bucket.height % edge:
            raise ValueError(
                f"--patch-size: got {config.model.patch_size}, but sides of {bucket.name} are no "
                f"multiples of {edge} pixels; use --patch-size=2."
            )
    model = dataclasses.replace(
        config.model,
        resolution=max(dataset.resolution // edge, 1) * edge,
        latent_channels=record.vae["channels"],
        latent_downsampling=record.vae["downsampling"],
        text_dim=record.text["dim"],
        max_text_tokens=record.text["max_tokens"],
        visual_dim=record.visual["dim"],
        visual_patch_size=record.visual["patch_size"],
        buckets=tuple(bucket.name for bucket in dataset.buckets),
        **{
            f"{name}{suffix}": getattr(record, name)[key]
            for name in ("vae", "visual", "text")
            for suffix, key in (("", "location"), ("_hash", "hash"))
        },
    )
    return dataclasses.replace(config, model=model)


def fit_to_autoencoder(config: RunConfig, autoencoder: Autoencoder) -> RunConfig:
    """Return ``config`` with the normalisation of the autoencoder that encodes its images.

    Raises ValueError if its latents do not have the shape that the model expects.
    """
    model = dataclasses.replace(
        config.model,
        vae=autoencoder.location,
        vae_hash=autoencoder.sha256,
        latent_scale=autoencoder.scale,
        latent_shift=autoencoder.shift,
    )
    check_autoencoder(model, autoencoder)
    return dataclasses.replace(config, model=model)


def with_data_facts(config: RunConfig, img_channels: int, num_classes: int) -> RunConfig:
    """Return ``config`` with the fields of the model that follow from the data and augmentation.

    Raises ValueError for guidance or label dropout without classes, and for noise levels of the
    sampler that the network does not know.
    """
    label_drop = config.training.label_drop
    if label_drop is None:
        label_drop = _DEFAULT_LABEL_DROP if num_classes else 0.0
    if not num_classes and label_drop > 0:
        raise ValueError(
            f"--label-drop: got {label_drop}, but the model is unconditional; "
            "add --cond, or set --label-drop=0."
        )
    training = dataclasses.replace(config.training, label_drop=label_drop)
    config = dataclasses.replace(config, training=training)
    check_guidance(config, num_classes)
    check_guided_channels(config.guidance, config.model)
    precond = make_precond(config.precond)
    if config.features is not None:
        _check_flow(config)
    else:
        sampling_sigmas(config.sampling, precond)  # Raises if the network knows no such levels.
    is_image_model = not isinstance(
        config.model, ScaledLatentConfig | SetDiTConfig | FeatureDiTConfig
    )
    if not is_image_model and config.training.augment.augment > 0:
        what = "sets" if isinstance(config.model, SetDiTConfig) else "latents"
        raise ValueError(
            f"--augment: got {config.training.augment.augment:g}, but {what} cannot be augmented; "
            "set --augment=0 (--hflip mirrors images)."
        )
    model = dataclasses.replace(
        config.model,
        img_channels=img_channels,
        num_classes=num_classes,
        augment_dim=NUM_LABELS if config.training.augment.augment > 0 else 0,
        learned_variance=precond.learned_variance,
    )
    return dataclasses.replace(config, model=model)


def _check_flow(config: RunConfig) -> None:
    """Raise ValueError unless a run on features is one of flow matching, and sampled so."""
    for option, value, wanted in (
        ("--precond", config.precond.precond, "flow"),
        ("--sigma-grid", config.sampling.grid, "time"),
    ):
        if value != wanted:
            raise ValueError(
                f"{option}: got {value}, but preset {config.preset} is one of flow matching; give "
                f"{option}={wanted}."
            )


def describe(config: RunConfig, dataset: TrainingData, desc: str | None) -> str:
    """Return the readable part of a run folder's name."""
    training = config.training
    classes = ["cond" if dataset.num_classes else "uncond"]
    parts = [
        dataset.name,
        *(classes if config.features is None else []),
        config.preset,
        f"ranks{distributed.world_size()}",
        f"batch{training.batch}",
        training.precision,
    ]
    return "-".join(parts + ([desc] if desc else []))


def resume_paths(resume: str) -> tuple[Path, Path | None]:
    """Return ``(run folder, state file or None)`` for ``--resume=RUN_DIR|FILE``."""
    path = Path(resume)
    if path.is_dir():
        return path, None
    if path.is_file():
        return path.parent, path
    raise ValueError(f"--resume: {path} does not exist; give a run folder, a state file, or auto.")


def make_run_dir(outdir: Path, desc: str) -> Path:
    """Return a new folder ``outdir/00000-desc``, one number above the highest there. Collective."""

    def make() -> Path:
        outdir.mkdir(parents=True, exist_ok=True)
        numbers = [int(match.group()) for path in outdir.iterdir() if (match := _number(path))]
        number = max(numbers, default=-1) + 1
        while True:
            run_dir = outdir / f"{number:05d}-{desc}"
            try:
                run_dir.mkdir()
            except FileExistsError:  # Another run that starts now took the number.
                number += 1
                continue
            return run_dir

    return distributed.on_main(make)


def _number(path: Path) -> re.Match | None:
    return re.match(r"\d+", path.name) if path.is_dir() else None


def write_options(run_dir: Path, config: RunConfig, facts: dict[str, Any]) -> None:
    """Write ``training_options.json``: the whole configuration and the facts of this start."""
    with atomic_write(run_dir / "training_options.json", "w", encoding="utf-8") as file:
        json.dump({"config": to_dict(config), **facts}, file, indent=2)


def read_options(run_dir: Path, report: Callable[[str], None]) -> RunConfig:
    """Return the configuration of a run folder; raises ValueError if it has none.

    If ``training_options.json`` is missing or damaged, that is named through ``report`` and the
    configuration in the newest readable training state is used.
    """
    return _read_start(run_dir, report)[0]


def _read_start(
    run_dir: Path, report: Callable[[str], None]
) -> tuple[RunConfig, dict[str, Any] | None]:
    """Return a run's configuration and its origin (see :func:`origin_of`), None if unknown."""
    path = run_dir / "training_options.json"
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        return from_dict(RunConfig, options["config"]), options.get("origin")
    except FileNotFoundError:
        reason = "is missing"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"cannot be read ({error})"
    for state_file in find_states(run_dir):
        try:
            config = from_dict(RunConfig, load_state(state_file)["config"])
        except ValueError:
            continue
        report(f"{path}: {reason}; the configuration in {state_file.name} is used.")
        return config, None
    if reason == "is missing":
        raise ValueError(f"{run_dir}: not a run folder (no training_options.json).")
    raise ValueError(f"{path}: {reason}.")


def stored_origin(run_dir: Path) -> dict[str, Any] | None:
    """Return the origin noted in a run folder, None if unknown."""
    return _read_start(run_dir, lambda text: None)[1]


def origin_of(transfer: Snapshot | None, desc: str | None) -> dict[str, Any]:
    """Return what makes a run another one besides its configuration: first weights, description."""
    return dict(transfer=None if transfer is None else transfer.sha256, desc=desc)


def clear_leftovers(run_dir: Path) -> None:
    """Remove what an earlier process left: its request to be requeued, half-written files."""
    (run_dir / REQUEUE_FILE).unlink(missing_ok=True)
    for name in _RUN_FILES:
        for path in run_dir.glob(f".{name}.*.tmp"):
            path.unlink()


def find_same_run(
    outdir: Path, config: RunConfig, origin: dict[str, Any], report: Callable[[str], None]
) -> Path | None:
    """Return the newest run folder in ``outdir`` that computes the same as ``config``.

    Duration, logging and sampling may differ; they do not change the weights on the way. The
    ``origin`` (see :func:`origin_of`) may not. Folders that cannot be compared are named through
    ``report``.
    """
    if not outdir.is_dir():
        return None
    for path in sorted(outdir.iterdir(), reverse=True):
        if _number(path) and (find_states(path) or (path / "training_options.json").is_file()):
            try:
                other, other_origin = _read_start(path, report)
            except ValueError as error:
                report(f"Skipped: {error}")
                continue
            same = _identity(to_dict(other)) == _identity(to_dict(config))
            if same and other_origin in (None, origin):
                return path
    return None


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the weights on the way, by dotted name."""
    return {
        f"{section}.{name}": value
        for section, values in config.items()
        if isinstance(values, dict) and section not in _SPEED_SECTIONS
        for name, value in values.items()
        if name not in SPEED_SETTINGS.get(section, ())
    }


def load_resume_state(
    run_dir: Path,
    exact: Path | None,
    config: RunConfig,
    data_hash: str,
    report: Callable[[str], None],
) -> dict[str, Any] | None:
    """Return the newest readable training state of a run folder on every rank. Collective.

    A damaged file is named through ``report`` and the one before it is used. ``exact`` asks for
    one particular file, which must be readable. Returns None if the folder has no state yet, which
    means to start from the beginning. Other settings than those of the state, and other data than
    those of ``data_hash``, are reported. Raises ValueError if the state is of another model or
    holds other averages of the weights.
    """

    def load() -> tuple[dict[str, Any] | None]:
        if exact is not None:
            return (load_state(exact),)
        for path in find_states(run_dir):
            try:
                state = load_state(path)
            except ValueError as error:
                report(f"Skipped: {error} Trying the state before it.")
                continue
            report(f"Resuming from {path}")
            return (state,)
        report(f"{run_dir} holds no readable training state: starting from the beginning.")
        return (None,)

    loaded = distributed.on_main_tree(load)[0]
    if loaded is not None:
        check_same_model(to_dict(config), loaded["config"], report)
        if loaded["progress"].get("data_hash", data_hash) != data_hash:
            report(
                "The training data are not those that the run began with (or their files were "
                "copied or touched, if they are a folder): what follows differs from a run that "
                "was never interrupted."
            )
    return loaded


def check_same_model(
    config: dict[str, Any], saved: dict[str, Any], report: Callable[[str], None]
) -> None:
    """Raise ValueError if a saved state is of another model or average; report other changes."""
    own, there = _identity(config), _identity(to_dict(from_dict(RunConfig, saved)))
    changed = [name for name in own if own[name] != there.get(name)]
    listed = {name: f"{name} {there.get(name)} there, {own[name]} here" for name in changed}
    fixed = [n for n in changed if n.startswith(("model.", "precond.")) and n != "model.dropout"]
    if fixed:
        details = "; ".join(listed[name] for name in fixed)
        raise ValueError(f"--resume: the state is of another model ({details}).")
    stds, stds_there = (sorted(settings["training.ema_stds"]) for settings in (own, there))
    if stds != stds_there:
        raise ValueError(
            f"--resume: the state holds the averages of --ema-stds={_show(stds_there)}, not of "
            f"{_show(stds)}, and none can start in the middle of a run; leave --ema-stds as it "
            "was, or start a new run."
        )
    if changed:
        report(f"This continues a run with other settings: {'; '.join(listed.values())}.")


def _show(stds: Sequence[float]) -> str:
    return ",".join(map(str, stds)) or "none"
