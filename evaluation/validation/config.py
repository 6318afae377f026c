"""Which tests a feature-conditioned model is given, and on how many images."""

import dataclasses
from typing import ClassVar

from dnnlib.config import Config, option
from dnnlib.errors import refusal

# The tests in order, each with the setting that gives its number of images.
SIZES = dict(
    reconstruction="num_reconstructions",
    swap="num_swaps",
    text_edit="num_edits",
    text_only="num_text_only",
    divergence="num_divergence",
)
TESTS = tuple(SIZES)
METRIC_PREFIX = "validation_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig(Config):
    """Tests on held-out images: whether the model uses its text and its reference image."""

    title: ClassVar[str] = "Validation on held-out images"
    affects: ClassVar[str] = "speed"

    tests: tuple[str, ...] = option(
        TESTS, choices=TESTS, exposed=False, help="Tests, in this order."
    )
    num_reconstructions: int = option(
        25, min=1, max=100_000, help="Images to reconstruct from their own text and reference."
    )
    num_swaps: int = option(
        5,
        min=1,
        max=100_000,
        help="Pairs of images of the same size in which one gets the other's reference.",
    )
    num_edits: int = option(
        5, min=1, max=100_000, help="Images to generate with words of their text replaced."
    )
    num_text_only: int = option(
        20, min=1, max=100_000, help="Images to generate from their text alone."
    )
    num_divergence: int = option(
        5,
        min=1,
        max=100_000,
        help="Images to generate with text guidance, and again with reference guidance.",
    )
    num_shown: int = option(4, min=1, max=1_000, help="Rows in the picture of each test.")
    lpips_net: str = option(
        "alex",
        choices=("alex", "vgg"),
        help="Backbone of LPIPS, the perceptual distance between images.",
    )
    lpips_weights: tuple[str, ...] = option(
        (),
        help="Paths or URLs of LPIPS's weights: BACKBONE,LINEAR or one file with both; none: the "
        "published addresses.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.lpips_weights) > 2:
            accepted = "one with the weights of backbone and linear layers, or BACKBONE,LINEAR"
            raise refusal("--lpips-weights", f"{len(self.lpips_weights)} files", accepted=accepted)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images, or pairs, of every test."""
        return {test: getattr(self, name) for test, name in SIZES.items()}
