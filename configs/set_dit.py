"""Presets of set-conditioned DiT models."""

import dataclasses

from configs.presets import Preset, half_life_kimg
from data.fewshot.config import SetConfig
from data.images.config import AugmentConfig, DatasetConfig
from diffusion.config import PrecondConfig, SamplingConfig
from families.runs import SetRun
from models.architectures.set_dit import SetDiTConfig
from training.config import LoggingConfig, TrainingConfig

# Widths, depths and heads as the project's first users ran them on CIFAR-100; sets of six images,
# each generated from the other five. Context and encoder are as wide as the DiT unless stated.
_FILM = SetDiTConfig(hidden_dim=468, num_blocks=6, num_heads=9, hdim=256, mode_conditioning="film")
MODELS: dict[str, SetDiTConfig] = {
    "fsdm-cifar100-film": _FILM,
    "fsdm-cifar100-lag": dataclasses.replace(_FILM, mode_conditioning="lag", encoder_depth=3),
    "fsdm-depth6": SetDiTConfig(hidden_dim=450, num_blocks=6, num_heads=9),
    "fsdm-depth12": SetDiTConfig(hidden_dim=384, num_blocks=12, num_heads=6),
    "fsdm-option-a": SetDiTConfig(hidden_dim=440, num_blocks=6, num_heads=8),
    "fsdm-option-b": SetDiTConfig(hidden_dim=420, num_blocks=6, num_heads=6),
    "fsdm-option-c": SetDiTConfig(hidden_dim=512, num_blocks=4, num_heads=8, hdim=512),
    # Ours: small enough to train in a few CPU minutes, on 8x8 grey digits.
    "fsdm-digits": SetDiTConfig(
        **dict(resolution=8, img_channels=1, patch_size=4),
        **dict(hidden_dim=96, num_blocks=3, num_heads=4),
        **dict(encoder_tokenizer="per_sample_mean", encoder_pool="mean", encoder_depth=2),
        **dict(encoder_heads=4, encoder_dim_head=24, encoder_mlp_ratio=2.0),
    ),
    # Ours too, on 16x16 letters.
    "fsdm-glyphs": SetDiTConfig(
        **dict(resolution=16, img_channels=1, patch_size=8),
        **dict(hidden_dim=128, num_blocks=3, num_heads=4, warm_start_adaln=True),
        **dict(encoder_tokenizer="per_sample_mean", encoder_pool="mean", encoder_depth=1),
        **dict(encoder_heads=4, encoder_dim_head=32, encoder_mlp_ratio=2.0),
    ),
}


def _fsdm(name: str) -> SetRun:
    """Return a run of the set-conditioned DiT ``name`` on the classes of CIFAR-100.

    Batch, learning rate, steps, noise levels and weight average are the settings that the project
    began with (the published code of few-shot diffusion models, arXiv 2205.15463): 32 sets per
    step, 250 timesteps, epsilon-prediction with the larger variance, x0 clipped, and an EMA decay
    of 0.9999 per step.
    """
    model = MODELS[name]
    nimg = 32 * model.sample_size
    return SetRun(
        preset=name,
        model=model,
        precond=PrecondConfig(precond="ddpm", diffusion_steps=250),
        sets=SetConfig(),
        training=TrainingConfig(
            batch=32,
            kimg=300_000 * nimg / 1000,
            lr=1e-4,
            lr_rampup=0,
            ema_kimg=half_life_kimg(0.9999, nimg),
            augment=AugmentConfig(augment=0.0),
        ),
        sampling=SamplingConfig(
            sampler="ddpm", grid="timesteps", steps=250, variance="large", clip_denoised=True
        ),
    )


_OURS = ("fsdm-digits", "fsdm-glyphs")
_FSDM = {name: _fsdm(name) for name in MODELS if name not in _OURS}
# Ours: a few CPU minutes on the digits 0 to 7, with 8 and 9 unseen. The rotation of a six by half a
# turn is skipped, because it shows a nine.
_FSDM_DIGITS = SetRun(
    preset="fsdm-digits",
    model=MODELS["fsdm-digits"],
    data=DatasetConfig(cache=True),
    sets=SetConfig(
        **dict(train_classes=("0-7",), test_classes=("8", "9"), held_out=20),
        **dict(class_transforms="dihedral", skip_transforms=("6:2",), hybrids=0.4),
        rules_for=tuple("0123456789"),
        context_drop=0.1,
    ),
    training=TrainingConfig(
        batch=32, kimg=800, lr=2e-3, lr_rampup=40, ema_kimg=20, augment=AugmentConfig(augment=0.0)
    ),
    logging=LoggingConfig(tick=40, snap=4, workers=0, sample_batch=256),
    sampling=SamplingConfig(sampler="dpmpp_2m", steps=16),
)
# Ours: a few CPU minutes on the letters of matplotlib's fonts, with Armenian and Georgian unseen.
_FSDM_GLYPHS = dataclasses.replace(
    _FSDM_DIGITS,
    preset="fsdm-glyphs",
    model=MODELS["fsdm-glyphs"],
    # Higher noise levels than EDM's, as it is there that the identity of a letter is determined.
    precond=PrecondConfig(P_mean=-0.4, sigma_data=0.8),
    sets=SetConfig(held_out=6, context_drop=0.1, pretrain_encoder=20),
    training=dataclasses.replace(
        _FSDM_DIGITS.training,
        **dict(batch=16, kimg=240, ema_kimg=5),
        **dict(lr=2e-3, lr_rampup=5, lr_schedule="cosine"),
    ),
    logging=dataclasses.replace(_FSDM_DIGITS.logging, tick=20, snap=10),
)

PRESETS: dict[str, Preset] = {
    **{
        name: Preset(run=run, num_classes=60, source="few-shot diffusion models, arXiv 2205.15463")
        for name, run in _FSDM.items()
    },
    "fsdm-digits": Preset(run=_FSDM_DIGITS, num_classes=8, source="ours, for CPUs"),
    "fsdm-glyphs": Preset(run=_FSDM_GLYPHS, num_classes=1_000, source="ours, for CPUs"),
}
