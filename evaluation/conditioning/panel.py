"""Held-out images with their conditions, of every family of models, and ways to vary these."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from data.features.dataset import FeatureDataset
from data.fewshot.sets import SetDataset
from data.images.augment import AugmentConfig
from data.images.dataset import Cond
from data.latents.dataset import LatentDataset
from encoders.autoencoder import open_autoencoder
from models import ScaledLatentConfig
from models.feature_conditioner import CONDITIONS
from models.feature_dit import FeatureDiTConfig
from models.set_dit import SetDiTConfig
from training.checkpoint import Snapshot
from training.config import RunConfig
from training.inputs import make_inputs, open_training_data

_VISUAL_ALONE = "never dropped without the other in training"


@dataclasses.dataclass(frozen=True)
class Condition:
    """One thing that a model is given.

    Attributes:
        name: What it is called.
        entries: Which entries of ``cond`` it is.
        drop: Columns of ``drop`` that replace it by its null; None for a ``drop`` without columns.
        reason: Why it cannot be dropped; None if it can.
        note: What to know of its being dropped.
    """

    name: str
    entries: tuple[str, ...]
    drop: tuple[int, ...] | None = None
    reason: str | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Images of one size: what a network denoises [N, C, H, W], and its conditions.

    ``kinds`` [N] tell conditions that are alike: none is varied to one of its own kind.
    """

    inputs: torch.Tensor
    cond: Cond
    kinds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
    """Images that a model was not trained on, if there are any, with their conditions."""

    name: str
    conditions: tuple[Condition, ...]
    groups: tuple[Group, ...]

    @property
    def num_images(self) -> int:
        """Number of images, of all groups."""
        return sum(len(group.inputs) for group in self.groups)


def make_panel(snapshot: Snapshot, data: str | None, num: int, device: torch.device) -> Panel:
    """Return about ``num`` images and their conditions for a snapshot, always the same.

    Images of classes are taken in turn of each class; sets are of unseen classes, features of the
    validation split, as far as there are any. ``data`` says where they are, if not where they were.
    Raises ValueError for a model without conditions, and for data that do not fit.
    """
    config = _without_augmentation(snapshot.config, data)
    if not (config.features or config.sets or config.model.num_classes):
        raise ValueError(f"{snapshot.path}: this model is unconditional; there is nothing to vary.")
    dataset = open_training_data(config)
    autoencoder = None
    if isinstance(config.model, ScaledLatentConfig) and not isinstance(dataset, LatentDataset):
        autoencoder = open_autoencoder(config.model, None, device)
    inputs = make_inputs(config, dataset, autoencoder, device)
    if isinstance(config.model, FeatureDiTConfig):
        return _panel_of_features(config, dataset, inputs, num, device)
    if isinstance(config.model, SetDiTConfig):
        return _panel_of_sets(config, dataset, inputs, num, device)
    order = _in_turn(dataset.labels, num)
    images, cond = dataset.__getitems__(order.tolist())
    images, cond = _prepared(inputs, images, cond, device)
    reason = None if config.training.label_drop else "trained without --label-drop"
    condition = Condition("class", ("label",), reason=reason)
    group = Group(images, {"label": cond["label"]}, dataset.labels[order])
    return Panel(f"{dataset.name}, {len(order)} images", (condition,), (group,))


def _without_augmentation(config: RunConfig, data: str | None) -> RunConfig:
    training = dataclasses.replace(config.training, augment=AugmentConfig(augment=0.0))
    settings = dataclasses.replace(
        config.data, data=data or config.data.data, hflip=False, max_size=None, cache=False
    )
    return dataclasses.replace(config, training=training, data=settings)


def _prepared(
    inputs, images: torch.Tensor, cond: Cond, device: torch.device
) -> tuple[torch.Tensor, Cond]:
    cond = {name: value.to(device) for name, value in cond.items() if name != "size"}
    # Latents are their means: a draw would be one more thing that varies.
    return inputs.prepare(images.to(device), cond, None)


def _in_turn(labels: np.ndarray, num: int) -> np.ndarray:
    """Return up to ``num`` indices, one of each class after the other."""
    places = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        places[rows] = np.arange(len(rows))
    return np.lexsort((labels, places))[:num]


def _panel_of_sets(
    config: RunConfig, dataset: SetDataset, inputs, num: int, device: torch.device
) -> Panel:
    classes = dataset.split.test or dataset.split.val or dataset.split.train
    held_out = dataset.of_classes(classes)
    sets, facts = held_out.__getitems__(range(num))
    images, _ = _prepared(inputs, sets, {}, device)
    first = 1 if config.model.leave_one_out else 0
    cond = {"support": images[:, first:]}
    if "mask" in facts:
        cond["mask"] = facts["mask"][:, first:].to(device)
    reason = None if config.sets.context_drop else "trained without --context-drop"
    group = Group(images[:, 0], cond, facts["label"].numpy())
    kind = "unseen" if dataset.split.test else "validation" if dataset.split.val else "training"
    name = f"{dataset.name}, {len(images)} sets of {kind} classes"
    return Panel(name, (Condition("support", tuple(cond), reason=reason),), (group,))


def _panel_of_features(
    config: RunConfig, dataset: FeatureDataset, inputs, num: int, device: torch.device
) -> Panel:
    held_out = dataset.of_split("validation")
    kind = "validation"
    if not len(held_out):
        held_out, kind = dataset, "training"
    groups = []
    for bucket, count in enumerate(held_out.counts):
        share = min(max(round(num * count / len(held_out)), 2), count)
        first = int(held_out.firsts[bucket])
        latents, cond = held_out.__getitems__(range(first, first + share))
        images, prepared = _prepared(inputs, latents, cond, device)
        groups.append(Group(images, {**prepared, "size": cond["size"]}, np.arange(share)))
    features, has_patches = config.features, config.model.use_dino_patches
    no_text = None if features.drop_all + features.visual_only else "trained with it always there"
    no_visual = None if features.drop_all + features.text_only else "trained with it always there"
    note = _VISUAL_ALONE if has_patches else None
    text, cls, patches = range(len(CONDITIONS))
    conditions = [
        Condition("text", ("text", "text_mask"), (text,), no_text),
        Condition("CLS", ("cls",), (cls,), no_visual, note),
    ]
    if has_patches:
        conditions += [
            Condition("patches", ("patches",), (patches,), no_visual, note),
            Condition("CLS + patches", ("cls", "patches"), (cls, patches), no_visual),
        ]
    total = sum(len(group.inputs) for group in groups)
    name = f"{dataset.name}, {total} {kind} images in {len(groups)} bucket(s)"
    return Panel(name, tuple(conditions), tuple(groups))


def derangement(kinds: Sequence[int] | np.ndarray, change: str) -> tuple[np.ndarray, np.ndarray]:
    """Return whose condition each row gets, and which rows get one of another kind, bool.

    ``shuffled`` goes round through all rows; ``swapped`` exchanges pairs.
    """
    kinds = np.asarray(kinds)
    num = len(kinds)
    order = np.argsort(kinds, kind="stable")
    source = np.arange(num)
    if change == "shuffled":
        shift = int(np.unique(kinds, return_counts=True)[1].max())
        source[order] = np.roll(order, -shift)
    else:
        half = num // 2
        first, second = order[:half], order[num - half :]
        source[first], source[second] = second, first
    return source, kinds[source] != kinds
