"""What a run is, in words: the text of --dry-run and the first lines of a run."""

import dataclasses
import json

import torch

from dnnlib.config import to_dict
from dnnlib.text import format_count
from models import ScaledLatentConfig, attention_backend, build_network
from models.feature_dit import FeatureDiTConfig
from models.set_dit import SetDiTConfig
from torch_utils.misc import count_flops, count_parameters
from training.config import RunConfig, accumulation_rounds
from training.watch import describe_sets


def forward_flops(config: RunConfig) -> int:
    """Return the floating-point operations of one network evaluation on one image."""
    # Flex attention knows no meta device; it does the same arithmetic.
    model = dataclasses.replace(config.model, attention="sdpa")
    with torch.device("meta"):
        network = build_network(model).eval()
        x = torch.empty(1, *config.model.input_shape)
        cond = {"label": torch.zeros(1, dtype=torch.int64)} if config.model.num_classes else {}
        if isinstance(model, SetDiTConfig):
            cond["support"] = torch.empty(1, model.context_size, *model.input_shape)
        if isinstance(model, FeatureDiTConfig):
            rows, columns = model.patch_grid(model.resolution, model.resolution)
            cond = dict(
                text=torch.empty(1, model.max_text_tokens, model.text_dim),
                cls=torch.empty(1, model.visual_dim),
                patches=torch.empty(1, rows * columns, model.visual_dim),
                size=torch.tensor([model.resolution, model.resolution], device="cpu"),
            )
        return count_flops(lambda: network(x, torch.zeros(1), network.context(cond, num=1)))


def num_parameters(config: RunConfig) -> int:
    """Return the parameter count of the run's network, without allocating it."""
    with torch.device("meta"):
        return count_parameters(build_network(config.model))


def describe_run(config: RunConfig, world_size: int, device: torch.device) -> str:
    """Return the size of a run in a few lines: model, cost, batch, steps, backends."""
    model, training = config.model, config.training
    batch_gpu, rounds = accumulation_rounds(training, world_size)
    steps = -(-config.total_nimg // config.step_nimg)
    classes = f"{model.num_classes} classes" if model.num_classes else "unconditional"
    if isinstance(model, FeatureDiTConfig):
        classes = "text and image features"
    kind = f"{model.family}, {model.resolution}x{model.resolution}x{model.img_channels}"
    logging = config.logging
    kimg_per_snapshot = config.tick_nimg * min(logging.snap, logging.dump or logging.snap) / 1000
    if logging.save_interval is not None:
        kimg_per_snapshot = logging.save_interval * config.step_nimg / 1000
    num = model.images_per_row
    rows_of = "images" if num == 1 else f"sets of {num} images"
    rows = {
        "preset": config.preset,
        "model": f"{kind}, {classes}",
        "parameters": f"{num_parameters(config):,}",
        "forward cost": f"{format_count(forward_flops(config))}FLOP per image",
        "batch": f"{training.batch} {rows_of} per optimizer step = {batch_gpu} per pass x "
        f"{rounds} pass(es) x {world_size} rank(s)",
        "duration": f"{config.total_nimg / 1000:,.1f} kimg = {steps:,} optimizer steps",
        "precision": training.precision + (", compiled" if training.compile else ""),
        "attention": attention_backend(model, device),
        "device": str(device),
    }
    if isinstance(model, ScaledLatentConfig):
        scale = "" if model.latent_scale is None else f", scale {model.latent_scale:g}"
        shape = "x".join(map(str, model.input_shape))
        rows["latents"] = f"{shape} of {model.vae or 'the autoencoder in --data'}{scale}"
    rows.update(describe_sets(config))
    rows.update(describe_features(config))
    if kimg_per_snapshot < 1:
        rows["note"] = (
            f"snapshots and states come every {kimg_per_snapshot:g} kimg, but their names count "
            "whole ones: of those in the same kimg the last stays (see --tick, --snap, --dump)"
        )
    return "\n".join(f"  {name:<13} {value}" for name, value in rows.items())


def describe_features(config: RunConfig) -> dict[str, str]:
    """Return rows that tell what a run's model is conditioned on; none for other runs."""
    model, features = config.model, config.features
    if not isinstance(model, FeatureDiTConfig):
        return {}
    both = 1 - features.drop_all - features.text_only - features.visual_only
    patches = "no patches"
    if model.use_dino_patches:
        patches = f"patches of {model.visual_patch_size} pixels"
    return {
        "buckets": ", ".join(model.buckets) or "those of the data",
        "context": f"text of up to {model.max_text_tokens} x {model.text_dim}, CLS token and "
        f"{patches} of {model.visual_dim}",
        "dropout": f"nothing given {features.drop_all:.0%}, text alone {features.text_only:.0%}, "
        f"image alone {features.visual_only:.0%}, both {both:.0%}",
    }


def describe_config(config: RunConfig) -> str:
    """Return the resolved configuration as indented JSON."""
    return json.dumps(to_dict(config), indent=2)
