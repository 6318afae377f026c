"""Latent DiffiT models."""

from models.latent_diffit import LatentDiffiTConfig

# The classes of ImageNet, with the null label beside them.
_IMAGENET_CLASSES = 1000

# Depth 28 is what the published weights have, and what DiffiT's Table 9 counts (arXiv 2312.02139:
# 561M parameters); Appendix H.2 says 30. Widths, depths and heads of the smaller ones are those of
# DiT-S/2, B/2 and L/2 (arXiv 2212.09748, Table 1).
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
        latent_scale=0.18215,  # Of Stable Diffusion's autoencoders.
        **settings,
    )
    for resolution, sizes in ((256, _SIZES), (512, ("", "-d30")))
    for size, settings in ((size, _SIZES[size]) for size in sizes)
}
# Ours: small enough for a few CPU minutes, on latents of 8x8 grey digits.
MODELS["digits-latent"] = LatentDiffiTConfig(
    resolution=8,
    img_channels=1,
    num_classes=10,
    latent_channels=4,
    latent_downsampling=2,
    num_blocks=3,
    hidden_dim=64,
    num_heads=4,
    patch_size=1,
    base_dim=32,
    learned_variance=True,
)
