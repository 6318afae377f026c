"""Presets of latent DiffiT."""

from configs.presets import Preset, half_life_kimg
from data.images.config import AugmentConfig, DatasetConfig
from diffusion.config import GuidanceConfig, PrecondConfig, SamplingConfig
from families.runs import LatentRun
from models.architectures.latent_diffit import LatentDiffiTConfig
from training.config import LoggingConfig, TrainingConfig

_IMAGENET_CLASSES = 1000
_SOURCE = "DiffiT section 5.2, Appendix H.2 and I.2; DiT"

# Depth 28 is that of the published weights and of Table 9 of the DiffiT paper (arXiv 2312.02139,
# 561M parameters); its Appendix H.2 says 30. Widths, depths and heads of the smaller models are
# those of DiT-S/2, B/2 and L/2 (arXiv 2212.09748, Table 1).
_SIZES: dict[str, dict[str, int]] = {
    "": dict(num_blocks=28, hidden_dim=1152, num_heads=16),
    "-d30": dict(num_blocks=30, hidden_dim=1152, num_heads=16),
    "-l": dict(num_blocks=24, hidden_dim=1024, num_heads=16),
    "-b": dict(num_blocks=12, hidden_dim=768, num_heads=12),
    "-s": dict(num_blocks=12, hidden_dim=384, num_heads=6),
}

MODELS: dict[str, LatentDiffiTConfig] = {
    f"imagenet{resolution}{size}": LatentDiffiTConfig(
        resolution=resolution,
        num_classes=_IMAGENET_CLASSES,
        learned_variance=True,
        latent_scale=0.18215,  # That of Stable Diffusion's autoencoders.
        **settings,
    )
    for resolution, sizes in ((256, _SIZES), (512, ("", "-d30")))
    for size, settings in ((size, _SIZES[size]) for size in sizes)
}
# Ours: small enough to train in a few CPU minutes, on latents of 8x8 grey digits.
MODELS["digits-latent"] = LatentDiffiTConfig(
    **dict(resolution=8, img_channels=1, num_classes=10, latent_channels=4, latent_downsampling=2),
    **dict(num_blocks=3, hidden_dim=64, num_heads=4, patch_size=1, base_dim=32),
    learned_variance=True,
)


def _imagenet(name: str, *, batch: int, lr: float, guidance: GuidanceConfig) -> LatentRun:
    """Return a run of latent DiffiT on ImageNet.

    Batch, learning rate and an EMA decay of 0.9999 per step come from DiffiT (arXiv 2312.02139),
    Appendix I.2. The paper names neither optimizer nor duration; AdamW without weight decay or
    warm-up, and mirrored images, come from DiT (arXiv 2212.09748, section 4). Sampling and guidance
    are those of the published weights: 250 ancestral steps, guidance on the first three channels.
    """
    return LatentRun(
        preset=name,
        model=MODELS[name],
        precond=PrecondConfig(precond="ddpm", learned_variance=True),
        data=DatasetConfig(cond=True, hflip=True),
        training=TrainingConfig(
            batch=batch,
            kimg=400_000,
            lr=lr,
            lr_rampup=0,
            ema_kimg=half_life_kimg(0.9999, batch),
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


_GUIDANCE_256 = GuidanceConfig(
    cfg_scale=4.4, cfg_schedule="power-cosine", cfg_power=4.0, cfg_channels=3
)
_GUIDANCE_512 = GuidanceConfig(cfg_scale=1.49, cfg_channels=3)
_IMAGENET = {
    name: _imagenet(name, batch=256, lr=3e-4, guidance=_GUIDANCE_256)
    if model.resolution == 256
    else _imagenet(name, batch=512, lr=1e-4, guidance=_GUIDANCE_512)
    for name, model in MODELS.items()
    if name.startswith("imagenet")
}
# Ours: a few CPU minutes on the latents of a small autoencoder of digits.
_DIGITS_LATENT = LatentRun(
    preset="digits-latent",
    model=MODELS["digits-latent"],
    precond=PrecondConfig(precond="ddpm", learned_variance=True),
    data=DatasetConfig(cond=True),
    training=TrainingConfig(
        batch=128, kimg=300, lr=4e-3, lr_rampup=5, ema_kimg=10, augment=AugmentConfig(augment=0.0)
    ),
    logging=LoggingConfig(tick=20, snap=5, workers=0, sample_batch=256),
    sampling=SamplingConfig(sampler="ddpm", grid="timesteps", steps=50),
)


PRESETS: dict[str, Preset] = {
    **{
        name: Preset(run=run, num_classes=_IMAGENET_CLASSES, source=_SOURCE)
        for name, run in _IMAGENET.items()
    },
    "digits-latent": Preset(run=_DIGITS_LATENT, num_classes=10, source="ours, for CPUs"),
}
