"""What a run on sets says of itself: its configuration, and warnings about its context."""

import itertools

import torch

from models import build_network
from models.set_dit import SetDiTConfig
from torch_utils.misc import count_parameters
from training.config import RunConfig
from training.telemetry import Stats

# Nothing is said of the first steps: the encoder has no gradient in the first two, since the
# modulation and the output begin at zero, and little in those after.
_FIRST_STEP = 200
_SMALL_NORM = 1e-3  # Of the square root of the width, the length of a vector of unit variance.
_SMALL_ENCODER_GRADIENT = 1e-3  # Of the gradient of the DiT.
_VANISHING = 0.5  # Of the gradient of the next block, for each of at least three.

_REMEDIES = {
    "context": "the context is near zero and is not being used: raise the learning rate (--lr=2e-4 "
    "instead of 1e-4), begin with a stronger modulation, or pre-train the encoder",
    "encoder": "the encoder's gradient is far below the DiT's, so that the encoder hardly learns: "
    "raise the learning rate, or lower the number of blocks of the DiT",
    "layers": "the gradient falls exponentially from block to block and vanishes: use fewer blocks "
    "(--depth=6) of a larger width",
}


def describe_sets(config: RunConfig) -> dict[str, str]:
    """Return rows that tell how a run's model is conditioned on sets; none for other runs."""
    model = config.model
    if not isinstance(model, SetDiTConfig):
        return {}
    is_lag = model.mode_conditioning == "lag"
    tokens = f"{model.num_context_tokens}, " if is_lag else ""
    match = "equals hdim" if model.context_dim == model.encoder_dim else "projected from hdim"
    tokenizer = f", {model.encoder_tokenizer}" if model.encoder_mode == "vit_set" else ""
    left_out = "each image from the others" if model.leave_one_out else "each image from all"
    how = "cross-attention to tokens" if is_lag else "a vector modulates every block"
    precond = config.precond
    schedule = precond.precond
    if schedule == "ddpm":
        variance = "learned" if precond.learned_variance else "fixed"
        schedule = f"ddpm, {precond.diffusion_steps} steps, linear; variance {variance}"
    context = model.mode_context
    if model.mode_context == "variational":
        context += f", weight {config.sets.kl_weight:g} after {config.sets.kl_rampup:g} kimg"
    return {
        "conditioning": f"{model.mode_conditioning}: {how}",
        "context": f"(b*n, {tokens}{model.context_dim}); context_channels {model.context_dim} "
        f"{match} {model.encoder_dim}",
        "patch tokens": f"{model.grid**2} per {model.resolution}x{model.resolution} image",
        "sets": f"n = {model.sample_size}, context of {model.context_size} ({left_out})",
        "encoder": f"{model.encoder_mode}{tokenizer}, width {model.encoder_dim}, depth "
        f"{model.encoder_depth}, heads {model.encoder_heads} x {model.encoder_dim_head}, mlp ratio "
        f"{model.encoder_mlp_ratio:g}, pool {model.encoder_pool}, dropout "
        f"{model.encoder_dropout:g}, {'with' if model.encoder_time else 'without'} noise level",
        "DiT": f"width {model.hidden_dim}, depth {model.num_blocks}, heads {model.num_heads}, mlp "
        f"ratio {model.mlp_ratio:g}, patch {model.patch_size}",
        "context mode": context,
        "diffusion": schedule,
        "optimizer": f"lr {config.training.lr:g}, weight decay {config.training.weight_decay:g}, "
        f"average of {config.training.ema_kimg:g} kimg half-life",
        "modules": _module_sizes(model),
    }


def _module_sizes(model: SetDiTConfig) -> str:
    with torch.device("meta"):
        network = build_network(model)
    parts = {"DiT": network.backbone, "encoder": network.conditioner.encoder}
    sizes = {name: count_parameters(module) for name, module in parts.items()}
    rest = count_parameters(network) - sum(sizes.values())
    sizes["null and labels" if model.mode_context == "deterministic" else "rest"] = rest
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items())


class Watch:
    """Warns when the diagnostics of a run say that its context is not learned.

    A warning is given when its reason appears, and again only after that has gone.
    """

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model
        self._known: set[str] = set()

    def warnings(self, fields: Stats, step: int) -> list[str]:
        """Return the new warnings of a tick that ends after ``step`` optimizer steps."""
        if "debug/context_norm" not in fields or step < _FIRST_STEP:
            return []
        mean = {name: value["mean"] for name, value in fields.items()}
        holds = {
            "context": mean["debug/context_norm"] < _SMALL_NORM * self._model.context_dim**0.5,
            "encoder": mean.get("debug/encoder_grad_norm", 0.0)
            < _SMALL_ENCODER_GRADIENT * mean.get("debug/dit_grad_norm", 0.0),
            "layers": self._vanishes(mean),
        }
        found = {name for name, value in holds.items() if value}
        fresh = sorted(found - self._known)
        self._known = found
        return [f"Warning: {_REMEDIES[name]}." for name in fresh]

    def _vanishes(self, mean: dict[str, float]) -> bool:
        names = [f"debug/dit_layer_{i}_grad_norm" for i in range(self._model.num_blocks)]
        norms = [mean[name] for name in names if name in mean]
        if len(norms) < 3:
            return False
        ratios = [low / max(high, 1e-30) for low, high in itertools.pairwise(norms)]
        backward = all(ratio < _VANISHING for ratio in ratios)
        return backward or all(ratio > 1 / _VANISHING for ratio in ratios)
