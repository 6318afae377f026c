"""The averages of a run's weights that a sweep compares."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from dnnlib.errors import refusal
from training.checkpoint import Snapshot, count_name, load_snapshot, read_header
from training.config import std_name
from training.posthoc_ema import POOR_FIT, Profile, make_averages, read_profiles

_MAX_AT_ONCE = 4  # Averages in memory at a time.


@dataclasses.dataclass(frozen=True)
class Networks:
    """One snapshot, or averages of a run's weights with several relative stds.

    Attributes:
        snapshot: The given snapshot, or the newest of the run.
        profiles: Compact snapshots from which averages are made; empty for the snapshot alone.
    """

    snapshot: Snapshot
    profiles: Sequence[Profile] = ()

    @property
    def identity(self) -> str:
        """Hexadecimal identity of the weights, or of the profiles that averages are made from."""
        if not self.profiles:
            return self.snapshot.sha256
        last = load_snapshot(self.profiles[-1].path).sha256
        content = json.dumps([[own.cur_nimg, own.std] for own in self.profiles])
        return hashlib.sha256(f"{last} {content}".encode()).hexdigest()

    def path(self, std: float | None, folder: Path) -> Path:
        """Return the path of the average with relative std ``std`` in a folder of averages.

        For None, it is the path of the snapshot.
        """
        if std is None:
            return self.snapshot.path
        count = count_name(self.profiles[-1].cur_nimg, 7)
        return folder / f"network-snapshot-{count}-{std_name(std)}-posthoc.pkl"

    def make(self, stds: Sequence[float], folder: Path) -> list[str]:
        """Write the averages that do not exist yet; return warnings about poorly fitted ones."""
        missing = [std for std in stds if not self.path(std, folder).is_file()]
        for start in range(0, len(missing), _MAX_AT_ONCE):
            list(make_averages(self.profiles, missing[start : start + _MAX_AT_ONCE], folder))
        warnings = []
        for std in stds:
            error = read_header(self.path(std, folder))[1]["posthoc"]["error"]
            if error > POOR_FIT:
                warnings.append(
                    f"no combination of the run's snapshots is close to --ema-std={std:g} (error "
                    f"{error:.0%}); those of more ticks or of nearer stds would be"
                )
        return warnings


def open_networks(location: str, snapshot: Snapshot, stds: Sequence[float]) -> Networks:
    """Return the networks at ``location``. Raises ValueError if averages cannot be made from it."""
    if not stds:
        return Networks(snapshot)
    if not Path(location).is_dir():
        remedy = "name the folder of the run with --network"
        but = f"averages are made from a run's compact snapshots, and {location} is not a folder"
        raise refusal("--ema-std", but=but, remedy=remedy)
    profiles = read_profiles(Path(location))
    if len(profiles) < 2:
        but = f"{location} holds {len(profiles)} compact snapshots, but two are needed"
        remedy = "train with --ema-stds=0.05,0.10 and a smaller --snap"
        raise refusal("--ema-std", but=but, remedy=remedy)
    return Networks(snapshot, profiles)
