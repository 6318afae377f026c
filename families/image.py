"""Pixel-space models of images, class-conditional or unconditional: DiffiT's U-shaped network."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from data.images.augment import NUM_LABELS, make_augment_pipe
from data.images.codec import PixelCodec
from data.images.dataset import ImageDataset, MirroredImages, open_dataset
from data.samplers import MAX_POSITIONS, PositionSampler
from diffusion.denoiser import AUTOCAST_DTYPES
from diffusion.precond import make_precond
from dnnlib.addresses import is_address
from dnnlib.errors import refusal
from families.checks import check_metrics, unconditional
from families.distillation import as_student
from families.inspected import images_to_inspect
from families.next_steps import image_steps
from families.reporting import check_conditions, reporting
from families.runs import ImageRun
from families.sampled import check_levels, run_to_sample, sampled_run
from models.network import Network
from sampling.images import ImageGenerator, cached_snapshot, check_guide
from torch_utils.rng import seed_after
from training.asked import NOT_FEATURES, NOT_SETS, Asked, GeneratorOptions
from training.checkpoint import DataSummary, Snapshot
from training.config import RunConfig
from training.family import Codec, Evaluator, Part, Steps, TrainingData
from training.objective import Objective
from training.transfer import Transfer, transfer_weights
from training.validation.examples import Examples, examples_of_images
from training.watching.inspection.sample import Batch, Sample

_DEFAULT_LABEL_DROP = 0.1  # From the paper on classifier-free guidance (arXiv 2207.12598).


class ImageFamily:
    """Images in pixel space. Families that differ only in parts derive from it."""

    run: ClassVar[type[RunConfig]] = ImageRun
    library_bytes = 0

    # Before anything is opened.

    def check(self, run: ImageRun, given: Collection[str]) -> ImageRun:
        check_metrics(run, given, of_supports=False)
        return run

    def settle_in(
        self, run: ImageRun, source: RunConfig, trained_nimg: int, given: Collection[str]
    ) -> ImageRun:
        run = with_architecture(run, source, given)
        # The weights are good from the start, so the average need not forget its first steps.
        return run if "ema_rampup" in given else run.changed("training", ema_rampup=None)

    def distil(self, run: ImageRun, source: RunConfig, given: Collection[str]) -> ImageRun:
        run = as_student(run, source, given)
        scale = run.distillation.distill_cfg_scale
        problem = None if scale == 1.0 else self._unguided(source, source.model.num_classes)
        if problem is not None:
            but = f"the teacher {problem[0]}"
            raise refusal("--distill-cfg-scale", scale, but=but, remedy="leave it out")
        return run

    # A training run.

    def open_data(
        self, run: ImageRun, path: str | None = None, split: str = "train"
    ) -> TrainingData:
        dataset = open_images_of(with_path(run, path))
        return MirroredImages(dataset) if run.data.hflip else dataset

    def fit(self, run: ImageRun, data: TrainingData | None, num_classes: int = 0) -> ImageRun:
        channels = run.model.img_channels
        if data is not None:
            check_resolution(run, data.resolution)
            channels, num_classes = data.img_channels, data.num_classes
        run = self._with_label_drop(run, num_classes)
        self.check_guidance(run, num_classes)
        check_levels(run)
        precond = make_precond(run.precond)
        return run.changed(
            "model",
            img_channels=channels,
            num_classes=num_classes,
            augment_dim=NUM_LABELS if run.training.augment.augment > 0 else 0,
            learned_variance=precond.learned_variance,
        )

    def _with_label_drop(self, run: ImageRun, num_classes: int) -> ImageRun:
        label_drop = run.training.label_drop
        if label_drop is None:
            label_drop = _DEFAULT_LABEL_DROP if num_classes else 0.0
        if not num_classes and label_drop > 0:
            raise unconditional(label_drop)
        return run.changed("training", label_drop=label_drop)

    def check_guidance(self, run: ImageRun, num_classes: int) -> None:
        """Raise ValueError if the run asks for guidance that its model cannot give."""
        guidance, channels = run.guidance, run.model.input_shape[0]
        if (guidance.cfg_channels or 0) > channels:
            but = f"the model denoises {channels} channels"
            remedy = "give at most as many, or none for all"
            raise refusal("--cfg-channels", guidance.cfg_channels, but=but, remedy=remedy)
        problem = None if guidance.cfg_scale == 1.0 else self._unguided(run, num_classes)
        if problem is not None:
            remedy = f"train with {problem[1]}, or set --cfg-scale=1"
            but = f"the model {problem[0]}"
            raise refusal("--cfg-scale", guidance.cfg_scale, but=but, remedy=remedy)

    def _unguided(self, run: ImageRun, num_classes: int) -> tuple[str, str] | None:
        """Return why a model cannot be guided, and the options to train with; None if it can."""
        if not num_classes:
            return "is unconditional", "--cond and --label-drop=0.1"
        if not run.training.label_drop:
            reason = "was trained without label dropout and has learned no unconditional half"
            return reason, "--label-drop=0.1"
        return None

    def open_codec(
        self, run: ImageRun, data: TrainingData, device: torch.device
    ) -> tuple[ImageRun, Codec]:
        return run, self.encoder_codec(run, data, device)

    def snapshot_codec(self, snapshot: Snapshot, vae: str | None, device: torch.device) -> Codec:
        """Return the codec that decodes a snapshot's images.

        ``vae`` is the autoencoder's new location, if it has moved. Raises ValueError if the model
        has none, or if the file is not the right one.
        """
        if vae is not None:
            raise ValueError(f"--vae: got {vae}, but this model makes images without one.")
        return PixelCodec()

    def steps(self, run: ImageRun, data: TrainingData, start_nimg: int, part: Part) -> Steps:
        sampler = PositionSampler(
            self._num_keys(data),
            first_key=part.num_rollbacks * MAX_POSITIONS,
            seed=seed_after(run.training.seed, part.num_rollbacks),
            # A row of a batch is one image or a set of images.
            start_nimg=start_nimg // run.model.images_per_row,
            batch_size=run.training.batch,
            **part.share,
        )
        return Steps(sampler, lambda cur_nimg: run.model.input_shape)

    def _num_keys(self, data: TrainingData) -> int | None:
        """Return the number of rows in the data; None if each position in the run has its own."""
        return len(data)

    def places(self, data: TrainingData, keys: Sequence[int]) -> np.ndarray:
        return np.asarray(keys) % data.num_images  # Mirrored images come after all originals.

    def inspected(
        self, run: ImageRun, data: TrainingData, codec: Codec, device: torch.device, number: int
    ) -> Sample:
        stored, cond = images_to_inspect(self, run, data, number)
        x, _ = codec.encode(stored[: self._num_encoded(data)].to(device), {}, None)
        batch = Batch(stored=stored, x=x.cpu(), cond=cond, groups=cond.get("label"))
        return Sample(batches=(batch,), **self._expected_std(run))

    def _num_encoded(self, data: TrainingData) -> int | None:
        """Return how many of the inspected images are also encoded; None for all of them."""
        return None

    def _expected_std(self, run: ImageRun) -> dict[str, Any]:
        """Return the standard deviation that a model expects of data, as arguments of Sample."""
        return dict(std=make_precond(run.precond).sigma_data)

    def objective(self, run: ImageRun, network: Network, codec: Codec) -> Objective:
        return Objective(network, make_precond(run.precond), codec, **objective_settings(run))

    def validation(self, run: ImageRun, data: TrainingData) -> Examples | None:
        held_out, shape = data.validation_part, run.model.input_shape
        if held_out is None:
            return None
        return examples_of_images(held_out, data, shape, data.num_images)

    def start_from(
        self, run: ImageRun, network: Network, snapshot: Snapshot, data: DataSummary
    ) -> Transfer:
        def check(found: Transfer) -> None:
            if run.distillation.is_on:
                found.refuse_any_difference()
            found.refuse_poor_match(run.training.transfer_allow)

        return transfer_weights(network, snapshot, check=check)

    def generator(
        self, run: ImageRun, network: Network, codec: Codec, device: torch.device
    ) -> ImageGenerator:
        return ImageGenerator(
            network=network,
            precond=make_precond(run.precond),
            model=run.model,
            sampling=run.sampling,
            guidance=run.guidance,
            device=device,
            codec=codec,
            autocast_dtype=AUTOCAST_DTYPES[run.training.precision],
        )

    def evaluator(self, run: ImageRun, data: TrainingData, device: torch.device) -> Evaluator:
        from evaluation.in_loop.images import ImageEvaluator

        counts = data.class_counts if data.num_classes else ()
        evaluate = self._evaluate(run, data, device)
        names = data.class_names if counts else ()
        if run.logging.report_conditions:
            check_conditions(run)
        return reporting(self, run, ImageEvaluator(run, counts, evaluate, names), device)

    def _evaluate(
        self, run: ImageRun, data: TrainingData, device: torch.device
    ) -> Callable[..., list[dict[str, Any]]] | None:
        """Return the function that scores images with the run's metrics; None if it has none."""
        if not run.logging.metrics:
            return None
        from evaluation.scoring import RealImages, make_evaluate
        from metrics.metric import get_metrics

        specs = self._metric_specs(run, get_metrics(run.logging.metrics))
        real, compared = None, [spec.name for spec in specs if spec.has_reference]
        location, parts = run.logging.metrics_ref, None
        if compared:
            images = location or self._real_images(run, data, compared[0])
            real = RealImages(images)
            if location is None and images.validation_part is not None:
                parts = images, images.validation_part
        return make_evaluate(specs, run.detectors, real, run.model, device, parts)

    def _metric_specs(self, run: ImageRun, specs: Sequence[Any]) -> Sequence[Any]:
        """Return ``specs``, the run's metrics, with the run's own settings."""
        return specs

    def _real_images(self, run: ImageRun, data: TrainingData, metric: str) -> Any:
        """Return the dataset of real images for ``metric``: those of the training data."""
        return data.images if isinstance(data, MirroredImages) else data

    def describe(self, run: ImageRun) -> dict[str, str]:
        return {}

    def describe_data(self, data: TrainingData) -> list[str]:
        return ["cond" if data.num_classes else "uncond"]

    def next_steps(self, run: ImageRun) -> dict[str, str]:
        return image_steps(run, run.data.data)

    # A snapshot.

    def load(
        self, snapshot: Snapshot, device: torch.device, options: GeneratorOptions
    ) -> ImageGenerator:
        run = run_to_sample(snapshot, options, device)
        self.check_sampling(snapshot, options)
        codec = self.snapshot_codec(snapshot, options.vae, device)
        generator = self.generator(run, options.build(snapshot, device), codec, device)
        if options.guide is None:
            return generator
        guide = cached_snapshot(options.guide)
        network, sha256 = options.build(guide, device), guide.sha256
        return dataclasses.replace(generator, guide=network, guide_hash=sha256)

    def check_sampling(self, snapshot: Snapshot, options: GeneratorOptions) -> None:
        run = sampled_run(snapshot, options)
        if options.guide is None:
            self.check_guidance(run, run.model.num_classes)
        else:
            check_guide(snapshot, cached_snapshot(options.guide), run.guidance)
        check_levels(run)

    def requests(self, snapshot: Snapshot, asked: Asked) -> Any:
        from sampling.outputs import ClassRequests, parse_classes

        asked.refuse(*NOT_SETS)
        asked.refuse(*NOT_FEATURES)
        names = snapshot.data.class_names
        return ClassRequests(parse_classes(asked.classes, names), names)

    def images(
        self, snapshot: Snapshot, generator: Callable[[], Any], first_seed: int, batch: int
    ) -> Any:
        from evaluation.images import SnapshotImages

        return SnapshotImages(generator(), snapshot, first_seed=first_seed, batch=batch)

    def panel(
        self,
        run: ImageRun,
        data: str | None,
        num: int,
        device: torch.device,
        features: Mapping[str, Any] | None = None,
    ) -> Any:
        from evaluation.conditioning.panel import Condition, Group, Panel, in_turn, prepared

        check_conditions(run)
        run = without_augmentation(run, data)
        dataset = self.open_data(run)
        order = in_turn(dataset.labels, num)
        images, cond = dataset.__getitems__(order.tolist())
        images, cond = prepared(self.encoder_codec(run, dataset, device), images, cond, device)
        reason = None if run.training.label_drop else "trained without --label-drop"
        condition = Condition("class", ("label",), reason=reason)
        group = Group(images, {"label": cond["label"]}, dataset.labels[order])
        return Panel(f"{dataset.name}, {len(order)} images", (condition,), (group,))

    def encoder_codec(self, run: ImageRun, data: TrainingData, device: torch.device) -> Codec:
        return PixelCodec(make_augment_pipe(run.training.augment))

    def example_run(self, run: ImageRun, num_classes: int) -> ImageRun:
        return self.fit(run, None, num_classes or 10)

    def unprompted(self, generator: ImageGenerator) -> ImageGenerator:
        return generator


