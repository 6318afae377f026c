"""A model of training steps on this host, fitted to 1, 2 and 4 processes."""

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
    """The median time of an optimizer step on ``num`` processes with ``rows`` each."""

    num: int
    shard: str
    rows: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class SumTime:
    """The median time of a sum of ``num_bytes`` over ``num`` processes."""

    num: int
    num_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured on a host, and what was predicted before the last of it was.

    Attributes:
        hardware: CPU, cores and versions.
        command: The options of the measured run.
        weight_bytes: Of the measured network.
        parts: Number of parts that are gathered by themselves.
        predicted: Seconds by ``shard``, on eight processes, as written down before.
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
        """Return what was measured on ``num`` processes."""
        return [time for time in self.steps if (time.num, time.shard) == (num, shard)]


def read_measured(path: Path = HOST_FILE) -> Measured | None:
    """Return what a file holds of a host; None if there is no file."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    values["sums"] = tuple(SumTime(**row) for row in values["sums"])
    values["steps"] = tuple(StepTime(**row) for row in values["steps"])
    return Measured(**values)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The constants of a host.

    A step of n processes with b rows each, on c cores, takes ``share(n) (fixed + b row) + sums``,
    where ``share(n) = slowdown max(1, n/c) (1 + crowding (n/c - 1))``. Nothing hides the sums,
    because what sends and adds them is the same cores.

    Attributes:
        fixed, row: Seconds of a step on one process, and of each of its rows.
        slowdown: Of each process where all cores are busy.
        crowding: What each process beyond the cores adds, relative to its own time.
        byte: Seconds for each byte that a process sends.
        message: Seconds for each message.
        gathering: Seconds that a step of a sharded network takes besides.
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
        """Return how much longer the passes of ``num`` processes take than those of one."""
        if num == 1:
            return 1.0
        over = max(num / self.num_cores - 1, 0.0)
        return self.slowdown * (1 + over) * (1 + self.crowding * over)

    def passes(self, num: int, rows: int) -> float:
        """Return what passes and update take, without communication."""
        return self.share(num) * (self.fixed + rows * self.row)

    def traffic(self, num: int, num_bytes: float, num_messages: float) -> float:
        """Return what it takes that each of ``num`` processes sends so much, on shared cores."""
        turns = max(num / self.num_cores, 1.0)
        return turns * (num_bytes * self.byte + num_messages * self.message)

    def sum(self, num: int, num_bytes: float) -> float:
        """Return the seconds of a sum over processes, by a ring."""
        return self.traffic(num, 2 * (num - 1) / num * num_bytes, 2 * (num - 1))

    def step(self, measured: Measured, num: int, rows: int, shard: str) -> float:
        """Return the seconds of an optimizer step on ``num`` processes."""
        passes, size = self.passes(num, rows), measured.weight_bytes
        if shard == "none":
            return passes + self.sum(num, size)
        # Two gathers and a scatter of each part.
        messages = 3 * (num - 1) * measured.parts
        gathered = self.traffic(num, 3 * (num - 1) / num * size, messages)
        return passes + self.share(num) * self.gathering + gathered


def fit(measured: Measured) -> Fit:
    """Return the constants by what was measured at 1, 2 and 4 processes.

    Sums: least squares over sizes, relative. Fixed and row: a line through the batches of one
    process. The others have an equation each: slowdown at 2, crowding at 4, gathering at 2.
    """
    num_cores = measured.num_cores
    byte, message = _fit_sums([time for time in measured.sums if time.num in FITTED], num_cores)
    alone = measured.of(1, "none")
    row, fixed = np.polyfit([t.rows for t in alone], [t.seconds for t in alone], 1).tolist()
    found = Fit(num_cores, fixed, row, 1.0, 0.0, byte, message, 0.0)

    def excess(num: int) -> float:
        """Return how much longer steps take than the constants so far explain."""
        ratios = []
        for time in measured.of(num, "none"):
            own = time.seconds - found.sum(num, measured.weight_bytes)
            ratios.append(own / found.passes(num, time.rows))
        return statistics.mean(ratios)

    found = dataclasses.replace(found, slowdown=excess(2))
    over = max(4 / num_cores - 1, 0.0)
    # Others that use the cores meanwhile can make it look negative, which no larger number bears.
    crowding = max((excess(4) - 1) / over, 0.0) if over else 0.0
    found = dataclasses.replace(found, crowding=crowding)
    rest = [t.seconds - found.step(measured, 2, t.rows, "full") for t in measured.of(2, "full")]
    return dataclasses.replace(found, gathering=statistics.mean(rest) / found.share(2))


def _fit_sums(times: Sequence[SumTime], num_cores: int) -> tuple[float, float]:
    """Return seconds for each byte and for each message; errors count relative to the time."""
    rows = []
    for time in times:
        turns = max(time.num / num_cores, 1.0)
        sent = 2 * (time.num - 1) / time.num * time.num_bytes
        row = np.array([sent, 2 * (time.num - 1)]) * turns
        rows.append(row / time.seconds)
    found, *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return tuple(found.tolist())
