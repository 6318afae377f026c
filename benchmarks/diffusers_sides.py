"""Training and sampling with the DiT of the diffusers package, written as its users write them."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kinds import dit_size
from benchmarks.steps import TrainingSteps
from data.images.dataset import Cond
from diffusion.denoiser import AUTOCAST_DTYPES
from dnnlib.errors import refusal
from encoders.loading import quiet
from torch_utils import rng
from torch_utils.misc import count_flops, count_parameters
from training.config import RunConfig
from training.family import Codec


def check_diffusers(config: RunConfig) -> None:
    """Raise ValueError if diffusers is missing, or its DiT cannot match the run's model."""
    dit_size(config)
    _diffusers()


def _diffusers() -> Any:
    """Return the diffusers package, with the parts that this module uses already imported."""
    try:
        with quiet("diffusers"):
            import diffusers

            _ = diffusers.DiTTransformer2DModel  # Attributes are imported on first access.
            import diffusers.training_utils
    except ModuleNotFoundError as error:
        raise refusal(
            "--against",
            "diffusers",
            but=f"the package {error.name} is not installed",
            remedy=f'pip install {error.name}, or pip install -e ".[latents]"',
        ) from None
    return diffusers


def build_dit(config: RunConfig) -> torch.nn.Module:
    """Return diffusers' DiT with the width, depth, heads and tokens of a run's model."""
    with quiet("diffusers"):
        return _diffusers().DiTTransformer2DModel(**dit_size(config))


def _autocast(config: RunConfig, device: torch.device) -> contextlib.AbstractContextManager:
    dtype = AUTOCAST_DTYPES[config.training.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class DiffusersTrainingSteps(TrainingSteps):
    """Training steps of diffusers' DiT: DDPM noise prediction, AdamW, clipping and EMAModel."""

    def _build(self) -> None:
        training = self.config.training
        self.network = build_dit(self.config).train().to(self.device)
        params = list(self.network.parameters())
        self._optimizer = torch.optim.AdamW(
            params, lr=training.lr, weight_decay=training.weight_decay
        )
        self._ema = _diffusers().training_utils.EMAModel(params, decay=0.9999)
        self.average = self._ema.shadow_params

    def _make_objective(self, codec: Codec) -> "_NoisePrediction":
        autocast = functools.partial(_autocast, self.config, self.device)
        return _NoisePrediction(self.network, codec, autocast)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _update_weights(self, loss: Tensor) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _update_average(self, beta: float) -> None:
        self._ema.step(self.network.parameters())

    def forward_flops(self) -> int:
        with torch.device("meta"):
            network = build_dit(self.config)
            x = torch.empty(1, *self.config.model.input_shape)
            step, label = torch.zeros(2, 1, dtype=torch.int64)
            return count_flops(lambda: network(x, step, class_labels=label))


class _NoisePrediction:
    """The mean squared error of the predicted noise, at timesteps drawn uniformly."""

    def __init__(self, network: torch.nn.Module, codec: Codec, autocast: Callable[[], Any]) -> None:
        self._network, self._codec, self._autocast = network, codec, autocast
        self._scheduler = _diffusers().DDPMScheduler(num_train_timesteps=1000)

    def draw(self, step: rng.Step) -> Any:
        """Return the codec's random draws; the loss draws noise and timesteps itself."""
        return self._codec.draw(step)

    def prepare(
        self, images: Tensor, cond: Cond, drawn: Any, device: torch.device
    ) -> tuple[Tensor, Cond]:
        cond = {name: value.to(device, non_blocking=True) for name, value in cond.items()}
        return self._codec.encode(images.to(device, non_blocking=True), cond, drawn)

    def __call__(self, images: Tensor, cond: Cond, drawn: Any) -> Tensor:
        noise, num = torch.randn_like(images), len(images)
        steps = torch.randint(0, 1000, (num,), device=images.device)
        noisy = self._scheduler.add_noise(images, noise, steps)
        with self._autocast():
            output = self._network(noisy, steps, class_labels=_labels(cond, steps)).sample
        return functional.mse_loss(output[:, : images.shape[1]].float(), noise)


def _labels(cond: Cond, steps: Tensor) -> Tensor:
    return cond["label"] if "label" in cond else torch.zeros_like(steps)


def make_sampler(
    config: RunConfig, device: torch.device
) -> tuple[str, Callable[[int], Tensor], int]:
    """Return guided sampling with diffusers: a name, a sampling function and a parameter count.

    The function maps a number of images to samples [num, *input_shape]. The scheduler is DDPM if
    the run samples with ``ddpm``, and DDIM otherwise. The number of steps is the run's, and each
    step evaluates a doubled batch once.
    """
    kind = "DDPM" if config.sampling.sampler == "ddpm" else "DDIM"
    scheduler = getattr(_diffusers(), f"{kind}Scheduler")(clip_sample=False)
    network = build_dit(config).eval().requires_grad_(False).to(device)
    model, scale = config.model, config.guidance.cfg_scale

    @torch.no_grad()
    def sample(num: int) -> Tensor:
        scheduler.set_timesteps(config.sampling.steps, device=device)
        x = torch.randn(num, *model.input_shape, device=device)
        classes = torch.arange(num, device=device) % max(model.num_classes, 1)
        classes = torch.cat([classes, torch.full_like(classes, max(model.num_classes, 1))])
        for step in scheduler.timesteps:
            steps = step.expand(2 * num)
            with _autocast(config, device):
                output = network(torch.cat([x, x]), steps, class_labels=classes).sample
            given, without = output[:, : x.shape[1]].float().chunk(2)
            x = scheduler.step(without + scale * (given - without), step, x).prev_sample
        return x

    return f"diffusers, {kind}", sample, count_parameters(network)
