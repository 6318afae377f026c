"""Feature-conditioned DiT models."""

from models.feature_dit import FeatureDiTConfig

# Width, blocks and heads of NanoDiT as the project's first users ran it.
MODELS: dict[str, FeatureDiTConfig] = {
    "nanodit": FeatureDiTConfig(hidden_dim=384, num_blocks=12, num_heads=6),
    "nanodit-768": FeatureDiTConfig(hidden_dim=768, num_blocks=18, num_heads=12),
    # Ours: small enough for a few CPU minutes on small images.
    "nanodit-tiny": FeatureDiTConfig(hidden_dim=96, num_blocks=4, num_heads=4),
}
