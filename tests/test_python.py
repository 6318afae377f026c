"""The Python interface: every kind of model by the same calls."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from feature_files import tiny_features
from latent_files import tiny_latents
from PIL import Image

import generate
import setdiffit
from sampling.outputs import parse_classes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("python")


@pytest.fixture(scope="module")
def models(base):
    """A model of every kind, by its kind."""
    # Each kind in its own folder: their encoders have the same names.
    latents, features = tiny_latents(base / "l0"), tiny_features(base / "f0")
    drop = "--label-drop=0.3"
    runs = dict(
        latent=helpers.train_tiny(base / "l", latents, drop, tiny=helpers.TINY_LATENT).run_dir,
        features=helpers.train_tiny(base / "f", features, tiny=helpers.TINY_FEATURES).run_dir,
        image=helpers.trained_run(base),
        sets=helpers.set_snapshot(base),
    )
    return {kind: setdiffit.load(run) for kind, run in runs.items()}


def request_of(model):
    """Return what a model is asked for, in the words of generate()."""
    support = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    return dict(
        image=dict(classes=1),
        latent={},
        sets=dict(support=support),
        features=dict(reference=Image.new("RGB", (64, 64), "teal")),
    )[model.kind]


KINDS = ("image", "latent", "sets", "features")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_asked_by_the_same_call(models, kind):
    model = models[kind]
    assert model.kind == kind
    asked = request_of(model)
    images = model.generate(seeds=[3, 5], steps=2, **asked)
    assert [image.size for image in images] == [model.image_sizes[0]] * 2
    tensors = model.generate(seeds=[5], steps=2, output="tensor", **asked)
    assert tensors[0].dtype == torch.uint8
    for seed in (-1, 2**32, 0.5, "1", True):
        with pytest.raises(ValueError, match=r"seeds: got .*; accepted: integers from 0 to 4,294"):
            model.generate(seeds=[seed], steps=2, **asked)
    # An image depends on its seed alone.
    pixels = np.asarray(images[1].convert("RGB")).astype(int)
    found = tensors[0].permute(1, 2, 0).cpu().numpy().astype(int)
    assert np.abs(pixels - found).max() <= 1
    text = repr(model)
    assert text.startswith(f"{kind} model of preset ")
    assert "steps=" in text
    assert model.inputs.keys() == model.snapshot.config.model.example_cond().keys() - {"size"}


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_encoding_and_decoding_are_in_one_space(models, kind):
    model = models[kind]
    width, height = model.image_sizes[0]
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    x0 = model.encode(images)
    assert x0.shape[1:] == model.snapshot.config.model.shape_of(model.image_sizes[0])
    assert x0.dtype == torch.float32
    decoded = model.decode(x0)
    assert decoded.shape == images.shape
    if kind in ("image", "sets"):
        assert torch.equal(decoded, images)
    asked = request_of(model)
    estimate = model.denoise(x0 + 1e-3 * torch.randn_like(x0), 1e-3, **asked)
    # At a low noise level what is denoised hardly changes.
    assert (estimate - x0).abs().max() < 0.1
    assert not torch.allclose(model.denoise(x0, 2.0, **asked), model.denoise(x0, 0.5, **asked))


def test_what_the_call_makes_is_what_the_program_makes(base, models, tmp_path):
    model = models["image"]
    options = [
        "--seeds=0-3",
        "--class=bar,dot",
        "--cfg-scale=2",
        "--steps=4",
        f"--outdir={tmp_path}",
    ]
    helpers.succeed(generate, f"--network={model.snapshot.path}", *options)
    files = [helpers.read_pixels(path) for path in sorted(tmp_path.glob("*.png"))]
    for classes in ("bar,dot", ["bar", "dot"], [0, 1]):
        images = model.generate(4, classes=classes, cfg_scale=2.0, steps=4, batch=3)
        pairs = zip(images, files, strict=True)
        assert all(np.abs(np.asarray(image) - file).max() <= 1 for image, file in pairs)


def test_guidance_acts_on_what_is_denoised(models):
    model = models["image"]
    x = torch.randn(3, 3, 8, 8)
    one, two, three = (
        model.denoise(x, 1.0, classes=0, cfg_scale=scale) for scale in (1.0, 2.0, 3.0)
    )
    torch.testing.assert_close(three - two, two - one, rtol=1e-3, atol=1e-5)
    null = model.denoise(x, 1.0)
    torch.testing.assert_close(null, one - (two - one), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(null, one)


def test_a_support_is_files_pictures_or_tensors(models, tmp_path):
    model = models["sets"]
    tensors = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in tensors]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    given = (tensors, list(tensors), pictures, files, [str(file) for file in files], tmp_path)
    made = [model.generate(1, support=support, steps=2)[0].tobytes() for support in given]
    assert len(set(made)) == 1
    other = model.generate(1, support=255 - tensors, steps=2)[0].tobytes()
    assert other != made[0]


def test_scores_are_the_rows_of_the_program(base, models):
    model = models["image"]
    (row,) = model.score("fd_pixels", ref=helpers.toy_data(base), num_images=16, steps=2)
    assert row["metric"] == "fd_pixels"
    assert row["num_images"] == 16
    assert row["sampling"]["steps"] == 2
    assert row["snapshot_hash"] == model.snapshot.sha256
    with pytest.raises(ValueError, match="compares with real images; give them"):
        model.score("fd_pixels")


def test_what_a_model_does_not_take_is_said_in_one_sentence(models, tmp_path):
    image, sets = models["image"], models["sets"]
    x, picture = torch.zeros(1, 3, 8, 8), Image.new("CMYK", (8, 8))
    for call, text in (
        (lambda: image.generate(1, step=3), "Did you mean 'steps'"),
        (lambda: image.generate(1, prompt="a cat"), "was not trained on features"),
        (lambda: image.generate(1, classes="cat"), "cat"),
        (lambda: image.generate(1, output="jpeg"), "accepted: 'pil', 'tensor'"),
        (lambda: image.generate(1, steps=0), "steps"),
        (lambda: image.generate(1.5), "seeds: got 1.5"),
        (lambda: image.generate(1, batch=-1), "batch: got -1; accepted: 1 or more"),
        (lambda: image.generate(1, classes=[]), "the list is empty"),
        (lambda: image.denoise(x, 0), "sigma: got 0.0; accepted: a number above 0"),
        (lambda: image.denoise(x, math.nan), "sigma: got nan"),
        (lambda: image.denoise(x, torch.ones(3)), r"sigma: got shape \[3\]; accepted: one number"),
        (lambda: image.denoise(x[0], 1), r"x: got shape \[3, 8, 8\]; accepted: \[N, 3, 8, 8\]"),
        (lambda: image.decode(x[:, :, 1:]), r"x: got shape \[1, 3, 7, 8\]"),
        (lambda: image.encode(x), "images: got torch.float32; accepted: torch.uint8"),
        (lambda: image.encode(x[:, :1]), r"images: got shape \[1, 1, 8, 8\]"),
        (lambda: sets.generate(1, support=[x[0]]), "A picture: got torch.float32 of shape"),
        (lambda: sets.generate(1, support=[picture]), "A picture: got mode CMYK"),
        (lambda: setdiffit.load(image.snapshot.path, device="gpu"), "device: got 'gpu'"),
        (lambda: setdiffit.load(image.snapshot.path, precision="fp8"), "precision: got 'fp8'"),
        (lambda: sets.generate(1), "from a support"),
        (lambda: setdiffit.load(tmp_path), "without a snapshot"),
        (lambda: setdiffit.load(tmp_path / "none.pkl"), "no such file"),
        (lambda: setdiffit.load(image.snapshot.path, stepps=3), "Unknown option 'stepps'"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_list_of_classes_may_hold_names_with_commas():
    names = ["tench, Tinca tinca", "goldfish"]
    asked = setdiffit._as_typed(
        dict(classes=[names[0], 1], support=None, prompt=None, reference=None, size=None), Path()
    )
    assert parse_classes(asked.classes, names) == (0, 1)


def test_a_network_is_built_once_whatever_the_settings(base):
    model = setdiffit.load(helpers.trained_snapshot(base), precision="bf16")
    first = model.generate(1, steps=2)
    network = model._generator({}).network
    assert model._generator(dict(steps=2)).network is network
    assert model._generator({}).autocast_dtype == torch.bfloat16
    assert np.asarray(first[0]).shape == (8, 8, 3)


def test_the_notebook_runs_as_it_is(base, tmp_path):
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] and "outputs" in cell for cell in cells)
    kinds = {kind for cell in cells for out in cell["outputs"] for kind in out.get("data", {})}
    assert "image/png" in kinds
    code = "\n".join("".join(cell["source"]) for cell in cells)
    shutil.copy(helpers.trained_snapshot(base), tmp_path / "network-snapshot-000001.pkl")
    own = dict(SETDIFFIT_NETWORK=str(tmp_path), PYTHONPATH=str(ROOT))
    shown = "def display(*things): print(*(type(thing).__name__ for thing in things))\n"
    found = subprocess.run(
        [sys.executable, "-c", shown + code],
        env={**os.environ, **own},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
