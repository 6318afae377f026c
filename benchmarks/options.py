"""The options of benchmark.py, known before what measures is loaded."""

import dataclasses

from configs.presets import PRESETS
from dnnlib.click_options import param

BATCH_HELP = "Number of images in a batch."
PRECISION_HELP = "Arithmetic to measure."
# What models are measured on, by their family; benchmarks/kinds.py makes it.
_DATA = {"image": "pictures", "latent": "latents", "sets": "pictures"}
MEASURED = [name for name, preset in PRESETS.items() if _DATA.get(preset.run.family)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every measurement has."""

    preset: str = param(default="cifar10", help=f"Model to measure: {', '.join(MEASURED)}.")
    rounds: int = param(
        default=7,
        min=1,
        max=10_000,
        help="Number of rounds in which all that is compared has a turn; medians count.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """What a measurement that reads images has."""

    data: str | None = param(
        help="Zip or folder made by dataset_tool.py.  [default: synthetic pictures]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """What a measurement of a network without training has."""

    precision: str = param(default="fp32", choices=("bf16", "fp32"), help=PRECISION_HELP)
    batch: int = param(default=16, min=1, max=1_000_000, help=BATCH_HELP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    batch_gpu: int = param(default=16, min=1, max=100_000, help=BATCH_HELP)
    steps: int | None = param(
        min=1, max=1_000_000, help="Number of steps in a turn.  [default: 1, on a GPU 20]"
    )
    precision: str = param(default="both", choices=("fp32", "bf16", "both"), help=PRECISION_HELP)
    compile: bool = param(
        "--compile/--no-compile", default=False, help="Compile this code's network."
    )
    tf32: bool = param(
        "--tf32/--no-tf32", default=False, help="Use TF32 products on both sides in fp32."
    )
    workers: int | None = param(
        min=0, max=1_024, help="Number of loader processes of each side.  [default: the preset's]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(NetworkOptions):
    steps: int | None = param(
        min=1, max=1_000_000, help="Number of sampling steps.  [default: the preset's]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadingOptions(DataOptions):
    batch: int | None = param(min=1, max=1_000_000, help=f"{BATCH_HELP}  [default: the preset's]")
    batches: int = param(default=8, min=1, max=1_000_000, help="Number of batches in a turn.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions(NetworkOptions):
    calls: int = param(default=3, min=1, max=1_000_000, help="Number of calls in a turn.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsOptions(DataOptions):
    precision: str = param(
        default="fp32,bf16", help="Arithmetic of the detector, separated by commas."
    )
    batch: int = param(default=64, min=1, max=1_000_000, help=BATCH_HELP)
    images: int = param(default=512, min=1, max=10_000_000, help="Number of images in a turn.")
    features: int = param(
        default=2048, min=2, max=16_384, help="Dimensions of the vectors that distances are of."
    )
    vectors: int = param(
        default=4000, min=10, max=1_000_000, help="Number of vectors of KID, precision and recall."
    )
