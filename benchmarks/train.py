"""benchmark.py train: what a training step costs, beside a plain one."""

import functools
import statistics

import click
import torch

import families
from benchmarks.kinds import (
    dataset_of,
    describe_run,
    measured_preset,
)
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
from models import build_network
from torch_utils import distributed, rng
from torch_utils.misc import allow_tf32, peak_flops
from torch_utils.stats import StatsCollector
from training.config import RunConfig
from training.ema import EMA, PowerEMA, ema_beta
from training.family import Part, TrainingData
from training.optimizer import GuardedAdam
from training.report import forward_flops

PARTS = ("data", "forward", "backward", "optimizer", "EMA")
_BASELINE = "baseline fp32"
# Far enough into a run for the average to have its full half-life.
_FIRST_NIMG = 50_000_000


def measure(options: TrainOptions) -> None:
    """Print the table of ``benchmark.py train``."""
    device, batch = distributed.init(), options.batch_gpu
    same = dict(compile=options.compile, tf32=options.tf32)
    config = measured_preset(options.preset).run
    config = config.changed("training", batch=batch, batch_gpu=batch, **same)
    if options.workers is not None:
        config = config.changed("logging", workers=options.workers)
    with dataset_of(config, options.data) as dataset:
        config = families.of(config).fit(config, dataset)
        click.echo(describe_run(config, device))
        rows = _benchmark_steps(config, dataset, device, options)
    compiled, tf32 = ", compiled" * options.compile, ", TF32" * options.tf32
    click.echo(f"batch {batch}{compiled}{tf32}\n{table(rows)}")


class TrainingSteps:
    """Optimizer steps made of what the training loop is made of, with marks between their parts.

    A batch is ``config.training.batch`` images, or sets of them; there is no accumulation and one
    rank.
    """

    def __init__(self, config: RunConfig, dataset: TrainingData, device: torch.device) -> None:
        training, family = config.training, families.of(config)
        self.config, self.device = config, device
        self._cur_nimg = _FIRST_NIMG
        part = Part(rank=0, world_size=1, batch_gpu=training.batch)
        sampler = family.steps(config, dataset, self._cur_nimg, part).sampler
        workers = config.logging.workers
        self._batches = iter(make_loader(dataset, sampler, num_workers=workers, device=device))
        torch.manual_seed(training.seed)
        self._build()
        codec = family.encoder_codec(config, dataset, device)
        self._objective = family.objective(config, self.network, codec)

    def _build(self) -> None:
        """Make the network, its average and their optimizer."""
        training, network = self.config.training, build_network(self.config.model)
        self.network = network.to(memory_format=torch.channels_last).train().to(self.device)
        self._optimizer = GuardedAdam(
            self.network.parameters(),
            beta2=training.beta2,
            weight_decay=training.weight_decay,
            clip_grad=training.clip_grad,
        )
        self._ema = EMA(self.network)
        self._profiles = PowerEMA(self.network, training.ema_stds)
        self.average = list(self._ema.network.parameters())
        self._stats = StatsCollector()
        if training.compile:
            self.network.compile_parts()

    def step(self, clock: Clock) -> None:
        """Make one optimizer step, calling ``clock.mark`` at the end of each of PARTS."""
        training, step_nimg = self.config.training, self.config.step_nimg
        shape = self.config.model.input_shape
        step = rng.Step(training.seed, self._cur_nimg, training.batch, shape, self.device)
        draws = self._objective.draw(step)
        torch.manual_seed(rng.mix(training.seed, self._cur_nimg, rng.STREAM_MODEL))
        images, cond = self._objective.prepare(*next(self._batches), draws, self.device)
        clock.mark("data")
        loss = self._objective(images, cond, draws)
        clock.mark("forward")
        (loss.sum() * (training.loss_scaling / step_nimg)).backward()
        clock.mark("backward")
        self._update_weights(loss)
        clock.mark("optimizer")
        beta = ema_beta(self._cur_nimg, step_nimg, training.ema_kimg, training.ema_rampup)
        self._update_average(beta)
        clock.mark("EMA")
        self._cur_nimg += step_nimg

    def _update_weights(self, loss: torch.Tensor) -> None:
        self._stats.report("Loss/loss", loss)
        self._stats.report("Loss/grad_norm", self._optimizer.step(self.config.training.lr))
        self._optimizer.zero_grad()

    def _update_average(self, beta: float) -> None:
        self._ema.update(beta, self._optimizer.skipped)
        step_nimg = self.config.step_nimg
        self._profiles.update(self._cur_nimg + step_nimg, step_nimg)

    def peak_memory(self, num_steps: int) -> str:
        """Make ``num_steps`` steps, and return the peak memory of one more in MiB."""
        step = functools.partial(self.step, Clock(self.device))
        for _ in range(num_steps):
            step()
        growth = peak_growth(step, self.device)
        # What is kept between two steps: weights, average, optimizer.
        kept = [*self.network.parameters(), *self.average, self._optimizer.state_dict()]
        return "unknown" if growth is None else f"{(tensor_bytes(kept) + growth) / 2**20:.0f}"

    def time(self, num_steps: int) -> dict[str, float]:
        """Make ``num_steps`` steps, and return the seconds that each part of one takes."""
        clock = Clock(self.device)
        clock.start()
        for _ in range(num_steps):
            self.step(clock)
        return {part: seconds / num_steps for part, seconds in clock.seconds().items()}


