"""A model of training steps on this host, fitted to measurements of 1, 2 and 4 processes."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HOST_FILE = Path(__file__).with_name("host.json")
FITTED = (1, 2, 4)
PREDICTED = 8


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The median seconds of an optimizer step on ``num`` processes with ``rows`` rows each."""

    num: int
    shard: str
    rows: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class SumTime:
    """The median seconds of an all-reduce of ``num_bytes`` over ``num`` processes."""

    num: int
    num_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of a host, and a prediction recorded before the last of them.

    Attributes:
        hardware: CPU and PyTorch version.
        command: Options of the measured run.
        weight_bytes: Size of the measured network's weights.
        parts: Number of parts that are gathered separately if the network is sharded.
        predicted: Predicted seconds of a step on eight processes, by ``shard``.
    """

    hardware: str
    num_cores: int
    command: str
    weight_bytes: int
    parts: int
    sums: tuple[SumTime, ...]
    steps: tuple[StepTime, ...]
    predicted: dict[str, float]

    def of(self, num: int, shard: str) -> list[StepTime]:
        """Return the step times of ``num`` processes and a ``shard`` mode."""
        return [time for time in self.steps if (time.num, time.shard) == (num, shard)]


def read_measured(path: Path = HOST_FILE) -> Measured | None:
    """Return the measurements stored in a file; None if it does not exist."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    values["sums"] = tuple(SumTime(**row) for row in values["sums"])
    values["steps"] = tuple(StepTime(**row) for row in values["steps"])
    return Measured(**values)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The fitted constants of a host.

    A step of n processes with b rows each, on c cores, takes ``share(n) (fixed + b row) + sums``.
    On several processes, ``share(n) = slowdown max(1, n/c) (1 + crowding max(0, n/c - 1))``; on one
    it is 1. Nothing hides the sums, because the cores that compute also send and add them.

    Attributes:
        fixed, row: Seconds of a step on one process without rows, and of each row.
        slowdown: Factor by which a process is slower if others keep all cores busy.
        crowding: Further relative slowdown, per unit by which n/c exceeds 1.
        byte: Seconds for each byte that a process sends.
        message: Seconds for each message.
        gathering: Additional seconds of a step of a sharded network.
    """

    num_cores: int
    fixed: float
    row: float
    slowdown: float
    crowding: float
    byte: float
    message: float
    gathering: float

    def share(self, num: int) -> float:
        """Return the time of a pass on ``num`` processes, relative to one process."""
        if num == 1:
            return 1.0
        over = max(num / self.num_cores - 1, 0.0)
        return self.slowdown * (1 + over) * (1 + self.crowding * over)

    def passes(self, num: int, rows: int) -> float:
        """Return the seconds of the passes and the update, without communication."""
        return self.share(num) * (self.fixed + rows * self.row)

    def traffic(self, num: int, num_bytes: float, num_messages: float) -> float:
        """Return the seconds for each of ``num`` processes to send these bytes and messages."""
        turns = max(num / self.num_cores, 1.0)
        return turns * (num_bytes * self.byte + num_messages * self.message)

    def sum(self, num: int, num_bytes: float) -> float:
        """Return the seconds of a ring all-reduce of ``num_bytes`` over ``num`` processes."""
        return self.traffic(num, 2 * (num - 1) / num * num_bytes, 2 * (num - 1))

    def step(self, measured: Measured, num: int, rows: int, shard: str) -> float:
        """Return the seconds of an optimizer step on ``num`` processes with ``rows`` rows each."""
        passes, size = self.passes(num, rows), measured.weight_bytes
        if shard == "none":
            return passes + self.sum(num, size)
        # Each part is gathered twice and reduce-scattered once.
        messages = 3 * (num - 1) * measured.parts
        gathered = self.traffic(num, 3 * (num - 1) / num * size, messages)
        return passes + self.share(num) * self.gathering + gathered


def fit(measured: Measured) -> Fit:
    """Return the constants that fit the measurements of 1, 2 and 4 processes.

    ``byte`` and ``message`` minimise the squared relative errors of the sums. ``fixed`` and ``row``
    are a line through the batches of one process. The others solve one equation each: slowdown and
    gathering with 2 processes, crowding with 4.
    """
    num_cores = measured.num_cores
    byte, message = _fit_sums([time for time in measured.sums if time.num in FITTED], num_cores)
    alone = measured.of(1, "none")
    row, fixed = np.polyfit([t.rows for t in alone], [t.seconds for t in alone], 1).tolist()
    found = Fit(num_cores, fixed, row, 1.0, 0.0, byte, message, 0.0)

    def excess(num: int) -> float:
        """Return the mean ratio of the measured passes to those of the constants so far."""
        ratios = []
        for time in measured.of(num, "none"):
            own = time.seconds - found.sum(num, measured.weight_bytes)
            ratios.append(own / found.passes(num, time.rows))
        return statistics.mean(ratios)

    found = dataclasses.replace(found, slowdown=excess(2))
    over = max(4 / num_cores - 1, 0.0)
    # Other programs on the cores can make the estimate negative, which would extrapolate badly.
    crowding = max((excess(4) - 1) / over, 0.0) if over else 0.0
    found = dataclasses.replace(found, crowding=crowding)
    rest = [t.seconds - found.step(measured, 2, t.rows, "full") for t in measured.of(2, "full")]
    return dataclasses.replace(found, gathering=statistics.mean(rest) / found.share(2))


def _fit_sums(times: Sequence[SumTime], num_cores: int) -> tuple[float, float]:
    """Return the seconds per byte and per message, by least squares of relative errors."""
    rows = []
    for time in times:
        turns = max(time.num / num_cores, 1.0)
        sent = 2 * (time.num - 1) / time.num * time.num_bytes
        row = np.array([sent, 2 * (time.num - 1)]) * turns
        rows.append(row / time.seconds)
    found, *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return tuple(found.tolist())
