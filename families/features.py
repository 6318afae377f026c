"""Feature-conditioned models: NanoDiT, flow matching on latents given text and visual features."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from data.samplers import BucketSampler, ShardSampler
from diffusion.denoiser import AUTOCAST_DTYPES
from diffusion.precond import make_precond
from dnnlib.addresses import is_address
from dnnlib.errors import refusal
from families.checks import refuse_augmentation, refuse_reference, unconditional
from families.distillation import as_student
from families.image import (
    objective_settings,
    with_architecture,
)
from families.inspected import features_to_inspect
from families.next_steps import CONDITIONS_STEP, generate_step
from families.reporting import reporting
from families.runs import FeatureRun
from families.sampled import run_to_sample
from models.network import Network
from torch_utils.rng import seed_after
from training.asked import NOT_SETS, Asked, GeneratorOptions
from training.checkpoint import DataSummary, Snapshot
from training.config import RunConfig
from training.family import Codec, Evaluator, Part, Steps, TrainingData
from training.feature_objective import FeatureObjective
from training.transfer import Transfer, transfer_weights
from training.validation.examples import NUM_IMAGES, Examples, Row, num_repeats, spread
from training.watching.inspection.sample import Sample

# Parameters that a model without patches lacks.
_PATCH_PARAMETERS = ("conditioner.dino_patch_proj.*", "conditioner.null_dino_patch_token")
_LR_FACTOR = 0.5
_BIAS_STEPS = 2000  # Optimizer steps over which new patches are phased in.
_VISUAL_ALONE = "never dropped without the other in training"


class FeatureFamily:
    """Latents of images in several sizes, conditioned on text and on a reference image."""

    run: ClassVar[type[RunConfig]] = FeatureRun
    library_bytes = 75 << 20

    # Before anything is opened.

    def check(self, run: FeatureRun, given: Collection[str]) -> FeatureRun:
        from evaluation.validation.networks import check_used, chosen_tests

        choice = f"--metrics={','.join(run.logging.metrics) or 'none'}"
        tests = chosen_tests(run.logging.metrics, option="--metrics")
        check_used(given, tests, choice)
        refuse_reference(run, "feature-conditioned models", "held-out images")
        run.detectors.check_used(given, (), choice)
        return run

    def settle_in(
        self, run: FeatureRun, source: RunConfig, trained_nimg: int, given: Collection[str]
    ) -> FeatureRun:
        """Return ``run`` with half the learning rate, and new patches phased in over 2,000 steps.

        Patches are new if ``source`` has none, or had not finished phasing them in.
        """
        changes = dict(ema_rampup=None, lr=run.training.lr * _LR_FACTOR)
        changes = {name: value for name, value in changes.items() if name not in given}
        had_patches = (
            getattr(source.model, "use_dino_patches", False)
            and trained_nimg >= 1000 * source.features.patch_bias_kimg
        )
        # The run may add patches to a model without them.
        run = with_architecture(run, source, {*given, "use_dino_patches"})
        if "patch_bias_kimg" not in given and run.model.use_dino_patches and not had_patches:
            run = run.changed("features", patch_bias_kimg=_BIAS_STEPS * run.training.batch / 1000)
        return run.changed("training", **changes)

    def distil(self, run: FeatureRun, source: RunConfig, given: Collection[str]) -> FeatureRun:
        run = as_student(run, source, given)
        # The teacher has finished phasing in its patches.
        return run if "patch_bias_kimg" in given else run.changed("features", patch_bias_kimg=0.0)

    # A training run.

    def open_data(
        self, run: FeatureRun, path: str | None = None, split: str = "train"
    ) -> TrainingData:
        from data.features.dataset import FeatureDataset
        from data.features.record import is_feature_folder

        path, data = path or run.data.data, run.data
        is_remote = path is not None and is_address(path)
        if not is_remote and (path is None or not is_feature_folder(path)):
            wanted = "trains on a folder made by dataset_tool.py features"
            raise refusal("--data", path, remedy=f"preset {run.preset} {wanted}")
        for option, value, reason in (
            ("--cond", data.cond, "there are no class labels"),
            ("--hflip", data.hflip, "mirrored latents do not belong to the features of an image"),
            ("--cache", data.cache, "nothing is decoded"),
            ("--max-size", data.max_size, "prepare fewer images with --max-images"),
        ):
            if value:
                raise ValueError(f"{option} has no effect on features: {reason}.")
        settings = dict(text_lengths=run.features.text_lengths)
        dataset = FeatureDataset(path, split, **settings, validation_share=data.validation_share)
        num = dataset.record.num_samples("validation")
        if data.validation_share and num:
            but = f"{dataset.name} has a validation split of {num} images already"
            remedy = "leave it out; the loss is measured on that"
            raise refusal("--validation-share", data.validation_share, but=but, remedy=remedy)
        return dataset

    def fit(self, run: FeatureRun, data: TrainingData | None, num_classes: int = 0) -> FeatureRun:
        if data is not None:
            run = _fit_to_features(run, data)
        if run.training.label_drop:
            raise unconditional(run.training.label_drop)
        for option, value, wanted in (
            ("--precond", run.precond.precond, "flow"),
            ("--sigma-grid", run.sampling.grid, "time"),
        ):
            if value != wanted:
                but = f"preset {run.preset} uses flow matching"
                raise refusal(option, value, but=but, remedy=f"give {option}={wanted}")
        refuse_augmentation(run, "latents")
        run = run.changed("training", label_drop=0.0)
        return run.changed("model", img_channels=3, num_classes=0)

    def open_codec(
        self, run: FeatureRun, data: TrainingData, device: torch.device
    ) -> tuple[FeatureRun, Codec]:
        return run, _make_codec(run, data.record.statistics, device)

    def steps(self, run: FeatureRun, data: TrainingData, start_nimg: int, part: Part) -> Steps:
        seed = seed_after(run.training.seed, part.num_rollbacks)
        batches = dict(seed=seed, batch_size=run.training.batch, **part.share)
        in_shards = dict(shard_sizes=data.shard_sizes) if run.features.streaming else {}
        kind = ShardSampler if run.features.streaming else BucketSampler
        sampler = kind(data.counts, **in_shards, start_nimg=start_nimg, **batches)
        return Steps(sampler, lambda cur_nimg: data.latent_shape(sampler.bucket_at(cur_nimg)))

    def places(self, data: TrainingData, keys: Sequence[int]) -> np.ndarray:
        return np.asarray(keys)

    def inspected(
        self, run: FeatureRun, data: TrainingData, codec: Codec, device: torch.device, number: int
    ) -> Sample:
        batches = features_to_inspect(run, data, codec, device, number)
        visual = ("cls", "patches") if run.model.use_dino_patches else ("cls",)
        return Sample(batches=batches, std=1.0, std_from="latents", visual=visual)

    def objective(self, run: FeatureRun, network: Network, codec: Codec) -> FeatureObjective:
        precond, settings = make_precond(run.precond), objective_settings(run)
        settings = dict(settings, config=run.features, is_summed=run.summed_loss)
        return FeatureObjective(network, precond, codec, **settings)

    def validation(self, run: FeatureRun, data: TrainingData) -> Examples | None:
        held_out, rows = data.of_split("validation"), []
        is_many = len(held_out) > NUM_IMAGES
        repeats = num_repeats(len(held_out)) if len(held_out) else 0
        for bucket, size in enumerate(held_out.buckets):
            if size not in data.buckets:
                continue
            own, other = held_out.counts[bucket], data.buckets.index(size)
            # In proportion to the bucket's images, but at least one.
            num = max(NUM_IMAGES * own // len(held_out), 1) if is_many else own * repeats
            starts = (held_out.firsts[bucket], data.firsts[other])
            places = [spread(num, own), spread(num, data.counts[other])]
            pairs = zip(*places, strict=True)
            shape = held_out.latent_shape(bucket)
            rows += [Row(shape, int(starts[0]) + a, int(starts[1]) + b) for a, b in pairs]
        return Examples(held_out, data, tuple(rows)) if rows else None

    def start_from(
        self, run: FeatureRun, network: Network, snapshot: Snapshot, data: DataSummary
    ) -> Transfer:
        there = (snapshot.data.features or {}).get("statistics")
        notes, length = [], 1000 * snapshot.config.features.patch_bias_kimg
        if run.distillation.is_on and snapshot.trained_nimg < length:
            but = f"{snapshot.path} has not phased in its patches yet (--patch-bias-kimg)"
            raise refusal("--distill", but=but, remedy="give a later snapshot of its run")
        if there is not None and there != data.features["statistics"]:
            notes.append("Its features were normalised by the statistics of other data.")

        def check(found: Transfer) -> None:
            if run.distillation.is_on:
                found.refuse_any_difference()
            allowed = run.training.transfer_allow
            found.refuse_differences(allowed, _PATCH_PARAMETERS)

        return transfer_weights(network, snapshot, check=check, notes=notes)

    def generator(
        self, run: FeatureRun, network: Network, codec: Codec, device: torch.device
    ) -> Any:
        from sampling.features import FeatureGenerator

        return FeatureGenerator(
            network=network,
            model=run.model,
            features=run.features,
            codec=codec,
            sampling=run.sampling,
            guidance=run.guidance,
            device=device,
            trained_nimg=0,
            autocast_dtype=AUTOCAST_DTYPES[run.training.precision],
        )

    def evaluator(self, run: FeatureRun, data: TrainingData, device: torch.device) -> Evaluator:
        from evaluation.in_loop.features import FeatureEvaluator
        from evaluation.validation.networks import chosen_tests, make_validate

        tests = chosen_tests(run.logging.metrics, option="--metrics")
        evaluate = None
        if tests:
            validation = dataclasses.replace(run.validation, tests=tests)
            evaluate = make_validate(validation, data.of_split("validation"), device)
        return reporting(self, run, FeatureEvaluator(run, data, evaluate), device)

    def describe(self, run: FeatureRun) -> dict[str, str]:
        model, features = run.model, run.features
        both = 1 - features.drop_all - features.text_only - features.visual_only
        size = f"patches of {model.visual_patch_size} pixels"
        patches = size if model.use_dino_patches else "no patches"
        return {
            "model": f"{model.family}, {model.resolution}x{model.resolution}x"
            f"{model.img_channels}, text and image features",
            "buckets": ", ".join(model.buckets) or "those of the data",
            "context": f"text of up to {model.max_text_tokens} x {model.text_dim}, CLS token and "
            f"{patches} of {model.visual_dim}",
            "dropout": f"nothing given {features.drop_all:.0%}, text alone "
            f"{features.text_only:.0%}, image alone {features.visual_only:.0%}, both {both:.0%}",
        }

    def next_steps(self, run: FeatureRun) -> dict[str, str]:
        request = '--prompt="A RED HOUSE" --reference=IMAGE.jpg --num=16'
        validate = "python fid.py validate --network={network} --outdir={run}/validation"
        return {
            **generate_step("Generate from a text and a reference image", request),
            "Test it on held-out images": validate,
            **CONDITIONS_STEP,
        }

    def describe_data(self, data: TrainingData) -> list[str]:
        return []

    # A snapshot.

    def load(self, snapshot: Snapshot, device: torch.device, options: GeneratorOptions) -> Any:
        self.check_sampling(snapshot, options)
        run = run_to_sample(snapshot, options, device)
        codec = _make_codec(run, snapshot.data.features["statistics"], device, options.vae)
        generator = self.generator(run, options.build(snapshot, device), codec, device)
        return dataclasses.replace(generator, trained_nimg=snapshot.trained_nimg)

    def check_sampling(self, snapshot: Snapshot, options: GeneratorOptions) -> None:
        if options.guide is not None:
            raise ValueError("--guide: this model is guided by --text-scale and --visual-scale.")

    def requests(self, snapshot: Snapshot, asked: Asked) -> Any:
        from sampling.requests import PromptRequests

        asked.refuse(("classes",), "this model makes images from texts and reference images")
        asked.refuse(*NOT_SETS)
        return PromptRequests(snapshot, asked)

    def images(
        self, snapshot: Snapshot, generator: Callable[[], Any], first_seed: int, batch: int
    ) -> Any:
        raise ValueError(
            f"{snapshot.path}: this model makes images from texts and reference images; sample it "
            "with generate.py, and measure it with fid.py validate or fid.py conditions."
        )

    def panel(
        self,
        run: FeatureRun,
        data: str | None,
        num: int,
        device: torch.device,
        features: Mapping[str, Any] | None = None,
    ) -> Any:
        from evaluation.conditioning.panel import Group, Panel, prepared

        dataset = self.open_data(run, data)
        codec = _encoder_codec(features or dataset.summary(), device)
        held_out, kind = dataset.of_split("validation"), "validation"
        if not len(held_out):
            held_out, kind = dataset, "training"
        groups = []
        for bucket, count in enumerate(held_out.counts):
            share = min(max(round(num * count / len(held_out)), 2), count)
            first = int(held_out.firsts[bucket])
            latents, cond = held_out.__getitems__(range(first, first + share))
            images, encoded = prepared(codec, latents, cond, device)
            encoded["size"] = cond["size"]
            segments = dict(text=encoded["text"].shape[1], CLS=1)
            if run.model.use_dino_patches:
                segments["patches"] = encoded["patches"].shape[1]
            groups.append(Group(images, encoded, np.arange(share), segments))
        total = sum(len(group.inputs) for group in groups)
        name = f"{dataset.name}, {total} {kind} images in {len(groups)} bucket(s)"
        return Panel(name, _conditions(run), tuple(groups))

    def encoder_codec(self, run: FeatureRun, data: TrainingData, device: torch.device) -> Codec:
        return _encoder_codec(data.summary(), device)


def _encoder_codec(features: Mapping[str, Any], device: torch.device) -> Codec:
    from data.features.codec import FeatureCodec, FeatureStatistics

    return FeatureCodec(FeatureStatistics.of(features["statistics"], device), None)


def _make_codec(
    run: FeatureRun, statistics: Mapping[str, Any], device: torch.device, vae: str | None = None
) -> Codec:
    from data.features.codec import FeatureCodec, FeatureStatistics
    from families.latent import decoder_of

    autoencoder = decoder_of(run.model, vae, device)
    return FeatureCodec(FeatureStatistics.of(statistics, device), autoencoder)


def _fit_to_features(run: FeatureRun, data: TrainingData) -> FeatureRun:
    record = data.record
    if not data.num_images:
        raise ValueError(f"--data: {run.data.data} holds no image to train on.")
    limit = run.features.text_lengths[-1]
    cut = data.longer_text(limit) if limit < record.text["max_tokens"] else None
    if cut is not None:
        but = f"the text of {cut[0]} has {cut[1]} tokens, and would be cut"
        remedy = f"add a length, such as {record.text['max_tokens']}"
        raise refusal("--text-lengths", limit, but=but, remedy=remedy)
    edge = run.model.patch_size * record.vae["downsampling"]
    for bucket in data.buckets:
        if bucket.width % edge or bucket.height % edge:
            but = f"sides of {bucket.name} are not multiples of {edge} pixels"
            remedy = "use --patch-size=2"
            raise refusal("--patch-size", run.model.patch_size, but=but, remedy=remedy)
    return run.changed(
        "model",
        resolution=max(data.resolution // edge, 1) * edge,
        latent_channels=record.vae["channels"],
        latent_downsampling=record.vae["downsampling"],
        text_dim=record.text["dim"],
        max_text_tokens=record.text["max_tokens"],
        visual_dim=record.visual["dim"],
        visual_patch_size=record.visual["patch_size"],
        buckets=tuple(bucket.name for bucket in data.buckets),
        **{
            f"{name}{suffix}": getattr(record, name)[key]
            for name in ("vae", "visual", "text")
            for suffix, key in (("", "location"), ("_hash", "hash"))
        },
    )


def _conditions(run: FeatureRun) -> tuple[Any, ...]:
    """Return the conditions of a model, and why some of them cannot be dropped."""
    from evaluation.conditioning.panel import Condition
    from models.feature_conditioner import CONDITIONS

    features, has_patches = run.features, run.model.use_dino_patches
    no_text = None if features.drop_all + features.visual_only else "trained with it always present"
    no_visual = None if features.drop_all + features.text_only else "trained with it always present"
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
    return tuple(conditions)


FAMILY = FeatureFamily()
