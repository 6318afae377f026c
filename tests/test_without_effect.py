"""Options that could do nothing where they are given are refused with a sentence that says so."""

import json

import pytest
from feature_files import tiny_features
from helpers import (
    TINY,
    TINY_FEATURES,
    fail,
    first_snapshot,
    succeed,
    toy_data,
    train_tiny,
    trained_snapshot,
)
from training_runs import only_run

import generate
import train
from training.checkpoint import load_snapshot
from training.config import TrainingConfig

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("without-effect")


@pytest.fixture(scope="module")
def features(base):
    return tiny_features(base)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--cfg-interval=200,300", "--cfg-interval: got 200 to 300, but the sampler visits no"),
        ("--cfg-interval=0.1,0.2 --steps=2", "only 0.002 to 80"),
    ],
)
def test_guidance_where_the_sampler_never_is_is_refused(base, options, sentence):
    words = (f"--network={trained_snapshot(base)}", f"--outdir={base / 'out'}", "--num=1")
    assert sentence in fail(generate, *words, "--cfg-scale=2", *options.split())
    succeed(generate, *words, "--steps=2", "--cfg-scale=2", "--cfg-interval=1,100")


def test_churn_and_guidance_of_a_run_are_held_against_its_noise_levels(base):
    words = (f"--outdir={base}", f"--data={toy_data(base)}", *TINY, "--cond", "--cfg-scale=2")
    assert "--cfg-interval: got" in fail(train, *words, "--cfg-interval=100,200")
    churn = ("--s-churn=5", "--s-min=100", "--dry-run")
    assert "--s-min and --s-max: got 100 to inf" in fail(train, *words, *churn)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--prompt=red --visual-scale=3", "--visual-scale has no effect without --reference"),
        ("--reference=x.png --text-scale=3", "--text-scale has no effect without --prompt"),
        ("--prompt=red --guidance-form=seed", "without --prompt and --reference"),
    ],
)
def test_guidance_by_a_condition_that_is_not_given_is_refused(base, features, options, sentence):
    network = base / "features-run"
    if not network.is_dir():
        train_tiny(network, features, "--iters=1", tiny=TINY_FEATURES)
    snapshot = max(network.glob("*/network-snapshot-*.pkl"))
    words = (f"--network={snapshot}", f"--outdir={base / 'out'}", "--num=1", *options.split())
    assert sentence in fail(generate, *words)


def test_more_images_than_there_are_cannot_be_asked_for(base):
    words = (f"--outdir={base}", f"--data={toy_data(base)}", *TINY)
    assert "holds 42 images; leave it out to take all" in fail(train, *words, "--max-size=43")


@pytest.mark.parametrize("name", ["lr", "loss_scaling"])
def test_a_run_that_could_learn_nothing_is_refused(name):
    with pytest.raises(ValueError, match=r"accepted: a number of at least 1e-12"):
        TrainingConfig(**{name: 0.0})


def test_rules_of_a_preset_hold_for_the_classes_that_they_name_alone(base):
    words = (f"--outdir={base}", f"--data={toy_data(base)}", "--preset=fsdm-digits", "--iters=1")
    typed = ("--train-classes=bar,dot", "--test-classes=ring")
    for given in ((), typed, ("--skip-transforms=none",)):
        message = fail(train, *words, *given)
        assert "the preset has rules for the classes 0, 1, 2" in message
        assert "--train-classes, --test-classes and --skip-transforms" in message
    words += ("--held-out=6", "--lr-rampup=0", "--batch=4", "--dry-run")
    succeed(train, *words, *typed, "--skip-transforms=bar:2")
    succeed(train, *words, *typed, "--class-transforms=none")


def test_a_transfer_takes_the_architecture_from_the_snapshot(base):
    snapshot, outdir = first_snapshot(base), base / "transferred"
    plain = [word for word in TINY if not word.startswith(("--num-", "--hidden-", "--base-"))]
    words = (f"--outdir={outdir}", f"--data={toy_data(base)}", *plain, f"--transfer={snapshot}")
    result = succeed(train, *words, "--iters=1")
    assert "num_blocks=(1,)" in result.error.replace("[1]", "(1,)")
    report = json.loads((only_run(outdir) / "warm-start.json").read_text())
    assert report["share"] > 0.99
    there = load_snapshot(snapshot).config.model
    made = load_snapshot(max(only_run(outdir).glob("network*.pkl"))).config.model
    assert made.hidden_dim == there.hidden_dim == 16


def test_a_poor_match_is_refused_unless_it_is_allowed(base):
    outdir = base / "poor"
    words = (f"--outdir={outdir}", f"--data={toy_data(base)}", *TINY, "--iters=1")
    words += (f"--transfer={first_snapshot(base)}", "--hidden-dim=32")
    message = fail(train, *words)
    assert "of the parameters of this model and lacks" in message
    assert "--transfer-allow='*'" in message
    assert not outdir.exists() or not list(outdir.iterdir())
    assert "of the parameters" in fail(train, *words, "--transfer-allow=conditioner.*")
    succeed(train, *words, "--transfer-allow=*")
    without = ("--preset=digits", "--transfer-allow=*", "--dry-run")
    assert "--transfer-allow has no effect without --transfer" in fail(train, *without)
