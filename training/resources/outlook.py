"""Predicted and actual memory, disk space, images per second and duration of a run."""

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib.files import file_sizes, write_json
from dnnlib.text import format_count, format_kimg, format_time
from dnnlib.typed import typed
from training.config import RunConfig
from training.resources.memory import CUDA_CONTEXT, count_snapshots, count_ticks, predict_disk
from training.resources.memory_process import MemoryProcess
from training.run_report.files import PREDICTION_FILE, STATS_FILE
from training.run_report.history import History
from training.run_report.rows import read_object

# Memory is predicted only if at least this is left of a run, as that takes a processor for seconds.
_LONG_SEC = 120.0
_REST = "the rest"  # Time between ticks that is not for pictures or scores: files, validation.
_WARM_UP, _PROBED = 2, 10  # Steps of a tick before and in the speed measurement (the probe).


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The first prediction of a run.

    Attributes:
        total_nimg: Images after which the run ends.
        disk: Bytes of snapshots and states at the end.
        memory: Peak bytes of a rank; None if memory was not predicted.
        images_per_sec: Speed that the probe measured; None before it.
        probe_nimg, probe_sec: Images and seconds from the start of the run to the end of the probe.
        total_sec: Seconds from the start of the run to its end, without the time between a stop and
            a resume; None before the probe.
    """

    total_nimg: int
    disk: int
    memory: int | None = None
    images_per_sec: float | None = None
    probe_nimg: int = 0
    probe_sec: float = 0.0
    total_sec: float | None = None

    def seconds_until(self, cur_nimg: int) -> float | None:
        """Return the predicted seconds from the start of the run to ``cur_nimg`` images.

        None before the end of the probe.
        """
        if self.total_sec is None or cur_nimg <= self.probe_nimg:
            return None
        share = (cur_nimg - self.probe_nimg) / max(self.total_nimg - self.probe_nimg, 1)
        return self.probe_sec + min(share, 1.0) * (self.total_sec - self.probe_sec)


def _read(config: RunConfig, run_dir: Path) -> Prediction | None:
    """Return the first prediction of a run; None if there is none for the run's present length."""
    try:
        found = typed(Prediction, read_object(run_dir / PREDICTION_FILE))
    except ValueError:
        return None
    return found if found.total_nimg == config.total_nimg else None


