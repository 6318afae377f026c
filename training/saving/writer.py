"""Writes states and snapshots of a run in the background, with one saver process per rank."""

import collections
import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.config import to_dict
from dnnlib.saver import lock_path
from torch_utils import distributed
from torch_utils.misc import count_parameters
from torch_utils.saver import Saver
from torch_utils.states import take_apart
from training.checkpoint import (
    DataSummary,
    snapshot_header,
    state_path,
    superfluous_states,
)
from training.config import RunConfig
from training.saving.archive import Archive
from training.saving.state_folder import (
    FORMAT_VERSION,
    STATE_FORMAT,
    part_header,
    part_name,
    sorted_for_part,
)

# Path of a snapshot, its weights one by one, the run as it is sampled, and its progress.
SnapshotParts = tuple[Path, Iterator[tuple[str, Tensor | None]], RunConfig, dict[str, Any]]


class Writer:
    """Copies states and snapshots into memory from which the savers write them.

    Every rank that sees the run folder writes a part of each state. Construction is collective, and
    raises ValueError if the run is sharded and a rank does not see the run folder.

    Args:
        is_sharded: Whether each rank holds some rows of each tensor, so that snapshots are
            gathered.
    """

    def __init__(
        self,
        saver: Saver,
        run_dir: Path,
        config: RunConfig,
        data: DataSummary,
        *,
        keep_states: int,
        is_sharded: bool,
    ) -> None:
        self._saver, self._run_dir, self._config, self._data = saver, run_dir, config, data
        self._keep, self._is_sharded = keep_states, is_sharded
        self._rank = distributed.rank()
        seeing = _who_sees(run_dir)
        if is_sharded and len(seeing) < distributed.world_size():
            missing = sorted(set(range(distributed.world_size())) - set(seeing))
            raise ValueError(
                f"{run_dir}: ranks {', '.join(map(str, missing))} do not see it, but each writes "
                "its part of a state; give an --outdir that all nodes share."
            )
        # These ranks write what every rank holds whole; in sharded runs that is little.
        self._writers = (0,) if is_sharded else seeing
        if self._rank in seeing:
            saver.hold(lock_path(run_dir, self._rank))

    def reserve(self, like: Any, network: nn.Module, device: torch.device) -> None:
        """Reserve memory for states whose tensors are as large as ``like``'s, and for snapshots."""
        _, own, _ = take_apart(like, self._writers, self._rank)
        # Each tensor begins at a multiple of 64 bytes.
        num_bytes = sum(tensor.nbytes + 64 for tensor in own.values())
        if self._rank == 0:
            # Bytes per parameter: the gathered float32 average of a sharded run, float16 profiles.
            width = 4 * self._is_sharded + 2 * len(self._config.training.ema_stds)
            num_bytes += width * count_parameters(network)
        self._saver.reserve(num_bytes, is_pinned=device.type == "cuda")

    def write(
        self,
        state: dict[str, Any] | None,
        snapshots: Iterable[SnapshotParts],
        cur_nimg: int,
        *,
        is_urgent: Callable[[], bool],
        alone: bool = False,
        of_stop: bool = False,
    ) -> float:
        """Copy a state and snapshots for the savers; return the seconds spent waiting before that.

        The wait is for the previous ones to be written. Once ``is_urgent()`` is true it ends, and
        the copy takes more memory. Collective, unless ``alone``: then rank 0 writes everything,
        because other ranks may have stopped, and ``state`` has to be whole. ``of_stop`` marks a
        state that is written only because the run stops.
        """
        if alone and self._rank:
            return 0.0
        together = contextlib.nullcontext if alone else distributed.together
        writers = (0,) if alone else self._writers
        path, token = state_path(self._run_dir, cur_nimg), secrets.token_hex(8)
        if not alone:
            token = distributed.broadcast_object(token)
        folder = path.with_name(f".{path.name}.{token}.tmp")
        part = (part_name(self._rank), {})
        with together():
            waited = self._saver.begin(is_urgent)
            if state is not None:
                # The state comes first: snapshots then share its copies of their tensors.
                tree, own, first_rows = take_apart(state, writers, self._rank)
                own, part = sorted_for_part(own), (part_name(self._rank), first_rows)
                regions = [self._saver.stage(part_header(own))]
                regions += [self._saver.stage(tensor, keep=True) for tensor in own.values()]
            for snapshot in snapshots:
                self._write_snapshot(*snapshot)
            if part[1]:
                self._saver.write_file(folder / part[0], regions)
        if state is None:
            return waited
        # The manifest is ordered only once every rank has copied its part.
        parts = [part] if alone else distributed.gather_objects(part)
        if self._rank == 0:
            header = dict(format=STATE_FORMAT, version=FORMAT_VERSION)
            content = dict(header, config=to_dict(self._config), tree=tree)
            written = [part for part in parts if part[1]]
            if of_stop:
                content["of_stop"] = True
            old = superfluous_states(self._run_dir, path, self._keep, of_stop=of_stop)
            self._saver.write_manifest(folder, path, content, written, old)
        return waited

    def check(self) -> None:
        """Raise OSError if something could not be written."""
        self._saver.check()

    def finish(self) -> None:
        """Wait until this rank's files are written and, on rank 0, every state is complete."""
        self._saver.wait()

    def _write_snapshot(
        self,
        path: Path,
        weights: Iterator[tuple[str, Tensor | None]],
        config: RunConfig,
        progress: dict[str, Any],
    ) -> None:
        if self._rank == 0:
            archive = Archive(self._saver.stage)
            ema = {name: archive.add(tensor) for name, tensor in weights}
            header = snapshot_header(config, self._data, progress)
            self._saver.write_archive(path, archive.members(dict(header, ema=ema)))
        elif self._is_sharded:
            collections.deque(weights, maxlen=0)  # Gathering them on rank 0 is collective.


def _who_sees(run_dir: Path) -> tuple[int, ...]:
    """Return the ranks that see the run folder, which rank 0 made. Collective."""
    found = distributed.gather_objects(run_dir.is_dir())
    return tuple(rank for rank, sees in enumerate(found) if sees)
