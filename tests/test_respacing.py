"""Subsets of timesteps by their published names, and the samplers on them."""

import itertools
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import TINY, fail, succeed, toy_data, train_tiny
from test_ddpm import (
    MEAN,
    PRECOND,
    STD,
    Noise,
    assert_moments_of_the_recursion,
    exact_fraction,
    exact_network,
    randn,
)

import generate
import train
from diffusion.config import PrecondConfig, SamplingConfig
from diffusion.denoiser import Denoiser
from diffusion.precond import EDMPrecond, make_precond
from diffusion.respacing import respaced
from diffusion.samplers import num_evaluations, sample, sampling_sigmas
from diffusion.schedules import posterior_variances
from sampling.images import sampling_facts

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def named(respacing, **settings):
    return SamplingConfig(grid="timesteps", respacing=respacing, **settings)


@pytest.mark.parametrize(
    ("name", "num_timesteps", "expected"),
    [
        ("ddim50", 1000, list(range(0, 1000, 20))),
        ("ddim334", 1000, list(range(0, 1000, 3))),
        ("ddim4", 10, [0, 3, 6, 9]),
        ("1", 1000, [0]),
        ("5", 10, [0, 2, 4, 7, 9]),  # 0, 2.25, 4.5, 6.75, 9; halves go to the even number.
        ("4,3,2", 10, [0, 1, 2, 3, 4, 5, 6, 7, 9]),
        ("2,1", 5, [0, 2, 3]),
        ("10,10,5", 1000, [
            *(0, 37, 74, 111, 148, 185, 222, 259, 296, 333),
            *(334, 371, 408, 445, 482, 518, 555, 592, 629, 666),
            *(667, 750, 833, 916, 999),
        ]),
        # Strides of 11, 99 / 14 and 99 / 19. Seven times the second is 49.5, but summed up less.
        ("10,15,20", 300, [
            *(0, 11, 22, 33, 44, 55, 66, 77, 88, 99),
            *(100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199),
            *(200, 205, 210, 216, 221, 226, 231, 236, 242, 247),
            *(252, 257, 263, 268, 273, 278, 283, 289, 294, 299),
        ]),
    ],
)  # fmt: skip
def test_names_mean_the_published_timesteps(name, num_timesteps, expected):
    assert respaced(name, num_timesteps) == expected


def test_a_number_of_steps_alone_takes_the_published_timesteps():
    for num_steps in (2, 10, 21, 25, 50, 100, 250, 1000):
        plain = SamplingConfig(grid="timesteps", steps=num_steps)
        levels = sampling_sigmas(plain, PRECOND)
        assert levels == sampling_sigmas(named(str(num_steps)), PRECOND)
        if num_steps == 21:
            assert levels[10] == PRECOND.level(499)  # Of 499.5, as the published sum rounds it.


def test_the_number_of_steps_is_that_of_the_name():
    assert [named(name).steps for name in ("ddim50", "250", "10,10,5")] == [50, 250, 25]
    assert num_evaluations(named("ddim50", sampler="ddim"), PRECOND) == 50
    assert num_evaluations(named("ddim50", sampler="heun"), PRECOND) == 99


@pytest.mark.parametrize("precond", ["ddpm", "iddpm"])
def test_ddim_visits_the_integer_strides_and_takes_published_steps(precond):
    precond, seen = make_precond(PrecondConfig(precond=precond)), []
    denoiser = Denoiser(exact_network(precond, seen=seen), precond)
    latents = randn(3, 1, 2, 2)
    config = named("ddim50", sampler="ddim")
    found = sample(lambda x, sigma: denoiser(x, sigma), latents, config, precond)
    timesteps = list(range(980, -1, -20))
    assert [int(t[0]) for t in seen] == timesteps

    # In the variables of the paper: x_t of unit variance, the noise that is predicted, and abar.
    alpha_bar = [1 / (1 + precond.level(t) ** 2) for t in timesteps]
    x = math.sqrt(1 - alpha_bar[0]) * latents
    for bar, after in itertools.pairwise([*alpha_bar, 1.0]):
        sigma = math.sqrt((1 - bar) / bar)
        noisy = x / math.sqrt(bar)
        x0 = (MEAN * sigma**2 + STD**2 * noisy) / (sigma**2 + STD**2)
        eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        x = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim50", "10,10,5"])
