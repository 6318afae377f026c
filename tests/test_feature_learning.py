"""A proof that feature-conditioned models learn, and use what they are given."""

import dataclasses

import pytest
import torch
from helpers import succeed
from training_runs import only_run, per_tick

import dataset_tool
import families
import train as train_script
from data.features.dataset import FeatureDataset
from demos.patches import check_patches, mean_loss, other_of_bucket
from demos.photographs import write_encoders, write_photographs
from diffusion.config import DualGuidanceConfig
from training.asked import GeneratorOptions
from training.checkpoint import find_snapshots, load_snapshot

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

SETTINGS = (
    *("--preset=nanodit-tiny", "--batch=8", "--lr=4e-3", "--text-lengths=8"),
    *("--ema-kimg=0.1", "--snap=100"),
)
PLAIN = DualGuidanceConfig(text_scale=1.0, visual_scale=1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen crops of photographs in two buckets, with features of random encoders."""
    base = tmp_path_factory.mktemp("photographs")
    write_photographs(base / "images", sizes=((96, 96), (128, 64)))
    encoders = write_encoders(base / "encoders", vae_steps=0)
    succeed(
        dataset_tool,
        *("features", f"--source={base / 'images'}", f"--dest={base / 'features'}"),
        *("--buckets=96x96,128x64", "--validation-share=0", *encoders),
    )
    return base / "features"


def train(outdir, data, *options):
    succeed(train_script, f"--outdir={outdir}", f"--data={data}", *SETTINGS, *options)
    run_dir = only_run(outdir)
    return run_dir, find_snapshots(run_dir)[0]


def test_sixteen_crops_are_learned_by_their_patches_and_texts(data, tmp_path):
    run_dir, network = train(tmp_path, data, "--kimg=4.8", "--tick=0.6")
    losses = per_tick(run_dir, "Loss/loss")
    assert losses[0] == pytest.approx(2, abs=0.15)
    assert losses[-1] < 0.3 * losses[0]

    snapshot, dataset = load_snapshot(network), FeatureDataset(data, text_lengths=(8,))
    assert dataset.counts == [8, 8]
    loss = mean_loss(snapshot, dataset)
    assert loss < 0.5
    for name in ("text", "patches"):
        assert mean_loss(snapshot, dataset, swapped=(name,)) > 1.3 * loss, name
    sampling = dataclasses.replace(snapshot.config.sampling, steps=8)
    options = GeneratorOptions(sampling=sampling, guidance=PLAIN)
    generator = families.of(snapshot.config).load(snapshot, torch.device("cpu"), options)
    check = check_patches(generator, dataset, num_repeats=3)
    assert check.share >= 0.9
    assert check.own.mean() < 0.8 * check.swapped.mean()


def test_patches_can_be_added_to_a_model_that_was_trained_without(data, tmp_path):
    small = ("--num-blocks=2", "--hidden-dim=64")
    base_dir, base = train(
        *(tmp_path / "base", data, *small),
        *("--kimg=1.6", "--tick=0.8", "--no-use-dino-patches"),
    )
    options = (f"--transfer={base}", "--kimg=1.2", "--tick=0.2", "--lr-rampup=0.1")
    options = (*small, *options, "--patch-bias-kimg=0.2")
    run_dir, warm = train(tmp_path / "warm", data, *options)
    succeed(train_script, f"--resume={base_dir}", "--kimg=2.8")
    dataset = FeatureDataset(data, text_lengths=(8,))
    losses = {
        name: mean_loss(load_snapshot(path), dataset)
        for name, path in (
            ("before", base),
            ("with", warm),
            ("without", find_snapshots(base_dir)[0]),
        )
    }
    # No worse than without by more than a tenth, and on its way from the first step on.
    assert losses["with"] < 1.1 * losses["without"]
    assert losses["with"] < 0.9 * losses["before"]
    assert per_tick(run_dir, "Loss/loss")[0] < 1.5
    assert per_tick(run_dir, "Flow/grad_norm_dino_patch_proj")[-1] > 0
    assert mean_loss(load_snapshot(warm), dataset, swapped=("patches",)) != losses["with"]


def test_every_image_has_another_of_its_bucket(data):
    dataset = FeatureDataset(data)
    others = other_of_bucket(dataset)
    assert sorted(others) == list(range(16))
    assert all(
        own != other and dataset.bucket_index(own) == dataset.bucket_index(other)
        for own, other in enumerate(others)
    )
