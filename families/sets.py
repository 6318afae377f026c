"""Set-conditioned models."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.fewshot.episodes import Episodes, episodes_of_run
from data.fewshot.sets import SetDataset
from training.checkpoint import Snapshot
from training.config import RunConfig
from training.inputs import TrainingData, open_training_data


def episodes_to_show(
    config: RunConfig, dataset: TrainingData
) -> tuple[Episodes, Episodes | None] | None:
    """Return the episodes of a run's pictures, and those that are scored, of unseen classes.

    Pictures show one support each of four seen classes and of four unseen ones, or of eight of the
    one kind that there is. Returns None for a run without sets.
    """
    if config.sets is None:
        return None
    size = config.model.context_size
    shown, scored = [], None
    names = _kinds_to_show(dataset, size)
    for name in names:
        episodes = episodes_of_run(dataset, name, support_size=size, num_per_class=1)
        chosen = np.linspace(0, len(episodes) - 1, min(len(episodes), 8 // len(names)))
        shown.append(episodes[chosen.round().astype(int).tolist()])
    if config.logging.metrics and "unseen" in names:
        scored = episodes_of_run(dataset, "unseen", support_size=size)
    return _joined(shown), scored


def check_classes(config: RunConfig, dataset: SetDataset) -> None:
    """Raise ValueError if a run has no support for its pictures, or no classes to validate on."""
    if not _kinds_to_show(dataset, config.model.context_size):
        raise ValueError(
            "There is no support to show: no class is unseen, and too few images of the classes "
            "trained on are held out; give --test-classes, or a larger --held-out."
        )
    if config.sets.num_eval_batches and not (dataset.split.val or dataset.split.test):
        raise ValueError(
            "--num-eval-batches: there are no classes to validate on; name some with "
            "--val-classes, or set --num-eval-batches=0."
        )


def _kinds_to_show(dataset: SetDataset, size: int) -> list[str]:
    """Return of which kinds of classes, seen and unseen, there are supports of ``size``."""
    counts = dataset.images.class_counts
    pools = dict(
        seen=[len(pool) for pool in dataset.held_out.values()],
        unseen=[counts[index] for index in dataset.split.test],
    )
    return [name for name, sizes in pools.items() if sizes and min(sizes) >= size]


def _joined(parts: Sequence[Episodes]) -> Episodes:
    return dataclasses.replace(
        parts[0],
        supports=torch.cat([part.supports for part in parts]),
        classes=np.concatenate([part.classes for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        indices=np.concatenate([part.indices for part in parts]),
        counts=tuple(count for part in parts for count in part.counts),
        source=" and ".join(part.source for part in parts),
    )


def episodes_of_snapshot(
    snapshot: Snapshot, split: str, num: int, *, data: str | None = None, seed: int = 0
) -> Episodes:
    """Return ``num`` episodes of a split of the data of a snapshot, of one class after another.

    Args:
        snapshot: Of a model of sets.
        split: ``seen`` (by held-out images), ``unseen`` or ``val``.
        num: Number of episodes.
        data: Where the data are now, if not where they were.
        seed: Seed of the choice.

    Raises ValueError if the data are not there, or have no such classes or too few images.
    """
    dataset = open_data_of(snapshot, data)
    size = snapshot.config.model.context_size
    once = episodes_of_run(dataset, split, support_size=size, num_per_class=1, seed=seed)
    num_classes = len(once)
    found = episodes_of_run(
        dataset, split, support_size=size, num_per_class=-(-num // num_classes), seed=seed
    )
    # Episodes of a class lie together; take the first of each class, then the second.
    order = np.arange(len(found)).reshape(num_classes, -1).T.flatten()[:num]
    return found[order.tolist()]


def open_data_of(snapshot: Snapshot, data: str | None = None) -> SetDataset:
    """Return the sets that a snapshot was trained on; ``data`` says where they are now.

    Raises ValueError if they are not there, or are other data.
    """
    config = snapshot.config
    location = data or config.data.data
    if location is None or not Path(location).exists():
        raise ValueError(
            f"--data: {location} does not exist; say where the data are that {snapshot.path} was "
            "trained on."
        )
    changed = dataclasses.replace(config.data, data=location, cache=False)
    dataset = open_training_data(dataclasses.replace(config, data=changed))
    if dataset.content_hash != snapshot.data.content_hash:
        raise ValueError(
            f"--data: {location} holds other data than {snapshot.path} was trained on (or a folder "
            "whose files were copied or touched), so that its split of classes is not known."
        )
    return dataset
