"""Training steps to measure: those of this code, and plain ones for the same network."""

import functools
from typing import Any, NamedTuple

import torch

import families
from benchmarks.measure import Clock, CpuClock, Spent, peak_growth, tensor_bytes
from benchmarks.plain import build_plain_network
from data.loader import make_loader
from models import build_network
from torch_utils import rng
from torch_utils.parameters import Parameters
from torch_utils.stats import StatsCollector
from training.config import RunConfig
from training.ema import EMA, PowerEMA, ema_beta
from training.family import Codec, Part, TrainingData
from training.optimizer import GuardedAdam
from training.report import forward_flops

PARTS = ("data", "forward", "backward", "optimizer", "EMA")
# Far enough into a run for the EMA to have its full half-life.
_FIRST_NIMG = 50_000_000


class Turn(NamedTuple):
    """The time of one step: the seconds of each of PARTS, and of the whole step."""

    parts: dict[str, float]
    spent: Spent


class TrainingSteps:
    """Optimizer steps built from the parts of the training loop, with clock marks between them.

    A batch is ``config.training.batch`` images, or sets of images. There is one rank and no
    gradient accumulation.
    """

    compile_backend = "inductor"

    def __init__(self, config: RunConfig, dataset: TrainingData, device: torch.device) -> None:
        self.config, self.device, self._dataset = config, device, dataset
        self._cur_nimg = _FIRST_NIMG
        torch.manual_seed(config.training.seed)
        self._build()
        self._codec = families.of(config).encoder_codec(config, dataset, device)
        self.resize(config.training.batch)

    def resize(self, batch: int) -> None:
        """Use batches of ``batch`` rows from the next step on."""
        self.config = config = self.config.changed("training", batch=batch, batch_gpu=batch)
        part = Part(rank=0, world_size=1, batch_gpu=batch)
        sampler = families.of(config).steps(config, self._dataset, self._cur_nimg, part).sampler
        workers = config.logging.workers
        loader = make_loader(self._dataset, sampler, num_workers=workers, device=self.device)
        self._batches = iter(loader)
        self._objective = self._make_objective(self._codec)

    def _make_objective(self, codec: Codec) -> Any:
        """Return the objective, which draws for a batch, prepares it and computes its loss."""
        return families.of(self.config).objective(self.config, self.network, codec)

    def _build(self) -> None:
        """Build the network, its weight averages and the optimizer."""
        training, network = self.config.training, build_network(self.config.model)
        self.network = network.to(memory_format=torch.channels_last).train().to(self.device)
        parameters = Parameters(self.network)
        self._optimizer = GuardedAdam(
            parameters,
            beta2=training.beta2,
            weight_decay=training.weight_decay,
            clip_grad=training.clip_grad,
        )
        self._ema = EMA(parameters)
        self._profiles = PowerEMA(parameters, training.ema_stds)
        self.average = list(self._ema.network.parameters())
        self._stats = StatsCollector()
        if training.compile:
            self.network.compile_parts(backend=self.compile_backend)

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
        self._backward(loss)
        clock.mark("backward")
        self._update_weights(loss)
        clock.mark("optimizer")
        beta = ema_beta(self._cur_nimg, step_nimg, training.ema_kimg, training.ema_rampup)
        self._update_average(beta)
        clock.mark("EMA")
        self._cur_nimg += step_nimg

    def _backward(self, loss: torch.Tensor) -> None:
        total = self._objective.total(loss)
        (total * (self.config.training.loss_scaling / self.config.step_nimg)).backward()

    def _update_weights(self, loss: torch.Tensor) -> None:
        self._stats.report("Loss/loss", loss)
        self._stats.report("Loss/grad_norm", self._optimizer.step(self.config.training.lr))
        self._optimizer.zero_grad()

    def _update_average(self, beta: float) -> None:
        self._ema.update(beta, self._optimizer.skipped)
        step_nimg = self.config.step_nimg
        self._profiles.update(self._cur_nimg + step_nimg, step_nimg)

    def state(self) -> dict[str, Any]:
        """Return the entries of a training state for the network, averages and optimizer."""
        return dict(
            net=self.network.state_dict(),
            ema=self._ema.network.state_dict(),
            ema_profiles=self._profiles.state_dict(),
            optimizer=self._optimizer.state_dict(),
        )

    def peak_memory(self, num_steps: int) -> str:
        """Make ``num_steps`` steps, and return the peak memory of one more in MiB, or "unknown"."""
        step = functools.partial(self.step, Clock(self.device))
        for _ in range(num_steps):
            step()
        growth = peak_growth(step, self.device)
        # What stays in memory between steps: weights, their EMA, and the optimizer's state.
        kept = [*self.network.parameters(), *self.average, self._optimizer.state_dict()]
        return "unknown" if growth is None else f"{(tensor_bytes(kept) + growth) / 2**20:.0f}"

    def time(self, num_steps: int) -> Turn:
        """Make ``num_steps`` steps, and return the mean time of one."""
        clock, cpu = Clock(self.device), CpuClock()
        clock.start()
        for _ in range(num_steps):
            self.step(clock)
        parts = {part: seconds / num_steps for part, seconds in clock.seconds().items()}
        return Turn(parts, Spent(sum(parts.values()), cpu.seconds() / num_steps))

    def forward_flops(self) -> int:
        """Return the floating-point operations of one network evaluation on one image."""
        return forward_flops(self.config)


class PlainTrainingSteps(TrainingSteps):
    """Plain steps: a plain network, with Adam and averages that update one parameter at a time."""

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
