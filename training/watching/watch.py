"""The watch over a run: it measures at the end of ticks, and reports faults with their remedies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data.images.dataset import Cond
from torch_utils.stats import StatsCollector
from training.config import RunConfig
from training.distillation.stages import num_optimizer_steps, stage_index
from training.ema import EMA
from training.family import of as family_of
from training.optimizer import GuardedAdam
from training.run_report.rows import read_rows
from training.telemetry import Stats, Telemetry
from training.watching.averages import AverageWatcher
from training.watching.context import ContextWatcher
from training.watching.finding import Finding
from training.watching.inspection.draws import DrawsWatcher
from training.watching.inspection.inspect import inspect
from training.watching.layers import LayerWatcher
from training.watching.learning_rate import LearningRateWatcher
from training.watching.probe import Probe, named_blocks
from training.watching.samples import SampleWatch
from training.watching.set_context import SetContextWatcher
from training.watching.tick import Tick, Watcher
from training.watching.updates import UpdateMeter
from training.watching.weights import PrecisionWatcher

_STEPS_BETWEEN = 20  # A tick is probed only if it contains a multiple of this number of steps.


def watchers_of(config: RunConfig) -> list[Watcher]:
    """Return the watchers that judge the statistics of a run."""
    return [
        LearningRateWatcher(config),
        PrecisionWatcher(),
        AverageWatcher(config.training, config.step_nimg),
        LayerWatcher(),
        ContextWatcher(),
        SetContextWatcher(config.model),
    ]


class Judge:
    """Returns a finding when it appears, and again only after it has gone.

    Args:
        config: Configuration of the run.
        objective: The objective whose phases tell when the loss becomes a different one.
        watchers: The watchers that judge the statistics.
    """

    def __init__(self, config: RunConfig, objective: Any, watchers: Sequence[Watcher]) -> None:
        self._config, self._objective, self._watchers = config, objective, watchers
        self._found: dict[Watcher | None, list[Finding]] = {}

    def fresh(self, stats: Stats, cur_nimg: int, drawn: Sequence[Finding] = ()) -> list[Finding]:
        """Return the findings that are new at a tick that ends after ``cur_nimg`` images.

        ``drawn`` are the findings on the draws of its last step.
        """
        config, before = self._config, cur_nimg - self._config.step_nimg
        phase = stage_index(config, before), self._objective.phase(before)
        step, num_steps = cur_nimg // config.step_nimg, num_optimizer_steps(config)
        tick = Tick(step, num_steps, phase, stats)
        known = {finding.name for found in self._found.values() for finding in found}
        for watcher in self._watchers:
            found = watcher.look(tick)
            if found is not None:
                self._found[watcher] = found
        self._found[None] = list(drawn)
        now = [finding for found in self._found.values() for finding in found]
        return [finding for finding in now if finding.name not in known]


class Watch:
    """The watch over a run; with ``--no-watch`` it does nothing.

    Args:
        job: The job that is trained, a :class:`training.loop.Job`.
        run_dir: The run folder, whose statistics so far are read.
        objective: The family's objective of the network that is trained.
        trained: The parameters of the network, their average and their optimizer.
        cur_nimg: Training images so far; at 0, the data are inspected.
        telemetry: Where findings are reported, on rank 0; None elsewhere.
    """

    def __init__(
        self,
        job: Any,
        run_dir: Path,
        objective: Any,
        trained: tuple[Any, EMA, GuardedAdam],
        cur_nimg: int,
        telemetry: Telemetry | None,
    ) -> None:
        config: RunConfig = job.config
        self._step_nimg, self._telemetry = config.step_nimg, telemetry
        self._is_on = config.logging.watch
        self._begun = False
        self._batch: tuple[Tensor, Cond, Any] | None = None
        if not self._is_on:
            return
        _, ema, _ = trained
        averaged = family_of(config).objective(config, ema.network, job.codec)
        blocks = named_blocks(config.model, objective.network.backbone)
        self._meter = UpdateMeter(*trained, list(blocks))
        self._probe = Probe(objective, averaged, ema, blocks)
        self._objective, self._draws = objective, DrawsWatcher(config, job.data)
        self._drawn: list[Finding] = []
        if telemetry is not None:
            self._samples = SampleWatch(job, run_dir, telemetry)
            self._judge = Judge(config, objective, watchers_of(config))
            for finding in inspect(job) if cur_nimg == 0 else ():
                telemetry.tell(finding, cur_nimg)
            for row in read_rows(run_dir / "stats.jsonl")[0]:
                nimg = Tick(0, 0, (), row).mean("Progress/kimg")
                if nimg is not None:
                    self._judge.fresh(row, round(nimg * 1000))

    def begin_step(
        self, batch: tuple[Tensor, Cond, Any], tick_start_nimg: int, cur_nimg: int
    ) -> None:
        """Prepare to measure the step that ends the tick, which begins at ``cur_nimg`` images.

        ``batch`` is that of the last pass of the step, prepared, with its draws. Collective.
        """
        self._batch = batch
        end_nimg = cur_nimg + self._step_nimg
        steps = [nimg // self._step_nimg // _STEPS_BETWEEN for nimg in (tick_start_nimg, end_nimg)]
        self._begun = self._is_on and steps[0] < steps[1]
        if self._begun:
            self._meter.begin()
            self._probe.begin(batch, cur_nimg)

    def measure(self, stats: StatsCollector, beta: float) -> None:
        """Report statistics of the step that ended the tick, and of the network on its batch.

        ``beta`` is the decay of the average in that step. Collective; synchronises.
        """
        if not self._is_on:
            return
        self._drawn = self._draws.findings(self._objective, *self._batch)
        self._batch = None
        if not self._begun:
            return
        self._begun = False
        for name, value in self._meter.measure(beta).items():
            stats.report(f"Watch/{name}", value)
        self._probe.look(stats)

    def see(self, pictures: Sequence[Tensor] | None, cur_nimg: int) -> None:
        """Judge the spread of the samples of a snapshot, uint8 [C, H, W] each, on rank 0."""
        if self._is_on and self._telemetry is not None and pictures is not None:
            self._samples.see(pictures, cur_nimg)

    def lacks_samples(self, cur_nimg: int) -> bool:
        """Return, on rank 0, whether the samples of a snapshot are still to be judged."""
        return self._is_on and self._samples.is_lacking(cur_nimg)

    def see_scores(self, cur_nimg: int) -> None:
        """Judge the detector outputs of the samples that were just scored, on rank 0."""
        if self._is_on and self._telemetry is not None:
            self._samples.see_scores(cur_nimg)

    def judge(self, stats: Stats, cur_nimg: int) -> None:
        """Report what the statistics of the tick show, on rank 0."""
        if self._is_on and self._telemetry is not None:
            for finding in self._judge.fresh(stats, cur_nimg, self._drawn):
                self._telemetry.tell(finding, cur_nimg)
