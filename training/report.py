"""The description of a run: the text of --dry-run, of its first lines, and of its report."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib.cli import settings
from dnnlib.config import Config, to_dict
from dnnlib.text import format_count
from models import ModelConfig, attention_backend, build_network
from torch_utils.misc import count_flops, count_parameters
from training import family
from training.config import RunConfig
from training.distillation.stages import stages_of
from training.division import accumulation_rounds, group_size
from training.family import Codec, TrainingData

_NUM_REALS = 64
_MAX_TILE = 512  # Pixels: larger images are scaled down in a picture of many.


@functools.lru_cache(maxsize=4)
def _cost(model: ModelConfig) -> tuple[int, int]:
    """Return a network's number of parameters, and the FLOPs of its evaluation on one image.

    Nothing is allocated. The result is cached, because a run needs it twice.
    """
    # Flex attention does not support the meta device; SDPA does the same arithmetic.
    model = dataclasses.replace(model, attention="sdpa")
    with torch.device("meta"):
        network = build_network(model).eval()
        x, c_noise, cond = torch.empty(1, *model.input_shape), torch.zeros(1), model.example_cond()
        flops = count_flops(lambda: network(x, c_noise, network.context(cond, num=1)))
    return count_parameters(network), flops


def forward_flops(config: RunConfig) -> int:
    """Return the floating-point operations of one network evaluation on one image."""
    return _cost(config.model)[1]


def num_parameters(config: RunConfig) -> int:
    """Return the parameter count of the run's network."""
    return _cost(config.model)[0]


def describe_run(
    config: RunConfig, world_size: int, device: torch.device, *, with_forecast: bool = False
) -> str:
    """Return the size of a run in a few lines: model, cost, batch, steps, backends.

    ``with_forecast`` adds memory, disk and traffic, which takes a few seconds.
    """
    rows = run_facts(config, world_size, device)
    if with_forecast:
        from training.resources.memory import forecast

        rows.update(forecast(config, world_size, device))
    return "\n".join(f"  {name:<13} {value}" for name, value in rows.items())


def run_facts(config: RunConfig, world_size: int, device: torch.device) -> dict[str, str]:
    """Return the rows of :func:`describe_run` by name."""
    model, training = config.model, config.training
    batch_gpu, rounds = accumulation_rounds(training, world_size)
    steps = -(-config.total_nimg // config.step_nimg)
    classes = f"{model.num_classes} classes" if model.num_classes else "unconditional"
    size = f"{model.resolution}x{model.resolution}x{model.img_channels}"
    size_of_group = group_size(training, world_size)
    num, kimg = model.images_per_row, config.total_nimg / 1000
    duration = f"{kimg:,.1f}" if kimg >= 1 else f"{kimg:.2f}"
    rows_of = "images" if num == 1 else f"sets of {num} images"
    parts = f"= {batch_gpu} per pass x {rounds} pass(es) x {world_size} rank(s)"
    if batch_gpu * rounds * world_size != training.batch:
        parts = f"on {world_size} rank(s), in {rounds} pass(es) of at most {batch_gpu} each"
    rows = {
        "preset": config.preset,
        "model": f"{model.family}, {size}, {classes}",
        "parameters": f"{num_parameters(config):,}",
        "forward cost": f"{format_count(forward_flops(config))}FLOP per image",
        "batch": f"{training.batch} {rows_of} per optimizer step {parts}",
        "duration": f"{duration} kimg = {steps:,} optimizer steps",
        **({"shards": f"weights divided among {size_of_group} ranks"} if size_of_group > 1 else {}),
        "precision": training.precision + (", compiled" if training.compile else ""),
        "attention": attention_backend(model, device),
        **({"cpu matmul": training.cpu_matmul} if device.type == "cpu" else {}),
        "device": str(device),
    }
    if config.distillation.is_on:
        stages = stages_of(config)
        students = ", ".join(str(stage.steps) for stage in stages)
        shortest = stages[0].num_images // config.step_nimg
        rows["distillation"] = (
            f"students of {students} sampling steps, of {shortest:,} optimizer steps or one more "
            f"each; teacher guided by {_scales(config.distillation.guidance)}"
        )
    rows.update(family.of(config).describe(config))
    logging = config.logging
    kimg_per_snapshot = config.tick_nimg * min(logging.snap, logging.dump or logging.snap) / 1000
    if logging.save_interval is not None:
        kimg_per_snapshot = logging.save_interval * config.step_nimg / 1000
    if kimg_per_snapshot < 1 < kimg:
        rows["note"] = (
            f"snapshots and states come every {kimg_per_snapshot:g} kimg, but from 1 kimg on their "
            "names count whole ones: of those in the same kimg the last stays (see --tick, --snap, "
            "--dump)"
        )
    return rows


def _scales(guidance: Config) -> str:
    values = to_dict(guidance)
    return ", ".join(f"{name} {values[name]:g}" for name in values if name.endswith("_scale"))


def changes_from(preset: RunConfig, config: RunConfig) -> list[dict[str, Any]]:
    """Return the settings in which a run differs from a preset, as plain values for JSON.

    Each has its ``setting``, such as ``training.batch``, its values in ``preset`` and ``run`` (None
    where only the other has it), and ``option``, its name on the command line (None for settings
    that the data or the model determine).
    """
    own, usual = dict(_flat(to_dict(config))), dict(_flat(to_dict(preset)))
    options = {".".join(found.path): f"--{found.name}" for found in settings(config)}
    return [
        dict(setting=name, preset=usual.get(name), run=own.get(name), option=options.get(name))
        for name in {**usual, **own}
        if name != "preset" and own.get(name) != usual.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def save_reals(data: TrainingData, codec: Codec, path: Path) -> None:
    """Write a picture of about 64 training images, in the rows of the data's preview."""
    from torch_utils.pictures import image_grid, mixed_grid, save_image

    rows, titles = data.preview(_NUM_REALS)
    if len({item.shape for row in rows for item in row}) == 1:
        images = torch.cat([codec.pictures(torch.stack(row)).cpu() for row in rows])
        if max(images.shape[2:]) <= _MAX_TILE:
            save_image(image_grid(images, len(rows[0]), titles), path)
            return
        rows = [list(part) for part in images.split(len(rows[0]))]
    else:
        rows = [[codec.pictures(item[None])[0].cpu() for item in row] for row in rows]
    save_image(mixed_grid(rows, titles=titles), path)
