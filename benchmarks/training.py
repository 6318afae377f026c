"""What a training step costs, beside a plain one."""

import functools
import statistics

import torch

import families
from benchmarks.kinds import with_section
from benchmarks.measure import (
    Clock,
    device_name,
    interleave,
    median_ratio,
    peak_growth,
    table,
    tensor_bytes,
)
from benchmarks.options import TrainOptions
from benchmarks.plain import build_plain_network
from data.loader import make_loader
from models import Network, build_network
from torch_utils import rng
from torch_utils.misc import allow_tf32, peak_flops
from torch_utils.stats import StatsCollector
from training.config import RunConfig
from training.ema import EMA, PowerEMA, ema_beta
from training.family import Part, TrainingData
from training.optimizer import GuardedAdam
from training.report import forward_flops

PARTS = ("data", "forward", "backward", "optimizer", "EMA")
MIB = 2**20
Seconds = dict[str, float]  # Of each part of a step.
_BASELINE = "baseline fp32"
# Far enough into a run for the average to have its full half-life.
_FIRST_NIMG = 50_000_000


class TrainingSteps:
    """Optimizer steps made of what the training loop is made of, with marks between their parts.

    A batch is ``config.training.batch`` images, or sets of them; there is no accumulation and one
    rank.
    """

    def __init__(self, config: RunConfig, dataset: TrainingData, device: torch.device) -> None:
        training = config.training
        self.config, self.device = config, device
        self._cur_nimg = _FIRST_NIMG
        family = families.of(config)
        part = Part(rank=0, world_size=1, batch_gpu=training.batch)
        sampler = family.steps(config, dataset, self._cur_nimg, part).sampler
        workers = config.logging.workers
        self._batches = iter(make_loader(dataset, sampler, num_workers=workers, device=device))
        torch.manual_seed(training.seed)
        self.network = self._build_network().train().requires_grad_(True).to(device)
        self._make_optimizer()
        codec = family.encoder_codec(config, dataset, device)
        self._objective = family.objective(config, self.network, codec)

    def _build_network(self) -> Network:
        network = build_network(self.config.model)
        return network.to(memory_format=torch.channels_last)

    def _make_optimizer(self) -> None:
        clip_grad = self.config.training.clip_grad
        self._optimizer = GuardedAdam(
            self.network.parameters(),
            beta2=self.config.training.beta2,
            weight_decay=self.config.training.weight_decay,
            clip_grad=clip_grad,
        )
        self._ema = EMA(self.network)
        self._profiles = PowerEMA(self.network, self.config.training.ema_stds)
        self.average = list(self._ema.network.parameters())
        self._stats = StatsCollector()
        if self.config.training.compile:
            self.network.compile_parts()

    def step(self, clock: Clock) -> None:
        """Make one optimizer step, calling ``clock.mark`` at the end of each of PARTS."""
        training = self.config.training
        shape = self.config.model.input_shape
        step = rng.Step(training.seed, self._cur_nimg, training.batch, shape, self.device)
        draws = self._objective.draw(step)
        torch.manual_seed(rng.mix(training.seed, self._cur_nimg, rng.STREAM_MODEL))
        images, cond = self._objective.prepare(*next(self._batches), draws, self.device)
        clock.mark("data")
        loss = self._objective(images, cond, draws)
        clock.mark("forward")
        (loss.sum() * (training.loss_scaling / self.config.step_nimg)).backward()
        clock.mark("backward")
        self._update_weights(loss)
        clock.mark("optimizer")
        self._update_average(
            ema_beta(self._cur_nimg, self.config.step_nimg, training.ema_kimg, training.ema_rampup)
        )
        clock.mark("EMA")
        self._cur_nimg += self.config.step_nimg

    def _update_weights(self, loss: torch.Tensor) -> None:
        self._stats.report("Loss/loss", loss)
        self._stats.report("Loss/grad_norm", self._optimizer.step(self.config.training.lr))
        self._optimizer.zero_grad()

    def _update_average(self, beta: float) -> None:
        self._ema.update(beta, self._optimizer.skipped)
        step_nimg = self.config.step_nimg
        self._profiles.update(self._cur_nimg + step_nimg, step_nimg)

    def state_bytes(self) -> int:
        """Return the bytes kept between two steps: weights, average, optimizer."""
        tensors = [*self.network.parameters(), *self.average]
        return tensor_bytes(tensors) + tensor_bytes(self._optimizer.state_dict())


