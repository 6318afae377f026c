"""Snapshots to sample from and training states to resume from: data only, written atomically.

Snapshots, and states of older versions, are ``torch.save`` archives of plain containers and
tensors, read with ``torch.load(weights_only=True)``. States are folders now: see
:mod:`training.saving.state_folder`. Nothing in a file is ever executed. docs/formats.md describes
all layouts.
"""

import contextlib
import dataclasses
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib.config import Config, to_dict
from dnnlib.files import atomic_write, check_source
from models import build_network
from models.network import Network
from torch_utils.fingerprints import package_versions, weights_hash
from training.config import RunConfig, std_name
from training.family import TrainingData, restore_run
from training.saving import state_folder
from training.saving.state_folder import (
    FORMAT_VERSION,
    STATE_FORMAT,
    check_readable,
    check_version,
    is_of_stop,
    is_state_folder,
)

_SNAPSHOT_FORMAT = "setdiffit-snapshot"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What sampling and scoring need to know about the training data."""

    name: str
    resolution: int
    img_channels: int
    num_images: int
    content_hash: str
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    # For stored features: buckets, statistics, and their location.
    features: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A trained network with everything that is needed to sample from it and to score it.

    ``sha256`` is the hash of the weights in ``state_dict``, none of which are float16.
    """

    path: Path
    sha256: str
    config: RunConfig
    data: DataSummary
    progress: dict[str, Any]
    packages: dict[str, str]
    state_dict: dict[str, Tensor]

    @property
    def trained_nimg(self) -> int:
        """Number of images that the weights were trained on; 0 in old imports that do not say."""
        return self.progress.get("cur_nimg", 0)

    def build(self, device: torch.device | str = "cpu") -> Network:
        """Return the network with the averaged weights, in evaluation mode, on ``device``.

        Raises ValueError if they do not fit the network of the configuration.
        """
        network = build_network(self.config.model)
        try:
            network.load_state_dict(self.state_dict)
        except RuntimeError as error:
            raise ValueError(f"{self.path}: weights and configuration disagree: {error}") from error
        return network.eval().requires_grad_(False).to(device)


_COUNT = r"(\d+)(?:\.(\d+))?"  # Kimg in file names; below 1 kimg, the images after a point.


def remove_pictures(run_dir: Path, cur_nimg: int) -> None:
    """Delete pictures of an earlier snapshot that has the same name as the one to be written."""
    count = count_name(cur_nimg)
    for path in (pictures_path(run_dir, cur_nimg), *run_dir.glob(f"conditioning-{count}.*")):
        path.unlink(missing_ok=True)


def count_name(cur_nimg: int, digits: int = 6) -> str:
    """Return how file names state ``cur_nimg`` images: whole kimg, with three decimals below 1."""
    images = f".{cur_nimg:03d}" if 0 < cur_nimg < 1000 else ""
    return f"{cur_nimg // 1000:0{digits}d}{images}"


def snapshot_path(run_dir: Path, cur_nimg: int) -> Path:
    """Return the path of the snapshot after ``cur_nimg`` training images."""
    return run_dir / f"network-snapshot-{count_name(cur_nimg)}.pkl"


def pictures_path(run_dir: Path, cur_nimg: int) -> Path:
    """Return the path of the picture of samples after ``cur_nimg`` training images."""
    return run_dir / f"fakes-{count_name(cur_nimg)}.png"


def profile_path(run_dir: Path, cur_nimg: int, std: float) -> Path:
    """Return the path of the compact snapshot of the profile ``std`` after ``cur_nimg`` images."""
    return run_dir / f"network-snapshot-{count_name(cur_nimg, 7)}-{std_name(std)}.pkl"


def state_path(run_dir: Path, cur_nimg: int) -> Path:
    """Return the folder of the training state after ``cur_nimg`` training images."""
    return run_dir / f"training-state-{count_name(cur_nimg)}"


def is_state_after(path: Path, cur_nimg: int) -> bool:
    """Return whether a file or folder is the training state after ``cur_nimg`` images."""
    return path.name.removesuffix(".pt") == state_path(path, cur_nimg).name


