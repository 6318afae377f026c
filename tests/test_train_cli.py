"""train.py as it is typed: the seed's commands, every option, every refusal, help."""

import dataclasses
import functools
import importlib.machinery
import json
import math
import os
import re
import shlex
import sys
import types
from contextlib import ExitStack
from typing import ClassVar
from unittest import mock

import click
import helpers
import pytest
import test_conditioning
import test_cpu_matmul
import test_distillation_runs
import test_respacing
import test_rollback
import test_saver
import test_sharding
import test_watching
import torch
from feature_files import tiny_features
from helpers import dry_run
from latent_files import tiny_autoencoder

import data.images.dataset
import evaluation.in_loop.features
import evaluation.in_loop.images
import evaluation.in_loop.sets
import fid
import generate
import models.layers
import train
import training.boards
import training.launch
import training.loop
import training.telemetry
from commands import synonyms
from configs import PRESETS
from dnnlib.cli import settings
from dnnlib.config import option, to_dict
from families.runs import ImageRun
from metrics.metric import get_metrics
from models.config import ModelConfig
from models.diffit import DiffiT
from sampling.images import ImageGenerator
from torch_utils.saver import Saver
from training.checkpoint import find_snapshots, find_states, load_snapshot, load_state
from training.config import fit_to_device
from training.feature_objective import FeatureObjective
from training.objective import Objective


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


# The first users' commands, word for word.
CIFAR10_COMMAND = r"""
torchrun --nproc_per_node=4 train.py \
    --outdir=./runs/cifar10 \
    --data=./datasets/cifar10.zip \
    --batch-gpu=128 \
    --resolution=32 \
    --base-dim=128 \
    --hidden-dim=256 \
    --num-heads=4 \
    --num-blocks=2 \
    --lr=1e-3 \
    --kimg=200000 \
    --metrics=fid10k_full \
    --metrics-ticks=50
"""
FFHQ64_COMMAND = r"""
torchrun --nproc_per_node=4 train.py \
    --outdir=./runs/ffhq64 \
    --data=./datasets/ffhq64.zip \
    --batch-gpu=64 \
    --resolution=64 \
    --base-dim=128 \
    --hidden-dim=256 \
    --num-heads=4 \
    --num-blocks=4 \
    --lr=2e-4 \
    --kimg=200000 \
    --metrics=fid10k_full
"""

IMAGENET_COMMAND = r"""
torchrun --nproc_per_node=8 train.py \
    --outdir=./runs/imagenet256 \
    --data=./datasets/imagenet256.zip \
    --batch-gpu=32 \
    --resolution=256 \
    --base-dim=128 \
    --hidden-dim=1152 \
    --num-heads=16 \
    --num-blocks=30 \
    --lr=3e-4 \
    --kimg=1000000 \
    --cond \
    --label-drop=0.1 \
    --cfg-scale=4.6 \
    --metrics=fid50k_full \
    --metrics-ticks=100
"""


@pytest.mark.parametrize(
    ("command", "preset", "batch", "lr", "steps"),
    [
        (CIFAR10_COMMAND, "cifar10", 512, 1e-3, "390,625"),
        (FFHQ64_COMMAND, "ffhq64", 256, 2e-4, "781,250"),
    ],
)
def test_the_seed_commands_work_as_typed(command, preset, batch, lr, steps, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("\\\n", " "))  # As a shell joins the lines.
    config, description = dry_run(*words[words.index("train.py") + 1 :])
    expected = to_dict(PRESETS[preset].run)
    expected["data"]["data"] = os.path.abspath(f"datasets/{preset}.zip")
    expected["training"]["batch_gpu"] = batch // 4
    expected["training"]["label_drop"] = 0.0  # Without labels.
    expected["training"]["cpu_matmul"] = "mkl"
    expected["logging"]["metrics"] = ["fid10k_full"]
    expected["logging"]["metrics_ticks"] = 50 if preset == "cifar10" else None
    expected["model"]["augment_dim"] = 9
    assert config == expected
    assert config["training"]["lr"] == lr
    assert f"{batch} images per optimizer step = {batch // 4} per pass x 1" in description
    assert f"200,000.0 kimg = {steps} optimizer steps" in description
    assert f"/datasets/{preset}.zip does not exist" in description
    assert list(tmp_path.iterdir()) == []


def test_the_seed_s_command_for_imagenet_works_as_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(IMAGENET_COMMAND.replace("\\\n", " "))
    config, description = dry_run(*words[words.index("train.py") + 1 :])
    expected = to_dict(PRESETS["imagenet256-d30"].run)
    expected["preset"] = "imagenet256"
    expected["data"]["data"] = os.path.abspath("datasets/imagenet256.zip")
    expected["training"].update(batch_gpu=32, kimg=1_000_000, label_drop=0.1)
    # Without a GPU.
    expected["training"].update(precision="fp32", compile=False, cpu_matmul="mkl")
    expected["guidance"]["cfg_scale"] = 4.6
    expected["logging"].update(metrics=["fid50k_full"], metrics_ticks=100)
    assert config == expected
    assert re.search(r"parameters +600,906,752", description)
    assert "256 images per optimizer step = 32 per pass x 1 pass(es) x 8 rank(s)" in description
    assert "1,000,000.0 kimg = 3,906,250 optimizer steps" in description
    assert "/datasets/imagenet256.zip does not exist" in description
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("preset", "millions", "tolerance"),
    [
        ("cifar10", 15.9, 0.01),
        ("cifar10-l4", 28.7, 0.01),
        ("ffhq64", 44.8, 0.01),
        ("digits", 0.45, 0.2),
        ("imagenet256", 561.0, 0.001),
        ("imagenet512", 562.4, 0.001),
        ("imagenet256-s", 27.3, 0.01),
        ("imagenet256-b", 108.0, 0.01),
        ("imagenet256-l", 380.5, 0.01),
        ("digits-latent", 0.2, 0.2),
    ],
)
def test_a_dry_run_of_every_preset_needs_no_data(preset, millions, tolerance):
    config, description = dry_run(f"--preset={preset}")
    count = int(re.search(r"parameters +([\d,]+)", description).group(1).replace(",", ""))
    assert count == pytest.approx(millions * 1e6, rel=tolerance)
    assert re.search(r"forward cost +[\d.]+[MGT]FLOP per image", description)
    assert config["preset"] == preset
    assert re.search(r"duration +[\d,.]+ kimg = [\d,]+ optimizer steps", description)
    assert f"{config['training']['batch']} images per optimizer step" in description


def test_a_dry_run_counts_steps_from_kimg_and_kimg_from_steps():
    _, by_kimg = dry_run("--preset=cifar10", "--kimg=10", "--batch=512")
    assert "10.0 kimg = 20 optimizer steps" in by_kimg  # The last step is not cut short.
    for name in ("--iters", "--max-steps"):
        _, by_steps = dry_run("--preset=cifar10", f"{name}=3", "--batch=500")
        assert "1.5 kimg = 3 optimizer steps" in by_steps


