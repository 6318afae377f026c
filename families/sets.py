"""Set-conditioned models: a DiT that generates more images like the few in its support."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.fewshot.episodes import Episodes, episodes_of_run
from data.fewshot.sets import SetDataset
from data.fewshot.supports import read_support
from diffusion.precond import make_precond
from dnnlib.addresses import is_address
from dnnlib.errors import refusal
from families.checks import check_metrics, refuse_augmentation, refuse_reference
from families.image import (
    ImageFamily,
    check_resolution,
    objective_settings,
    open_images_of,
    with_path,
    without_augmentation,
)
from families.next_steps import CONDITIONS_STEP, generate_step, is_for_inception
from families.reporting import reporting
from families.runs import SetRun
from models import build_network
from models.architectures.set_dit import SetDiTConfig
from models.network import Network
from sampling.images import ImageGenerator
from sampling.supports import SupportGenerator, SupportRequests
from torch_utils.misc import count_parameters
from training.asked import NOT_FEATURES, Asked
from training.checkpoint import Snapshot
from training.config import RunConfig
from training.family import Codec, Evaluator, TrainingData
from training.set_objective import SetObjective, validation_loss
from training.validation.examples import NUM_IMAGES, Examples, Row, num_repeats
from training.watching.inspection.sample import Batch, Sample, num_items

_VALIDATION_SEED = 0


class SetFamily(ImageFamily):
    """Sets of images of one class, which a support stands for."""

    run = SetRun

    def check(self, run: SetRun, given: Collection[str]) -> SetRun:
        if "compute_fid" in given:
            metrics = dict.fromkeys((*run.logging.metrics, "fewshot_fid"))
            if not run.sets.compute_fid:
                del metrics["fewshot_fid"]
            run = run.changed("logging", metrics=tuple(metrics))
        if run.data.validation_share and "held_out" in given:
            raise ValueError("Give --validation-share or --held-out, not both.")
        lists = {"train_classes", "test_classes"}
        if run.sets.class_transforms != "none":
            lists.add("skip_transforms")
        if lists <= given:
            run = run.changed("sets", rules_for=())
        if "like" in given:
            run.model.check_like()
        check_metrics(run, given, of_supports=True)
        refuse_reference(run, "set-conditioned models", "images of their unseen classes")
        return run

    def distil(self, run: SetRun, source: RunConfig, given: Collection[str]) -> SetRun:
        run = super().distil(run, source, given)
        return run if "context_drop" in given else run.changed("sets", context_drop=0.0)

    def open_data(self, run: SetRun, path: str | None = None, split: str = "train") -> SetDataset:
        run = with_path(run, path)
        # Only classes trained on hold out images; unseen classes are needed whole.
        whole = run.changed("data", validation_share=0.0)
        images = open_images_of(whole, use_labels=None)
        check_resolution(run, images.resolution)
        return SetDataset(
            images,
            run.sets,
            sample_size=run.model.sample_size,
            seed=run.training.seed,
            use_labels=run.data.cond,
            hflip=run.data.hflip,
            validation_share=run.data.validation_share,
        )

    def fit(self, run: SetRun, data: TrainingData | None, num_classes: int = 0) -> SetRun:
        if data is not None:
            check_resolution(run, data.resolution)
            _check_classes(run, data)
        run = super().fit(run, data, num_classes)
        refuse_augmentation(run, "sets")
        # A model keeps the reconstruction layer that its encoder was pre-trained with.
        reconstructs = run.model.reconstructs or run.sets.pretrain_encoder > 0
        return run.changed("model", reconstructs=reconstructs)

    def _unguided(self, run: SetRun, num_classes: int) -> tuple[str, str] | None:
        if run.sets.context_drop:
            return None
        reason = "was trained without context dropout and has learned nothing to guide away from"
        return reason, "--context-drop=0.1"

    def _num_keys(self, data: TrainingData) -> None:
        return None  # Sets are drawn by their position in the run, which is their key.

    def objective(self, run: SetRun, network: Network, codec: Codec) -> SetObjective:
        settings = objective_settings(run)
        return SetObjective(network, make_precond(run.precond), codec, config=run.sets, **settings)

    def validation(self, run: SetRun, data: SetDataset) -> Examples | None:
        num_held_out = sum(len(rows) for rows in data.held_out.values() if len(rows) > 1)
        if not num_held_out:
            return None
        sides = [data.plain(held_out=held_out, seed=_VALIDATION_SEED) for held_out in (True, False)]
        num_images = min(num_held_out * num_repeats(num_held_out), NUM_IMAGES)
        num, rows = max(num_images // run.model.sample_size, 1), []
        for place in itertools.count():
            drawn = sides[0].draw(place)
            if drawn.rows.size > 1:  # Its class has held-out images.
                name = data.set_classes[drawn.labels[0]]
                rows.append(Row(run.model.input_shape, place, place, name))
            if len(rows) == num:
                return Examples(*sides, tuple(rows))

    def places(self, data: SetDataset, keys: Sequence[int]) -> np.ndarray:
        return np.array([data.draw(key).rows.flat[0] for key in keys])

    def inspected(
        self, run: SetRun, data: SetDataset, codec: Codec, device: torch.device, number: int
    ) -> Sample:
        num = num_items(data.__getitems__([0])[0].nbytes // data.sample_size, number)
        keys, shown = range(-(-num // data.sample_size)), data
        if data.remote_bytes:
            data.prefetch(keys)  # Training begins with these.
        else:
            # No derived classes: images rotated or composed in the same way look alike anyway.
            shown = data.of_classes(data.split.train)
        sets, facts = shown.__getitems__(keys)
        there = facts.get("mask", torch.ones(sets.shape[:2], dtype=torch.bool))
        stored, groups = sets[there], there.nonzero()[:, 0]
        x, _ = codec.encode(stored.to(device), {}, None)
        batch = Batch(stored=stored, x=x.cpu(), cond={}, groups=groups)
        return Sample(batches=(batch,), groups_name="sets", **self._expected_std(run))

    def evaluator(self, run: SetRun, data: SetDataset, device: torch.device) -> Evaluator:
        from evaluation.in_loop.sets import SetEvaluator

        episodes_of = functools.partial(episodes_of_run, data, support_size=run.model.context_size)
        names = _kinds_to_show(data, run.model.context_size)
        shown, scored = [], None
        for name in names:
            episodes = episodes_of(name, num_per_class=1)
            chosen = np.linspace(0, len(episodes) - 1, min(len(episodes), 8 // len(names)))
            shown.append(episodes[chosen.round().astype(int).tolist()])
        evaluate = self._evaluate(run, data, device)
        if run.logging.metrics and "unseen" in names:
            scored = episodes_of("unseen")
        measure_loss = None
        if run.sets.num_eval_batches:
            sets = data.of_classes(data.split.val or data.split.test)

            def measure_loss(generator: ImageGenerator) -> float:
                objective = self.objective(run, generator.network, generator.codec)
                return validation_loss(run, sets, objective)

        evaluator = SetEvaluator(run, evaluate, _joined(shown), scored, measure_loss)
        return reporting(self, run, evaluator, device)

    def _metric_specs(self, run: SetRun, specs: Sequence[Any]) -> Sequence[Any]:
        num_images = run.sets.fid_num_samples
        return [dataclasses.replace(spec, num_images=num_images) for spec in specs]

    def _real_images(self, run: SetRun, data: SetDataset, metric: str) -> Any:
        # The images of unseen classes that belong to no support.
        episodes = episodes_of_run(data, "unseen", support_size=run.model.context_size)
        return data.images.subset(episodes.reals)

    def describe(self, run: SetRun) -> dict[str, str]:
        return _describe(run)

    def next_steps(self, run: SetRun) -> dict[str, str]:
        request = "--episodes=10 --split=unseen --num=16"
        metrics = "" if is_for_inception(run) else " --metrics=fewshot_fd_pixels"
        score = f"python fid.py fewshot --network={{network}}{metrics} --outdir={{run}}/fewshot"
        return {
            **generate_step("Generate from supports of unseen classes", request),
            "Score images of seen and unseen classes": score,
            **CONDITIONS_STEP,
        }

    # A snapshot.

    def requests(self, snapshot: Snapshot, asked: Asked) -> SupportRequests:
        asked.refuse(("classes",), "this model makes images from a support; give --support")
        asked.refuse(*NOT_FEATURES)
        if bool(asked.support) == (asked.episodes is not None):
            but = "give --support=IMAGES, or --episodes=N"
            raise refusal("This model makes images from a support", but=but)
        if asked.support:
            asked.refuse(("split", "data"), "applies to --episodes alone; leave it out")
            return SupportRequests(read_support(asked.support, snapshot.config.model), False)
        num, split = asked.episodes, asked.split or "unseen"
        return SupportRequests(episodes_of_snapshot(snapshot, split, num, data=asked.data), True)

    def images(
        self, snapshot: Snapshot, generator: Callable[[], Any], first_seed: int, batch: int
    ) -> Any:
        raise ValueError(
            f"--network: {snapshot.path} makes images from supports; score it with fid.py fewshot, "
            "or the images that generate.py makes, with --images."
        )

    def panel(
        self,
        run: SetRun,
        data: str | None,
        num: int,
        device: torch.device,
        features: Mapping[str, Any] | None = None,
    ) -> Any:
        from evaluation.conditioning.panel import Condition, Group, Panel, prepared

        run = without_augmentation(run, data)
        dataset = self.open_data(run)
        classes = dataset.split.test or dataset.split.val or dataset.split.train
        held_out = dataset.of_classes(classes)
        sets, facts = held_out.__getitems__(range(num))
        images, _ = prepared(self.encoder_codec(run, dataset, device), sets, {}, device)
        first = 1 if run.model.leave_one_out else 0
        cond = {"support": images[:, first:]}
        if "mask" in facts:
            cond["mask"] = facts["mask"][:, first:].to(device)
        reason = None if run.sets.context_drop else "trained without --context-drop"
        group = Group(images[:, 0], cond, facts["label"].numpy())
        split = dataset.split
        kind = "unseen" if split.test else "validation" if split.val else "training"
        name = f"{dataset.name}, {len(images)} sets of {kind} classes"
        return Panel(name, (Condition("support", tuple(cond), reason=reason),), (group,))

    def example_run(self, run: SetRun, num_classes: int) -> SetRun:
        return self.fit(run, None, 0)  # Guidance needs the support, not classes.

    def unprompted(self, generator: ImageGenerator) -> SupportGenerator:
        return SupportGenerator.of(generator, _noise_support(generator.model))


def _noise_support(model: SetDiTConfig) -> Episodes:
    """Return one support of noise, with as many images as in training."""
    size = model.context_size
    return Episodes(
        supports=torch.randint(256, (1, size, *model.input_shape), dtype=torch.uint8),
        classes=np.zeros(1, np.int64),
        class_names=("noise",),
        labels=torch.tensor([model.num_classes]),
        indices=np.full((1, size), -1),
        counts=(1,),
        reals=np.empty(0, np.int64),
        source="noise",
    )


def _describe(run: SetRun) -> dict[str, str]:
    model = run.model
    is_lag = model.mode_conditioning == "lag"
    tokens = f"{model.num_context_tokens}, " if is_lag else ""
    match = "equals hdim" if model.context_dim == model.encoder_dim else "projected from hdim"
    tokenizer = f", {model.encoder_tokenizer}" if model.encoder_mode == "vit_set" else ""
    left_out = "each image from the others" if model.leave_one_out else "each image from all"
    how = "cross-attention to tokens" if is_lag else "a vector modulates every block"
    precond = run.precond
    schedule = precond.precond
    if schedule == "ddpm":
        variance = "learned" if precond.learned_variance else "fixed"
        schedule = f"ddpm, {precond.diffusion_steps} steps, linear; variance {variance}"
    context = model.mode_context
    if model.mode_context == "variational":
        context += f", weight {run.sets.kl_weight:g} after {run.sets.kl_rampup:g} kimg"
    return {
        "conditioning": f"{model.mode_conditioning}: {how}",
        "context": f"(b*n, {tokens}{model.context_dim}); context_channels {model.context_dim} "
        f"{match} {model.encoder_dim}",
        "patch tokens": f"{model.grid**2} per {model.resolution}x{model.resolution} image",
        "sets": f"n = {model.sample_size}, context of {model.context_size} ({left_out})",
        "encoder": f"{model.encoder_mode}{tokenizer}, width {model.encoder_dim}, depth "
        f"{model.encoder_depth}, heads {model.encoder_heads} x {model.encoder_dim_head}, mlp ratio "
        f"{model.encoder_mlp_ratio:g}, pool {model.encoder_pool}, dropout "
        f"{model.encoder_dropout:g}, {'with' if model.encoder_time else 'without'} noise level",
        "DiT": f"width {model.hidden_dim}, depth {model.num_blocks}, heads {model.num_heads}, mlp "
        f"ratio {model.mlp_ratio:g}, patch {model.patch_size}",
        "context mode": context,
        "diffusion": schedule,
        "optimizer": f"lr {run.training.lr:g}, weight decay {run.training.weight_decay:g}, "
        f"average of {run.training.ema_kimg:g} kimg half-life",
        "modules": _module_sizes(model),
    }


def _check_classes(run: SetRun, data: SetDataset) -> None:
    """Raise ValueError if a run's data provide no support to show, or no classes to validate on."""
    if not _kinds_to_show(data, run.model.context_size):
        but = "no class is unseen, and too few images of the classes trained on are held out"
        remedy = "give --test-classes, or a larger --held-out"
        raise refusal("There is no support to show", but=but, remedy=remedy)
    if run.sets.num_eval_batches and not (data.split.val or data.split.test):
        remedy = "name some with --val-classes, or set --num-eval-batches=0"
        but = "there are no classes to validate on"
        raise refusal("--num-eval-batches", but=but, remedy=remedy)


