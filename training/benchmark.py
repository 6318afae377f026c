"""What training, sampling, loading and attention cost on a device: the text of benchmark.py.

Whatever is compared runs in one process and in turn, round by round, and medians count.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from diffusion.guidance import GuidanceConfig
from diffusion.precond import make_precond
from diffusion.samplers import SamplingConfig
from models import Network, build_network
from models.layers import attend, choose_attention
from torch_utils import rng
from torch_utils.stats import StatsCollector
from training.augment import make_augment_pipe
from training.baseline import build_plain_network, plain_attention
from training.config import RunConfig
from training.dataset import ImageDataset
from training.ema import EMA, ema_beta
from training.generation import AUTOCAST_DTYPES, ImageGenerator
from training.measure import (
    Clock,
    bare_decode,
    device_name,
    interleave,
    median_ratio,
    peak_flops,
    peak_growth,
    seconds_of,
    table,
    tensor_bytes,
)
from training.objective import Objective
from training.optimizer import GuardedAdam
from training.report import forward_flops
from training.sampler import PositionSampler, make_loader

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
PARTS = ("data", "forward", "backward", "optimizer", "EMA")
MIB = 2**20
# Far enough into a run for the average to have its full half-life.
_FIRST_NIMG = 50_000_000
# Batches that a loader process makes ahead, and more.
_NUM_AHEAD = 5


class TrainingSteps:
    """Optimizer steps made of what the training loop is made of, with marks between their parts.

    A batch is ``config.training.batch`` images; there is no accumulation and one rank.
    """

    def __init__(self, config: RunConfig, dataset: ImageDataset, device: torch.device) -> None:
        training = config.training
        self.config, self.device = config, device
        self._image_shape = (dataset.img_channels, dataset.resolution, dataset.resolution)
        self._cur_nimg = _FIRST_NIMG
        sampler = PositionSampler(
            len(dataset),
            seed=training.seed,
            start_nimg=self._cur_nimg,
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
        self._objective = Objective(
            self.network,
            make_precond(config.precond),
            augment_pipe=make_augment_pipe(training.augment),
            label_drop=training.label_drop or 0.0,
            autocast_dtype=AUTOCAST_DTYPES[training.precision],
        )

    def _build_network(self) -> Network:
        network = build_network(self.config.model)
        return network.to(memory_format=torch.channels_last)

    def _make_optimizer(self) -> None:
        clip_grad = self.config.training.clip_grad
        self._optimizer = GuardedAdam(self.network.parameters(), clip_grad=clip_grad)
        self._ema = EMA(self.network)
        self.average = list(self._ema.network.parameters())
        self._stats = StatsCollector()
        if self.config.training.compile:
            self.network.backbone.compile()

    def step(self, clock: Clock) -> None:
        """Make one optimizer step, calling ``clock.mark`` at the end of each of PARTS."""
        training = self.config.training
        draws = self._objective.draw(
            seed=training.seed,
            cur_nimg=self._cur_nimg,
            batch=training.batch,
            image_shape=self._image_shape,
            device=self.device,
        )
        torch.manual_seed(rng.mix(training.seed, self._cur_nimg, rng.STREAM_MODEL))
        images, cond = self._objective.prepare(*next(self._batches), draws, self.device)
        clock.mark("data")
        loss = self._objective(images, cond, draws)
        clock.mark("forward")
        (loss.sum() * (training.loss_scaling / training.batch)).backward()
        clock.mark("backward")
        self._update_weights(loss)
        clock.mark("optimizer")
        self._update_average(
            ema_beta(self._cur_nimg, training.batch, training.ema_kimg, training.ema_rampup)
        )
        clock.mark("EMA")
        self._cur_nimg += training.batch

    def _update_weights(self, loss: torch.Tensor) -> None:
        self._stats.report("Loss/loss", loss)
        self._stats.report("Loss/grad_norm", self._optimizer.step(self.config.training.lr))
        self._optimizer.zero_grad()

    def _update_average(self, beta: float) -> None:
        self._ema.update(beta, self._optimizer.skipped)

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

    def _update_weights(self, loss: torch.Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.training.lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _update_average(self, beta: float) -> None:
        for average, param in zip(self.average, self.network.parameters(), strict=True):
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
    torch.backends.cudnn.allow_tf32 = training.tf32
    torch.backends.cuda.matmul.allow_tf32 = training.tf32

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
    flops = 3 * forward_flops(config) * training.batch
    rows = [["", *sides]]
    for part in PARTS:
        medians = [statistics.median(turn[part] for turn in turns) for turns in times.values()]
        rows.append([f"{part}, ms", *(f"{1000 * median:.1f}" for median in medians)])
    seconds = {name: statistics.median(total) for name, total in totals.items()}
    rows.append(["step, ms", *(f"{1000 * s:.1f}" for s in seconds.values())])
    rows.append(["images/s", *(f"{training.batch / s:.1f}" for s in seconds.values())])
    rows.append(["peak memory, MiB", *peaks.values()])
    rows.append(["TFLOP/s of the model", *(f"{flops / s / 1e12:.3f}" for s in seconds.values())])
    utilisation = []
    for name, side in sides.items():
        precision = side.config.training.precision
        peak = peak_flops(
            device_name(device), "tf32" if precision == "fp32" and training.tf32 else precision
        )
        achieved = flops / seconds[name]
        utilisation.append("unknown" if peak is None else f"{100 * achieved / peak:.1f}%")
    rows.append(["model-FLOPs utilisation", *utilisation])
    base = totals["baseline fp32"]
    ratios = [f"{median_ratio(base, total):.2f}" for total in totals.values()]
    rows.append(["speed, baseline = 1", *ratios])
    return table(rows)


def benchmark_sample(
    config: RunConfig,
    device: torch.device,
    *,
    precision: str,
    batch: int,
    sampling: SamplingConfig,
    num_rounds: int,
) -> str:
    """Return the rate of sampling without and with guidance, and what guidance costs.

    ``config`` is of a class-conditional model. Guidance evaluates the network on a doubled batch;
    it is compared with sampling twice as many images without it.
    """
    assert config.model.num_classes > 0
    torch.manual_seed(config.training.seed)
    network = build_network(config.model).eval().requires_grad_(False).to(device)

    def make_turn(num: int, cfg_scale: float) -> Callable[[], float]:
        generator = ImageGenerator(
            network=network,
            precond=make_precond(config.precond),
            image_shape=(config.model.img_channels, *[config.model.resolution] * 2),
            num_classes=config.model.num_classes,
            sampling=sampling,
            guidance=GuidanceConfig(cfg_scale=cfg_scale),
            device=device,
            autocast_dtype=AUTOCAST_DTYPES[precision],
        )
        return lambda: seconds_of(lambda: generator.generate(range(num)), device)

    names = [f"batch {batch}", f"batch {batch}, guided", f"batch {2 * batch}"]
    turns = [make_turn(batch, 1.0), make_turn(batch, 1.5), make_turn(2 * batch, 1.0)]
    for turn in turns:
        turn()
    times = interleave(dict(zip(names, turns, strict=True)), num_rounds)
    rows = [["", "s a batch", "images/s"]]
    for name, num in zip(names, (batch, batch, 2 * batch), strict=True):
        seconds = statistics.median(times[name])
        rows.append([name, f"{seconds:.3f}", f"{num / seconds:.2f}"])
    ratio = median_ratio(times[names[1]], times[names[2]])
    return f"{table(rows)}\nGuidance costs {ratio:.3f} times one doubled batch."


def benchmark_data(
    dataset: ImageDataset,
    *,
    batch: int,
    workers: tuple[int, ...],
    num_batches: int,
    num_rounds: int,
) -> str:
    """Return the rates of loading and of decoding the files, already in memory, with Pillow."""
    num_images = batch * num_batches
    files = [dataset.archive.read(index % len(dataset)) for index in range(num_images)]

    def make_turn(num_workers: int) -> Callable[[], float]:
        sampler = PositionSampler(
            len(dataset),
            seed=0,
            start_nimg=0,
            batch_size=batch,
            batch_gpu=batch,
            rank=0,
            world_size=1,
        )
        cpu = torch.device("cpu")
        batches = iter(make_loader(dataset, sampler, num_workers=num_workers, device=cpu))

        def load(num_batches: int) -> None:
            for _ in range(num_batches):
                next(batches)

        def turn() -> float:
            load(_NUM_AHEAD * num_workers)  # Made ahead before this turn.
            seconds = seconds_of(lambda: load(num_batches), cpu)
            if num_workers:
                # Let the workers come to rest before the others have their turns.
                time.sleep(_NUM_AHEAD / num_batches * seconds)
            return seconds

        return turn

    turns = {"Pillow alone": lambda: seconds_of(lambda: bare_decode(files), torch.device("cpu"))}
    for num in workers:
        turns[f"loader, {num or 'no'} worker{'s' if num != 1 else ''}"] = make_turn(num)
    for turn in turns.values():
        turn()
    times = interleave(turns, num_rounds)
    rows = [["", "images/s", "of Pillow alone"]]
    for name, seconds in times.items():
        share = median_ratio(times["Pillow alone"], seconds)
        rate = num_images / statistics.median(seconds)
        rows.append([name, f"{rate:.0f}", f"{100 * share:.0f}%"])
    return table(rows)


def benchmark_attention(
    config: RunConfig,
    device: torch.device,
    *,
    precision: str,
    batch: int,
    num_rounds: int,
    num_calls: int,
) -> str:
    """Return the time of attention, forward and backward, by each way of computing it.

    Rows are the stages of the model with their windows; the last row is all blocks of the network.
    """
    model = config.model
    attentions: dict[str, Attention] = {
        name: functools.partial(attend, attention=name) for name in ("sdpa", "flex")
    }
    attentions["plain"] = plain_attention
    notes = []
    try:
        choose_attention("flex", device, needs_grad=True)
    except ValueError:
        del attentions["flex"]
        notes.append(f"Flex attention has no backward pass on a {device.type.upper()}.")
    dtype = AUTOCAST_DTYPES[precision] or torch.float32

    rows = [["stage", "windows", "tokens", "blocks", *(f"{n}, ms" for n in attentions), "fastest"]]
    totals = dict.fromkeys(attentions, 0.0)
    for stage, (grid, window, width) in enumerate(
        zip(model.grids, model.windows, model.widths, strict=True)
    ):
        num_windows, length = batch * (grid // window) ** 2, window**2
        is_bottom = stage == model.num_stages - 1
        num_blocks = model.blocks_per_stage[stage] * (1 if is_bottom else 2)
        shape = (num_windows, model.num_heads, length, width // model.num_heads)
        turns = {
            name: _attention_turn(attention, shape, dtype, device, num_calls)
            for name, attention in attentions.items()
        }
        for turn in turns.values():
            turn()
        times = interleave(turns, num_rounds)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        for name in totals:
            totals[name] += num_blocks * seconds[name]
        sizes = [f"{stage}: {grid}x{grid}x{width}", str(num_windows), str(length), str(num_blocks)]
        rows.append([*sizes, *_fastest(seconds)])
    rows.append(["all", "", "", "", *_fastest(totals)])
    chosen = choose_attention("auto", device, needs_grad=True)
    notes.append(f"--attention=auto means {chosen} on this device.")
    return "\n".join([table(rows), *notes])


def _attention_turn(
    attention: Attention,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    num_calls: int,
) -> Callable[[], float]:
    num_windows, heads, length, head_dim = shape
    # Three parts of one tensor, as the network has them.
    qkv = torch.randn(num_windows, 3 * heads, length, head_dim, dtype=dtype, device=device)
    inputs = [part.requires_grad_() for part in qkv.chunk(3, dim=1)]
    inputs.append(torch.randn(heads, length, length, device=device, requires_grad=True))
    grad = torch.randn(num_windows, heads, length, head_dim, dtype=dtype, device=device)

    def calls() -> None:
        for _ in range(num_calls):
            torch.autograd.grad(attention(*inputs).to(dtype), inputs, grad)

    return lambda: seconds_of(calls, device) / num_calls


def _fastest(seconds: dict[str, float]) -> list[str]:
    return [*(f"{1000 * s:.2f}" for s in seconds.values()), min(seconds, key=seconds.get)]
