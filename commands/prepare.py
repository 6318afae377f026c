"""The options --data-dir, --dataset and --prepare of train.py."""

import dataclasses
import re
import shlex
import time
from collections.abc import Collection
from pathlib import Path

from dnnlib import launcher
from dnnlib.errors import refusal
from training.config import RunConfig

_POLL_SEC = 1.0


def with_named_data(
    config: RunConfig, given: Collection[str], data_dir: Path | None, dataset: str | None
) -> RunConfig:
    """Return ``config`` with the data named by ``--data-dir`` and ``--dataset``.

    The path is DATA_DIR/DATASET if that exists and holds no official archive to convert, and
    DATA_DIR/DATASET.zip otherwise. Raises ValueError unless both options are given, without
    ``--data``.
    """
    if data_dir is None or dataset is None or "data" in given:
        raise ValueError("Give --data, or --data-dir and --dataset together.")
    path = data_dir / dataset
    archive = official_archive(data_dir, dataset) if path.is_dir() else None
    if not path.exists() or (archive is not None and archive.is_relative_to(path)):
        path = data_dir / f"{dataset.removesuffix('.zip')}.zip"
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=str(path)))


def official_archive(data_dir: Path, dataset: str) -> Path | None:
    """Return the official archive or folder of a dataset such as ``cifar100``, or None.

    It is ``data_dir`` itself, or lies in it or in its subfolder with the dataset's name.
    """
    from data.convert.sources import unconverted

    # Neither CIFAR-100 for CIFAR-10, nor Fashion-MNIST for MNIST.
    wanted = re.compile(f"(?<![a-z]){_letters(dataset.removesuffix('.zip'))}(?![0-9])")
    for folder in (data_dir, data_dir / dataset.removesuffix(".zip")):
        if not folder.is_dir():
            continue
        inside = sorted(path for path in folder.iterdir() if wanted.search(_letters(path.name)))
        for path in [*inside, folder]:
            fits = wanted.search(_letters(path.name)) and not path.name.endswith(".zip")
            if fits and unconverted(path) is not None:
                return path
    return None


def _letters(name: str) -> str:
    """Return a name in lower case without punctuation, and without CIFAR's ``python``."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).replace("python", "")


def prepare_data(data_dir: Path, dataset: str, path: Path, *, convert: bool) -> None:
    """Convert an official archive in ``data_dir`` to ``path`` if ``path`` does not exist.

    With ``convert``, rank 0 converts the archive and the other ranks wait for ``path``. Without it,
    raises ValueError with the command that converts. Rank 0 does nothing if there is no archive.
    """
    if path.exists():
        return
    if launcher.number("RANK") != 0 and convert:
        _wait_for(path)
        return
    source = official_archive(data_dir, dataset)
    if source is None:
        return
    if not convert:
        command = f"python dataset_tool.py convert --source={shlex.quote(str(source))}"
        but = f"{source} has to be converted first"
        remedy = f"add --prepare, or run {command} --dest={shlex.quote(str(path))}"
        raise refusal("--dataset", but=but, remedy=remedy)
    from data.convert.convert import convert_images
    from data.convert.sources import open_source

    print(f"Converting {source} to {path}.", flush=True)
    convert_images(open_source(str(source)), path)


def _wait_for(path: Path) -> None:
    """Wait until rank 0 has written a file; if it fails, the launcher ends this process."""
    while not path.exists():
        time.sleep(_POLL_SEC)
