"""Snapshots as other programs read them: weights in safetensors, and the rest as JSON beside them.

A folder has ``model.safetensors`` and ``config.json``. Nothing is lost: the network loaded from it
is the snapshot's to the last bit. The same two files make a repository of the Hugging Face hub.
"""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from dnnlib.config import to_dict
from dnnlib.downloads import fetch
from dnnlib.errors import refusal
from dnnlib.files import atomic_write, check_source
from dnnlib.typed import JsonFormat
from metrics.weights import read_safetensors
from training.checkpoint import (
    FORMAT_VERSION,
    DataSummary,
    Snapshot,
    find_snapshots,
    load_snapshot,
    read_header,
    snapshot_of,
)
from training.config import RunConfig
from training.family import restore_run

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_HUB = "hf://"
_LOG_IN = "check the name, and log in with `hf auth login` where that is needed"
_CONFIG_FORMAT = JsonFormat(
    name="setdiffit-weights", version=FORMAT_VERSION, command="export.py", remedy="export it again"
)


def save_portable(snapshot: Snapshot, folder: Path) -> None:
    """Write a snapshot's two files into a folder, each atomically, the configuration last.

    Raises ValueError if the package safetensors is missing.
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        but = "writing it needs the package safetensors, which is not installed"
        raise refusal(folder / WEIGHTS, but=but, remedy="pip install safetensors") from None
    tensors = {name: value.contiguous() for name, value in snapshot.state_dict.items()}
    about = dict(
        format=_CONFIG_FORMAT.name,
        version=_CONFIG_FORMAT.version,
        weights_hash=snapshot.sha256,
        config=to_dict(snapshot.config),
        data=dataclasses.asdict(snapshot.data),
        progress=snapshot.progress,
        packages=snapshot.packages,
    )
    text = json.dumps(about, indent=2)
    with atomic_write(folder / WEIGHTS) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with atomic_write(folder / CONFIG, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def load_portable(location: Path) -> Snapshot:
    """Return the snapshot exported to a folder, given by its path or its ``.safetensors`` file's.

    Raises ValueError for files that are missing or damaged, or that are not of the same export.
    """
    folder, _, about = _read_config(location)
    weights = read_safetensors(folder / WEIGHTS, "It should be an export made by export.py.")
    snapshot = snapshot_of(folder / WEIGHTS, about, weights)
    if snapshot.sha256 != about["weights_hash"]:
        but = f"its weights do not belong to {CONFIG}"
        raise refusal(folder / WEIGHTS, but=but, remedy="export the snapshot again")
    return snapshot


def _read_config(location: Path) -> tuple[Path, RunConfig, dict[str, Any]]:
    """Return the folder of an export, its run, and the content of its ``config.json``."""
    check_source(location)
    folder = location if location.is_dir() else location.parent
    path = folder / CONFIG
    if not path.is_file():
        but = f"there is no {CONFIG} beside it, which export.py writes"
        raise refusal(location, but=but, remedy="keep both files together")

    def make(values: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
        expected = dict(weights_hash=str, data=dict, progress=dict, packages=dict, config=dict)
        for name, kind in expected.items():
            if not isinstance(values.get(name), kind):
                raise ValueError(f"{name} is missing")
        known = {field.name for field in dataclasses.fields(DataSummary)}
        if not values["data"].keys() <= known:
            raise ValueError("data has other fields than those of a dataset")
        return restore_run(values["config"]), values

    return folder, *_CONFIG_FORMAT.parse(path.read_bytes(), path, make)


def find_snapshot(location: str | os.PathLike) -> Path:
    """Return the local snapshot file or export folder that a location names.

    A location is a path, a URL of a snapshot, ``hf://ORG/NAME`` (a repository of the Hugging Face
    hub that export.py pushed, perhaps with ``@REVISION``) or a run folder, which stands for its
    newest snapshot. Raises ValueError if it has no snapshot or cannot be fetched.
    """
    location = os.fspath(location)
    if location.startswith(_HUB):
        return _from_hub(location)
    path = fetch(location) if re.match(r"https?://", location) else Path(location)
    if path.is_dir() and not (path / WEIGHTS).is_file():
        snapshots = find_snapshots(path)
        if not snapshots:
            but = "is a folder without a snapshot"
            raise ValueError(f"{path} {but}; give a snapshot, a run folder or an export.")
        return snapshots[0]
    return path


def open_snapshot(location: str | os.PathLike) -> Snapshot:
    """Return the snapshot that a location names, see :func:`find_snapshot`."""
    path = find_snapshot(location)
    is_portable = path.is_dir() or path.suffix == ".safetensors"
    return load_portable(path) if is_portable else load_snapshot(path)


def open_header(location: str | os.PathLike) -> tuple[RunConfig, dict[str, Any]]:
    """Return a snapshot's configuration and progress, without reading its weights."""
    path = find_snapshot(location)
    if not path.is_dir() and path.suffix != ".safetensors":
        return read_header(path)
    _, config, about = _read_config(path)
    return config, about["progress"]


def split_hub_name(location: str) -> tuple[str, str | None]:
    """Return ORG/NAME and the revision, if any, of ``hf://ORG/NAME@REVISION`` or ``ORG/NAME``.

    Raises ValueError for any other text.
    """
    match = re.fullmatch(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", location)
    if match is None:
        raise refusal(location, but="it is not a repository of the hub", accepted="ORG/NAME")
    return match[1], match[2]


@functools.cache
def _from_hub(location: str) -> Path:
    name, revision = split_hub_name(location)
    hub = import_hub(location)
    try:
        folder = hub.snapshot_download(
            name, revision=revision, allow_patterns=[WEIGHTS, CONFIG], etag_timeout=30
        )
    except Exception as error:  # The package raises those of several others.
        but = f"cannot be fetched from the hub ({_reason(error)})"
        raise refusal(location, but=but, remedy=_LOG_IN) from None
    if not (Path(folder) / WEIGHTS).is_file():
        raise refusal(location, but=f"holds no {WEIGHTS}, which export.py --push uploads")
    return Path(folder)


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload an export to the repository ``ORG/NAME`` of the hub; return the URL of the commit.

    Raises ValueError if the hub refuses it.
    """
    name, revision = split_hub_name(name)
    hub = import_hub("--push")
    try:
        api = hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        files = [WEIGHTS, CONFIG, "README.md", "samples.png"]
        result = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, revision=revision
        )
    except Exception as error:  # The package raises those of several others.
        raise refusal(
            "--push", name, but=f"the hub refused it ({_reason(error)})", remedy=_LOG_IN
        ) from None
    return str(result.commit_url)


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def import_hub(where: str) -> Any:
    """Return the package huggingface_hub; raises ValueError about ``where`` if it is missing."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        but = "this needs the package huggingface_hub, which is not installed"
        raise refusal(where, but=but, remedy="pip install huggingface_hub") from None
    return huggingface_hub