class Outlook:
    """Predicts the speed and duration of a run, and at its end compares predictions with facts.

    Only rank 0 predicts; ``telemetry`` is None elsewhere. Speed is measured over ten steps without
    stalling them: on a GPU two events are recorded, and the host waits for the second one, once. A
    resumed run keeps its first prediction, in ``prediction.json``.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        device: torch.device,
        telemetry: Any,
        *,
        cur_nimg: int,
        start_sec: float,
    ) -> None:
        """Read or make the first prediction.

        ``start_sec`` is the time, in seconds since the epoch, at which the run would have started
        had it never been stopped.
        """
        self._config, self._run_dir, self._device = config, run_dir, device
        self._telemetry, self._start_sec = telemetry, start_sec
        self._num_steps = self._num_in_ticks = 0
        self._sec_in_ticks = self._sec_of_events = 0.0
        self._mark: Any = None
        self._is_probing = telemetry is not None and cur_nimg < config.total_nimg
        self._has_trained = False
        self._costs: dict[str, float] = {}  # Longest duration of each kind of event, in seconds.
        self._memory: MemoryProcess | None = None
        if telemetry is None:
            return
        self._prediction = _read(config, run_dir)
        if self._prediction is None and self._is_probing:
            self._keep(Prediction(config.total_nimg, predict_disk(config).total))
            telemetry.message(f"Predicted: disk {_bytes(self._prediction.disk)}.")

    def _keep(self, prediction: Prediction) -> None:
        self._prediction = prediction
        with contextlib.suppress(OSError):  # A prediction never ends a run.
            write_json(self._run_dir / PREDICTION_FILE, dataclasses.asdict(prediction))

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Time an event of kind ``what``, such as pictures, that runs in this context."""
        start = time.monotonic()
        yield
        self._note(what, time.monotonic() - start)

    def _note(self, what: str, seconds: float) -> None:
        self._sec_of_events += seconds
        self._costs[what] = max(self._costs.get(what, 0.0), seconds)

    def step(self, cur_nimg: int) -> None:
        """Count a step, which ends at ``cur_nimg`` images."""
        self._has_trained = True
        if not self._is_probing:
            return
        self._num_steps += 1
        if self._num_steps == _WARM_UP:
            self._mark = self._now()
        elif self._num_steps == _WARM_UP + _PROBED:
            self._tell(_PROBED * self._config.step_nimg / self._since_mark(), cur_nimg)

    def tick(self, tick_nimg: int, sec_per_tick: float, cur_nimg: int, maintenance: float) -> None:
        """Note the seconds of a tick of ``tick_nimg`` images, and of the maintenance after it.

        If ticks are too short for a probe, speed is measured over several of them; the first tick
        does not count, because it is a single step. A prediction of memory is reported when it is
        there.
        """
        self._note(_REST, max(maintenance - self._sec_of_events, 0.0))
        self._sec_of_events = 0.0
        if self._is_probing and self._num_steps > 1:
            self._num_in_ticks += tick_nimg
            self._sec_in_ticks += sec_per_tick
            if self._num_in_ticks >= _PROBED * self._config.step_nimg:
                self._tell(self._num_in_ticks / self._sec_in_ticks, cur_nimg)
        self._num_steps = 0
        found = None if self._memory is None else self._memory.poll()
        if found is not None:
            self._memory = None
            self._keep(dataclasses.replace(self._prediction, memory=found))
            self._telemetry.message(f"Predicted: memory {_bytes(found)} a rank.")

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since_mark(self) -> float:
        """Return the seconds since the mark. Waits for the device, but only once per run."""
        now = self._now()
        if self._device.type != "cuda":
            return max(now - self._mark, 1e-9)
        now.synchronize()
        return max(self._mark.elapsed_time(now) / 1000, 1e-9)

    def _tell(self, images_per_sec: float, cur_nimg: int) -> None:
        """Report the speed and the predicted end of the run; keep the first such prediction."""
        self._is_probing = False
        elapsed = time.time() - self._start_sec
        extra, included = self._cost_of_events(cur_nimg)
        left = (self._config.total_nimg - cur_nimg) / images_per_sec + extra
        with_what = f", with {included}" if included else ""
        self._telemetry.message(
            f"Predicted after {_PROBED} steps: {images_per_sec:,.4g} images/s, "
            f"{format_time(left)} until the end at kimg "
            f"{format_kimg(self._config.total_nimg / 1000)}{with_what}."
        )
        if self._prediction.images_per_sec is None:
            speed = dict(images_per_sec=images_per_sec, probe_nimg=cur_nimg, probe_sec=elapsed)
            self._keep(dataclasses.replace(self._prediction, total_sec=elapsed + left, **speed))
        if self._prediction.memory is None and left >= _LONG_SEC:
            self._memory = MemoryProcess(self._run_dir)

    def _cost_of_events(self, cur_nimg: int) -> tuple[float, str]:
        """Return the seconds of the pictures, scores and files to come, and a phrase naming them.

        Each is expected to take as long as the longest of its kind so far.
        """
        config = self._config
        so_far = config.changed("training", kimg=cur_nimg / 1000, iters=None)
        # The shortened run counts a snapshot at its last tick, the newest one: hence the 1.
        scores = snapshots = count_snapshots(config) - count_snapshots(so_far) + 1
        if config.logging.metrics_ticks:
            last = count_ticks(config) - 1
            due = range(0, last, config.logging.metrics_ticks)
            scores = sum(tick >= count_ticks(so_far) - 1 for tick in due) + 1
        total, words = 0.0, []
        for what, num in (("pictures", snapshots), ("scores", scores), (_REST, snapshots)):
            seconds = num * self._costs.get(what, 0.0)
            total += seconds
            if seconds >= 0.5 and what != _REST:
                words.append(f"{what} in {format_time(seconds)}")
        return total, " and ".join(words)

    def finish(self, cur_nimg: int) -> None:
        """Report predicted and actual values after ``cur_nimg`` images, and stop predicting."""
        if self._telemetry is None or not self._has_trained:
            return
        if self._memory is not None:
            self._memory.close()
        rows = compare(self._prediction, self._config, self._run_dir, self._device, cur_nimg)
        elapsed = time.time() - self._start_sec
        foreseen = self._prediction.seconds_until(cur_nimg)
        if foreseen is not None:
            rows["duration"] = foreseen, elapsed
        texts = [f"{name} {describe(name, *pair)}" for name, pair in rows.items()]
        if texts:
            self._telemetry.message(f"Predicted and actual: {'; '.join(texts)}.")


def compare(
    prediction: Prediction, config: RunConfig, run_dir: Path, device: torch.device, cur_nimg: int
) -> dict[str, tuple[float, float]]:
    """Return predicted and actual memory and disk (bytes) and images/s after ``cur_nimg`` images.

    Values that were not predicted, or that cannot be measured yet, are left out.
    """
    history = History(run_dir / STATS_FILE)
    history.read()
    rows = {}
    if prediction.memory is not None:
        rows["memory"] = prediction.memory, _peak_memory(history, device)
    if cur_nimg >= config.total_nimg:  # At a stop, the last state is still being written.
        rows["disk"] = predict_disk(config).total, _size_of_files(run_dir)
    nimg = 1000 * sum(b - a for a, b in zip(history.kimg, history.kimg[1:], strict=False))
    seconds = float(history.values("Timing/sec_per_tick")[1:].sum())
    if nimg > 0 and seconds > 0 and prediction.images_per_sec is not None:
        rows["images/s"] = prediction.images_per_sec, nimg / seconds
    return rows


def describe(name: str, foreseen: float, actual: float) -> str:
    """Return two values and the error of the first as text: ``493MB, 491MB (+0.4%)``."""
    show = {"duration": format_time, "images/s": "{:,.4g}".format}.get(name, _bytes)
    error = f" ({foreseen / actual - 1:+.1%})" if actual > 0 else ""
    return f"{show(foreseen)}, {show(actual)}{error}"


def _bytes(size: float) -> str:
    return format_count(size, "B")


def _peak_memory(history: History, device: torch.device) -> float:
    """Return the peak bytes of rank 0, of its GPU or resident in this process."""
    if device.type == "cuda":
        values = history.values("Resources/peak_gpu_mem_reserved_gb")
        return float(values.max(initial=0.0)) * 2**30 + CUDA_CONTEXT
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size_of_files(run_dir: Path) -> int:
    """Return the total bytes of the snapshots and states of a run."""
    paths = [*run_dir.glob("network-snapshot-*.pkl"), *run_dir.glob("training-state-*")]
    return sum(sum(file_sizes(path).values()) for path in paths)