def test_variances_of_an_ancestral_chain_are_those_of_the_timesteps_kept(name):
    timesteps = respaced(name, 1000)
    levels = sampling_sigmas(named(name), PRECOND)
    assert levels == [*(PRECOND.level(t) for t in reversed(timesteps)), 0.0]
    for before, after in itertools.pairwise(timesteps):
        kept, bar = ALPHA_BAR[before], ALPHA_BAR[after]
        beta = 1 - bar / kept
        lowest, highest = posterior_variances(PRECOND.level(after), PRECOND.level(before))
        assert lowest * kept == pytest.approx(beta * (1 - kept) / (1 - bar), rel=1e-6)
        assert highest * kept == pytest.approx(beta, rel=1e-6)


@pytest.mark.parametrize("name", ["ddim50", "10,10,5"])
@pytest.mark.parametrize("learned", [False, True])
def test_samples_over_named_timesteps_have_the_moments_of_the_exact_recursion(name, learned):
    fraction = exact_fraction if learned else None
    variance = assert_moments_of_the_recursion(named(name, sampler="ddpm"), fraction)
    if learned:  # The true variance leaves the distribution of the data, whatever is left out.
        assert variance == pytest.approx(STD**4 / (STD**2 + PRECOND.sigma_min**2), rel=1e-4)


def test_ddim_with_eta_1_is_ancestral_on_named_timesteps_too():
    denoise = lambda x, sigma: (MEAN * sigma**2 + STD**2 * x) / (sigma**2 + STD**2)  # noqa: E731
    latents, found = randn(4, 1, 2, 2), []
    for config in (named("ddim20", sampler="ddim", eta=1.0), named("ddim20", sampler="ddpm")):
        found.append(sample(denoise, latents, config, PRECOND, Noise()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ddim51", r"no integer stride over 1000 timesteps takes 51 .* ddim48, ddim50, ddim53, "),
        ("10,10,400", r"a section of 333 timesteps has no 400; give 3 numbers of at most 333"),
        ("1001", r"--respacing: got 1001, but this network knows 1000 timesteps"),
    ],
)
def test_timesteps_that_a_network_has_not_get_a_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        sampling_sigmas(named(name), PRECOND)


@pytest.mark.parametrize("name", ["ddim", "dim50", "fifty", "10,,5", "0", "10,0", "-5", "1e2"])
def test_names_of_nothing_get_a_sentence(name):
    with pytest.raises(ValueError, match=r"--respacing: got .*; accepted: ddim and a number of"):
        named(name)


def test_networks_without_timesteps_get_a_sentence():
    with pytest.raises(ValueError, match=r"--sigma-grid: got timesteps, but this network"):
        sampling_sigmas(named("ddim50"), EDMPrecond())


def test_steps_and_other_grids_are_refused_beside_a_name():
    words = ("--preset=imagenet256", "--dry-run", "--timestep-respacing=ddim50")
    assert "only with --respacing=none; this run has ddim50" in fail(train, *words, "--steps=10")
    message = fail(train, *words, "--sigma-grid=karras")
    assert "--respacing has an effect only with --sigma-grid=timesteps" in message


def test_score_rows_name_the_timesteps():
    facts = sampling_facts(named("ddim50", sampler="ddim"))
    assert (facts["respacing"], facts["steps"]) == ("ddim50", 50)
    assert "respacing" not in sampling_facts(SamplingConfig())


def test_pictures_of_a_run_and_images_of_its_snapshot_visit_the_timesteps_named(tmp_path):
    tiny = [word for word in TINY if not word.startswith("--steps")]
    words = ("--precond=ddpm", "--sampler=ddim", "--sigma-grid=timesteps", "--respacing=ddim4")
    visited, call = [], Denoiser.__call__

    def spied(self, x, sigma, context=None):
        if isinstance(sigma, float):  # Of sampling; training has one for every image.
            visited.append(sigma)
        return call(self, x, sigma, context)

    with mock.patch.object(Denoiser, "__call__", spied):
        run_dir = train_tiny(tmp_path / "runs", toy_data(tmp_path), *words, tiny=tiny).run_dir
        expected = [PRECOND.level(t) for t in (750, 500, 250, 0)]
        assert visited[:4] == expected
        snapshot = max(run_dir.glob("network-snapshot-*.pkl"))
        for options, timesteps in (((), (750, 500, 250, 0)), (("--respacing=2,1",), (500, 499, 0))):
            visited.clear()
            outdir = tmp_path / f"out{len(options)}"
            succeed(generate, f"--network={snapshot}", f"--outdir={outdir}", "--num=2", *options)
            assert visited == [PRECOND.level(t) for t in timesteps]
            sampling = json.loads((outdir / "generation.json").read_text())["sampling"]
            assert sampling["respacing"] == ("2,1" if options else "ddim4")
            assert sampling["steps"] == len(timesteps)
