"""What a training step costs, beside a plain one."""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import (
    Clock,
    device_name,
    interleave,
    median_ratio,
    peak_growth,
    table,
    tensor_bytes,
)
from benchmarks.plain import build_plain_network
from data.images.dataset import ImageDataset
from data.loader import make_loader
from data.samplers import PositionSampler
from diffusion.precond import make_precond
from families.image import make_objective
from models import Network, build_network
from torch_utils import rng
from torch_utils.misc import allow_tf32, peak_flops
from torch_utils.stats import StatsCollector
from training.config import RunConfig
from training.ema import EMA, PowerEMA, ema_beta
from training.inputs import make_inputs
from training.optimizer import GuardedAdam
from training.report import forward_flops

PARTS = ("data", "forward", "backward", "optimizer", "EMA")
MIB = 2**20
# Far enough into a run for the average to have its full half-life.
_FIRST_NIMG = 50_000_000


class TrainingSteps:
    """Optimizer steps made of what the training loop is made of, with marks between their parts.

    A batch is ``config.training.batch`` images, or sets of them; there is no accumulation and one
    rank.
    """

    def __init__(self, config: RunConfig, dataset: ImageDataset, device: torch.device) -> None:
        training = config.training
        self.config, self.device = config, device
        self._cur_nimg = _FIRST_NIMG
        sampler = PositionSampler(
            len(dataset) if config.sets is None else None,
            seed=training.seed,
            start_nimg=self._cur_nimg // config.model.images_per_row,
            batch_size=training.batch,
            batch_gpu=training.batch,
            rank=0,
            world_size=1,
        )
        workers = config.logging.workers
        self._batches = iter(make_loader(dataset, sampler, num_workers=workers, device=device))
        torch.manual_seed(training.seed)
        self.network = self._build_network().train().requires_grad_(True).to(device)
        self._make_optimizer()
        self._objective = make_objective(
            config,
            self.network,
            make_precond(config.precond),
            make_inputs(config, dataset, None, device),
        )

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
        draws = self._objective.draw(
            seed=training.seed,
            cur_nimg=self._cur_nimg,
            batch=training.batch,
            input_shape=self.config.model.input_shape,
            device=self.device,
        )
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
    config: RunConfig,
    dataset: ImageDataset,
    device: torch.device,
    *,
    precisions: tuple[str, ...],
    num_rounds: int,
    num_steps: int,
    num_warmup: int,
) -> str:
    """Return what a training step costs, for this code in each precision and for the baseline.

    Args:
        config: A run fitted to the data; its batch is that of one pass.
        dataset: Images to train on.
        device: Where to train.
        precisions: ``fp32``, ``bf16`` or both. The baseline is always eager fp32.
        num_rounds: Rounds, in each of which every side has one turn.
        num_steps: Timed steps a turn.
        num_warmup: Steps of each side before all that.
    """
    training = config.training
    torch.backends.cudnn.benchmark = training.cudnn_benchmark
    allow_tf32(training.tf32)

    def with_training(**changes: Any) -> RunConfig:
        return dataclasses.replace(config, training=dataclasses.replace(training, **changes))

    plain = with_training(precision="fp32", compile=False)
    sides = {"baseline fp32": PlainTrainingSteps(plain, dataset, device)}
    for precision in precisions:
        own = with_training(precision=precision)
        sides[f"this code {precision}"] = TrainingSteps(own, dataset, device)

    # Warm up, and measure memory once.
    peaks = {}
    for name, side in sides.items():
        step = functools.partial(side.step, Clock(device))
        for _ in range(num_warmup):
            step()
        growth = peak_growth(step, device)
        peaks[name] = "unknown" if growth is None else f"{(side.state_bytes() + growth) / MIB:.0f}"

    def make_turn(side: TrainingSteps) -> Callable[[], dict[str, float]]:
        def turn() -> dict[str, float]:
            clock = Clock(device)
            clock.start()
            for _ in range(num_steps):
                side.step(clock)
            return {part: seconds / num_steps for part, seconds in clock.seconds().items()}

        return turn

    times = interleave({name: make_turn(side) for name, side in sides.items()}, num_rounds)
    totals = {name: [sum(turn.values()) for turn in turns] for name, turns in times.items()}
    flops = 3 * forward_flops(config) * config.step_nimg
    rows = [["", *sides]]
    for part in PARTS:
        medians = [statistics.median(turn[part] for turn in turns) for turns in times.values()]
        rows.append([f"{part}, ms", *(f"{1000 * median:.1f}" for median in medians)])
    seconds = {name: statistics.median(total) for name, total in totals.items()}
    rows.append(["step, ms", *(f"{1000 * s:.1f}" for s in seconds.values())])
    rows.append(["images/s", *(f"{config.step_nimg / s:.1f}" for s in seconds.values())])
    rows.append(["peak memory, MiB", *peaks.values()])
    rows.append(["TFLOP/s of the model", *(f"{flops / s / 1e12:.3f}" for s in seconds.values())])
    utilisation = []
    for name, side in sides.items():
        peak = peak_flops(device_name(device), side.config.training.arithmetic)
        achieved = flops / seconds[name]
        utilisation.append("unknown" if peak is None else f"{100 * achieved / peak:.1f}%")
    rows.append(["model-FLOPs utilisation", *utilisation])
    base = totals["baseline fp32"]
    ratios = [f"{median_ratio(base, total):.2f}" for total in totals.values()]
    rows.append(["speed, baseline = 1", *ratios])
    return table(rows)