def test_a_dry_run_foresees_memory_disk_and_traffic(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = helpers.succeed(train, "--preset=digits", "--dry-run").output
    assert re.search(r"memory +[\d.]+[kMG]?B a rank: weights .*, gradients .*, passes ", output)
    assert re.search(r"disk +[\d.]+[kMG]?B", output)
    assert re.search(r"traffic +[\d.]+[kMG]?B a step from each rank", output)


def test_a_dry_run_under_torchrun_is_printed_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert helpers.succeed(train, "--preset=digits", "--dry-run").output == ""


def test_a_dry_run_looks_at_data_that_exist(base):
    data = helpers.toy_data(base)
    config, description = dry_run(
        "--preset=digits", f"--data={data}", "--no-cond", "--label-drop=0"
    )
    assert config["model"]["img_channels"] == 3
    assert "8x8x3, unconditional" in description
    message = helpers.fail(train, "--preset=cifar10", f"--data={data}", "--dry-run")
    assert "--resolution: this run expects 32x32" in message


def test_cond_works_bare_and_with_a_value_and_brings_label_dropout():
    for text, classes in (("--cond", 10), ("--cond=True", 10), ("--cond=False", 0)):
        config, _ = dry_run("--preset=cifar10", text, "--lr=2e-3")
        assert config["model"]["num_classes"] == classes
        assert config["training"]["label_drop"] == (0.1 if classes else 0)
        assert config["training"]["lr"] == 2e-3


# Every option, with what it must change in a training run.


@dataclasses.dataclass(frozen=True)
class Case:
    """One value of an option.

    ``changes`` and ``keeps`` name the parts of a run's fingerprint that must differ from those of
    the same run without the option, and that must not. ``beside`` is given to both.
    """

    value: str
    changes: str
    keeps: str = ""
    beside: str = ""
    data_size: int = 8


# Runs that continue a trained network hardly, for options of which random weights show little.
SAMPLED = "TRANSFER --cond --label-drop=0.2 --lr=1e-5 --iters=1 --steps=4 "


def sampled(value, beside=""):
    return Case(value, "fakes", keeps="net ema", beside=SAMPLED + beside)


def unseen(value, changes, beside=""):
    """A case that must not change what is computed."""
    return Case(value, changes, keeps="net ema losses", beside=beside)


CASES = {
    "resolution": [Case("16", "net fakes", data_size=16)],
    "attention": [Case("sdpa", "options net")],  # The last digits.
    "qk-norm": [Case("True", "net")],
    "checkpointing": [unseen("True", "checkpoints")],
    "num-stages": [Case("1", "net")],
    "num-blocks": [Case("1,2", "net")],
    "base-dim": [Case("8", "net")],
    "hidden-dim": [Case("24", "net")],
    "num-heads": [Case("4", "net")],
    "window": [Case("2", "net")],
    "time-dim": [Case("16", "net")],
    "mlp-ratio": [Case("2", "net")],
    "dropout": [Case("0.5", "net")],
    "skip": [Case("block", "net", beside="--num-blocks=2")],
    "precond": [Case(name, "net fakes") for name in ("vp", "ve", "iddpm", "ddpm", "flow")],
    "logit-mean": [Case("1", "net", beside="FEATURES")],
    "logit-std": [Case("0.3", "net", beside="FEATURES")],
    "flow-shift": [Case("3", "net", beside="FEATURES")],
    "diffusion-steps": [Case("50", "net", beside="--precond=ddpm")],
    "learned-variance": [
        Case("True", "net", beside="--precond=ddpm"),
        Case("True", "net fakes", beside="--precond=iddpm --sampler=ddpm --sigma-grid=timesteps"),
    ],
    "sigma-data": [Case("0.4", "net")],
    "p-mean": [Case("-1", "net")],
    "p-std": [Case("1", "net")],
    "kimg": [Case("0.03", "net num_images", beside="--iters=none --kimg=0.01")],
    "iters": [Case("3", "net num_images")],
    "batch": [Case("16", "net num_images")],
    "batch-gpu": [Case("4", "passes")],
    "lr": [Case("0.02", "net")],
    "beta2": [Case("0.9", "net")],
    "lr-rampup": [Case("0.1", "net")],
    "lr-schedule": [
        Case("cosine", "net"),
        Case("constant", "net", beside="--lr-schedule=cosine"),
    ],
    "lr-final": [Case("0.005", "net", beside="--lr-schedule=cosine")],
    "weight-decay": [Case("0.5", "net")],
    "clip-grad": [Case("0.01", "net")],
    "label-drop": [Case("0.5", "net", beside="--cond")],
    "ema-kimg": [Case("0.0001", "ema", keeps="net losses")],
    "ema-rampup": [
        Case("0.5", "ema", keeps="net losses"),
        Case("none", "ema", keeps="net losses"),
    ],
    "ema-stds": [unseen("0.05,0.10", "files")],
    "loss-scaling": [Case("100", "net gradients")],
    "seed": [Case("1", "net")],
    "precision": [Case("bf16", "net"), Case("fp16", "net", beside="--iters=8")],
    "compile": [Case("True", "compiled")],
    "tf32": [unseen("True", "backends")],
    "bench": [unseen("False", "backends")],
    "augment": [Case("0.5", "net")],
    "data": [Case("RING", "net")],
    "cond": [Case("True", "net")],
    "max-size": [Case("20", "net")],
    "hflip": [Case("True", "net")],
    "cache": [unseen("True", "caches")],
    "tick": [unseen("100", "ticks", beside="--tick=0 --iters=3")],
    "snap": [unseen("1", "saved", beside="--tick=0 --iters=4")],
    "dump": [unseen("1", "saved", beside="--tick=0 --iters=4")],
    "metrics": [unseen("fd_pixels", "files")],
    "metrics-ticks": [unseen("1", "scores", beside="--metrics=fd_pixels --tick=0 --iters=3")],
    "sample-batch": [unseen("3", "batches")],
    "workers": [unseen("1", "workers")],
    "board": [unseen("wandb", "wandb"), unseen("trackio", "trackio")],
    "wandb": [unseen("True", "wandb")],
    "wandb-project": [unseen("mine", "wandb", beside="--wandb")],
    "sampler": [sampled(name) for name in ("euler", "ddim", "dpmpp_2m", "ddpm")],
    "steps": [sampled("3")],
    "grid-steps": [sampled("8")],
    "sigma-grid": [sampled(name) for name in ("linear", "vp", "ve", "iddpm")]
    + [Case("timesteps", "fakes", keeps="net ema", beside="--precond=ddpm --iters=1")],
    "patch-size": [
        Case("2", "net"),
        Case("2", "net", beside="LATENT"),
        Case("4", "net", beside="SETS"),
    ],
    "log-interval": [unseen("1", "ticks", beside="--iters=3")],
    "save-interval": [unseen("2", "saved", beside="--tick=0 --iters=5")],
    "validation-share": [
        Case("0.3", "net"),
        Case("0.3", "net", beside="LATENT"),
    ],
    "validation-ticks": [
        unseen("1", "validations", beside="--validation-share=0.3 --tick=0 --iters=3")
    ],
    "early-stop": [
        Case(
            "2",
            "num_images",
            beside="--validation-share=0.3 --tick=0 --snap=1 --iters=4 --lr=1e-12",
        )
    ],
    "num-sample-batches": [unseen("2", "fakes")],
    "variance": [
        sampled("large", "--sampler=ddpm"),
        sampled("small", "--sampler=ddpm --variance=large"),
    ],
    "clip-denoised": [sampled("True", "--sampler=ddpm")],
    "sample-size": [Case("4", "net", beside="SETS")],
    "mode-conditioning": [
        Case("lag", "net", beside="SETS"),
        Case("film", "net", beside="SETS --mode-conditioning=lag"),
    ],
    "context-channels": [
        Case("12", "net", beside="SETS --hdim=20 --context-proj --context-channels=16")
    ],
    "use-context-layernorm": [Case("False", "net", beside="SETS")],
    "like": [
        Case("fsdm-jax", "net", beside="SETS --encoder-pool=mean-all"),
        Case("paper", "net", beside="SETS --encoder-pool=mean-all --like=fsdm-jax"),
    ],
    "cross-attn-layers": [Case("1", "net", beside="SETS --mode-conditioning=lag --num-blocks=2")],
    "gate": [
        Case(name, "net", beside="SETS --mode-conditioning=lag") for name in ("scalar", "none")
    ]
    + [Case("adaln", "net", beside="SETS --mode-conditioning=lag --gate=none")],
    "pretrain-encoder": [Case("1", "net", beside="SETS")],
    "warm-start-adaln": [Case("True", "net", beside="SETS")],
    "context-pool-size": [Case("4", "net", beside="SETS --mode-conditioning=lag --iters=4")],
    "hdim": [Case("12", "net", beside="SETS")],
    "encoder-mode": [
        Case("vit", "net", beside="SETS"),
        Case("vit_set", "net", beside="SETS --encoder-mode=vit"),
    ],
    "encoder-tokenizer": [
        Case("stack", "net", beside="SETS"),
        Case("per_sample_mean", "net", beside="SETS --encoder-tokenizer=stack"),
    ],
    "encoder-depth": [Case("2", "net", beside="SETS")],
    "encoder-heads": [Case("3", "net", beside="SETS")],
    "encoder-dim-head": [Case("6", "net", beside="SETS")],
    "encoder-mlp-ratio": [Case("3", "net", beside="SETS")],
    "encoder-dropout": [Case("0.5", "net", beside="SETS --iters=5")],
    "encoder-pool": [
        Case(name, "net", beside="SETS --iters=5") for name in ("cls", "sum", "mean-all")
    ]
    + [Case("mean", "net", beside="SETS --iters=5 --encoder-pool=cls")],
    "encoder-time": [Case("True", "net", beside="SETS")],
    "spt-shifts": [Case("True", "net", beside="SETS")],
    "second-pass": [Case("True", "net", beside="SETS --iters=5 --encoder-mode=vit")],
    "leave-one-out": [Case("False", "net", beside="SETS --iters=5")],
    "mode-context": [
        Case("variational", "net", beside="SETS"),
        Case("deterministic", "net", beside="SETS --mode-context=variational"),
    ],
    "train-classes": [Case("bar", "net", beside="SETS")],
    "test-classes": [unseen("none", "fakes", beside="SETS")],
    "split-fractions": [
        Case("0.3,0.3,0.4", "net", beside="SETS --train-classes=none --test-classes=none")
    ],
    "split-seed": [Case("3", "net", beside="SETS")],
    "held-out": [Case("8", "net", beside="SETS")],
    "hybrids": [Case("1", "net", beside="SETS")],
    "min-sample-size": [Case("1", "net", beside="SETS")],
    "context-drop": [Case("0.9", "net", beside="SETS --iters=5")],
    "num-eval-batches": [unseen("2", "files", beside="SETS")],
    "diagnostics": [unseen("False", "debug", beside="SETS")],
    "kl-weight": [Case("100", "net", beside="SETS --mode-context=variational --kl-rampup=0")],
    "kl-rampup": [Case("0", "net", beside="SETS --mode-context=variational")],
    "kl-scale": [
        Case("elbo", "net", beside="SETS --mode-context=variational --kl-rampup=0"),
        Case(
            "dimensions",
            "net",
            beside="SETS --mode-context=variational --kl-rampup=0 --kl-scale=elbo",
        ),
    ],
    "use-dino-patches": [Case("False", "net", beside="FEATURES")],
    "patch-pos": [Case("False", "net", beside="FEATURES")],
    "gates": [Case("True", "net", beside="FEATURES")],
    "cls-token-time": [Case("True", "net", beside="FEATURES")],
    "drop-all": [Case("1", "net", beside="FEATURES --drop-all=0 --text-only=0 --visual-only=0")],
    "text-only": [Case("1", "net", beside="FEATURES --drop-all=0 --text-only=0 --visual-only=0")],
    "visual-only": [Case("1", "net", beside="FEATURES --drop-all=0 --text-only=0 --visual-only=0")],
    "patch-bias-kimg": [Case("1", "net", beside="FEATURES")],
    "streaming": [Case("True", "net", beside="FEATURES")],
    "time-shift": [unseen("3", "fakes", beside="FEATURES")],
    "text-scale": [unseen("40", "fakes", beside="FEATURES")],
    "visual-scale": [unseen("40", "fakes", beside="FEATURES")],
    "guidance-form": [
        unseen("seed", "fakes", beside="FEATURES --text-scale=40"),
        unseen("joint", "fakes", beside="FEATURES --text-scale=40"),
        unseen("nested", "fakes", beside="FEATURES --text-scale=40 --guidance-form=joint"),
    ],
    "joint-scale": [unseen("40", "fakes", beside="FEATURES --guidance-form=joint")],
    "sigma-min": [sampled("0.2")],
    "sigma-max": [sampled("10")],
    "rho": [sampled("3")],
    "s-churn": [sampled("8")],
    "s-min": [sampled("20", "--s-churn=8")],
    "s-max": [sampled("20", "--s-churn=8")],
    "s-noise": [sampled("1.2", "--s-churn=8")],
    "eta": [sampled("1", "--sampler=ddim")],
    "cfg-scale": [sampled("3")],
    "cfg-schedule": [sampled("power-cosine", "--cfg-scale=3")],
    "cfg-power": [sampled("1", "--cfg-scale=3 --cfg-schedule=power-cosine")],
    "cfg-channels": [sampled("1", "--cfg-scale=3")],
    "cfg-interval": [sampled("0.1,10", "--cfg-scale=3")],
}
# Options whose effect is another, with the test that shows it.
SHOWN_BY = {
    "context-proj": "test_a_context_of_another_width_than_the_encoders_is_projected_when_asked",
    **dict.fromkeys(
        ("class-transforms", "skip-transforms"), "test_turned_classes_are_classes_unless_skipped"
    ),
    "val-classes": "test_the_validation_loss_is_that_of_the_classes_named",
    **dict.fromkeys(
        ("compute-fid", "fid-num-samples"), "test_compute_fid_scores_samples_of_unseen_classes"
    ),
    "save-rate": "test_a_saver_writes_no_faster_than_it_may",
    "keep-states": "test_keep_states_is_the_number_of_states_that_stay",
    **dict.fromkeys(
        ("vae", "latent-channels", "latent-downsampling"),
        "test_latent_models_train_with_the_autoencoder_that_the_options_describe",
    ),
    "watch": "test_a_watch_changes_nothing_about_the_training",
    "hang-limit": "test_ranks_are_watched_with_the_hang_limit",
    "metrics-ref": "test_metrics_compare_with_what_metrics_ref_names",
    "text-lengths": "test_texts_are_padded_to_the_lengths_given_and_are_never_cut",
    "transfer-allow": "test_a_warm_start_is_strict_but_for_patches_and_what_is_allowed",
    **dict.fromkeys(
        ("num-reconstructions", "num-swaps", "num-edits", "num-text-only", "num-divergence"),
        "test_validation_is_of_as_many_images_and_by_the_networks_that_the_options_say",
    ),
    **dict.fromkeys(
        ("num-shown", "lpips-net", "lpips-weights"),
        "test_validation_is_of_as_many_images_and_by_the_networks_that_the_options_say",
    ),
    "report-conditions": (
        "test_a_run_reports_on_conditions_as_the_command_does_and_trains_as_without"
    ),
    **dict.fromkeys(
        (
            *("distill-steps", "distill-cfg-scale"),
            *("distill-text-scale", "distill-visual-scale"),
        ),
        "test_students_of_every_kind_are_sampled_as_they_were_trained",
    ),
    "shard": "test_losses_norms_and_weights_are_those_of_whole_weights",
    "shard-size": "test_groups_of_ranks_hold_a_copy_each",
    "respacing": "test_pictures_of_a_run_and_images_of_its_snapshot_visit_the_timesteps_named",
    "cpu-matmul": "test_what_multiplies_is_kept_in_states_snapshots_and_protocols",
    "rollback": "test_a_run_goes_back_no_more_often_than_asked",
    "skip-limit": "test_skip_limit_stops_a_run_whose_gradients_stay_non_finite",
    "inception": "test_detectors_of_the_metrics_come_from_where_the_options_say",
    "dinov2": "test_detectors_of_the_metrics_come_from_where_the_options_say",
    "clip": "test_detectors_of_the_metrics_come_from_where_the_options_say",
    "inception-input": "test_detectors_of_the_metrics_compute_as_the_options_say",
    "detector-precision": "test_detectors_of_the_metrics_compute_as_the_options_say",
}
# The values that runs of the table have anyway, and those that another test is about.
DEFAULTS = {
    "inception-input": {"tensorflow", "pytorch-fid"},
    "detector-precision": {"fp32", "bf16"},
    "lpips-net": {"alex", "vgg"},
    "attention": {"auto", "flex", "explicit"},
    "skip": {"stage"},
    "board": {"tensorboard"},
    "shard": {"none", "full", "hybrid"},
    "precond": {"edm"},
    "precision": {"fp32", "auto"},
    "cpu-matmul": {"auto", "mkl", "onednn"},
    "class-transforms": {"none", "rotations", "dihedral"},
    "sampler": {"heun"},
    "sigma-grid": {"karras", "time"},
    "cfg-schedule": {"constant"},
}


def all_settings():
    return {s.name: s for preset in PRESETS.values() for s in settings(preset.run)}


def test_every_option_and_every_choice_of_it_has_a_test():
    found = all_settings()
    assert set(found) == set(CASES) | set(SHOWN_BY)
    known = (
        globals()
        | vars(test_conditioning)
        | vars(test_distillation_runs)
        | vars(test_sharding)
        | vars(test_cpu_matmul)
        | vars(test_respacing)
        | vars(test_rollback)
        | vars(test_saver)
        | vars(test_watching)
    )
    assert all(callable(known[name]) for name in SHOWN_BY.values())
    for name, setting in found.items():
        choices = set(setting.field.metadata["choices"] or ())
        tried = {case.value for case in CASES.get(name, [])} | DEFAULTS.get(name, set())
        assert choices <= tried, f"--{name}"


class Spies:
    """What a run does besides computing, noted while it runs."""

    def __init__(self, stack):
        self._stack = stack
        self.seen = {}
        self.wandb = mock.MagicMock()
        wandb = types.ModuleType("wandb")
        wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)  # Others look for it.
        wandb.init, wandb.Settings, wandb.Image = self.wandb, mock.MagicMock(), mock.MagicMock()
        sys.modules["wandb"] = wandb
        sys.modules["trackio"] = self.trackio = mock.MagicMock()
        for name in ("wandb", "trackio"):
            stack.callback(sys.modules.pop, name)
        self._watch("passes", Objective, "forward", lambda self, images, *rest: len(images))
        self._watch("batches", ImageGenerator, "generate", lambda self, seeds, *rest: len(seeds))
        self._watch("compiled", torch.nn.Module, "compile", lambda module, **kw: type(module))
        self._watch("checkpoints", models.layers, "checkpoint", lambda *args, **kwargs: 1)
        self._watch("caches", data.images.dataset, "SharedCache", lambda shape, path: shape)
        self._watch(
            "workers", training.loop, "make_loader", lambda *a, num_workers, **kw: num_workers
        )
        self._watch("saved", Saver, "write_archive", lambda *args: "snapshot")
        self._watch("saved", Saver, "write_manifest", lambda *args: "state")
        # A few pictures tell as much as 64, and neither of the others tells anything here.
        patch = functools.partial(mock.patch.object, return_value=None)
        for module in (evaluation.in_loop.images, evaluation.in_loop.sets):
            stack.enter_context(mock.patch.object(module, "GRID_SEEDS", 6))
        stack.enter_context(mock.patch.object(evaluation.in_loop.features, "_NUM_SHOWN", 2))
        stack.enter_context(mock.patch.object(training.boards, "_TensorBoard"))
        stack.enter_context(patch(training.launch, "describe_run"))

    def _watch(self, key, owner, name, note):
        original = getattr(owner, name)
        seen = self.seen.setdefault(key, [])

        @functools.wraps(original)
        def spy(*args, **kwargs):
            seen.append(note(*args, **kwargs))
            if key == "compiled":
                kwargs["backend"] = "eager"  # Inductor takes minutes.
            return original(*args, **kwargs)

        self._stack.enter_context(mock.patch.object(owner, name, spy))


