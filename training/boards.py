"""Boards that show a run's curves and pictures: TensorBoard, Weights & Biases, trackio."""

import abc
import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dnnlib.config import Config, to_dict
from training.config import LoggingConfig

_WANDB_TIMEOUT_SEC = 30.0


class Board(Protocol):
    """Where numbers and pictures of one run are shown; the x-axis is the number of images."""

    name: str

    def scalars(self, values: Mapping[str, float], cur_nimg: int) -> None:
        """Show numbers by name."""

    def picture(self, name: str, path: Path, cur_nimg: int) -> None:
        """Show the picture in a file."""

    def close(self) -> None:
        """Send what is left."""


def open_board(
    name: str, run_dir: Path, logging: LoggingConfig, config: Config, cur_nimg: int
) -> Board:
    """Return a board for a run that begins, or continues, at ``cur_nimg`` images.

    Raises ValueError if its package is missing, and whatever the package raises.
    """
    if name == "tensorboard":
        return _TensorBoard(run_dir, cur_nimg)
    kind = dict(wandb=_WandB, trackio=_Trackio)[name]
    return kind(run_dir, logging.wandb_project, to_dict(config))


def import_board(name: str) -> Any:
    """Return the module of a board; raises ValueError with the install command if it is missing."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        remedy = f"pip install {name} (or leave {name} out)"
        raise ValueError(f"--board={name} needs the package {name}: {remedy}.") from error


def problem_with(name: str, error: Exception) -> str:
    """Return a sentence about a board that failed, and what to do about it."""
    what = {"wandb": "Weights & Biases"}.get(name, name)
    remedy = ""
    if name == "wandb":
        remedy = (
            " Log in with `wandb login`, or set WANDB_MODE=offline to keep the curves in the run "
            "folder."
        )
    return (
        f"{what} cannot be used ({str(error).rstrip('.')}): training continues without it.{remedy}"
    )


def _run_id(run_dir: Path) -> str:
    """Return an id that the run in a folder keeps when it continues, and that no other run has."""
    path_hash = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    return f"{run_dir.name[:5]}-{path_hash}"


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, run_dir: Path, cur_nimg: int) -> None:
        # TensorBoard hides what a killed run wrote at purge_step and later.
        module = import_board(self.name)
        self._writer = module.SummaryWriter(run_dir, purge_step=cur_nimg + 1)

    def scalars(self, values: Mapping[str, float], cur_nimg: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=cur_nimg)
        self._writer.flush()

    def picture(self, name: str, path: Path, cur_nimg: int) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as image:
            width, height = image.size
        # The file is handed on as it is; the writer's own method would decode and re-encode it.
        shown = Summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes()
        )
        summary = Summary(value=[Summary.Value(tag=name, image=shown)])
        self._writer.file_writer.add_summary(summary, cur_nimg)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Service(abc.ABC):
    """A board whose package ``name`` takes numbers and pictures in one call."""

    name: str

    def __init__(self) -> None:
        self._module = import_board(self.name)

    @abc.abstractmethod
    def _log(self, values: Mapping[str, Any], cur_nimg: int) -> None:
        """Log everything that is shown for one point of training."""

    def scalars(self, values: Mapping[str, Any], cur_nimg: int) -> None:
        self._log({**values, "images": cur_nimg, "kimg": cur_nimg / 1000}, cur_nimg)

    def picture(self, name: str, path: Path, cur_nimg: int) -> None:
        self.scalars({name: self._module.Image(str(path))}, cur_nimg)


class _WandB(_Service):
    name = "wandb"

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        super().__init__()
        # The folder identifies the run, so that a resumed run continues its own record.
        self._run = self._module.init(
            settings=self._module.Settings(init_timeout=_WANDB_TIMEOUT_SEC),
            project=project,
            id=_run_id(run_dir),
            name=run_dir.name,
            dir=run_dir,
            config=config,
            resume="allow",
        )
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def _log(self, values: Mapping[str, Any], cur_nimg: int) -> None:
        self._run.log(values)

    def close(self) -> None:
        self._run.finish()


class _Trackio(_Service):
    name = "trackio"

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        super().__init__()
        name = f"{run_dir.name}-{_run_id(run_dir)[-8:]}"
        self._module.init(project=project, name=name, config=config, resume="allow")

    def _log(self, values: Mapping[str, Any], cur_nimg: int) -> None:
        self._module.log(values, step=cur_nimg)

    def close(self) -> None:
        self._module.finish()