class PlainTrainingSteps(TrainingSteps):
    """The same steps, plainly: other network code, Adam and average one parameter at a time."""

    def _build_network(self) -> Network:
        return build_plain_network(self.config.model)

    def _make_optimizer(self) -> None:
        self._optimizer = torch.optim.Adam(
            self.network.parameters(), betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False
        )
        self.average = [param.detach().clone() for param in self.network.parameters()]
        self._profiles = [
            [param.detach().clone() for param in self.network.parameters()]
            for _ in self.config.training.ema_stds
        ]

    def _update_weights(self, loss: torch.Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.training.lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _update_average(self, beta: float) -> None:
        for averages in (self.average, *self._profiles):
            for average, param in zip(averages, self.network.parameters(), strict=True):
                average.lerp_(param, 1 - beta)


def benchmark_train(
    config: RunConfig, dataset: TrainingData, device: torch.device, options: TrainOptions
) -> str:
    """Return what a training step costs, for this code in each precision and for the baseline.

    ``config`` is a run fitted to the data; its batch is that of one pass. The baseline is always
    eager fp32.
    """
    on_gpu = device.type == "cuda"
    num_steps = options.steps or (20 if on_gpu else 1)
    precisions = ("fp32", "bf16") if options.precision == "both" else (options.precision,)
    torch.backends.cudnn.benchmark = config.training.cudnn_benchmark
    allow_tf32(config.training.tf32)
    plain = with_section(config, "training", precision="fp32", compile=False)
    sides = {_BASELINE: PlainTrainingSteps(plain, dataset, device)}
    for precision in precisions:
        own = with_section(config, "training", precision=precision)
        sides[f"this code {precision}"] = TrainingSteps(own, dataset, device)
    peaks = [_warm_up(side, 5 if on_gpu else 1) for side in sides.values()]
    turns = {name: functools.partial(_timed_steps, side, num_steps) for name, side in sides.items()}
    times = interleave(turns, options.rounds)
    rows = _time_rows(times, config.step_nimg)
    rows.append(["peak memory, MiB", *peaks])
    flops = 3 * forward_flops(config) * config.step_nimg
    rows += _flops_rows(sides, times, flops)
    base = _totals(times[_BASELINE])
    ratios = [f"{median_ratio(base, _totals(turns)):.2f}" for turns in times.values()]
    rows.append(["speed, baseline = 1", *ratios])
    return table([["", *sides], *rows])


def _warm_up(side: TrainingSteps, num_steps: int) -> str:
    """Make some steps, and return the peak memory of one more in MiB."""
    step = functools.partial(side.step, Clock(side.device))
    for _ in range(num_steps):
        step()
    growth = peak_growth(step, side.device)
    return "unknown" if growth is None else f"{(side.state_bytes() + growth) / MIB:.0f}"


def _timed_steps(side: TrainingSteps, num_steps: int) -> Seconds:
    """Make some steps, and return the seconds that each part of one takes."""
    clock = Clock(side.device)
    clock.start()
    for _ in range(num_steps):
        side.step(clock)
    return {part: seconds / num_steps for part, seconds in clock.seconds().items()}


def _totals(turns: list[Seconds]) -> list[float]:
    """Return the seconds of a whole step in each turn."""
    return [sum(turn.values()) for turn in turns]


def _time_rows(times: dict[str, list[Seconds]], step_nimg: int) -> list[list[str]]:
    """Return the rows of the parts of a step, of a whole one, and of the rate."""
    rows = []
    for part in PARTS:
        medians = [statistics.median(turn[part] for turn in turns) for turns in times.values()]
        rows.append([f"{part}, ms", *(f"{1000 * median:.1f}" for median in medians)])
    seconds = [statistics.median(_totals(turns)) for turns in times.values()]
    rows.append(["step, ms", *(f"{1000 * s:.1f}" for s in seconds)])
    rows.append(["images/s", *(f"{step_nimg / s:.1f}" for s in seconds)])
    return rows


def _flops_rows(
    sides: dict[str, TrainingSteps], times: dict[str, list[Seconds]], flops: float
) -> list[list[str]]:
    """Return the rows of the arithmetic done: FLOP/s, and their share of the device's peak."""
    achieved, utilisation = [], []
    for name, side in sides.items():
        rate = flops / statistics.median(_totals(times[name]))
        peak = peak_flops(device_name(side.device), side.config.training.arithmetic)
        achieved.append(f"{rate / 1e12:.3f}")
        utilisation.append("unknown" if peak is None else f"{100 * rate / peak:.1f}%")
    return [["TFLOP/s of the model", *achieved], ["model-FLOPs utilisation", *utilisation]]
