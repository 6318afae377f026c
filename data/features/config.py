"""How features are read and randomly dropped in training, as settings of a run."""

import dataclasses
from typing import ClassVar

from dnnlib.config import Config, option
from dnnlib.errors import refusal

SPLITS = ("train", "validation")  # Parts of a feature folder.


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig(Config):
    """Dropout of the conditions, padding of the text, and phase-in of added patches."""

    title: ClassVar[str] = "Features and their dropout"

    drop_all: float = option(
        0.10, min=0, max=1, help="Probability of training without any condition."
    )
    text_only: float = option(
        0.30,
        min=0,
        max=1,
        help="Probability of training on the text alone, without CLS token and patches.",
    )
    visual_only: float = option(
        0.05,
        min=0,
        max=1,
        help="Probability of training on CLS token and patches alone, without text.",
    )
    text_lengths: tuple[int, ...] = option(
        (128, 256, 384, 512),
        min=1,
        max=65_536,
        help="Lengths to which the texts of a batch are padded.",
    )
    patch_bias_kimg: float = option(
        0.0,
        min=0,
        max=1e9,
        help="Phase in patches that are new to a model: a bias on the attention to them rises "
        "from -ln(number) - 4 to 0 over this many kimg; 0: none.",
    )
    streaming: bool = option(
        False,
        help="Shuffle whole shards, then samples within groups of about a thousand, instead of "
        "all samples at once: shards are read one after another, which suits disks and object "
        "stores with slow random access.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.drop_all + self.text_only + self.visual_only
        if total > 1 + 1e-9:
            but = f"they add up to {total:g}, but exclude each other"
            remedy = "make them at most 1 together"
            raise refusal("--drop-all, --text-only and --visual-only", but=but, remedy=remedy)
        if not self.text_lengths or list(self.text_lengths) != sorted(set(self.text_lengths)):
            got = ",".join(map(str, self.text_lengths)) or "none"
            accepted = "rising numbers of tokens, such as 128,256,384,512"
            raise refusal("--text-lengths", got, accepted=accepted)