def objective_settings(run: RunConfig) -> dict[str, Any]:
    """Return the arguments that all objectives take besides network, precond and codec."""
    return dict(
        label_drop=run.training.label_drop or 0.0,
        autocast_dtype=AUTOCAST_DTYPES[run.training.precision],
    )


def with_architecture(run: RunConfig, source: RunConfig, kept: Collection[str]) -> RunConfig:
    """Return ``run`` with the model settings of ``source``, except for the fields ``kept``.

    Settings that the data determine also stay, and so does dropout, which has no weights. If the
    models are of different kinds, nothing changes.
    """
    if type(source.model) is not type(run.model):
        return run
    fields = [f for f in dataclasses.fields(run.model) if f.name not in (*kept, "dropout")]
    of_weights = [
        f.name for f in fields if f.metadata["exposed"] and f.metadata["affects"] == "result"
    ]
    return run.changed("model", **{name: getattr(source.model, name) for name in of_weights})


def with_path(run: RunConfig, path: str | None) -> RunConfig:
    """Return ``run`` with its data at ``path``, or unchanged if that is None."""
    return run if path is None else run.changed("data", data=path)


def without_augmentation(run: RunConfig, data: str | None) -> RunConfig:
    """Return ``run`` with every image of its data used once, unmirrored and uncached.

    ``data`` is their new location, if they have moved.
    """
    return with_path(run, data).changed("data", hflip=False, max_size=None, cache=False)


