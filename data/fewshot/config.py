"""Which classes and images form sets, as settings of a run."""

import dataclasses
from typing import ClassVar

from dnnlib.config import Config, option

# Which classes supports are drawn from: those trained on, for testing, and for validation.
PROTOCOLS = ("seen", "unseen", "val")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetConfig(Config):
    """Which classes and images sets are made of, and how their context is trained."""

    title: ClassVar[str] = "Sets and their context"

    train_classes: tuple[str, ...] = option(
        (), help="Classes to train on, by name or index (0-7); none: see --split-fractions."
    )
    val_classes: tuple[str, ...] = option((), help="Classes kept for validation.")
    test_classes: tuple[str, ...] = option((), help="Unseen classes, on which a run is scored.")
    rules_for: tuple[str, ...] = option(
        (),
        exposed=False,
        affects="speed",
        help="Names of the classes for which a preset's lists of classes are meant; none: any.",
    )
    split_fractions: tuple[float, float, float] | None = option(
        None,
        min=0,
        max=1,
        help="Shares of classes for training, validation and test, chosen by --split-seed; none: "
        "the data's own split, or 0.6,0.2,0.2 without one.",
    )
    split_seed: int = option(
        0, min=-(2**63), max=2**63 - 1, help="Seed of the choice of classes and of held-out images."
    )
    held_out: int = option(
        100,
        min=0,
        max=1_000_000_000,
        help="Images of each training class that are held out for scores.",
    )
    class_transforms: str = option(
        "none",
        choices=("none", "rotations", "dihedral"),
        help="Train on each rotation (rotations), or each rotation and mirror image (dihedral), "
        "of a class as another class.",
    )
    skip_transforms: tuple[str, ...] = option(
        (),
        unless={"class_transforms": ("none",)},
        help="Transformed classes to leave out, such as 6:2 for class 6 rotated twice; transforms "
        "4 to 7 are the mirror images.",
    )
    hybrids: float = option(
        0.0,
        min=0,
        max=1,
        help="Share of sets from hybrid classes: half of each image is from one class and half "
        "from another, the same two throughout the set.",
    )
    min_sample_size: int | None = option(
        None,
        min=1,
        max=1_000,
        help="Draw sets of this many to --sample-size images; none: full sets.",
    )
    context_drop: float = option(
        0.0, min=0, max=1, help="Probability of training without the set, for guidance."
    )
    pretrain_encoder: float = option(
        0.0,
        min=0,
        max=1e9,
        help="Pre-train the encoder alone for this many kimg: a linear layer predicts each image "
        "from its context.",
    )
    num_eval_batches: int = option(
        0,
        min=0,
        max=1_000_000,
        help="Batches of sets from validation classes on which the loss is measured with every "
        "snapshot.",
        affects="speed",
    )
    compute_fid: bool = option(
        False, help="Compute fewshot_fid, as --metrics=fewshot_fid does.", affects="speed"
    )
    fid_num_samples: int = option(
        10_000,
        min=2,
        max=10_000_000,
        help="Images that the fewshot metrics generate, at most.",
        affects="speed",
    )
    diagnostics: bool = option(
        True,
        help="Log statistics of the context and gradients every tick, under debug/.",
        affects="speed",
    )
    kl_weight: float = option(
        1.0, min=0, help="Weight of the KL divergence of a variational context."
    )
    kl_rampup: float = option(
        1920.0,
        min=0,
        max=1e9,
        help="Linear warm-up of that weight, in kimg (10,000 steps of 32 sets).",
    )
    kl_scale: str = option(
        "dimensions",
        choices=("dimensions", "elbo"),
        help="How the KL divergence is scaled. dimensions: per dimension of the context; elbo: as "
        "in a bound in bits per dimension of the image (the other term stays the training loss).",
    )
