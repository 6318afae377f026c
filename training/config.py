"""The configuration of a run: everything that determines what is computed."""

import dataclasses
import os
from collections.abc import Collection
from typing import Any, ClassVar, Literal, Self

from data.images.config import AugmentConfig, DatasetConfig
from diffusion.config import PrecondConfig, SamplingConfig
from dnnlib.addresses import is_address
from dnnlib.config import Config, option
from dnnlib.errors import refusal
from metrics.config import DetectorConfig
from models.config import ModelConfig
from training.distillation.config import DistillationConfig

# Range of the relative stds of weight averages. File names show three decimals, and the std
# 1 / sqrt(12) = 0.2887 weighs all times equally.
MIN_STD, MAX_STD = 0.001, 0.288

_DURATION: dict[str, Any] = dict(affects={"lr_schedule": ("cosine",)})


# What --cpu-matmul accepts, in training and wherever a network is sampled.
CPU_MATMUL = ("auto", "mkl", "onednn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Optimization: how long training lasts, and how each step changes the weights.

    Defaults are EDM's (Karras et al. 2022, arXiv 2206.00364, Appendix F and its training code).
    Intervals and durations are in training images: 1 kimg is 1,000 of them.
    """

    title: ClassVar[str] = "Training options"

    kimg: float = option(200_000.0, min=0, max=1e9, help="Training duration in kimg.", **_DURATION)
    iters: int | None = option(
        None,
        min=1,
        max=1_000_000_000,
        aliases=("max-steps",),
        help="Duration in optimizer steps, instead of --kimg.",
        **_DURATION,
    )
    batch: int = option(
        512,
        min=1,
        max=1_000_000,
        aliases=("batch-size",),
        help="Images per optimizer step over all ranks, or sets for a model that trains on sets.",
    )
    batch_gpu: int | Literal["auto"] | None = option(
        None,
        min=1,
        max=100_000,
        help="Images (or sets) per rank and pass; gradients are accumulated up to --batch. auto: "
        "as many as fit in memory; none: the rank's whole share.",
        affects="speed",
    )
    lr: float = option(1e-3, min=1e-12, help="Learning rate.")
    weight_decay: float = option(
        0.0, min=0, help="Decoupled weight decay of matrices and kernels (AdamW); 0 is Adam."
    )
    beta2: float = option(
        0.999, min=0, max=0.9999, help="Decay of Adam's average of squared gradients."
    )
    lr_rampup: float = option(
        10_000.0, min=0, max=1e9, help="Linear learning-rate warm-up in kimg."
    )
    lr_schedule: str = option(
        "constant",
        choices=("constant", "cosine"),
        help="Schedule after the warm-up; cosine falls to --lr-final at the end of the run.",
    )
    lr_final: float = option(
        1e-6,
        min=0,
        requires={"lr_schedule": ("cosine",)},
        help="Learning rate at the end of the run.",
    )
    clip_grad: float | None = option(
        None, min=1e-6, help="Largest gradient norm; larger gradients are scaled down to it."
    )
    label_drop: float | None = option(
        None,
        min=0,
        max=1,
        help="Probability of training without the label, for guidance; none: 0.1 with labels.",
    )
    ema_kimg: float = option(500.0, min=0, max=1e9, help="Half-life of the weight average in kimg.")
    ema_rampup: float | None = option(
        0.05, min=0, help="Limit the half-life to this share of the images so far; none: no limit."
    )
    ema_stds: tuple[float, ...] = option(
        (),
        min=MIN_STD,
        max=MAX_STD,
        help="EMA lengths, as relative stds such as 0.05,0.10, of further weight averages with "
        "power-function profiles, from which python -m training.posthoc_ema makes any other "
        "length after training.",
    )
    loss_scaling: float = option(1.0, min=1e-12, help="Constant factor of the loss.")
    skip_limit: int = option(
        100,
        min=1,
        max=1_000_000,
        help="Stop, or roll back with --rollback, after this many non-finite gradients in a row.",
        affects="speed",
    )
    rollback: int = option(
        0,
        min=0,
        max=1_000,
        help="Number of times that a run may return to its last state and continue with other "
        "data when its loss spikes or --skip-limit is reached; 0: never.",
        affects="speed",  # So that a run can be continued with another number.
    )
    seed: int = option(
        0,
        min=-(2**63),
        max=2**63 - 1,
        help="Seed of the initial weights, data order, noise and augmentation.",
    )
    precision: str = option(
        "fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="Arithmetic of the network; auto: bf16 on GPUs, fp32 elsewhere.",
    )
    compile: bool | None = option(
        False, help="Compile the network with torch.compile; none: on GPUs.", affects="speed"
    )
    shard: str = option(
        "none",
        choices=("none", "full", "hybrid"),
        help="Shard weights, gradients, optimizer moments and weight averages over all ranks "
        "(full), or within groups of ranks (hybrid), so that larger models fit.",
        affects="speed",
    )
    shard_size: int | None = option(
        None,
        min=1,
        max=1_000_000,
        requires={"shard": ("hybrid",)},
        help="Ranks in a group; none: all ranks of a node.",
        affects="speed",
    )
    tf32: bool = option(False, help="Allow TF32 matrix products on NVIDIA GPUs.", affects="speed")
    cpu_matmul: str = option(
        "auto",
        choices=CPU_MATMUL,
        help="Library for float32 matrix products on CPUs; auto: oneDNN on AMD CPUs with AVX-512, "
        "MKL elsewhere. With onednn, AMX is not used on CPUs that have it.",
        affects="speed",
    )
    cudnn_benchmark: bool = option(
        True,
        name="bench",
        help="Let cuDNN time its algorithms and choose the fastest.",
        affects="speed",
    )
    transfer_allow: tuple[str, ...] = option(
        (),
        help="With --transfer: patterns of parameters that may be missing, unexpected or of "
        "another shape, such as 'backbone.head.*'.",
        affects="speed",
    )
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [std_name(std) for std in self.ema_stds]
        if len(set(names)) < len(names):
            accepted = "numbers that differ in their first three decimals"
            raise refusal("--ema-stds", ",".join(names), accepted=accepted)

    @property
    def arithmetic(self) -> str:
        """Arithmetic of matrix products on a GPU: ``fp32``, ``tf32`` or ``bf16``.

        fp16 counts as bf16, which is as fast. ``precision`` must be decided, not ``auto``.
        """
        if self.precision == "fp32":
            return "tf32" if self.tf32 else "fp32"
        return "bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig(Config):
    """What a run writes, how often, and what it measures during training."""

    title: ClassVar[str] = "Progress, snapshots and metrics"
    affects: ClassVar[str] = "speed"

    tick: float = option(
        50.0, min=0, max=1e9, help="Training duration in kimg between two console lines."
    )
    log_interval: int | None = option(
        None,
        min=1,
        max=1_000_000_000,
        help="Optimizer steps between two console lines, instead of --tick.",
    )
    snap: int = option(
        50, min=1, max=1_000_000, help="Ticks between two snapshots and image grids."
    )
    save_interval: int | None = option(
        None,
        min=1,
        max=1_000_000_000,
        help="Optimizer steps between two snapshots and image grids, instead of --snap; rounded up "
        "to the end of a tick.",
    )
    dump: int | None = option(
        None,
        min=1,
        max=1_000_000,
        help="Ticks between two training states; none: one with every snapshot.",
    )
    keep_states: int = option(
        2, min=1, max=1_000_000, help="Number of training states kept, newest last."
    )
    save_rate: float | None = option(
        None,
        min=1e-6,
        max=1e6,
        help="Limit in MB/s at which each rank writes states and snapshots, so that other "
        "programs can use the disk; none: no limit.",
    )
    metrics: tuple[str, ...] = option(
        (), help="Metrics computed with the averaged weights, such as fid10k_full,fid50k_full."
    )
    metrics_ref: str | None = option(
        None,
        unless={"metrics": ((),)},
        help="Reference for --metrics: images, or statistics (.npz or EDM2's .pkl), by path or "
        "URL; none: the images in --data.",
    )
    metrics_ticks: int | None = option(
        None,
        min=1,
        max=1_000_000,
        unless={"metrics": ((),)},
        help="Ticks between two evaluations of --metrics; none: with every snapshot.",
    )
    validation_ticks: int | None = option(
        None,
        min=1,
        max=1_000_000,
        help="Ticks between two measurements of the validation loss; none: with every snapshot.",
    )
    early_stop: int = option(
        0,
        min=0,
        max=1_000_000,
        help="End the run after this many validations in which the loss on held-out images has "
        "not fallen by more than chance; 0: never.",
    )
    sample_batch: int = option(
        64, min=1, max=100_000, help="Images per rank and pass when sampling."
    )
    num_sample_batches: int = option(
        1,
        min=1,
        max=1_000,
        help="Batches of 64 images in the sample picture of every snapshot.",
    )
    report_conditions: int = option(
        0,
        min=0,
        max=1_000_000,
        help="Images in the conditioning report of every snapshot; 0: no report.",
    )
    workers: int = option(1, min=0, max=1_024, help="Data loader processes per rank.")
    hang_limit: float = option(
        5.0,
        min=0,
        help="Minutes without a sign of life from a rank after which the run ends and names it; "
        "0: never.",
    )
    watch: bool = option(
        True,
        help="Check training at the end of every tick, and warn of problems with a remedy for "
        "each.",
    )
    board: tuple[str, ...] = option(
        ("tensorboard",),
        choices=("tensorboard", "wandb", "trackio"),
        help="Boards that show curves and pictures, separated by commas; none: only the run "
        "folder.",
    )
    wandb: bool = option(False, aliases=("use-wandb",), help="Short for adding wandb to --board.")
    wandb_project: str = option("setdiffit", help="Project name on the boards wandb and trackio.")

    @property
    def boards(self) -> tuple[str, ...]:
        """All boards of --board and --wandb, each once."""
        return tuple(dict.fromkeys((*self.board, *(("wandb",) if self.wandb else ()))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A preset with its overrides: the whole configuration of a training run.

    Each family of models has a subclass in ``families/``, with its kind of guidance and sections of
    its own, whose ``family`` is the name under which :mod:`training.family` knows it.
    """

    preset: str
    model: ModelConfig
    precond: PrecondConfig = PrecondConfig()
    training: TrainingConfig = TrainingConfig()
    data: DatasetConfig = DatasetConfig()
    logging: LoggingConfig = LoggingConfig()
    detectors: DetectorConfig = DetectorConfig()
    sampling: SamplingConfig = SamplingConfig()
    guidance: Config
    distillation: DistillationConfig = DistillationConfig()

    def changed(self, section: str, **values: Any) -> Self:
        """Return the run with other values in one of its sections, such as ``training``."""
        section_values = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **{section: section_values})

    @property
    def step_nimg(self) -> int:
        """Number of images in an optimizer step; in a batch of sets, those of all its sets."""
        return self.training.batch * self.model.images_per_row

    @property
    def total_nimg(self) -> int:
        """Number of training images after which the run ends."""
        if self.training.iters is not None:
            return self.training.iters * self.step_nimg
        return round(self.training.kimg * 1000)

    @property
    def tick_nimg(self) -> float:
        """Number of images between two console lines."""
        if self.logging.log_interval is not None:
            return self.logging.log_interval * self.step_nimg
        return self.logging.tick * 1000

    def as_begun(self, before: Self) -> Self:
        """Return the run with settings that have no option and must stay, as in ``before``."""
        return self

    def cond_after(self, cur_nimg: int, input_shape: tuple[int, ...]) -> dict[str, float]:
        """Return conditions that are the same for all images after ``cur_nimg`` training images.

        ``input_shape`` is [C, h, w], the shape of what the network denoises.
        """
        return {}

    def snapshot_is_due(self, tick: int, tick_start_nimg: int, cur_nimg: int) -> bool:
        """Return whether a snapshot is due at the end of the tick that ends at ``cur_nimg``."""
        if self.logging.save_interval is None:
            return tick % self.logging.snap == 0
        interval = self.logging.save_interval * self.step_nimg
        return cur_nimg // interval > tick_start_nimg // interval