def check_resolution(run: RunConfig, resolution: int) -> None:
    """Raise ValueError if ``resolution``, that of the data in pixels, is not that of the model."""
    expected = run.model.resolution
    if resolution != expected:
        raise ValueError(
            f"--resolution: this run expects {expected}x{expected} images, but {run.data.data} "
            f"holds {resolution}x{resolution}. Give --resolution={resolution} or another preset, "
            f"or convert the data with dataset_tool.py convert --resolution={expected}."
        )


def open_images_of(run: RunConfig, **settings: Any) -> ImageDataset:
    """Return the images that a run's ``--data`` names.

    ``settings`` are further arguments of open_dataset. Raises ValueError if they cannot be opened;
    the message recognises latents, features, and archives that need converting first.
    """
    try:
        return open_dataset(run.data, seed=run.training.seed, **settings)
    except ValueError:
        if run.data.data is not None and is_address(run.data.data):
            raise
        from data.convert.sources import unconverted
        from data.features.record import is_feature_folder
        from data.latents.record import is_latent_folder

        path = run.data.data
        if path is not None and (command := unconverted(Path(path))) is not None:
            remedy = f"run {command}, and give --data={command.rpartition('=')[2]}"
            raise refusal(
                "--data", but=f"{path} has to be converted first", remedy=remedy
            ) from None
        for what, is_what, does, other in (
            ("features", is_feature_folder, "does not train on them", "a preset such as nanodit"),
            ("latents", is_latent_folder, "trains on pixels", "a preset of latent models"),
        ):
            if path is not None and is_what(path):
                but = f"{path} holds {what}, but preset {run.preset} {does}"
                raise refusal("--data", but=but, remedy=f"give images, or {other}") from None
        raise


FAMILY = ImageFamily()
