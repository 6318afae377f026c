"""Presets of DiffiT in image space."""

import dataclasses

from configs.presets import Preset
from data.images.config import AugmentConfig, DatasetConfig
from diffusion.config import PrecondConfig, SamplingConfig
from families.runs import ImageRun
from models.architectures.diffit import DiffiTConfig
from training.config import LoggingConfig, TrainingConfig

# Widths and stages: DiffiT (arXiv 2312.02139), Appendix H.1 and Table S.2; windows: Appendix I.1;
# time token of width 512: section 5.1. The paper gives no number of heads for image space; ours is
# 4. Dropout: EDM (arXiv 2206.00364), Table 7.
MODELS: dict[str, DiffiTConfig] = {
    # CIFAR-10 according to Appendix I.1: two residual blocks a stage.
    "cifar10": DiffiTConfig(resolution=32, num_stages=3, num_blocks=(2,), window=4, dropout=0.13),
    # According to Appendix H.1: four.
    "cifar10-l4": DiffiTConfig(
        resolution=32, num_stages=3, num_blocks=(4,), window=4, dropout=0.13
    ),
    # Appendix H.1: four residual blocks a stage; I.1: windows of 8.
    "ffhq64": DiffiTConfig(resolution=64, num_stages=4, num_blocks=(4,), window=8, dropout=0.05),
    # Ours: one stage of patches with attention over the whole image, so that a laptop trains it in
    # half an hour. With more stages or blocks it takes longer to learn details (docs/photos.md).
    # Without query-key normalisation, attention scores grow beyond 200 at its learning rate.
    "photos64": DiffiTConfig(
        **dict(resolution=64, patch_size=4, num_stages=1, num_blocks=(4,), window=16, time_dim=128),
        **dict(base_dim=128, num_heads=4, mlp_ratio=2.0, qk_norm=True),
    ),
    # Ours: small enough to train in a few CPU minutes, for scikit-learn's 8x8 grey digits.
    "digits": DiffiTConfig(
        **dict(resolution=8, img_channels=1, num_classes=10, num_stages=2, num_blocks=(1,)),
        **dict(base_dim=32, hidden_dim=96, num_heads=2, window=4, time_dim=128),
    ),
}

# Batch, learning rate and duration of EDM's CIFAR-10 and FFHQ runs (arXiv 2206.00364, Table 7),
# which DiffiT adopts (arXiv 2312.02139, Appendix I.1); Heun with 18 and 40 steps (section 5.1).
_CIFAR10 = ImageRun(
    preset="cifar10",
    model=MODELS["cifar10"],
    training=TrainingConfig(batch=512, lr=1e-3, augment=AugmentConfig(augment=0.12)),
    sampling=SamplingConfig(steps=18),
)
_FFHQ64 = ImageRun(
    preset="ffhq64",
    model=MODELS["ffhq64"],
    training=TrainingConfig(batch=256, lr=2e-4, augment=AugmentConfig(augment=0.15)),
    sampling=SamplingConfig(steps=40),
)
# Ours: half an hour on one CPU core, on crops of a few photographs (docs/photos.md). Small batches
# allow many steps: their number determines when details are learned, and the schedule removes the
# noise of small batches in the end. Images are mirrored but not augmented, because a short run has
# to spend its steps on plain images. The distribution of noise levels is EDM2's (arXiv 2312.02696)
# for 64x64 images: EDM's seldom reaches the levels that determine the colours of a whole image.
_PHOTOS64 = ImageRun(
    preset="photos64",
    model=MODELS["photos64"],
    precond=PrecondConfig(P_mean=-0.8, P_std=1.6),
    data=DatasetConfig(hflip=True, cache=True),
    training=TrainingConfig(
        **dict(batch=4, kimg=66, lr=1e-3, lr_rampup=0.3, lr_schedule="cosine", beta2=0.99),
        ema_kimg=2,
        augment=AugmentConfig(augment=0.0),
    ),
    logging=LoggingConfig(tick=2.2, snap=3, workers=0),
    sampling=SamplingConfig(sampler="dpmpp_2m", steps=12),
)
# Ours: a few CPU minutes on scikit-learn's 8x8 digits, without augmentation, because a mirrored
# digit is not a digit.
_DIGITS = ImageRun(
    preset="digits",
    model=MODELS["digits"],
    data=DatasetConfig(cond=True, cache=True),
    training=TrainingConfig(
        batch=128, kimg=154, lr=2e-3, lr_rampup=5, ema_kimg=10, augment=AugmentConfig(augment=0.0)
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
    "photos64": Preset(run=_PHOTOS64, num_classes=0, source="ours, for CPUs"),
    "digits": Preset(run=_DIGITS, num_classes=10, source="ours, for CPUs"),
}
