"""Presets: whole runs by name, each row citing where its numbers come from."""

import dataclasses
import math
from typing import Any

from configs import diffit, feature_dit, latent_diffit, set_dit
from data.fewshot.sets import SetConfig
from data.images.augment import AugmentConfig
from data.images.dataset import DatasetConfig
from diffusion.guidance import DualGuidanceConfig, GuidanceConfig
from diffusion.precond import PrecondConfig
from diffusion.samplers import SamplingConfig
from dnnlib.config import did_you_mean
from evaluation.validation.config import ValidationConfig
from models.diffit import DiffiTConfig
from models.latent_diffit import LatentDiffiTConfig
from training.config import LoggingConfig, RunConfig, TrainingConfig
from training.feature_config import FeatureConfig


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
    model=diffit.MODELS["cifar10"],
    training=TrainingConfig(batch=512, lr=1e-3, augment=AugmentConfig(augment=0.12)),
    sampling=SamplingConfig(steps=18),
)
_FFHQ64 = RunConfig(
    preset="ffhq64",
    model=diffit.MODELS["ffhq64"],
    training=TrainingConfig(batch=256, lr=2e-4, augment=AugmentConfig(augment=0.15)),
    sampling=SamplingConfig(steps=40),
)
# Ours: a few CPU minutes on the 8x8 digits of scikit-learn. A mirrored digit is no digit, hence no
# augmentation.
_DIGITS = RunConfig(
    preset="digits",
    model=diffit.MODELS["digits"],
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


def _imagenet(name: str, *, batch: int, lr: float, guidance: GuidanceConfig) -> RunConfig:
    """Return a run of latent DiffiT on ImageNet.

    Batch, learning rate and a weight average of 0.9999 a step: DiffiT (arXiv 2312.02139), Appendix
    I.2. It names no optimizer and no duration; AdamW without decay or warm-up and mirrored images
    are DiT's (arXiv 2212.09748, section 4). Sampling and guidance are those of the published
    weights: 250 ancestral steps, guidance on the first three channels.
    """
    return RunConfig(
        preset=name,
        model=latent_diffit.MODELS[name],
        precond=PrecondConfig(precond="ddpm", learned_variance=True),
        data=DatasetConfig(cond=True, hflip=True),
        training=TrainingConfig(
            batch=batch,
            kimg=400_000,
            lr=lr,
            lr_rampup=0,
            ema_kimg=_half_life_kimg(0.9999, batch),
            ema_rampup=None,
            ema_stds=(0.05, 0.10),
            precision="auto",
            compile=None,
            augment=AugmentConfig(augment=0.0),
        ),
        logging=LoggingConfig(sample_batch=32),
        sampling=SamplingConfig(sampler="ddpm", grid="timesteps", steps=250),
        guidance=guidance,
    )


def _half_life_kimg(beta: float, batch: int) -> float:
    """Return the half-life of a weight average whose decay is ``beta`` a step of ``batch``."""
    return batch * math.log(0.5) / math.log(beta) / 1000


_GUIDANCE_256 = GuidanceConfig(
    cfg_scale=4.4, cfg_schedule="power-cosine", cfg_power=4.0, cfg_channels=3
)
_GUIDANCE_512 = GuidanceConfig(cfg_scale=1.49, cfg_channels=3)
_IMAGENET = {
    name: _imagenet(name, batch=256, lr=3e-4, guidance=_GUIDANCE_256)
    if model.resolution == 256
    else _imagenet(name, batch=512, lr=1e-4, guidance=_GUIDANCE_512)
    for name, model in latent_diffit.MODELS.items()
    if name.startswith("imagenet")
}
# Ours: a few CPU minutes on the latents of a small autoencoder of digits.
_DIGITS_LATENT = RunConfig(
    preset="digits-latent",
    model=latent_diffit.MODELS["digits-latent"],
    precond=PrecondConfig(precond="ddpm", learned_variance=True),
    data=DatasetConfig(cond=True),
    training=TrainingConfig(
        batch=128,
        kimg=300,
        lr=4e-3,
        lr_rampup=5,
        ema_kimg=10,
        augment=AugmentConfig(augment=0.0),
    ),
    logging=LoggingConfig(tick=20, snap=5, workers=0, sample_batch=256),
    sampling=SamplingConfig(sampler="ddpm", grid="timesteps", steps=50),
)


def _fsdm(name: str) -> RunConfig:
    """Return a run of a set-conditioned DiT on CIFAR-100's classes.

    Batch, learning rate, steps, noise levels and weight average are those of the settings that the
    project began with (few-shot diffusion models, arXiv 2205.15463, in their published form):
    32 sets a step, 250 timesteps, epsilon-prediction with the larger variance, x0 clipped, an
    average of 0.9999 a step.
    """
    model = set_dit.MODELS[name]
    nimg = 32 * model.sample_size
    return RunConfig(
        preset=name,
        model=model,
        precond=PrecondConfig(precond="ddpm", diffusion_steps=250),
        sets=SetConfig(),
        training=TrainingConfig(
            batch=32,
            kimg=300_000 * nimg / 1000,
            lr=1e-4,
            lr_rampup=0,
            ema_kimg=_half_life_kimg(0.9999, nimg),
            augment=AugmentConfig(augment=0.0),
        ),
        sampling=SamplingConfig(
            sampler="ddpm", grid="timesteps", steps=250, variance="large", clip_denoised=True
        ),
    )


_FSDM = {name: _fsdm(name) for name in set_dit.MODELS if name != "fsdm-digits"}
# Ours: a few CPU minutes on the digits 0 to 7, with 8 and 9 unseen. A six turned by half is a nine.
_FSDM_DIGITS = RunConfig(
    preset="fsdm-digits",
    model=set_dit.MODELS["fsdm-digits"],
    data=DatasetConfig(cache=True),
    sets=SetConfig(
        train_classes=("0-7",),
        test_classes=("8", "9"),
        held_out=20,
        class_transforms="dihedral",
        skip_transforms=("6:2",),
        hybrids=0.4,
        context_drop=0.1,
    ),
    training=TrainingConfig(
        batch=32,
        kimg=800,
        lr=2e-3,
        lr_rampup=40,
        ema_kimg=20,
        augment=AugmentConfig(augment=0.0),
    ),
    logging=LoggingConfig(tick=40, snap=4, workers=0, sample_batch=256),
    sampling=SamplingConfig(sampler="dpmpp_2m", steps=16),
)


def _nanodit(name: str, **changes: Any) -> RunConfig:
    """Return a run of a feature-conditioned DiT; ``changes`` are to its training settings.

    Flow matching with AdamW as the project's first users ran it: 256 images a step, warm-up over
    500 steps, a cosine down to 1e-6, gradients clipped at 1; 25 Euler steps.
    """
    settings = dict(batch=256, kimg=12_800, lr=3e-4, lr_rampup=128, weight_decay=0.03)
    settings.update(beta2=0.95, lr_schedule="cosine", clip_grad=1.0, ema_kimg=500, precision="auto")
    return RunConfig(
        preset=name,
        model=feature_dit.MODELS[name],
        precond=PrecondConfig(precond="flow"),
        features=FeatureConfig(),
        training=TrainingConfig(**{**settings, **changes}, augment=AugmentConfig(augment=0.0)),
        logging=LoggingConfig(tick=25.6, snap=20, workers=4, sample_batch=4),
        sampling=SamplingConfig(sampler="euler", grid="time", steps=25),
        guidance=None,
        dual_guidance=DualGuidanceConfig(),
        validation=ValidationConfig(),
    )


_NANODIT_TINY = _nanodit(
    "nanodit-tiny", batch=16, kimg=32, lr=2e-3, lr_rampup=1, ema_kimg=1, precision="fp32"
)
_NANODIT_TINY = dataclasses.replace(
    _NANODIT_TINY, logging=LoggingConfig(tick=1.6, snap=10, workers=0, sample_batch=16)
)

PRESETS: dict[str, Preset] = {
    "cifar10": Preset(
        run=_CIFAR10, num_classes=10, source="DiffiT Appendix I.1; EDM Table 7 (CIFAR-10)"
    ),
    "cifar10-l4": Preset(
        run=dataclasses.replace(_CIFAR10, preset="cifar10-l4", model=diffit.MODELS["cifar10-l4"]),
        num_classes=10,
        source="DiffiT Appendix H.1: four residual blocks a stage",
    ),
    "ffhq64": Preset(
        run=_FFHQ64, num_classes=0, source="DiffiT Appendix H.1 and I.1; EDM Table 7 (FFHQ)"
    ),
    "digits": Preset(run=_DIGITS, num_classes=10, source="ours, for CPUs"),
    **{
        name: Preset(
            run=run, num_classes=1000, source="DiffiT section 5.2, Appendix H.2 and I.2; DiT"
        )
        for name, run in _IMAGENET.items()
    },
    "digits-latent": Preset(run=_DIGITS_LATENT, num_classes=10, source="ours, for CPUs"),
    **{
        name: Preset(run=run, num_classes=60, source="few-shot diffusion models, arXiv 2205.15463")
        for name, run in _FSDM.items()
    },
    "fsdm-digits": Preset(run=_FSDM_DIGITS, num_classes=8, source="ours, for CPUs"),
    **{
        name: Preset(run=_nanodit(name), num_classes=0, source="NanoDiT, as first users ran it")
        for name in ("nanodit", "nanodit-768")
    },
    "nanodit-tiny": Preset(run=_NANODIT_TINY, num_classes=0, source="ours, for CPUs"),
}

# What --resolution alone means.
PRESET_OF_RESOLUTION = {32: "cifar10", 64: "ffhq64", 256: "imagenet256", 512: "imagenet512"}


def get_preset(name: str) -> Preset:
    """Return a preset; raises ValueError that suggests the nearest name."""
    if name not in PRESETS:
        raise ValueError(
            f"--preset: got {name!r}; accepted: {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]


def preset_of_model(name: str, mode_conditioning: str | None = None) -> str:
    """Return the preset that a name stands for: its own, or that of a model of earlier code.

    ``mode_conditioning`` decides between those of few-shot diffusion models.
    """
    if name.replace("-", "_") in ("vfsddpm_jax", "vfsddpm"):
        return "fsdm-cifar100-lag" if mode_conditioning == "lag" else "fsdm-depth6"
    return name


def get_diffit_config(name: str) -> DiffiTConfig | LatentDiffiTConfig:
    """Return the model configuration of a DiffiT preset, such as ``cifar10``.

    Raises ValueError for an unknown name.
    """
    models = {**diffit.MODELS, **latent_diffit.MODELS}
    if name not in models:
        raise ValueError(
            f"Unknown DiffiT preset {name!r}; accepted: {', '.join(models)}."
            f"{did_you_mean(name, models)}"
        )
    return models[name]


def get_training_config(name: str) -> TrainingConfig:
    """Return the training settings of a preset, such as ``cifar10``."""
    return get_preset(name).run.training
