"""Set-conditioned DiT models."""

import dataclasses

from models.set_dit import SetDiTConfig

# Widths, depths and heads as the project's first users ran them on CIFAR-100; sets of six images,
# each made from the five others. Context and encoder are as wide as the DiT unless stated.
_FILM = SetDiTConfig(hidden_dim=468, num_blocks=6, num_heads=9, hdim=256, mode_conditioning="film")
MODELS: dict[str, SetDiTConfig] = {
    "fsdm-cifar100-film": _FILM,
    "fsdm-cifar100-lag": dataclasses.replace(_FILM, mode_conditioning="lag", encoder_depth=3),
    "fsdm-depth6": SetDiTConfig(hidden_dim=450, num_blocks=6, num_heads=9),
    "fsdm-depth12": SetDiTConfig(hidden_dim=384, num_blocks=12, num_heads=6),
    "fsdm-option-a": SetDiTConfig(hidden_dim=440, num_blocks=6, num_heads=8),
    "fsdm-option-b": SetDiTConfig(hidden_dim=420, num_blocks=6, num_heads=6),
    "fsdm-option-c": SetDiTConfig(hidden_dim=512, num_blocks=4, num_heads=8, hdim=512),
    # Ours: small enough for a few CPU minutes, on 8x8 grey digits.
    "fsdm-digits": SetDiTConfig(
        resolution=8,
        img_channels=1,
        patch_size=4,
        hidden_dim=96,
        num_blocks=3,
        num_heads=4,
        encoder_tokenizer="per_sample_mean",
        encoder_depth=2,
        encoder_heads=4,
        encoder_dim_head=24,
        encoder_mlp_ratio=2.0,
        encoder_pool="mean",
    ),
}