def hash_tensors(tree):
    return hash(tuple((name, tensor.numpy().tobytes()) for name, tensor in tree.items()))


@functools.cache
def fingerprint(base, args, data_size=8):
    """Return what can be observed of a training run, part by part."""
    data = helpers.toy_data(base, data_size)
    words = args.split()
    if "TRANSFER" in words:
        words[words.index("TRANSFER")] = f"--transfer={helpers.trained_snapshot(base)}"
    words = [word.replace("RING", str(base / "toy" / "ring")) for word in words]
    tiny = helpers.TINY
    if "SETS" in words:
        words.remove("SETS")
        tiny = helpers.TINY_SETS
    if "FEATURES" in words:
        words.remove("FEATURES")
        tiny, data = helpers.TINY_FEATURES, tiny_features(base / "features")
    if "LATENT" in words:
        words.remove("LATENT")
        vae = base / "vae"
        if not vae.exists():
            tiny_autoencoder(vae)
        tiny = [*helpers.TINY_LATENT, f"--vae={vae}"]
    outdir = base / "options" / str(len(list((base / "options").glob("*"))))
    flags = (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32)
    with ExitStack() as stack:
        spies = Spies(stack)
        run_dir = helpers.train_tiny(outdir, data, *words, tiny=tiny).run_dir
    backends = (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = flags
    torch.backends.cudnn.allow_tf32 = True
    state = load_state(find_states(run_dir)[0])
    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    scores = run_dir / "metric-fd_pixels.jsonl"
    files = {path.name for path in run_dir.iterdir()}
    return dict(
        net=hash_tensors(state["net"]),
        ema=load_snapshot(find_snapshots(run_dir)[0]).sha256,
        fakes=max(run_dir.glob("fakes-*.png")).read_bytes(),
        losses=rows[0]["Loss/loss"]["mean"],
        gradients=rows[0]["Loss/grad_norm"]["mean"],
        num_images=state["progress"]["cur_nimg"],
        ticks=len(rows),
        validations=sum("Validation/loss" in row for row in rows),
        debug=[name for name in rows[0] if name.startswith("debug/")],
        scores=len(scores.read_text().splitlines()) if scores.is_file() else 0,
        files=files,
        options=json.loads((run_dir / "training_options.json").read_text())["config"],
        backends=backends,
        wandb=[
            (call.kwargs["project"], call.kwargs["name"]) for call in spies.wandb.mock_calls[:1]
        ],
        trackio=[call.kwargs["project"] for call in spies.trackio.init.mock_calls],
        **spies.seen,
    )


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, cases in CASES.items() for case in cases],
    ids=lambda x: x.value if isinstance(x, Case) else x,
)
def test_every_option_has_the_effect_that_it_is_for(name, case, base):
    (base / "options").mkdir(exist_ok=True)
    plain = fingerprint(base, case.beside)
    other = fingerprint(base, f"{case.beside} --{name}={case.value}", case.data_size)
    assert plain["options"] != other["options"]
    for part in case.changes.split():
        assert plain[part] != other[part], part
    for part in case.keeps.split():
        assert plain[part] == other[part], part


