"""The options of benchmark.py, which do not import the code that measures."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from configs.presets import PRESETS, Preset, get_preset
from dnnlib.cli import raw_value, usage_errors
from dnnlib.click_options import param
from dnnlib.errors import refusal
from models import ModelConfig
from training.config import CPU_MATMUL, RunConfig

DEFAULT_PRESET = "cifar10"
BATCH_HELP = "Number of images in a batch."
PRECISION_HELP = "Arithmetic to measure."
# The data that each model family is measured on; benchmarks/kinds.py makes them.
_DATA = {"image": "pictures", "latent": "latents", "sets": "pictures"}
MEASURED = [name for name, preset in PRESETS.items() if _DATA.get(preset.run.family)]

# The parts of benchmark.py gpu, and their time budgets in seconds.
GPU_PARTS = dict(gemm=60, attention=180, train=480, sample=150, metrics=90, loading=120)


def measured_preset(name: str) -> Preset:
    """Return a preset that can be measured; raises ValueError for any other."""
    preset = get_preset(name, MEASURED)
    if name not in MEASURED:
        got = f"{name}, for which there is no benchmark yet"
        raise refusal("--preset", got, accepted=", ".join(MEASURED))
    return preset


def measured_model(args: Sequence[str]) -> ModelConfig:
    """Return the model of the preset named in unparsed arguments, as the base of its options."""
    return measured_preset(raw_value(args, "preset") or DEFAULT_PRESET).run.model


def measured_run(name: str, model: ModelConfig) -> RunConfig:
    """Return the run of a preset with its model replaced."""
    return dataclasses.replace(measured_preset(name).run, model=model)


def listed(option: str, text: str, accepted: Collection[str]) -> tuple[str, ...]:
    """Return the comma-separated names in an option; raises UsageError for one not accepted."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in accepted:
            with usage_errors():
                raise refusal(option, repr(name), accepted=", ".join(accepted))
    return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every measurement."""

    preset: str = param(default=DEFAULT_PRESET, help=f"Model to measure: {', '.join(MEASURED)}.")
    rounds: int = param(
        default=7,
        min=1,
        max=10_000,
        help="Number of rounds, in each of which every side has a turn; medians are reported.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """The options of measurements that read images."""

    data: str | None = param(
        help="Zip or folder made by dataset_tool.py.  [default: synthetic pictures]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """The options of measurements of a network without training."""

    precision: str = param(default="fp32", choices=("bf16", "fp32"), help=PRECISION_HELP)
    batch: int = param(default=16, min=1, max=1_000_000, help=BATCH_HELP)
    cpu_matmul: str = param(
        default="auto",
        choices=CPU_MATMUL,
        help="What multiplies float32 matrices on CPUs, for all sides.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    against: str = param(
        default="plain", help="What to compare with: plain, diffusers or plain,diffusers."
    )
    batch_gpu: int = param(default=16, min=1, max=100_000, help=BATCH_HELP)
    steps: int | None = param(
        min=1, max=1_000_000, help="Number of steps in a turn.  [default: 1; 20 on a GPU]"
    )
    precision: str = param(default="both", choices=("fp32", "bf16", "both"), help=PRECISION_HELP)
    compile: bool = param(
        "--compile/--no-compile", default=False, help="Compile this code's network."
    )
    tf32: bool = param(
        "--tf32/--no-tf32", default=False, help="Allow TF32 matrix products on all sides in fp32."
    )
    cpu_matmul: str = param(
        default="auto",
        choices=CPU_MATMUL,
        help="What multiplies float32 matrices on CPUs, for all sides.",
    )
    workers: int | None = param(
        min=0, max=1_024, help="Number of loader processes on each side.  [default: the preset's]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(NetworkOptions):
    against: str | None = param(
        help="What to compare guided sampling with: plain (the network without its fast parts), "
        "diffusers or plain,diffusers."
    )
    steps: int | None = param(
        min=1, max=1_000_000, help="Number of sampling steps.  [default: the preset's]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadingOptions(DataOptions):
    batch: int | None = param(min=1, max=1_000_000, help=f"{BATCH_HELP}  [default: the preset's]")
    batches: int = param(default=8, min=1, max=1_000_000, help="Number of batches in a turn.")
    delay: float | None = param(
        min=0,
        max=10_000,
        help="Time epochs read from a local web server that delays every answer by this many ms, "
        "against epochs read from the disk: images of the preset's size and of 256x256, latents "
        "and features.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions(NetworkOptions):
    calls: int = param(default=3, min=1, max=1_000_000, help="Number of calls in a turn.")
    bias: bool = param(
        "--bias/--no-bias",
        default=True,
        help="Add a learned bias to the scores, as DiffiT does; set- and feature-conditioned "
        "models have none.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsOptions(DataOptions):
    precision: str = param(
        default="fp32,bf16", help="Precisions of the detector to time, separated by commas."
    )
    batch: int = param(default=64, min=1, max=1_000_000, help=BATCH_HELP)
    images: int = param(default=512, min=1, max=10_000_000, help="Number of images in a turn.")
    features: int = param(
        default=2048,
        min=2,
        max=16_384,
        help="Dimensions of the vectors between which distances are computed.",
    )
    vectors: int = param(
        default=4000, min=10, max=1_000_000, help="Number of vectors for KID, precision and recall."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateOptions(Options):
    rate: float = param(
        default=100.0, min=0.001, max=1e6, help="Speed in MB/s of the slow disk in the last rows."
    )
    warm_up: float = param(
        default=5.0, min=0.0, max=3600.0, help="Seconds between the start and the first state."
    )
    outdir: Path | None = param(
        help="Folder to write to, on the disk to measure.  [default: a temporary one]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuOptions:
    out: Path = param(required=True, help="JSON file of the results; a table is written beside it.")
    part: str | None = param(choices=tuple(GPU_PARTS), help="Measure this part alone.")
    dry_run: bool = param(default=False, help="Try everything on the CPU, at tiny sizes.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    preset: str = param(default="imagenet256", help=f"Model to predict: {', '.join(PRESETS)}.")
    gpu: str = param(default="h100", choices=("a100", "h100"), help="GPU to predict for.")
    measure: bool = param(
        default=False,
        help="Measure 1, 2, 4 and 8 processes on this host, which takes a few minutes, and store "
        "the result for the page.",
    )
    write: bool = param(default=False, help="Regenerate docs/scaling.md and its picture.")
