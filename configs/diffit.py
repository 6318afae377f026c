"""DiffiT models in image space."""

from models.diffit import DiffiTConfig

# Widths and stages: DiffiT (arXiv 2312.02139), Appendix H.1 and Table S.2; windows: Appendix I.1;
# time token of width 512: section 5.1. The paper prints no number of heads for image space; we take
# 4. Dropout: EDM (arXiv 2206.00364), Table 7.
MODELS: dict[str, DiffiTConfig] = {
    # Appendix I.1's reading of CIFAR-10: two residual blocks a stage.
    "cifar10": DiffiTConfig(resolution=32, num_stages=3, num_blocks=(2,), window=4, dropout=0.13),
    # Appendix H.1's reading: four.
    "cifar10-l4": DiffiTConfig(
        resolution=32, num_stages=3, num_blocks=(4,), window=4, dropout=0.13
    ),
    # Appendix H.1: four residual blocks a stage; I.1: windows of 8.
    "ffhq64": DiffiTConfig(resolution=64, num_stages=4, num_blocks=(4,), window=8, dropout=0.05),
    # Ours: small enough for a few CPU minutes. 8x8 grey digits of scikit-learn.
    "digits": DiffiTConfig(
        resolution=8,
        img_channels=1,
        num_classes=10,
        num_stages=2,
        num_blocks=(1,),
        base_dim=32,
        hidden_dim=96,
        num_heads=2,
        window=4,
        time_dim=128,
    ),
}
