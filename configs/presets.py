"""Presets: whole runs by name, each row citing where its numbers come from."""

import dataclasses

from configs.diffit import MODELS
from diffusion.samplers import SamplingConfig
from dnnlib.config import did_you_mean
from training.augment import AugmentConfig
from training.config import LoggingConfig, RunConfig, TrainingConfig
from training.dataset import DatasetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A run's configuration, and what is usually known of its data before it is opened."""

    run: RunConfig
    num_classes: int  # Of the dataset that the preset is named after, used with --cond.
    source: str


# Batch, learning rate and duration of EDM's CIFAR-10 and FFHQ runs (arXiv 2206.00364, Table 7),
# which DiffiT adopts (arXiv 2312.02139, Appendix I.1); Heun with 18 and 40 steps (section 5.1).
_CIFAR10 = RunConfig(
    preset="cifar10",
    model=MODELS["cifar10"],
    training=TrainingConfig(batch=512, lr=1e-3, augment=AugmentConfig(augment=0.12)),
    sampling=SamplingConfig(steps=18),
)
_FFHQ64 = RunConfig(
    preset="ffhq64",
    model=MODELS["ffhq64"],
    training=TrainingConfig(batch=256, lr=2e-4, augment=AugmentConfig(augment=0.15)),
    sampling=SamplingConfig(steps=40),
)
# Ours: a few CPU minutes on the 8x8 digits of scikit-learn. A mirrored digit is no digit, hence no
# augmentation.
_DIGITS = RunConfig(
    preset="digits",
    model=MODELS["digits"],
    data=DatasetConfig(cond=True, cache=True),
    training=TrainingConfig(
        batch=128,
        kimg=154,
        lr=2e-3,
        lr_rampup=5,
        ema_kimg=10,
        augment=AugmentConfig(augment=0.0),
    ),
    logging=LoggingConfig(tick=8, snap=10, workers=0, sample_batch=256),
    sampling=SamplingConfig(sampler="dpmpp_2m", steps=16),
)

PRESETS: dict[str, Preset] = {
    "cifar10": Preset(
        run=_CIFAR10, num_classes=10, source="DiffiT Appendix I.1; EDM Table 7 (CIFAR-10)"
    ),
    "cifar10-l4": Preset(
        run=dataclasses.replace(_CIFAR10, preset="cifar10-l4", model=MODELS["cifar10-l4"]),
        num_classes=10,
        source="DiffiT Appendix H.1: four residual blocks a stage",
    ),
    "ffhq64": Preset(
        run=_FFHQ64, num_classes=0, source="DiffiT Appendix H.1 and I.1; EDM Table 7 (FFHQ)"
    ),
    "digits": Preset(run=_DIGITS, num_classes=10, source="ours, for CPUs"),
}

# What --resolution alone means.
PRESET_OF_RESOLUTION = {32: "cifar10", 64: "ffhq64"}


def get_preset(name: str) -> Preset:
    """Return a preset; raises ValueError that suggests the nearest name."""
    if name not in PRESETS:
        raise ValueError(
            f"--preset: got {name!r}; accepted: {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]


def get_training_config(name: str) -> TrainingConfig:
    """Return the training settings of a preset, such as ``cifar10``."""
    return get_preset(name).run.training
