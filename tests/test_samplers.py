"""Noise grids and samplers, against the exact denoiser of Gaussian data."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from diffusion.config import SamplingConfig
from diffusion.precond import EDMPrecond, TablePrecond, VEPrecond, VPPrecond
from diffusion.samplers import (
    SAMPLERS,
    Churn,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    heun,
    num_evaluations,
    sample,
    sampling_sigmas,
)
from diffusion.schedules import GRIDS, cosine_sigmas, sigma_grid
from dnnlib.config import from_dict, to_dict
from torch_utils.rng import SeededNoise

MEAN, STD = 0.3, 0.5
DETERMINISTIC = (heun, euler, ddim, dpmpp_2m)


IDDPM = TablePrecond(cosine_sigmas())


class CountingNoise:
    """Normal numbers from one generator, with the number of draws."""

    def __init__(self, seed=1):
        self.generator, self.num_draws = torch.Generator().manual_seed(seed), 0

    def randn_like(self, x):
        self.num_draws += 1
        return torch.randn(x.shape, dtype=x.dtype, generator=self.generator)


class Oracle:
    """The exact denoiser of pixels that are independent N(MEAN, STD^2), counting its calls."""

    def __init__(self):
        self.sigmas = []

    def __call__(self, x, sigma):
        self.sigmas.append(sigma)
        return (MEAN * sigma**2 + STD**2 * x) / (sigma**2 + STD**2)


def exact_solution(x, sigma):
    """Return where the probability-flow ODE takes x from noise level sigma to 0."""
    return MEAN + STD / math.sqrt(STD**2 + sigma**2) * (x - MEAN)


def latents(num=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 1, 2, 2, generator=generator, dtype=torch.float64)


# Grids.


def test_karras_grid_with_18_steps_is_the_published_one():
    published = [80, 57.586, 40.786, 28.375, 19.352, 12.910, 8.401, 5.315, 3.257, 1.923, 1.088]
    published += [0.5853, 0.2964, 0.1395, 0.0599, 0.0229, 0.00753, 0.002, 0]
    assert sigma_grid("karras", 18, 0.002, 80) == pytest.approx(published, rel=3e-3)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
def test_grids_descend_from_the_highest_level_to_zero(name, num_steps):
    sigmas = sigma_grid(name, num_steps, 0.01, 50)
    assert len(sigmas) == num_steps + 1
    assert all(type(sigma) is float for sigma in sigmas)
    assert (np.diff(sigmas) < 0).all()
    assert sigmas[-1] == 0
    if name == "iddpm":
        table = cosine_sigmas()
        assert sigmas[0] == table[table <= 50][0]
        assert num_steps == 1 or sigmas[-2] == table[table >= 0.01][-1]
    else:
        assert sigmas[0] == pytest.approx(50)
        assert num_steps == 1 or sigmas[-2] == pytest.approx(0.01)


def test_ve_grid_is_geometric_and_linear_grid_even():
    ratios = np.divide(sigma_grid("ve", 9, 0.02, 100)[1:-1], sigma_grid("ve", 9, 0.02, 100)[:-2])
    assert ratios == pytest.approx([5000 ** (-1 / 8)] * 8)
    assert np.diff(sigma_grid("linear", 5, 1, 9)) == pytest.approx([-2, -2, -2, -2, -1])


def test_vp_grid_over_the_range_of_the_vp_process_is_even_in_its_time():
    precond = VPPrecond()
    expected = precond.sigma(torch.linspace(1, 1e-3, 12, dtype=torch.float64))
    grid = sigma_grid("vp", 12, expected[-1].item(), expected[0].item())
    assert grid[:-1] == pytest.approx(expected.tolist())


def test_iddpm_grid_takes_the_published_entries_of_the_table():
    table, num_steps = cosine_sigmas(), 10
    rows = [math.floor(8 + (999 - 8) / (num_steps - 1) * i + 0.5) for i in range(num_steps)]
    assert sigma_grid("iddpm", num_steps, 0.002, 81) == [*table[rows], 0]


def test_bad_grids_say_what_is_accepted():
    with pytest.raises(
        ValueError, match=r"--sigma-grid: got 'cosine'.*karras, linear, vp, ve, iddpm"
    ):
        SamplingConfig(grid="cosine")
    with pytest.raises(ValueError, match="--steps: got 0"):
        SamplingConfig(steps=0)
    with pytest.raises(
        ValueError, match=r"--sigma-grid=iddpm has no noise level from 1e-05 to 0\.0001"
    ):
        sigma_grid("iddpm", 5, 1e-5, 1e-4)
    with pytest.raises(ValueError, match="--sigma-min: got 3; accepted: a number below"):
        SamplingConfig(sigma_min=3, sigma_max=2)


# Deterministic samplers: every point has an exact destination.


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("grid", ["karras", "ve", "vp", "iddpm"])
def test_deterministic_samplers_reach_the_exact_solution(sampler, grid):
    sigmas = sigma_grid(grid, 400, 0.007, 80)
    x = latents() * sigmas[0]
    error = (sampler(Oracle(), x, sigmas) - exact_solution(x, sigmas[0])).abs().max()
    assert error < (0.03 if sampler in (euler, ddim) else 3e-3)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_samplers_converge_with_their_order(sampler, order):
    errors = []
    for num_steps in (100, 200):
        sigmas = sigma_grid("karras", num_steps, 1e-4, 80)
        x = latents() * sigmas[0]
        errors.append((sampler(Oracle(), x, sigmas) - exact_solution(x, sigmas[0])).abs().max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_ddim_without_stochasticity_equals_euler():
    sigmas = sigma_grid("karras", 9, 0.002, 80)
    x = latents() * sigmas[0]
    assert torch.allclose(ddim(Oracle(), x, sigmas, eta=0), euler(Oracle(), x, sigmas), rtol=1e-12)


def test_a_step_to_zero_is_the_denoised_image():
    x = latents() * 5
    for sampler in SAMPLERS.values():
        x0 = sampler.run(Oracle(), x, [5.0, 0.0], CountingNoise())
        assert torch.allclose(x0, Oracle()(x, 5.0))


def test_second_order_samplers_match_hand_computed_steps():
    x, oracle = latents(), Oracle()
    d2 = oracle(x, 2.0)
    slope = (x - d2) / 2
    half = x - slope
    average = (slope + (half - oracle(half, 1.0)) / 1) / 2
    assert torch.allclose(heun(oracle, x, [2.0, 1.0, 0.0]), oracle(x - average, 1.0))
    # DPM-Solver++(2M): x_1 by first order, then x_2 from D extrapolated in log sigma.
    x1 = x / 2 + d2 / 2
    d1 = oracle(x1, 1.0)
    r = math.log(2) / math.log(4)  # last step over this one
    target = (1 + 1 / (2 * r)) * d1 - 1 / (2 * r) * d2
    x2 = 0.25 * x1 + 0.75 * target
    assert torch.allclose(dpmpp_2m(oracle, x, [2.0, 1.0, 0.25, 0.0]), oracle(x2, 0.25))


# Stochastic samplers: the spread of the samples has an exact value.


def ancestral_std(sigmas, eta):
    """Return the standard deviation of samples of the exact denoiser, step by step."""
    variance = sigmas[0] ** 2  # about the mean, up to MEAN / sigma_max
    for sigma, sigma_next in itertools.pairwise(sigmas):
        added = eta**2 * sigma_next**2 * (1 - sigma_next**2 / sigma**2)
        kept = math.sqrt(sigma_next**2 - added) / sigma
        shrink = STD**2 / (STD**2 + sigma**2)
        variance = (shrink + kept * (1 - shrink)) ** 2 * variance + added
    return math.sqrt(variance)


@pytest.mark.parametrize("num_steps", [3, 20, 200])
def test_ddpm_samples_have_the_exact_mean_and_spread(num_steps):
    sigmas = sigma_grid("karras", num_steps, 0.002, 80)
    x = latents(5000) * sigmas[0]
    samples = ddpm(Oracle(), x, sigmas, CountingNoise())
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(ancestral_std(sigmas, 1.0), rel=0.02)
    if num_steps == 200:
        assert samples.std().item() == pytest.approx(STD, rel=0.03)


def test_ddim_with_full_stochasticity_equals_ddpm():
    sigmas = sigma_grid("karras", 9, 0.002, 80)
    x = latents() * sigmas[0]
    full = ddim(Oracle(), x, sigmas, CountingNoise(), eta=1.0)
    assert torch.allclose(full, ddpm(Oracle(), x, sigmas, CountingNoise()))


def test_ddim_with_half_stochasticity_has_the_exact_spread():
    sigmas = sigma_grid("karras", 5, 0.002, 80)
    samples = ddim(Oracle(), latents(5000) * sigmas[0], sigmas, CountingNoise(), eta=0.5)
    spread = ancestral_std(sigmas, 0.5)
    assert abs(spread - ancestral_std(sigmas, 1.0)) > 0.03 * spread
    assert samples.std().item() == pytest.approx(spread, rel=0.015)


def test_churn_keeps_the_distribution_and_changes_the_images():
    sigmas = sigma_grid("karras", 100, 0.002, 80)
    x = latents(5000) * sigmas[0]
    samples = heun(Oracle(), x, sigmas, CountingNoise(), churn=Churn(amount=30))
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, rel=0.03)
    correlation = torch.corrcoef(torch.stack([samples.flatten(), x.flatten()]))[0, 1]
    assert abs(correlation) < 0.5  # without churn it is 1


def test_churn_follows_the_published_algorithm():
    sigmas, oracle = [8.0, 4.0, 2.0, 1.0, 0.0], Oracle()
    noise = CountingNoise()
    heun(oracle, latents() * 8, sigmas, noise, churn=Churn(amount=0.4, low=1.5, high=5.0))
    assert oracle.sigmas == pytest.approx([8, 4, 4.4, 2, 2.2, 1, 1])  # gamma = 0.4 / 4
    assert noise.num_draws == 2
    oracle = Oracle()
    heun(oracle, latents() * 8, sigmas, CountingNoise(), churn=Churn(amount=100))
    assert oracle.sigmas[0] == pytest.approx(8 * math.sqrt(2))  # gamma is limited to sqrt(2) - 1
    oracle = Oracle()
    churn = Churn(amount=100, round_sigma=math.ceil)
    heun(oracle, latents() * 8, sigmas, CountingNoise(), churn=churn)
    assert oracle.sigmas[0] == 12

    # The added variance is S_noise^2 (sigma_hat^2 - sigma^2).
    seen = []

    def record(x, sigma):
        seen.append(x)
        return x

    churn = Churn(amount=0.25, noise_std=3)
    heun(record, torch.zeros(40_000, 1, 1, 1), [2.0, 0.0], CountingNoise(), churn=churn)
    assert seen[0].std().item() == pytest.approx(3 * math.sqrt(2.5**2 - 2**2), rel=0.02)


# The whole: clamped ranges, rounding, counts, seeds.


CONFIGS = [
    *(SamplingConfig(sampler=name, steps=6) for name in SAMPLERS),
    *(SamplingConfig(grid=name, steps=6) for name in GRIDS),
    SamplingConfig(s_churn=10, s_min=0.1, s_max=40, s_noise=1.01, steps=6),
    SamplingConfig(sampler="ddim", eta=0.7, steps=1),
    SamplingConfig(steps=1),
    SamplingConfig(steps=6, sigma_min=1e-5, sigma_max=1e5),
]


@pytest.mark.parametrize("precond", [EDMPrecond(), VPPrecond(), VEPrecond(), IDDPM])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_choice_samples_inside_the_range_of_the_network(config, precond):
    oracle, num_steps = Oracle(), []
    samples = sample(
        oracle, latents(4).float(), config, precond, CountingNoise(), lambda: num_steps.append(1)
    )
    assert samples.dtype == torch.float64
    assert samples.isfinite().all()
    assert len(oracle.sigmas) == num_evaluations(config, precond)
    assert len(num_steps) == len(sampling_sigmas(config, precond)) - 1
    if config.s_churn == 0:
        assert max(oracle.sigmas) <= precond.sigma_max * (1 + 1e-12)
    assert min(oracle.sigmas) >= precond.sigma_min * (1 - 1e-12)
    for sigma in oracle.sigmas:
        assert precond.round_sigma(sigma) == sigma


def test_options_reach_their_sampler():
    precond, sigmas = EDMPrecond(), sigma_grid("karras", 6, 0.002, 80)
    churned = dict(s_churn=3.0, s_min=0.1, s_max=50.0, s_noise=1.1)
    churn = dict(churn=Churn(amount=3.0, low=0.1, high=50.0, noise_std=1.1))
    eta = dict(eta=0.6)
    for sampler, settings, options in ((heun, churned, churn), (ddim, eta, eta)):
        config = SamplingConfig(sampler=sampler.__name__, steps=6, **settings)
        got = sample(Oracle(), latents(), config, precond, CountingNoise())
        expected = sampler(Oracle(), latents() * sigmas[0], sigmas, CountingNoise(), **options)
        assert torch.equal(got, expected)
    rho = SamplingConfig(rho=3.0, steps=6)
    assert sampling_sigmas(rho, precond) == sigma_grid("karras", 6, 0.002, 80, rho=3.0)


def test_evaluations_are_counted_as_published():
    assert num_evaluations(SamplingConfig()) == 35
    assert num_evaluations(SamplingConfig(steps=40)) == 79
    assert num_evaluations(SamplingConfig(sampler="dpmpp_2m", steps=40)) == 40


def test_levels_that_rounding_makes_equal_are_visited_once():
    config = SamplingConfig(sampler="dpmpp_2m", steps=700)
    sigmas = sampling_sigmas(config, IDDPM)
    assert (np.diff(sigmas) < 0).all()
    assert len(sigmas) < 600
    oracle = Oracle()
    samples = sample(oracle, latents(), config, IDDPM)
    assert samples.isfinite().all()
    assert len(oracle.sigmas) == num_evaluations(config, IDDPM) == len(sigmas) - 1


def test_with_churn_equal_levels_are_all_visited_as_published():
    """EDM's settings for ADM's network of ImageNet-64: 256 steps, 203 of them with noise."""
    config = SamplingConfig(steps=256, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003)
    oracle, noise = Oracle(), CountingNoise()
    sigmas = sampling_sigmas(config, IDDPM)
    sample(oracle, latents(), config, IDDPM, noise)
    assert len(sigmas) == 257
    assert len(set(sigmas)) < 257
    assert len(oracle.sigmas) == num_evaluations(config, IDDPM) == 511
    assert noise.num_draws == 203
    first = next(i for i, sigma in enumerate(sigmas) if sigma <= 50)
    assert oracle.sigmas[2 * first] == IDDPM.round_sigma(sigmas[first] * (1 + 40 / 256))


def test_a_range_outside_the_networks_is_refused():
    with pytest.raises(ValueError, match=r"--sigma-max 0.01 miss .* 0.02 to 100"):
        sample(Oracle(), latents(), SamplingConfig(sigma_max=0.01), VEPrecond())


def test_state_is_float64_with_a_float32_denoiser():
    config = SamplingConfig(steps=12)
    exact = sample(Oracle(), latents(), config, EDMPrecond())

    def single(x, sigma):
        assert x.dtype == torch.float64
        return Oracle()(x.float(), sigma)

    for name in SAMPLERS:
        result = sample(
            single,
            latents(),
            dataclasses.replace(config, sampler=name),
            EDMPrecond(),
            CountingNoise(),
        )
        assert result.dtype == torch.float64
    assert torch.allclose(sample(single, latents(), config, EDMPrecond()), exact, atol=1e-5)


@pytest.mark.parametrize(
    "config", [SamplingConfig(steps=4, s_churn=8), SamplingConfig(steps=4, sampler="ddpm")]
)
def test_an_image_depends_on_its_own_seed_alone(config):
    def images(seeds):
        noise = SeededNoise(seeds)
        return sample(Oracle(), noise.randn([1, 2, 2]), config, EDMPrecond(), noise)

    together = images([5, 6, 7])
    assert torch.equal(images([6])[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_sampling_options_survive_a_round_trip():
    config = SamplingConfig(s_churn=3.0, s_max=None, grid="ve")
    assert from_dict(SamplingConfig, to_dict(config)) == config
    assert sample(Oracle(), latents(2), config, EDMPrecond(), CountingNoise()).isfinite().all()