class PlainTrainingSteps(TrainingSteps):
    """The same steps, plainly: other network code, Adam and average one parameter at a time."""

    def _build(self) -> None:
        self.network = build_plain_network(self.config.model).train().to(self.device)
        params, training = list(self.network.parameters()), self.config.training
        settings = dict(lr=training.lr, betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False)
        self._optimizer = torch.optim.Adam(params, **settings)
        self.average, *self._profiles = (
            [weight.detach().clone() for weight in params] for _ in (None, *training.ema_stds)
        )

    def _update_weights(self, loss: torch.Tensor) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _update_average(self, beta: float) -> None:
        for averages in (self.average, *self._profiles):
            for average, weight in zip(averages, self.network.parameters(), strict=True):
                average.lerp_(weight, 1 - beta)


def _benchmark_steps(
    config: RunConfig, dataset: TrainingData, device: torch.device, options: TrainOptions
) -> list[list[str]]:
    """Return rows of what a step costs, for the baseline and for this code in each precision.

    ``config`` is a run fitted to the data; its batch is that of one pass. The baseline is always
    eager fp32.
    """
    on_gpu = device.type == "cuda"
    num_steps = options.steps or (20 if on_gpu else 1)
    precisions = ("fp32", "bf16") if options.precision == "both" else (options.precision,)
    torch.backends.cudnn.benchmark = config.training.cudnn_benchmark
    allow_tf32(config.training.tf32)
    plain = config.changed("training", precision="fp32", compile=False)
    sides = {_BASELINE: PlainTrainingSteps(plain, dataset, device)}
    for precision in precisions:
        own = config.changed("training", precision=precision)
        sides[f"this code {precision}"] = TrainingSteps(own, dataset, device)
    peaks = [side.peak_memory(5 if on_gpu else 1) for side in sides.values()]
    turns = {name: functools.partial(side.time, num_steps) for name, side in sides.items()}
    times = interleave(turns, options.rounds)

    steps = {name: [sum(turn.values()) for turn in turns] for name, turns in times.items()}
    seconds = {name: statistics.median(turns) for name, turns in steps.items()}
    flops = 3 * forward_flops(config) * config.step_nimg
    rates = {name: flops / s for name, s in seconds.items()}
    rows = [["", *sides]]
    for part in PARTS:
        medians = [statistics.median(turn[part] for turn in turns) for turns in times.values()]
        rows.append([f"{part}, ms", *(f"{1000 * median:.1f}" for median in medians)])
    ratios = [f"{median_ratio(steps[_BASELINE], turns):.2f}" for turns in steps.values()]
    rows += [
        ["step, ms", *(f"{1000 * s:.1f}" for s in seconds.values())],
        ["images/s", *(f"{config.step_nimg / s:.1f}" for s in seconds.values())],
        ["peak memory, MiB", *peaks],
        ["TFLOP/s of the model", *(f"{rate / 1e12:.3f}" for rate in rates.values())],
        ["model-FLOPs utilisation", *(_share(sides[name], rates[name]) for name in sides)],
        ["speed, baseline = 1", *ratios],
    ]
    return rows


def _share(side: TrainingSteps, rate: float) -> str:
    """Return the share of FLOP/s in the peak of the device."""
    peak = peak_flops(device_name(side.device), side.config.training.arithmetic)
    return "unknown" if peak is None else f"{100 * rate / peak:.1f}%"
