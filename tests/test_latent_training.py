"""Latent models end to end: images, autoencoder, latents, training, guided samples, scores."""

import dataclasses
import json
import shutil
from unittest import mock

import helpers
import numpy as np
import pytest
import torch
from helpers import call, fail, succeed
from latent_files import tiny_autoencoder

import dataset_tool
import fid
import generate
import train
from commands import posthoc_ema
from configs import get_preset
from data.latents.codec import LatentCodec
from data.latents.dataset import LatentDataset
from demos.digits import class_agreement, train_autoencoder
from diffusion.config import PrecondConfig
from diffusion.precond import make_precond
from encoders.autoencoder import Autoencoder, load_autoencoder
from families.latent import FAMILY
from models import build_network
from torch_utils import rng
from torch_utils.pictures import read_image, to_uint8
from training.asked import GeneratorOptions
from training.checkpoint import find_snapshots, find_states, load_snapshot, load_state
from training.objective import Objective

LATENT_MODEL = get_preset("digits-latent").run.model
TINY = [*helpers.TINY_LATENT, "--iters=4", "--tick=0", "--steps=3"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """42 RGB images of 8x8 in three classes."""
    return helpers.toy_data(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_autoencoder(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def latents(images, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "latents"
    succeed(
        dataset_tool, "encode", f"--source={images}", f"--dest={folder}", f"--vae={vae}", "--hflip"
    )
    return folder


def train_latent(outdir, data, *args):
    """Train in this process; return the run folder."""
    succeed(train, f"--outdir={outdir}", f"--data={data}", *TINY, *args)
    (run_dir,) = outdir.iterdir()
    return run_dir


def losses(run_dir):
    rows = (run_dir / "stats.jsonl").read_text().splitlines()
    return [json.loads(row)["Loss/loss"]["mean"] for row in rows]


def weights(run_dir):
    return load_state(find_states(run_dir)[0])["net"]


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory):
    return train_latent(tmp_path_factory.mktemp("trained"), latents, "--hflip")


def snapshot_of(run_dir):
    return find_snapshots(run_dir)[0]


def test_two_processes_train_as_one_and_their_snapshot_samples_and_scores(
    images, latents, trained, tmp_path
):
    reference = (f"--metrics-ref={images}", "--metrics=fd_pixels", "--hflip")
    arguments = (f"--outdir={tmp_path / 'runs'}", f"--data={latents}", *TINY, *reference)
    helpers.on_ranks(2, "train.py", *arguments)
    (run_dir,) = (tmp_path / "runs").iterdir()
    np.testing.assert_allclose(losses(run_dir), losses(trained), rtol=1e-5)
    score = json.loads((run_dir / "metric-fd_pixels.jsonl").read_text().splitlines()[-1])
    assert score["num_images"] == 42
    assert len(score["vae_hash"]) == 64

    network = snapshot_of(run_dir)
    grid = tmp_path / "grid.png"
    succeed(
        generate,
        *(f"--network={network}", f"--outdir={tmp_path / 'out'}", "--seeds=0-5", "--class=dot"),
        *("--cfg-scale=2", "--cfg-interval=0.1,50", "--cfg-channels=2", f"--grid={grid}"),
    )
    assert read_image(tmp_path / "out" / "000003.png").shape == (3, 8, 8)
    assert grid.is_file()
    json_path = tmp_path / "score.json"
    succeed(
        fid,
        "calc",
        *(f"--network={network}", f"--ref={images}", "--metrics=fd_pixels", "--cfg-scale=2"),
        f"--json={json_path}",
    )
    row = json.loads(json_path.read_text())["rows"][0]
    assert row["guidance"]["cfg_scale"] == 2
    assert row["sampling"]["grid"] == "timesteps"
    assert row["vae_hash"] == score["vae_hash"]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(latents, trained, tmp_path):
    run_dir = train_latent(tmp_path, latents, "--hflip", "--iters=2")
    succeed(train, f"--resume={run_dir}", "--iters=4")
    for name, tensor in weights(trained).items():
        assert torch.equal(weights(run_dir)[name], tensor), name


def test_encoding_while_training_is_the_same_training(images, vae, trained, tmp_path):
    run_dir = train_latent(tmp_path, images, "--hflip", f"--vae={vae}")
    # The latents on file are rounded to float16.
    np.testing.assert_allclose(losses(run_dir), losses(trained), rtol=2e-2)
    own, other = load_snapshot(snapshot_of(run_dir)), load_snapshot(snapshot_of(trained))
    assert own.config.model.vae_hash == other.config.model.vae_hash
    assert own.config.model.latent_scale == other.config.model.latent_scale
    assert own.data.num_images == other.data.num_images == 42


def test_latents_with_a_standard_deviation_are_sampled(images, vae, tmp_path):
    means = tmp_path / "means"
    arguments = (f"--source={images}", f"--vae={vae}")
    succeed(dataset_tool, "encode", *arguments, f"--dest={means}", "--mean-only")
    full = tmp_path / "full"
    succeed(dataset_tool, "encode", *arguments, f"--dest={full}")
    # One image, so that epochs differ by what is drawn alone.
    alone = ("--max-size=1", "--batch=1")
    by_mean = train_latent(tmp_path / "a", means, *alone)
    by_posterior = train_latent(tmp_path / "b", full, *alone)
    assert losses(by_mean)[-1] != losses(by_posterior)[-1]


def test_latents_bring_their_normalisation_and_refuse_another_autoencoder(latents, vae, tmp_path):
    run = get_preset("digits-latent").run
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, data=str(latents)))
    model = FAMILY.fit(run, FAMILY.open_data(run)).model
    assert (model.latent_scale, model.latent_shift) == (0.5, 0.0)
    assert model.vae == str(vae)
    assert model.vae_hash == load_autoencoder(str(vae), "cpu").sha256
    other = tiny_autoencoder(tmp_path / "other", scaling_factor=0.7)
    message = fail(train, *TINY, f"--outdir={tmp_path}", f"--data={latents}", f"--vae={other}")
    assert f"--vae: {other} is another autoencoder" in message


def test_averages_of_a_latent_run_are_reconstructed_after_its_autoencoder_moved(
    latents, vae, tmp_path
):
    profiles = ("--ema-stds=0.05,0.1", "--snap=1", "--tick=1", "--batch=500")
    run_dir = train_latent(tmp_path / "runs", latents, *profiles, "--iters=6")
    moved = shutil.copytree(vae, tmp_path / "moved")
    succeed(train, f"--resume={run_dir}", "--iters=10", f"--vae={moved}")
    done = call(posthoc_ema, run_dir, "--std=0.07")
    assert done.code == 0, done.error
    (network,) = run_dir.glob("*-0.070-posthoc.pkl")
    options = (f"--network={network}", "--seeds=0", "--class=1")
    succeed(generate, *options, f"--outdir={tmp_path / 'out'}")


def test_pictures_and_samples_are_what_the_autoencoder_decodes(latents, vae, trained, tmp_path):
    autoencoder = load_autoencoder(str(vae), "cpu")
    moments, _ = LatentDataset(latents).__getitems__([3, 30])
    model = load_snapshot(snapshot_of(trained)).config.model
    z = (moments[:, :4].float() - model.latent_shift) * model.latent_scale
    expected = to_uint8(autoencoder.decode(z))
    assert torch.equal(LatentCodec(model, autoencoder).pictures(moments), expected)
    assert expected.float().std() > 1

    snapshot = load_snapshot(snapshot_of(trained))
    generator = FAMILY.load(snapshot, torch.device("cpu"), GeneratorOptions())
    made = []
    with mock.patch.object(Autoencoder, "decode", autospec=True) as decode:
        decode.side_effect = lambda self, z: made.append(z) or z[:, :3].repeat(1, 1, 2, 2)
        images = generator.generate([5, 6])
    assert torch.equal(images, to_uint8(made[0][:, :3].repeat(1, 1, 2, 2)))
    assert made[0].std() > 0.1


def test_noise_of_training_and_of_the_posterior_are_independent():
    objective = Objective(
        build_network(dataclasses.replace(LATENT_MODEL, num_blocks=1)),
        make_precond(PrecondConfig(precond="ddpm", learned_variance=True)),
        codec=LatentCodec(LATENT_MODEL, None),
    )
    drawn = objective.draw(rng.Step(0, 0, 500, (4, 4, 4), torch.device("cpu")))
    both = torch.stack([drawn.noise.flatten(), drawn.codec.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.03


def test_presets_of_another_scale_refuse_latents_unless_told(latents):
    run = get_preset("digits-latent").run
    model = dataclasses.replace(run.model, latent_scale=0.18215)
    data = dataclasses.replace(run.data, data=str(latents))
    run = dataclasses.replace(run, model=model, data=data)
    with pytest.raises(ValueError, match=r"holds latents of scale 0\.5, but .* scale 0\.18215"):
        FAMILY.fit(run, FAMILY.open_data(run))


def test_posterior_noise_is_a_function_of_the_position_in_the_run():
    step = rng.Step(seed=1, cur_nimg=8, batch=4, shape=(4, 2, 2), device=torch.device("cpu"))

    def draw(**changes):
        return LatentCodec(LATENT_MODEL, None).draw(dataclasses.replace(step, **changes))

    assert torch.equal(draw(), draw())
    assert draw().std() > 0.5
    assert not torch.equal(draw(), draw(cur_nimg=12))
    assert not torch.equal(draw(), draw(seed=2))
    assert LatentCodec(LATENT_MODEL, None, has_std=False).draw(step) is None


def test_an_autoencoder_that_moved_is_named_and_another_is_refused(
    vae, trained, tmp_path, monkeypatch
):
    moved = shutil.copytree(vae, tmp_path / "moved")
    network = f"--network={snapshot_of(trained)}"
    out = (f"--outdir={tmp_path / 'out'}", "--seeds=0-1")
    succeed(generate, network, *out, f"--vae={moved}")
    other = tiny_autoencoder(tmp_path / "other", scaling_factor=0.7)
    message = fail(generate, network, f"--outdir={tmp_path / 'other-out'}", f"--vae={other}")
    assert str(other) in message
    # Nobody is asked over the network, which takes half a minute where there is none.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = fail(generate, network, f"--outdir={tmp_path / 'o'}", "--vae=nowhere/vae-folder")
    assert "nowhere/vae-folder" in missing


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--data=IMAGES", ["holds images, but preset digits-latent trains on latents", "--vae"]),
        ("--data=IMAGES --vae=./no/such/vae", ["./no/such/vae"]),
        ("--data=LATENTS --latent-channels=3", ["4x4x4", "3x4x4", "--latent-channels=4"]),
        ("--data=LATENTS --resolution=16", ["--resolution: this run expects 16x16", "8x8"]),
        ("--data=LATENTS --cfg-scale=2 --cfg-channels=5", ["--cfg-channels: got 5", "4 channels"]),
        (
            "--data=LATENTS --metrics=fd_pixels --metrics-ref=LATENTS",
            ["holds no images", "encoding.json"],
        ),
        ("--data=LATENTS --no-cond --label-drop=0 --cfg-scale=2", ["unconditional", "--cfg-scale"]),
        ("--data=LATENTS --augment=0.1", ["--augment: got 0.1, but latents", "--hflip"]),
        ("--data=LATENTS --cache", ["--cache has no effect on latents"]),
        ("--data=LATENTS --metrics=fd_pixels", ["--metrics-ref", "holds latents"]),
        ("--data=LATENTS --metrics-ref=x", ["--metrics-ref has no effect"]),
        ("--data=LATENTS --window=4", ["--window: preset digits-latent has no such option"]),
        ("--data=LATENTS --precond=edm --learned-variance", ["--learned-variance"]),
        ("--data=LATENTS --precond=edm", ["--sigma-grid: got timesteps", "--sigma-grid=karras"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(arguments, parts, images, latents, tmp_path):
    text = arguments.replace("IMAGES", str(images)).replace("LATENTS", str(latents))
    message = fail(train, *TINY, f"--outdir={tmp_path / 'runs'}", *text.split())
    for part in parts:
        assert part in message
    assert not (tmp_path / "runs").exists()


def test_a_model_of_pixels_refuses_latents_and_autoencoders(latents, tmp_path):
    message = fail(train, f"--outdir={tmp_path / 'runs'}", "--preset=digits", f"--data={latents}")
    assert "holds latents, but preset digits trains on pixels" in message
    snapshot = helpers.trained_snapshot(tmp_path)
    message = fail(generate, f"--network={snapshot}", f"--outdir={tmp_path / 'o'}", "--vae=x")
    assert "this model makes images without one" in message


def test_classes_that_the_model_does_not_have_are_refused(trained, tmp_path):
    network = (f"--network={snapshot_of(trained)}", f"--outdir={tmp_path / 'out'}")
    assert "--class: got 3; accepted: names, and indices from 0 to 2" in fail(
        generate, *network, "--class=3"
    )


def test_guidance_makes_digits_more_like_their_class(tmp_path):
    data, vae = tmp_path / "digits.zip", tmp_path / "vae"
    succeed(dataset_tool, "convert", "--source=digits", f"--dest={data}")
    assert train_autoencoder(data, vae, num_steps=300, batch=16) < 0.06
    latents = tmp_path / "latents"
    arguments = (f"--source={data}", f"--dest={latents}", f"--vae={vae}")
    succeed(dataset_tool, "encode", *arguments)
    succeed(
        train,
        *(f"--outdir={tmp_path / 'runs'}", f"--data={latents}", "--preset=digits-latent"),
        *("--kimg=48", "--snap=100", "--lr-rampup=1", "--ema-kimg=3", "--precond=edm"),
        *("--sampler=dpmpp_2m", "--sigma-grid=karras", "--steps=12"),
    )
    (run_dir,) = (tmp_path / "runs").iterdir()
    agreement = {}
    for scale in (1, 3):
        outdir = tmp_path / str(scale)
        succeed(
            generate,
            *(f"--network={snapshot_of(run_dir)}", "--seeds=0-199", "--class=0-9", "--batch=200"),
            *(f"--outdir={outdir}", f"--cfg-scale={scale}"),
        )
        made = np.stack([read_image(outdir / f"{seed:06d}.png").numpy() for seed in range(200)])
        agreement[scale] = class_agreement(made, np.arange(200) % 10)
    assert agreement[3] > 0.8
    assert agreement[3] > agreement[1] + 0.1
