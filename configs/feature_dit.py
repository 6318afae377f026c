"""Presets of feature-conditioned DiT models (NanoDiT)."""

import dataclasses
from typing import Any

from configs.presets import Preset
from data.images.config import AugmentConfig
from diffusion.config import PrecondConfig, SamplingConfig
from families.runs import FeatureRun
from models.architectures.feature_dit import FeatureDiTConfig
from training.config import LoggingConfig, TrainingConfig

# Width, blocks and heads of NanoDiT as the project's first users ran it.
MODELS: dict[str, FeatureDiTConfig] = {
    "nanodit": FeatureDiTConfig(hidden_dim=384, num_blocks=12, num_heads=6),
    "nanodit-768": FeatureDiTConfig(hidden_dim=768, num_blocks=18, num_heads=12),
    # Ours: small enough to train in a few CPU minutes on small images.
    "nanodit-tiny": FeatureDiTConfig(hidden_dim=96, num_blocks=4, num_heads=4),
}


def _nanodit(name: str, **changes: Any) -> FeatureRun:
    """Return a run of the feature-conditioned DiT ``name``, with changes to its training settings.

    Flow matching with AdamW as the project's first users ran it: 256 images per step, warm-up over
    500 steps, a cosine schedule down to 1e-6, gradients clipped to norm 1; 25 Euler steps.
    """
    settings = dict(batch=256, kimg=12_800, lr=3e-4, lr_rampup=128, weight_decay=0.03)
    settings.update(beta2=0.95, lr_schedule="cosine", clip_grad=1.0, ema_kimg=500, precision="auto")
    return FeatureRun(
        preset=name,
        model=MODELS[name],
        precond=PrecondConfig(precond="flow"),
        training=TrainingConfig(**{**settings, **changes}, augment=AugmentConfig(augment=0.0)),
        logging=LoggingConfig(tick=25.6, snap=20, workers=4, sample_batch=4),
        sampling=SamplingConfig(sampler="euler", grid="time", steps=25),
    )


_NANODIT_TINY = _nanodit(
    "nanodit-tiny", batch=16, kimg=32, lr=2e-3, lr_rampup=1, ema_kimg=1, precision="fp32"
)
_NANODIT_TINY = dataclasses.replace(
    _NANODIT_TINY, logging=LoggingConfig(tick=1.6, snap=10, workers=0, sample_batch=16)
)


PRESETS: dict[str, Preset] = {
    **{
        name: Preset(run=_nanodit(name), num_classes=0, source="NanoDiT, as first users ran it")
        for name in ("nanodit", "nanodit-768")
    },
    "nanodit-tiny": Preset(run=_NANODIT_TINY, num_classes=0, source="ours, for CPUs"),
}