def _kinds_to_show(dataset: SetDataset, size: int) -> list[str]:
    """Return which kinds of classes, seen and unseen, all have ``size`` images for a support."""
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


def _module_sizes(model: SetDiTConfig) -> str:
    with torch.device("meta"):
        network = build_network(model)
    parts = (network, network.backbone, network.conditioner.encoder)
    total, backbone, encoder = map(count_parameters, parts)
    rest = "null and labels" if model.mode_context == "deterministic" else "rest"
    return f"DiT {backbone:,}, encoder {encoder:,}, {rest} {total - backbone - encoder:,}"


def episodes_of_snapshot(
    snapshot: Snapshot, split: str, num: int, *, data: str | None = None, seed: int = 0
) -> Episodes:
    """Return ``num`` episodes from a split of a snapshot's data, cycling through its classes.

    Args:
        split: ``seen`` (held-out images of classes trained on), ``unseen`` or ``val``.
        data: New location of the data, if they have moved.
        seed: Seed of the choice of images.

    Raises ValueError if the data are missing or different, or have no such classes or too few
    images.
    """
    size, dataset = snapshot.config.model.context_size, open_data_of(snapshot, data)
    choose = functools.partial(episodes_of_run, dataset, split, support_size=size, seed=seed)
    num_classes = len(choose(num_per_class=1))
    found = choose(num_per_class=-(-num // num_classes))
    # Episodes of a class lie together; take the first of each class, then the second.
    order = np.arange(len(found)).reshape(num_classes, -1).T.flatten()[:num]
    return found[order.tolist()]


def open_data_of(snapshot: Snapshot, data: str | None = None) -> SetDataset:
    """Return the sets that a snapshot was trained on, opened at ``data`` if they have moved.

    Raises ValueError if the data are missing or different.
    """
    config = snapshot.config
    location = data or config.data.data
    if location is None or not (is_address(location) or Path(location).exists()):
        remedy = f"say where the data are that {snapshot.path} was trained on"
        raise refusal("--data", but=f"{location} does not exist", remedy=remedy)
    dataset = FAMILY.open_data(config.changed("data", data=location, cache=False))
    if not dataset.is_same_as(snapshot.data.content_hash):
        but = f"{location} holds other data than {snapshot.path} was trained on"
        raise refusal("--data", but=f"{but}, so that its split of classes is not known")
    return dataset


FAMILY = SetFamily()