def test_accumulation_passes_and_the_compiled_network_compute_the_same(base):
    (base / "options").mkdir(exist_ok=True)
    plain = fingerprint(base, "")
    for args in ("--batch-gpu=4", "--compile=True"):
        assert fingerprint(base, args)["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert fingerprint(base, "--batch-gpu=4")["passes"] == [4] * 4
    assert fingerprint(base, "--compile=True")["compiled"] == [DiffiT]


def test_latent_models_train_with_the_autoencoder_that_the_options_describe(base, tmp_path):
    vae = tiny_autoencoder(tmp_path / "vae", latent_channels=3, num_stages=3)
    data = helpers.toy_data(base)
    tiny = [*helpers.TINY_LATENT, f"--vae={vae}", "--latent-channels=3", "--iters=1"]
    run_dir = helpers.train_tiny(
        tmp_path / "runs", data, "--latent-downsampling=4", tiny=tiny
    ).run_dir
    weight = load_snapshot(max(run_dir.glob("*.pkl"))).state_dict["backbone.patch_embedding.weight"]
    assert weight.shape[1] == 3
    arguments = (*tiny, f"--outdir={tmp_path / 'runs'}", f"--data={data}")
    message = helpers.fail(train, *arguments)
    assert "has downsampling 4, but the model has 2" in message
    assert "--latent-downsampling=4" in message
    message = helpers.fail(train, *arguments, "--latent-downsampling=4", "--latent-channels=5")
    assert "has channels of the latents 3, but the model has 5" in message


def test_validation_is_of_as_many_images_and_by_the_networks_that_the_options_say(base, tmp_path):
    data = tiny_features(base / "features", "--validation-share=0.4", name="halved")
    numbers = dict(reconstruction=2, swap=1, text_edit=3, text_only=4, divergence=1)
    metrics = ",".join(f"validation_{name}" for name in numbers)
    hashes, heights = set(), {}
    for net, num_shown in (("alex", 1), ("vgg", 2)):
        weights = ",".join(helpers.random_lpips(tmp_path, net))
        options = [f"--num-{k.replace('_', '-')}={n}" for k, n in numbers.items()]
        for test, own in (("reconstruction", "reconstructions"), ("swap", "swaps")):
            options = [word.replace(f"--num-{test}=", f"--num-{own}=") for word in options]
        options = [word.replace("--num-text-edit=", "--num-edits=") for word in options]
        run_dir = helpers.train_tiny(
            tmp_path / net,
            data,
            f"--metrics={metrics}",
            "--iters=1",
            f"--lpips-net={net}",
            f"--lpips-weights={weights}",
            f"--num-shown={num_shown}",
            *options,
            tiny=[word for word in helpers.TINY_FEATURES if not word.startswith("--iters")],
        ).run_dir
        for name, num in numbers.items():
            (line,) = (run_dir / f"metric-validation_{name}.jsonl").read_text().splitlines()
            row = json.loads(line)
            assert (row["num"], row["lpips"]) == (num, net)
            assert row["value"] is not None
            hashes.add(row["lpips_hash"])
            picture = helpers.read_pixels(run_dir / f"validation_{name}-000000.004.png")
            heights.setdefault(name, []).append(len(picture))
    assert len(hashes) == 2
    # Two rows are higher than one, where there are two images.
    assert {name for name, (one, two) in heights.items() if two > one} == {
        name for name, num in numbers.items() if num > 1
    }


def test_a_context_of_another_width_than_the_encoders_is_projected_when_asked(base, tmp_path):
    options = (*helpers.TINY_SETS, "--context-channels=12")
    message = helpers.fail(train, *options, "--dry-run")
    assert "--context-channels: got 12, but the encoder has --hdim 16" in message
    assert "--context-proj" in message
    data = helpers.toy_data(base)
    run_dir = helpers.train_tiny(tmp_path, data, "--context-proj", tiny=options).run_dir
    state = load_snapshot(max(run_dir.glob("*.pkl"))).state_dict
    assert state["conditioner.projection.weight"].shape == (12, 16)


def test_turned_classes_are_classes_unless_skipped(base, tmp_path):
    nets, counts = [], []
    for options in (
        ["--class-transforms=none"],
        ["--class-transforms=rotations", "--skip-transforms=none"],
        ["--class-transforms=dihedral", "--skip-transforms=none"],
        ["--class-transforms=rotations", "--skip-transforms=bar:1,dot:1,dot:3"],
    ):
        run_dir = helpers.train_tiny(
            tmp_path / str(len(nets)),
            helpers.toy_data(base),
            "--cond",
            *options,
            tiny=[word for word in helpers.TINY_SETS if "transforms" not in word],
        ).run_dir
        nets.append(hash_tensors(load_state(find_states(run_dir)[0])["net"]))
        counts.append(len(load_snapshot(max(run_dir.glob("*.pkl"))).data.class_names))
    assert len(set(nets)) == 4
    assert counts == [2, 8, 16, 5]


def test_ranks_are_watched_with_the_hang_limit(base, tmp_path, monkeypatch):
    seen = []
    init = lambda limit: seen.append(limit) or torch.device("cpu")  # noqa: E731
    monkeypatch.setattr(training.launch.distributed, "init", init)
    helpers.train_tiny(tmp_path, helpers.toy_data(base), "--iters=1", "--hang-limit=7")
    assert seen == [7]


def test_texts_are_padded_to_the_lengths_given_and_are_never_cut(base, tmp_path, monkeypatch):
    data, tiny, seen = tiny_features(base / "features"), helpers.TINY_FEATURES, []
    words = (f"--outdir={tmp_path}", f"--data={data}", *tiny, "--text-lengths=2")
    message = helpers.fail(train, *words)
    assert "--text-lengths: got 2, but the text of" in message
    assert "tokens, and would be cut; add a length, such as" in message

    prepare = FeatureObjective.prepare

    def noted(self, batch, cond, *args):
        seen.append(cond["text"].shape[1])
        return prepare(self, batch, cond, *args)

    monkeypatch.setattr(FeatureObjective, "prepare", noted)
    run_dir = helpers.train_tiny(tmp_path, data, "--text-lengths=16", tiny=tiny).run_dir
    assert set(seen) == {16}
    snapshot, long = max(run_dir.glob("network*.pkl")), " ".join(["red"] * 20)
    words = (f"--network={snapshot}", f"--outdir={tmp_path / 'out'}", "--num=1")
    message = helpers.fail(generate, *words, f"--prompt={long}")
    assert "tokens, and the model was trained on texts of up to 16" in message


def test_a_warm_start_is_strict_but_for_patches_and_what_is_allowed(base, tmp_path):
    data = tiny_features(base / "features")
    without = helpers.train_tiny(
        tmp_path / "base", data, "--no-use-dino-patches", tiny=helpers.TINY_FEATURES
    ).run_dir
    transfer = f"--transfer={max(without.glob('*.pkl'))}"

    # Patches may be missing.
    run_dir = helpers.train_tiny(
        tmp_path / "runs", data, transfer, tiny=helpers.TINY_FEATURES
    ).run_dir
    report = json.loads((run_dir / "warm-start.json").read_text())
    assert sorted(report["missing"]) == [
        "conditioner.dino_patch_proj.bias",
        "conditioner.dino_patch_proj.weight",
        "conditioner.null_dino_patch_token",
    ]
    assert report["unexpected"] == report["mismatched"] == report["notes"] == []
    assert 0.9 < report["share"] < 1
    config = json.loads((run_dir / "training_options.json").read_text())["config"]
    assert config["training"]["lr"] == 0.01  # As typed.
    assert config["features"]["patch_bias_kimg"] == 2000 * 4 / 1000
    plain = [word for word in helpers.TINY_FEATURES if not word.startswith("--lr=")]
    settled = helpers.train_tiny(
        tmp_path / "settled", data, transfer, "--patch-bias-kimg=0", tiny=plain
    ).run_dir
    config = json.loads((settled / "training_options.json").read_text())["config"]
    assert config["training"]["lr"] == PRESETS["nanodit-tiny"].run.training.lr / 2
    assert config["features"]["patch_bias_kimg"] == 0

    # A model that has not let its patches in yet begins anew.
    again = helpers.train_tiny(
        tmp_path / "again", data, f"--transfer={max(run_dir.glob('*.pkl'))}", tiny=plain
    ).run_dir
    config = json.loads((again / "training_options.json").read_text())["config"]
    assert config["features"]["patch_bias_kimg"] == 2000 * 4 / 1000

    # Nothing else may, unless it is allowed.
    arguments = (f"--outdir={tmp_path}", f"--data={data}", *helpers.TINY_FEATURES)
    with_patches = f"--transfer={max(run_dir.glob('*.pkl'))}"
    message = helpers.fail(train, *arguments, "--no-use-dino-patches", with_patches)
    assert "conditioner.null_dino_patch_token and 2 more" in message
    assert "would be unexpected" in message
    gated = (*arguments, "--gates", with_patches)
    message = helpers.fail(train, *gated)
    assert "backbone.blocks.0.modulation.weight and 1 more" in message
    assert "of another shape" in message
    message = helpers.fail(train, *gated, "--transfer-allow=*.modulation.*")
    assert "at least 90% are needed" in message
    allowed = "--transfer-allow=conditioner.*dino_patch*"
    run_dir = helpers.train_tiny(
        tmp_path / "allowed",
        data,
        "--no-use-dino-patches",
        with_patches,
        allowed,
        tiny=helpers.TINY_FEATURES,
    ).run_dir
    assert len(json.loads((run_dir / "warm-start.json").read_text())["unexpected"]) == 3


def test_the_validation_loss_is_that_of_the_classes_named(base, tmp_path):
    losses = []
    for name in ("bar", "ring"):
        options = ["--train-classes=dot", "--test-classes=none", f"--val-classes={name}"]
        run_dir = helpers.train_tiny(
            tmp_path / name,
            helpers.toy_data(base),
            *options,
            "--num-eval-batches=2",
            tiny=helpers.TINY_SETS,
        ).run_dir
        rows = (run_dir / "metric-val_loss.jsonl").read_text().splitlines()
        losses.append(json.loads(rows[-1])["value"])
    assert losses[0] != losses[1]
    assert all(loss > 0 for loss in losses)


@pytest.mark.usefixtures("few_features", "small_inception")
def test_compute_fid_scores_samples_of_unseen_classes(base, tmp_path):
    weights = helpers.random_inception(base)
    options = ("--compute-fid", "--fid-num-samples=5", f"--inception={weights}", "--iters=1")
    run_dir = helpers.train_tiny(
        tmp_path / "runs", helpers.toy_data(base), *options, tiny=helpers.TINY_SETS
    ).run_dir
    row = json.loads((run_dir / "metric-fewshot_fid.jsonl").read_text().splitlines()[-1])
    assert row["num_images"] == 5
    # Of the 14 rings, two are in the one support.
    assert (row["reference_count"], row["num_episodes"], row["support_size"]) == (12, 1, 2)
    assert row["episodes"] == "unseen"


def test_metrics_compare_with_what_metrics_ref_names(base, tmp_path):
    data = helpers.toy_data(base)
    scored = ("--metrics=fd_pixels", "--iters=1")
    own = helpers.train_tiny(tmp_path / "own", data, *scored).run_dir
    ring = base / "toy" / "ring"
    other = helpers.train_tiny(tmp_path / "other", data, *scored, f"--metrics-ref={ring}").run_dir
    rows = [json.loads((d / "metric-fd_pixels.jsonl").read_text()) for d in (own, other)]
    assert rows[0]["reference_count"] == 42
    assert rows[1]["reference_count"] == 14
    assert rows[0]["value"] != rows[1]["value"]


@pytest.mark.parametrize(
    ("device", "precision", "compiled"), [("cuda", "bf16", True), ("cpu", "fp32", False)]
)
def test_latent_presets_take_bf16_and_the_compiler_on_gpus(device, precision, compiled):
    training = fit_to_device(PRESETS["imagenet256"].run, device).training
    assert (training.precision, training.compile) == (precision, compiled)
    assert fit_to_device(PRESETS["cifar10"].run, device).training.precision == "fp32"


def test_fp16_finds_a_loss_scale_and_trains(base, tmp_path):
    result = helpers.train_tiny(
        tmp_path, helpers.toy_data(base), "--precision=fp16", "--tick=0", "--iters=12"
    )
    rows = [json.loads(line) for line in (result.run_dir / "stats.jsonl").read_text().splitlines()]
    skipped = [row["Loss/skipped_steps"]["mean"] for row in rows]
    assert skipped[-1] == skipped[-2] < 11
    assert rows[-1]["Loss/grad_norm"]["mean"] > 0
    assert rows[-1]["Loss/loss"]["mean"] < rows[0]["Loss/loss"]["mean"]


def test_keep_states_is_the_number_of_states_that_stay(base, tmp_path):
    options = [
        "--batch=1000",
        "--iters=3",
        "--tick=0",
        "--snap=1",
        "--num-stages=1",
        "--base-dim=4",
    ]
    for keep in (1, 2):
        run_dir = helpers.train_tiny(
            tmp_path / str(keep), helpers.toy_data(base), *options, f"--keep-states={keep}"
        ).run_dir
        names = sorted(path.name for path in run_dir.glob("training-state-*"))
        assert names == [f"training-state-{3 - keep + k + 1:06d}" for k in range(keep)]
        assert len(list(run_dir.glob("network-snapshot-*.pkl"))) == 3


def test_skip_limit_stops_a_run_whose_gradients_stay_non_finite(base, tmp_path, monkeypatch):
    original = Objective.forward
    monkeypatch.setattr(
        Objective, "forward", lambda self, *args: original(self, *args) * float("nan")
    )
    args = [f"--outdir={tmp_path}", f"--data={helpers.toy_data(base)}", *helpers.TINY]
    args += ["--tick=0", "--iters=20"]
    message = helpers.fail(train, *args, "--skip-limit=3")
    assert "3 gradients in a row were not finite" in message
    assert "--skip-limit=3" in message
    assert helpers.fail(train, *args, "--skip-limit=5").startswith("Error: 5 gradients")


@pytest.mark.parametrize(
    ("metric", "option"),
    [("fid10k_full", "inception"), ("fd_dinov2_10k_full", "dinov2"), ("cmmd10k_full", "clip")],
)
def test_detectors_of_the_metrics_come_from_where_the_options_say(base, tmp_path, metric, option):
    message = helpers.fail(
        train,
        f"--outdir={tmp_path}",
        f"--data={helpers.toy_data(base)}",
        *helpers.TINY,
        f"--metrics={metric}",
        f"--{option}=absent.pth",
    )
    assert "absent.pth" in message
    assert "no such file" in message or f"--{option}=FOLDER" in message
    assert not list(tmp_path.glob("0*"))


@pytest.mark.usefixtures("few_features", "small_inception")
def test_detectors_of_the_metrics_compute_as_the_options_say(base, tmp_path, monkeypatch):
    """In-loop scores of any kind come with the detector's convention and arithmetic."""
    monkeypatch.setattr(
        "metrics.metric.get_metrics",
        lambda names: [dataclasses.replace(metric, num_images=12) for metric in get_metrics(names)],
    )
    run_dir = helpers.train_tiny(
        tmp_path / "runs",
        helpers.toy_data(base),
        "--metrics=fid10k_full,pr10k3_full,is10k,fd_pixels",
        f"--inception={helpers.random_inception(base)}",
        "--inception-input=pytorch-fid",
        "--detector-precision=bf16",
        "--snap=100",
        "--tick=100",
    ).run_dir
    for name in ("fid10k_full", "pr10k3_full", "is10k"):
        row = json.loads((run_dir / f"metric-{name}.jsonl").read_text().splitlines()[-1])
        assert "half-pixel" in row["preprocessing"]
        assert row["detector_precision"] == "bfloat16"
        assert row["seeds"] == "0-11"
        assert all(math.isfinite(value) for value in row["values"].values())
    row = json.loads((run_dir / "metric-fd_pixels.jsonl").read_text().splitlines()[-1])
    assert row["detector_precision"] == "float32"
    events = "".join(path.read_text() for path in run_dir.glob("log.txt"))
    assert "pr10k3_full: precision" in events


def test_a_run_starts_from_another_and_reports_which_weights_it_took(base, tmp_path):
    snapshot = helpers.trained_snapshot(base)
    result = helpers.train_tiny(
        tmp_path, helpers.toy_data(base), f"--transfer={snapshot}", "--lr=1e-12", "--iters=1"
    )
    assert "Unexpected (not used): conditioner" in result.output
    there = load_snapshot(snapshot).state_dict
    here = load_snapshot(max(result.run_dir.glob("*.pkl"))).state_dict
    shared = set(here) & set(there)
    assert len(shared) > 50
    assert all(torch.equal(here[name], there[name]) for name in shared)
    message = helpers.fail(
        train,
        f"--outdir={tmp_path}",
        f"--data={helpers.toy_data(base)}",
        *helpers.TINY,
        f"--transfer={tmp_path / 'absent.pkl'}",
    )
    assert "absent.pkl: no such file" in message


def test_an_ema_rampup_typed_beside_transfer_is_used(base, tmp_path):
    for given, used in (([], None), (["--ema-rampup=0.1"], 0.1)):
        result = helpers.train_tiny(
            tmp_path,
            helpers.toy_data(base),
            f"--transfer={helpers.trained_snapshot(base)}",
            "--iters=1",
            *given,
        )
        options = json.loads((result.run_dir / "training_options.json").read_text())
        assert options["config"]["training"]["ema_rampup"] == used


def test_the_description_is_part_of_the_folder_s_name(base, tmp_path):
    first = helpers.train_tiny(tmp_path, helpers.toy_data(base), "--iters=1", "--desc=try")
    assert first.run_dir.name == "00000-toy-uncond-cifar10-ranks1-batch8-fp32-try"
    second = helpers.train_tiny(tmp_path, helpers.toy_data(base), "--iters=1", "--cond")
    assert second.run_dir.name == "00001-toy-cond-cifar10-ranks1-batch8-fp32"


# What is refused, and in which words.

DATA = "--outdir=OUT --data=TOY"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("--preset=cifer10", ["'cifer10'", "accepted: cifar10, ", "Did you mean 'cifar10'?"]),
        ("", ["--preset", "cifar10-l4", "ffhq64"]),
        ("--preset=digits --num-head=2", ["No such option '--num-head'", "'--num-heads'"]),
        ("--preset=digits --drop-out=2", ["No such option '--drop-out'", "--dropout"]),
        ("--preset=digits --metrics=fid10k", ["'fid10k'", "Did you mean 'fid10k_full'?"]),
        ("--preset=digits --precond=ed", ["'ed'", "one of edm, vp", "Did you mean 'edm'?"]),
        ("--preset=digits --outdir=x", ["--data", "dataset_tool.py"]),
        ("--preset=digits --outdir=OUT --data=absent.zip", ["absent.zip"]),
        (
            "--resolution=48",
            [
                "no preset for 48",
                "64 (ffhq64), 256 (imagenet256) and 512 (imagenet512)",
                "--preset",
            ],
        ),
        ("--resolution=large", ["no preset for large"]),
        (
            f"--preset=cifar10 {DATA}",
            ["expects 32x32", "toy.zip holds 8x8", "--resolution=8", "convert --resolution=32"],
        ),
        (f"TINY {DATA}/../toy/ring --cond", ["has no class labels", "train with --cond=False"]),
        (f"TINY {DATA} --label-drop=0.1", ["--label-drop: got 0.1", "unconditional", "--cond"]),
        (f"TINY {DATA} --cfg-scale=2", ["--cfg-scale: got 2", "unconditional", "--cond"]),
        (
            f"TINY {DATA} --cond --label-drop=0 --cfg-scale=2",
            ["without label dropout", "--label-drop=0.1"],
        ),
        (f"TINY {DATA} --kimg=1", ["--kimg or --iters, not both"]),
        ("--preset=digits --resume=x --transfer=x", ["--resume or --transfer, not both"]),
        (f"--preset=digits {DATA} --resume=absent", ["--resume: absent does not exist"]),
        ("--preset=digits --data=TOY --resume=TOY", ["toy.zip is not a training state"]),
        ("--resume=.", [".: not a run folder (no training_options.json)"]),
        (
            f"TINY {DATA} --batch=10 --batch-gpu=4",
            ["--batch-gpu: got 4", "--batch 10", "a divisor of 10", "such as 5"],
        ),
        (f"TINY {DATA} --wandb", ["--board=wandb", "pip install wandb"]),
        (f"TINY {DATA} --attention=flex", ["flex", "cannot be trained on a CPU"]),
        (f"TINY {DATA} --precond=vp --p-mean=0", ["--p-mean", "only with --precond=edm", "vp"]),
        (f"TINY {DATA} --eta=1", ["--eta", "only with --sampler=ddim", "heun"]),
        (f"TINY {DATA} --s-noise=1.1", ["--s-noise has no effect with --s-churn=0"]),
        (f"TINY {DATA} --cfg-interval=0,1", ["--cfg-interval has no effect with --cfg-scale=1"]),
        (f"TINY {DATA} --metrics-ticks=2", ["--metrics-ticks", "--metrics=none"]),
        (
            f"TINY {DATA} --metrics=fd_pixels --inception=a.pth",
            ["--inception has no effect with --metrics=fd_pixels"],
        ),
        (f"TINY {DATA} --clip=a", ["--clip has no effect with --metrics=none"]),
        ("--preset=digits --batch=0", ["--batch: got 0", "an integer from 1 to 1,000,000"]),
        ("--preset=digits --batch=inf", ["--batch", "'inf'", "an integer"]),
        ("--preset=digits --kimg=inf", ["--kimg: got inf", "a number"]),
        ("--preset=digits --lr=nan", ["--lr: got nan", "a number"]),
        ("--preset=digits --lr=fast", ["--lr", "'fast'", "a number"]),
        ("--preset=digits --ema-stds=0.05,0.3", ["--ema-stds: got 0.05,0.3", "to 0.288"]),
        ("--preset=digits --ema-stds=0", ["--ema-stds: got 0.0;", "from 0.001"]),
        ("--preset=digits --ema-stds=0.05,0.0501", ["--ema-stds: got 0.050,0.050", "differ"]),
        ("--preset=digits --num-heads=5", ["--num-heads: got 5", "--base-dim"]),
        ("--preset=digits --window=3", ["--window: got 3", "8x8"]),
        ("--preset=digits --sigma-min=90", ["--sigma-min: got 90", "below --sigma-max"]),
        (
            "--preset=digits --dry-run --transfer=absent.pkl",
            ["absent.pkl: no such file"],
        ),
        ("--preset=digits --dry-run --desc=a/b", ["--desc: got 'a/b'", "letters"]),
        ("--preset=digits --dry-run --outdir=TOY", ["--outdir", "toy.zip is a file"]),
        ("--preset=digits --dry-run --cfg-scale=2 --cfg-interval=1", ["2 numbers separated"]),
        ("--preset=digits extra", ["unexpected extra argument", "extra"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(args, parts, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    text = args.replace("TOY/../", f"{base}/").replace("TOY", str(helpers.toy_data(base)))
    text = text.replace("OUT", str(tmp_path / "runs")).replace("TINY", " ".join(helpers.TINY))
    message = helpers.fail(train, *text.split())
    for part in parts:
        assert part in message
    assert not (tmp_path / "runs").exists()


def test_ranks_that_cannot_share_the_batch_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = helpers.fail(train, "--preset=digits", "--dry-run")
    assert "--batch: got 128, which 3 ranks cannot share evenly; use a multiple of 3." in message


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig(ModelConfig):
    title: ClassVar[str] = "Model options (patches)"
    patch: int = option(2, min=1, aliases=("p",), help="Edge of a patch.")


def test_an_option_of_another_family_is_refused_with_the_preset_that_has_it(monkeypatch):
    run = ImageRun(preset="patchy", model=PatchConfig())
    fake = dataclasses.replace(PRESETS["cifar10"], run=run)
    monkeypatch.setitem(PRESETS, "patchy", fake)
    for option_text in ("--patch=4", "--p=4"):
        message = helpers.fail(train, "--preset=cifar10", option_text)
        assert "preset cifar10 has no such option; patchy has." in message
    message = helpers.fail(train, "--preset=patchy", "--window=4")
    assert "--window: preset patchy has no such option; cifar10, " in message


def test_a_continued_run_keeps_its_folder_and_name(base, tmp_path):
    run_dir = helpers.train_tiny(tmp_path, helpers.toy_data(base), "--iters=1").run_dir
    message = helpers.fail(train, f"--resume={run_dir}", "--desc=new")
    assert "--desc names a new run folder" in message
    message = helpers.fail(train, f"--resume={run_dir}", f"--outdir={base}")
    assert f"--resume continues in {run_dir}" in " ".join(message.split())
    helpers.succeed(train, f"--resume={run_dir}", f"--outdir={tmp_path}", "--iters=2")
    assert [path.name for path in tmp_path.glob("0*")] == [run_dir.name]


def test_help_shows_the_preset_s_values_in_groups_with_examples():
    output = helpers.succeed(train, "--preset=ffhq64", "--help").output
    text = " ".join(output.split())
    for part in (
        "Learning rate. [default: 0.0002]",
        "for a model that trains on sets. [default: 256]",
        "[default: 0.05]",
        "--sampler [heun|euler|ddim|dpmpp_2m|ddpm]",
        "python train.py --preset=ffhq64 --dry-run",
    ):
        assert part in text
    titles = ["Main options", "Model options (DiffiT)", "Preconditioning", "Training options"]
    titles += ["Augmentation", "Data", "Progress, snapshots and metrics", "Sampling", "Guidance"]
    places = [output.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    for setting in settings(PRESETS["ffhq64"].run):
        assert f"--{setting.name}" in text
        assert setting.field.metadata["help"].split()[0] in text
    assert "Learning rate. [default: 0.001]" in " ".join(
        helpers.succeed(train, "--help").output.split()
    )


def test_no_option_is_mistaken_by_torchrun_for_an_abbreviation_of_its_own():
    # It looks at all arguments, and stops at one that begins several of its own names.
    from torch.distributed.run import get_args_parser

    names = {
        opt for s in [*all_settings().values()] for opt in (s.name, *s.field.metadata["aliases"])
    }
    context = click.Context(fid.main)
    scores = [fid.main.get_command(context, name) for name in fid.main.list_commands(context)]
    commands = [train.main, generate.main, *scores]
    names |= {opt.lstrip("-") for c in commands for p in c.params for opt in p.opts if "--" in opt}
    assert {"metrics", "seeds", "num-images", "max-steps"} <= names
    names -= {"num"}  # Of generate.py, for one process; its help says so, and it is --num-images.
    for name in sorted(names):
        words = ["--standalone", "script.py", f"--{name}=1"]
        assert get_args_parser().parse_args(words).training_script_args == [f"--{name}=1"]


@pytest.mark.parametrize(
    ("script", "words", "here"),
    [
        (train, "--preset=digits --duration=200", "--kimg, in thousands of images"),
        (train, "--preset=digits --fp16=1", "--precision=fp16"),
        (train, "--preset=digits --gpus=4", "torchrun --nproc_per_node=N"),
        (train, "--preset=digits --ema=0.5", "--ema-kimg"),
        (train, "--preset=digits --xflip=1", "--hflip"),
        (train, "--preset=digits --local-rank=0", "torchrun"),
        (train, "--preset=digits --epochs=10", "--kimg: epochs x images"),
        (generate, "--guidance-scale=4", "--cfg-scale"),
        (generate, "--num-inference-steps=20", "--steps"),
        (fid, "calc --num-samples=100", "--num-images"),
    ],
)
def test_an_option_of_another_program_is_answered_with_its_name_here(script, words, here):
    message = helpers.fail(script, *words.split())
    assert f"{words.split()[-1].partition('=')[0]}: here it is {here}" in message


def test_guidance_that_a_model_does_not_have_is_answered_with_its_own():
    message = synonyms.used_here("cfg-scale")
    assert "which is not one of these. Feature-conditioned models have --text-scale" in message
    assert synonyms.used_here("hflip").endswith("which is not one of these.")


def test_what_is_called_otherwise_exists_under_the_name_that_is_given():
    names = {f"--{setting.name}" for preset in PRESETS.values() for setting in settings(preset.run)}
    names |= {name for script in (train, generate) for p in script.main.params for name in p.opts}
    tables = synonyms._TRAIN, synonyms._SAMPLE, synonyms._SHARED, synonyms._INSTEAD
    for table in tables:
        for here in table.values():
            assert set(re.findall(r"(?<![\w'])--[a-z]+(?:-[a-z]+)*(?![_\w])", here)) <= names, here
