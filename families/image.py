"""Parts of a run that depend on the family of its model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from data.codecs import FeatureInputs, LatentInputs, PixelInputs
from data.features.dataset import FeatureDataset
from data.features.statistics import FeatureStatistics
from data.features.streaming import APPROXIMATE, StreamedFeatures, StreamSampler
from data.samplers import BucketSampler, PositionSampler
from diffusion.denoiser import AUTOCAST_DTYPES
from diffusion.precond import Precond, make_precond
from encoders.autoencoder import Autoencoder
from evaluation.in_loop.features import FeatureScores
from evaluation.in_loop.images import EvaluateFn, InLoopScores
from families.sets import episodes_to_show
from models import Network
from sampling.features import FeatureGenerator
from sampling.images import ImageGenerator
from torch_utils import distributed
from training.checkpoint import DataSummary, Snapshot
from training.config import RunConfig, accumulation_rounds
from training.feature_objective import FeatureObjective
from training.inputs import TrainingData
from training.objective import Objective
from training.set_objective import SetObjective, make_validate
from training.telemetry import Telemetry
from training.transfer import save_report, transfer_weights, warm_start


def start_from(
    config: RunConfig, network: Network, snapshot: Snapshot, data: DataSummary, run_dir: Path
) -> str:
    """Copy the weights of a snapshot into a run's network, and return a report.

    Raises ValueError if they do not fit.
    """
    if config.features is None:
        return transfer_weights(network, snapshot)
    report = warm_start(
        network,
        snapshot,
        allow=config.features.transfer_allow,
        statistics=data.features["statistics"],
    )
    if distributed.is_main():
        save_report(report, run_dir)
    return str(report)


def make_objective(
    config: RunConfig,
    network: Network,
    precond: Precond,
    inputs: PixelInputs | LatentInputs | FeatureInputs,
) -> Objective:
    """Return the objective of a run for ``network``."""
    settings = dict(
        inputs=inputs,
        label_drop=config.training.label_drop or 0.0,
        autocast_dtype=AUTOCAST_DTYPES[config.training.precision],
    )
    if config.features is not None:
        return FeatureObjective(network, precond, config=config.features, **settings)
    if config.sets is not None:
        return SetObjective(network, precond, config=config.sets, **settings)
    return Objective(network, precond, **settings)


def make_sampler(
    config: RunConfig, dataset: TrainingData, start_nimg: int
) -> tuple[Sampler, Callable[[int], tuple[int, int, int]]]:
    """Return this rank's sampler from ``start_nimg`` images on, and the shape of its inputs.

    The shape is a function of the number of images before a step.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    batch_gpu, _ = accumulation_rounds(config.training, world_size)
    settings = dict(
        seed=config.training.seed,
        batch_size=config.training.batch,
        batch_gpu=batch_gpu,
        rank=rank,
        world_size=world_size,
    )
    if isinstance(dataset, FeatureDataset):
        is_streamed = isinstance(dataset, StreamedFeatures)
        make = StreamSampler if is_streamed else BucketSampler
        sampler = make(dataset.counts, start_nimg=start_nimg, **settings)
        if is_streamed:
            distributed.print0(APPROXIMATE)
        return sampler, lambda cur_nimg: dataset.latent_shape(sampler.bucket_at(cur_nimg))
    size = len(dataset) if config.sets is None else None
    # A row of a batch is an image, or a set of them.
    start = start_nimg // config.model.images_per_row
    return PositionSampler(size, start_nimg=start, **settings), lambda _: config.model.input_shape


def make_scores(
    config: RunConfig,
    run_dir: Path,
    network: Network,
    dataset: TrainingData,
    data: DataSummary,
    inputs: PixelInputs | LatentInputs | FeatureInputs,
    *,
    device: torch.device,
    autoencoder: Autoencoder | None,
    evaluate: EvaluateFn | None,
    telemetry: Telemetry | None,
    stop_signal: distributed.StopSignal,
) -> InLoopScores | FeatureScores:
    """Return what makes pictures and scores of a run with the averaged weights of ``network``."""
    precond = make_precond(config.precond)
    protocol: dict[str, Any] = dict(
        network=network,
        model=config.model,
        sampling=config.sampling,
        device=device,
        autocast_dtype=AUTOCAST_DTYPES[config.training.precision],
        autoencoder=autoencoder,
    )
    outputs = dict(evaluate=evaluate, telemetry=telemetry, stop_signal=stop_signal)
    if isinstance(dataset, FeatureDataset):
        generator = FeatureGenerator(
            **protocol,
            features=config.features,
            statistics=FeatureStatistics.of(data.features["statistics"], device),
            guidance=config.dual_guidance,
            trained_nimg=0,
        )
        return FeatureScores(config, run_dir, generator, dataset, **outputs)
    validate = None
    if config.sets is not None:
        validate = make_validate(config, dataset, make_objective(config, network, precond, inputs))
    return InLoopScores(
        config,
        run_dir,
        ImageGenerator(**protocol, precond=precond, guidance=config.guidance),
        data,
        validate=validate,
        episodes=episodes_to_show(config, dataset),
        **outputs,
    )