def snapshot_header(config: Config, data: DataSummary, progress: dict[str, Any]) -> dict[str, Any]:
    """Return what a snapshot holds besides its weights, which are under ``ema``."""
    return dict(
        format=_SNAPSHOT_FORMAT,
        version=FORMAT_VERSION,
        config=to_dict(config),
        data=dataclasses.asdict(data),
        progress=progress,
        packages=package_versions(),
    )


def save_weights(
    path: Path,
    state_dict: Mapping[str, Tensor],
    config: RunConfig,
    data: DataSummary,
    progress: dict[str, Any],
    packages: Mapping[str, str] | None = None,
) -> None:
    """Write the averaged weights of a network and their description to ``path``, atomically.

    ``packages`` are the versions that trained them, by default those of this process.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    header = snapshot_header(config, data, progress)
    if packages is not None:
        header["packages"] = dict(packages)
    with atomic_write(path) as file:
        torch.save(dict(header, ema=weights), file)


def load_snapshot(path: str | os.PathLike) -> Snapshot:
    """Return the snapshot in a file; raises ValueError with a sentence for anything else."""
    path = Path(path)
    with _snapshot_of(path) as payload:
        return snapshot_of(path, payload, payload["ema"])


def snapshot_problems(paths: Iterable[Path]) -> dict[Path, str]:
    """Return an error message for each of ``paths`` that cannot be read as a snapshot."""
    found = {}
    for path in paths:
        try:
            load_snapshot(path)
        except ValueError as error:
            found[path] = str(error)
    return found


def snapshot_of(path: Path, about: Mapping[str, Any], weights: dict[str, Tensor]) -> Snapshot:
    """Return the snapshot of some weights, with the description that a file holds ``about`` them.

    Weights in float16 become float32. Raises KeyError, TypeError or ValueError for a description
    that is not of this version.
    """
    data = {k: tuple(v) if isinstance(v, list) else v for k, v in about["data"].items()}
    # Networks hold float32 weights; float16 is only how compact snapshots store them.
    weights = {k: v.float() if v.dtype == torch.float16 else v for k, v in weights.items()}
    return Snapshot(
        path=path,
        sha256=weights_hash(weights),
        config=restore_run(about["config"]),
        data=DataSummary(**data),
        progress=about["progress"],
        packages=about["packages"],
        state_dict=weights,
    )


def read_header(path: str | os.PathLike) -> tuple[RunConfig, dict[str, Any]]:
    """Return a snapshot's configuration and progress, without reading its weights.

    Raises ValueError as :func:`load_snapshot` does.
    """
    with _snapshot_of(Path(path), header_only=True) as payload:
        return restore_run(payload["config"]), dict(payload["progress"])


@contextlib.contextmanager
def _snapshot_of(path: Path, *, header_only: bool = False) -> Iterator[dict[str, Any]]:
    """Yield what a snapshot holds; what the block finds wrong with it becomes a ValueError."""
    payload = _load(path, _SNAPSHOT_FORMAT, "a snapshot", header_only=header_only)
    try:
        yield payload
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a snapshot that this version can read: {error}") from error


def load_state(path: str | os.PathLike, *, lazily: bool = False) -> dict[str, Any]:
    """Return the training state at a path; raises ValueError with a sentence for anything else.

    With ``lazily`` its tensors stay in their files until they are used, and those of a folder are
    :class:`~torch_utils.states.Pieces`.
    """
    path = Path(path)
    if path.is_dir():
        return state_folder.load(path, lazily=lazily)
    return _load(path, STATE_FORMAT, "a training state", mmap=lazily)


def find_states(run_dir: Path) -> list[Path]:
    """Return the training states of a run folder, newest first."""
    found = _newest_first(run_dir, rf"training-state-{_COUNT}(?:\.pt)?")
    return [path for path in found if path.suffix == ".pt" or is_state_folder(path)]


def find_snapshots(run_dir: Path) -> list[Path]:
    """Return the snapshots of a run folder that hold the average of --ema-kimg, newest first."""
    return _newest_first(run_dir, rf"network-snapshot-{_COUNT}\.pkl")


def find_profiles(run_dir: Path) -> list[Path]:
    """Return the compact snapshots of a run folder (those of --ema-stds), newest first."""
    return _newest_first(run_dir, rf"network-snapshot-{_COUNT}-0\.\d{{3}}\.pkl")


def _newest_first(run_dir: Path, pattern: str) -> list[Path]:
    found = [path for path in run_dir.glob("*") if re.fullmatch(pattern, path.name)]
    return sorted(found, key=lambda path: (_count_of(path), path.name), reverse=True)


def _count_of(path: Path) -> tuple[int, int]:
    """Return the kimg and the images that the name of a state or snapshot states."""
    kimg, images = re.match(rf"[a-z-]+-{_COUNT}", path.name).groups(default="0")
    return int(kimg), int(images)


def superfluous_states(
    run_dir: Path, latest: Path, keep: int, *, later_ones: bool = True, of_stop: bool = False
) -> list[Path]:
    """Return all training states of a run folder but ``latest`` and the ``keep - 1`` before it.

    ``latest`` need not exist yet. States of a stop (:func:`is_of_stop`) do not count: if ``latest``
    is one, as ``of_stop`` says, ``keep`` others stay before it. States after ``latest`` are
    damaged, or were left behind when the run went back to an earlier one; they are not returned
    without ``later_ones``.
    """
    others = [path for path in find_states(run_dir) if path.name != latest.name]
    before = [path for path in others if _count_of(path) < _count_of(latest)]
    kept = [path for path in before if not is_of_stop(path)][: keep if of_stop else keep - 1]
    if not later_ones:
        kept += [path for path in others if _count_of(path) > _count_of(latest)]
    return [path for path in others if path not in kept]


def summarise(data: TrainingData) -> DataSummary:
    """Return what a snapshot keeps of its training data."""
    return DataSummary(
        name=data.name,
        resolution=data.resolution,
        img_channels=data.img_channels,
        num_images=data.num_images,
        content_hash=data.content_hash,
        class_names=tuple(data.class_names) if data.num_classes else (),
        class_counts=tuple(data.class_counts) if data.num_classes else (),
        features=data.summary(),
    )


def _load(
    path: Path, expected: str, what: str, *, header_only: bool = False, mmap: bool = False
) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not {what}; give a file in it.")
    check_source(path, folder=False)
    try:
        # PyTorch itself does not verify the checksums of an archive, takes an entry with external
        # attributes for an empty folder, and never compresses.
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if not any(part.filename.endswith("/data.pkl") for part in parts):
                raise ValueError(f"{path}: is a zip of other files, not {what}.")
            strange = [part.filename for part in parts if part.external_attr or part.compress_type]
            if strange:
                stored = f"{strange[0]} is stored otherwise"
                raise ValueError(f"{path}: not {what}, or damaged ({stored}).")
            damaged = _test_header(archive) if header_only else archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path}: damaged (checksum of {damaged} does not match).")
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=header_only or mmap)
    except zipfile.BadZipFile as error:
        if _is_bare_pickle(path):
            raise ValueError(
                f"{path}: refused, because it is a pickle that could execute code when read. Only "
                "files written by this project's train.py or import tools are loaded."
            ) from error
        raise ValueError(f"{path}: not {what}, or cut off ({error}).") from error
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|class|function) (\S+\.\S+)", str(error))
        reason = f"execute code ({name.group(1)})" if name else "need more than plain data"
        raise ValueError(
            f"{path}: refused, because reading it would {reason}. Only tensors and plain values "
            "are loaded."
        ) from error
    except (RuntimeError, EOFError, OSError, UnicodeDecodeError) as error:
        check_readable(path, error)
        reason = str(error).partition("\n")[0].partition(" (Could this")[0]
        raise ValueError(f"{path}: not {what}, or damaged ({reason}).") from error
    if not isinstance(payload, dict) or payload.get("format") != expected:
        raise ValueError(f"{path}: not {what} of this project.")
    check_version(path, payload.get("version"))
    return payload


def _test_header(archive: zipfile.ZipFile) -> str | None:
    """Return the first damaged entry among those that hold no tensor, or None."""
    for name in archive.namelist():
        try:
            if Path(name).parent.name != "data":
                archive.read(name)
        except zipfile.BadZipFile:
            return name
    return None


def _is_bare_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(2)
    # Protocols from 2 on begin with their number, older ones with an opcode of the first object.
    newer = len(start) == 2 and start[0] == 0x80 and start[1] <= pickle.HIGHEST_PROTOCOL
    return newer or start[:1] in (b"(", b"c", b"]", b"}")
