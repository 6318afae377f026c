"""Values that are not finite become neither images nor scores."""

import dataclasses
import re

import helpers
import pytest
import torch
from helpers import TINY_SETS, fail, train_tiny

import fid
import generate
from diffusion.config import SamplingConfig
from diffusion.flow import sample_flow
from diffusion.precond import EDMPrecond
from diffusion.samplers import SAMPLERS, sample
from dnnlib.errors import NotFiniteError
from torch_utils.pictures import to_uint8
from training import loop
from training.checkpoint import load_snapshot


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def broken(base, tmp_path):
    """A snapshot with one weight that is no number."""
    path = helpers.trained_snapshot(base)
    payload = torch.load(path, weights_only=True)
    weights = payload["ema"] if "ema" in payload else payload["state_dict"]
    next(value for value in weights.values() if value.is_floating_point()).view(-1)[0] = torch.nan
    torch.save(payload, tmp_path / "broken.pkl")
    load_snapshot(tmp_path / "broken.pkl")
    return tmp_path / "broken.pkl"


def test_images_of_broken_weights_are_refused_with_the_first_step(broken, tmp_path):
    message = fail(generate, f"--network={broken}", f"--outdir={tmp_path}/out", "--num=4")
    assert "not finite, first in step 1 of 4" in message
    assert not list((tmp_path / "out").glob("*.png"))


def test_so_is_a_scale_that_overflows(base, tmp_path):
    network = helpers.trained_snapshot(base)
    out = tmp_path / "out"
    message = fail(generate, f"--network={network}", f"--outdir={out}", "--cfg-scale=1e38")
    assert "not finite, first in step" in message
    assert "lower guidance scale" in message


def test_nothing_is_scored(broken, base):
    data = helpers.toy_data(base)
    options = ("--metrics=fd_pixels", f"--ref={data}", "--num-images=8")
    assert "not finite" in fail(fid, "calc", f"--network={broken}", *options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_names_the_step(name):
    config, calls = SamplingConfig(sampler=name, steps=6), []

    def denoise(x, sigma):
        calls.append(sigma)
        return torch.full_like(x, torch.inf if sigma < 5 else 0.1).float()

    with pytest.raises(NotFiniteError, match=r"first in step [2-6] of 6") as caught:
        sample(denoise, torch.randn(1, 1, 2, 2), config, EDMPrecond(), torch)
    levels = [sigma for sigma in calls if sigma >= 5]
    # A step of second order evaluates at its end too.
    step = len(levels) // SAMPLERS[name].order + 1
    assert f"step {step} of 6" in str(caught.value)


def test_so_does_a_flow():
    config = SamplingConfig(sampler="euler", grid="time", steps=4)

    def velocity(z, t):
        return z.float() / 0 if t < 0.6 else z.float()

    with pytest.raises(NotFiniteError, match="first in step 3 of 4"):
        sample_flow(velocity, torch.randn(1, 1, 2, 2), config)


def test_the_first_step_is_named_even_if_its_second_evaluation_is_finite():
    """As of a denoiser that turns NaN into numbers."""
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return torch.full_like(x, torch.nan if len(calls) == 1 else 0.1)

    config = SamplingConfig(sampler="heun", steps=3)
    with pytest.raises(NotFiniteError, match="first in step 1 of 3"):
        sample(denoise, torch.randn(1, 1, 2, 2), config, EDMPrecond(), torch)


def test_decoding_refuses_them_too():
    with pytest.raises(NotFiniteError):
        to_uint8(torch.tensor([0.0, torch.inf]))


@pytest.mark.parametrize("kind", ["images", "sets"])
def test_training_says_that_there_is_no_picture_and_goes_on(kind, base, tmp_path, monkeypatch):
    """As where the network overflows in fp16: here, for the averaged weights alone."""
    make = loop.family_of

    def spoilt(config):
        found = make(config)

        class Spoilt(type(found)):
            def generator(self, run, network, codec, device):
                generator = super().generator(run, network, codec, device)
                sampling = dataclasses.replace(run.sampling, steps=2)
                broken = dataclasses.replace(generator, sampling=sampling)
                inner = broken.network.forward
                broken.network.forward = lambda *args: inner(*args) * torch.inf
                return broken

        return Spoilt()

    monkeypatch.setattr(loop, "family_of", spoilt)
    options = ["--metrics=fd_pixels", "--cond"] if kind == "images" else []
    tiny = helpers.TINY if kind == "images" else TINY_SETS
    output = train_tiny(tmp_path, helpers.toy_data(base), *options, tiny=tiny)
    assert re.search(r"No pictures at kimg 0\.0\d\. Sampling gave values that", output.output)
    if kind == "images":
        assert "No scores at kimg 0.02." in output.output
    assert list(output.run_dir.glob("training-state-*"))
    assert not list(output.run_dir.glob("fakes-*"))
    assert not list(output.run_dir.glob("metric-*"))