def with_one_of_each(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Return ``config`` with overridden --iters, --log-interval and --save-interval unset.

    --kimg, --tick and --snap override them; raises ValueError if both of a pair were typed.
    """
    for section, kimg_option, step_option in (
        ("training", "kimg", "iters"),
        ("logging", "tick", "log_interval"),
        ("logging", "snap", "save_interval"),
    ):
        values = getattr(config, section)
        if getattr(values, step_option) is None or kimg_option not in given:
            continue
        if step_option in given:
            step_name = step_option.replace("_", "-")
            raise ValueError(f"Give --{kimg_option} or --{step_name}, not both.")
        values = dataclasses.replace(values, **{step_option: None})
        config = dataclasses.replace(config, **{section: values})
    return config


def with_absolute_data(config: RunConfig) -> RunConfig:
    """Return ``config`` with an absolute data path, so that it can be continued from any folder."""
    location = config.data.data
    if location is None or is_address(location):
        return config
    data = dataclasses.replace(config.data, data=os.path.abspath(location))
    return dataclasses.replace(config, data=data)


def fit_to_device(config: RunConfig, device_type: str) -> RunConfig:
    """Return ``config`` with ``--precision=auto`` and ``--compile=none`` decided for a device."""
    training, on_gpu = config.training, device_type == "cuda"
    if training.precision == "auto":
        training = dataclasses.replace(training, precision="bf16" if on_gpu else "fp32")
    if training.compile is None:
        training = dataclasses.replace(training, compile=on_gpu)
    return dataclasses.replace(config, training=training)


def std_name(std: float) -> str:
    """Return the relative std of a profile as file names have it, with three decimals."""
    return f"{std:.3f}"
