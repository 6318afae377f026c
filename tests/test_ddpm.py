"""DDPM and iDDPM with a learned variance, against the closed forms of Gaussian data."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from diffusion.config import GuidanceConfig, PrecondConfig, SamplingConfig
from diffusion.denoiser import Denoiser
from diffusion.guidance import autoguidance, classifier_free, guidance_scale
from diffusion.losses import denoising_loss, hybrid_loss
from diffusion.precond import EDMPrecond, make_precond
from diffusion.samplers import ddpm, num_evaluations, reads_variance, sample, sampling_sigmas
from diffusion.schedules import linear_sigmas, posterior_variances
from models.context import Context

MEAN, STD = 0.3, 0.5
PRECOND = make_precond(PrecondConfig(precond="ddpm", learned_variance=True))
FIXED = make_precond(PrecondConfig(precond="ddpm"))
ANCESTRAL = SamplingConfig(sampler="ddpm", grid="timesteps", steps=250)


class Noise:
    """Normal numbers from one generator."""

    def __init__(self, seed=1):
        self._generator = torch.Generator().manual_seed(seed)

    def randn_like(self, x):
        return torch.randn(x.shape, dtype=x.dtype, generator=self._generator)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_network(precond, fraction=None, seen=None):
    """Return the network whose denoiser is exact for data N(MEAN, STD^2), with a variance."""

    def network(x, c_noise, context):
        if seen is not None:
            seen.append(c_noise)
        sigma = torch.tensor([precond.level(int(t)) for t in c_noise]).view(-1, 1, 1, 1)
        noisy = x * (sigma**2 + 1).sqrt()
        denoised = (MEAN * sigma**2 + STD**2 * noisy) / (sigma**2 + STD**2)
        eps = (noisy - denoised) / sigma
        return (
            eps if fraction is None else torch.cat([eps, torch.full_like(x, 2 * fraction - 1)], 1)
        )

    return network


# The schedule.


def test_the_linear_schedule_is_ddpm_s():
    alpha_bar, expected = 1.0, []
    for t in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        expected.append(math.sqrt((1 - alpha_bar) / alpha_bar))
    table = linear_sigmas()
    assert table[-1] == 0
    assert table[:-1][::-1] == pytest.approx(expected, rel=1e-9)
    assert (round(FIXED.sigma_min, 3), round(FIXED.sigma_max, 1)) == (0.010, 157.4)


def test_too_few_steps_for_the_schedule_are_refused():
    with pytest.raises(ValueError, match=r"--diffusion-steps: got 20; .* from 25"):
        PrecondConfig(precond="ddpm", diffusion_steps=20)


def test_another_number_of_steps_covers_about_the_same_noise():
    precond = make_precond(PrecondConfig(precond="ddpm", diffusion_steps=100))
    assert precond.num_timesteps == 100
    assert 150 < precond.sigma_max < 230


def test_levels_and_the_ones_below_are_those_of_the_table():
    timesteps = torch.tensor([0, 1, 500, 999])
    sigma = torch.tensor([PRECOND.level(t) for t in timesteps.tolist()])
    assert torch.equal(PRECOND.timestep(sigma), timesteps)
    below = PRECOND.level_below(sigma)
    expected = [0.0, PRECOND.level(0), PRECOND.level(499), PRECOND.level(998)]
    assert below.tolist() == pytest.approx(expected)


def test_variances_are_beta_tilde_and_beta():
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    for t in (1, 10, 400, 999):
        before = alpha_bar[t - 1]
        lowest, highest = posterior_variances(PRECOND.level(t), PRECOND.level(t - 1))
        tilde = betas[t] * (1 - before) / (1 - alpha_bar[t])
        assert lowest * before == pytest.approx(tilde, rel=1e-6)
        assert highest * before == pytest.approx(betas[t], rel=1e-6)


# The denoiser.


def test_the_denoiser_is_exact_and_tells_the_fraction_only_if_asked():
    sigma = torch.tensor([PRECOND.level(3), PRECOND.level(700)])
    x = randn(2, 3, 2, 2, dtype=torch.float32) * sigma.view(-1, 1, 1, 1)
    network = exact_network(PRECOND, fraction=0.2)
    variance = sigma.view(-1, 1, 1, 1) ** 2
    expected = (MEAN * variance + STD**2 * x) / (variance + STD**2)
    denoised = Denoiser(network, PRECOND)(x, sigma)
    torch.testing.assert_close(denoised, expected, rtol=1e-3, atol=1e-4)
    both = Denoiser(network, PRECOND, with_variance=True)(x, sigma)
    assert both.shape == (2, 6, 2, 2)
    assert torch.equal(both[:, :3], denoised)
    assert both[:, 3:].numpy() == pytest.approx(0.2)


def test_a_variance_that_was_not_learned_cannot_be_asked_for():
    with pytest.raises(AssertionError):
        Denoiser(exact_network(FIXED), FIXED, with_variance=True)
    with pytest.raises(AssertionError, match="network returned"):
        Denoiser(exact_network(FIXED), PRECOND)(torch.ones(1, 1, 2, 2), PRECOND.level(5))
    assert reads_variance(ANCESTRAL, PRECOND)
    assert not reads_variance(ANCESTRAL, FIXED)
    assert not reads_variance(SamplingConfig(sampler="heun"), PRECOND)


# Respacing.


@pytest.mark.parametrize("num_steps", [1, 2, 10, 250, 1000])
def test_the_network_is_given_the_original_timesteps(num_steps):
    seen = []
    denoiser = Denoiser(exact_network(PRECOND, 0.5, seen), PRECOND, with_variance=True)
    config = SamplingConfig(sampler="ddpm", grid="timesteps", steps=num_steps)
    sample(lambda x, sigma: denoiser(x, sigma), randn(1, 1, 1, 1), config, PRECOND, Noise())
    timesteps = [int(t) for t in torch.cat(seen)]
    expected = [999]
    if num_steps > 1:
        expected = [round(i * 999 / (num_steps - 1)) for i in range(num_steps)]
    assert timesteps == expected[::-1]
    assert num_evaluations(config, PRECOND) == num_steps


def test_timesteps_that_do_not_exist_get_a_sentence():
    with pytest.raises(ValueError, match=r"--steps: got 1001, but this network knows 1000"):
        sampling_sigmas(SamplingConfig(grid="timesteps", steps=1001), PRECOND)
    with pytest.raises(ValueError, match=r"--sigma-grid: got timesteps, but this network"):
        sampling_sigmas(SamplingConfig(grid="timesteps", steps=10), EDMPrecond())


# Ancestral sampling.


def recursion(sigmas, fraction):
    """Return the exact mean and variance of ancestral samples of Gaussian data.

    ``fraction`` maps two levels to the learned fraction; None is the smaller variance.
    """
    mean, variance = 0.0, sigmas[0] ** 2
    for sigma, below in itertools.pairwise(sigmas):
        gain, kept = STD**2 / (sigma**2 + STD**2), (below / sigma) ** 2
        offset = MEAN * sigma**2 / (sigma**2 + STD**2)
        mean = (1 - kept) * (offset + gain * mean) + kept * mean
        variance *= ((1 - kept) * gain + kept) ** 2
        if below > 0:
            lowest, highest = posterior_variances(sigma, below)
            chosen = 0.0 if fraction is None else fraction(sigma, below)
            variance += lowest ** (1 - chosen) * highest**chosen
    return mean, variance


def exact_fraction(sigma, below):
    """Where the true variance of x_below given x lies between the bounds."""
    lowest, highest = posterior_variances(sigma, below)
    of_x0 = STD**2 * sigma**2 / (sigma**2 + STD**2)
    true = lowest + (1 - (below / sigma) ** 2) ** 2 * of_x0
    return math.log(true / lowest) / math.log(highest / lowest)


FRACTIONS = {
    "lowest": lambda sigma, below: 0.0,
    "highest": lambda sigma, below: 1.0,
    "exact": exact_fraction,
    "not learned": None,
}


def assert_moments_of_the_recursion(config, fraction):
    """Sample Gaussian data by their exact denoiser, and compare; return the recursion's variance.

    ``fraction`` gives the learned variance of a step; None without one.
    """
    sigmas = sampling_sigmas(config, PRECOND)
    below = dict(itertools.pairwise(sigmas))

    def denoise(x, sigma):
        denoised = (MEAN * sigma**2 + STD**2 * x) / (sigma**2 + STD**2)
        if fraction is None:
            return denoised
        told = fraction(sigma, below[sigma]) if below[sigma] > 0 else 0.5
        return torch.cat([denoised, torch.full_like(x, told)], dim=1)

    x = sample(denoise, randn(4000, 1, 2, 2), config, PRECOND, Noise())
    mean, variance = recursion(sigmas, fraction)
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / x.numel()))
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / x.numel()))
    return variance


@pytest.mark.parametrize("num_steps", [10, 250, 1000])
@pytest.mark.parametrize("kind", FRACTIONS)
def test_ancestral_samples_have_the_moments_of_the_exact_recursion(kind, num_steps):
    config = SamplingConfig(sampler="ddpm", grid="timesteps", steps=num_steps)
    assert_moments_of_the_recursion(config, FRACTIONS[kind])


@pytest.mark.parametrize("num_steps", [3, 250, 1000])
def test_with_the_true_variance_ancestral_sampling_is_exact_for_any_number_of_steps(num_steps):
    sigmas = sampling_sigmas(
        SamplingConfig(sampler="ddpm", grid="timesteps", steps=num_steps), PRECOND
    )
    mean, variance = recursion(sigmas, exact_fraction)
    # The last step returns the estimate, whose variance is a little less than the data's.
    expected = STD**4 / (STD**2 + PRECOND.sigma_min**2)
    assert mean == pytest.approx(MEAN, rel=1e-4)
    assert variance == pytest.approx(expected, rel=1e-4)
    assert recursion(sigmas, None)[1] < variance < recursion(sigmas, FRACTIONS["highest"])[1]


def test_the_last_step_adds_no_noise():
    class Refused:
        def randn_like(self, x):
            raise AssertionError

    told = lambda x, sigma: torch.cat([x * 0 + 7, x * 0 + 0.5], dim=1)  # noqa: E731
    assert (ddpm(told, randn(2, 1, 2, 2), [3.0, 0.0], Refused()) == 7).all()


@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"),
    [("heun", 200, 2e-3), ("dpmpp_2m", 200, 1e-2), ("ddim", 1000, 0.02)],
)
def test_other_samplers_reach_the_exact_solution_on_the_same_network(sampler, steps, tolerance):
    config = SamplingConfig(sampler=sampler, grid="timesteps", steps=steps)
    denoiser = Denoiser(exact_network(PRECOND, fraction=0.7), PRECOND)
    latents = randn(16, 1, 2, 2)
    x = sample(lambda x, sigma: denoiser(x, sigma), latents, config, PRECOND)
    highest = PRECOND.sigma_max
    exact = MEAN + STD / math.sqrt(STD**2 + highest**2) * (latents * highest - MEAN)
    assert (x - exact).abs().max() < tolerance


@pytest.mark.parametrize("num_steps", [10, 250])
def test_ancestral_samples_of_iddpm_with_the_true_variance_are_exact(num_steps):
    precond = learned("iddpm")
    config = SamplingConfig(sampler="ddpm", grid="timesteps", steps=num_steps)
    assert reads_variance(config, precond)
    below = dict(itertools.pairwise(sampling_sigmas(config, precond)))

    def network(x, c_noise, context):
        # Below the highest levels float32 holds less than what the estimate adds to the noise.
        sigma = precond.level(int(c_noise[0]))
        noisy = x.double() * math.sqrt(sigma**2 + 1)
        eps = (noisy - MEAN) * sigma / (sigma**2 + STD**2)
        told = exact_fraction(sigma, below[sigma]) if below[sigma] > 0 else 0.5
        return torch.cat([eps, torch.full_like(eps, 2 * told - 1)], dim=1)

    denoiser = Denoiser(network, precond, with_variance=True)
    x = sample(denoiser, randn(4000, 1, 2, 2), config, precond, Noise())
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * STD / math.sqrt(x.numel()))
    assert x.std().item() == pytest.approx(STD, rel=5 / math.sqrt(2 * x.numel()))


# The loss.


def cosine_alpha_bar():
    """iDDPM's schedule (arXiv 2102.09672, Eq. 17), whose betas are clipped at 0.999."""
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    return np.cumprod([1 - min(1 - f[t + 1] / f[t], 0.999) for t in range(1000)])


ALPHA_BAR = dict(ddpm=np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), iddpm=cosine_alpha_bar())
BOTH = pytest.mark.parametrize("name", ALPHA_BAR)


def learned(name, **settings):
    return make_precond(PrecondConfig(precond=name, learned_variance=True, **settings))


def loss_of(name, timestep, images, noise, eps, v):
    """Return the hybrid loss for a network that returns ``eps`` and ``v``."""
    precond = learned(name)
    sigma = torch.full([len(images)], precond.level(timestep))
    denoiser = Denoiser(
        lambda x, c_noise, context: torch.cat([eps, v], dim=1), precond, with_variance=True
    )
    return hybrid_loss(denoiser, images, sigma, noise, None, precond)


def draws(num=6, seed=0):
    images, noise, eps, v = randn(4, num, 2, 3, 3, seed=seed, dtype=torch.float32)
    return images.clamp(-0.9, 0.9), noise, eps, v.clamp(-1, 1)


@BOTH
@pytest.mark.parametrize("timestep", [1, 2, 50, 500, 999])
def test_the_bound_is_the_divergence_of_two_normal_distributions(name, timestep):
    images, noise, eps, v = draws()
    before, bar = ALPHA_BAR[name][[timestep - 1, timestep]]
    beta = 1 - bar / before
    x_t = math.sqrt(bar) * images.double() + math.sqrt(1 - bar) * noise.double()
    estimate = (x_t - math.sqrt(1 - bar) * eps.double()) / math.sqrt(bar)

    def posterior_mean(x0):
        of_x0, of_x_t = math.sqrt(before) * beta, math.sqrt(1 - beta) * (1 - before)
        return (of_x0 * x0 + of_x_t * x_t) / (1 - bar)

    tilde = beta * (1 - before) / (1 - bar)
    fraction = (v.double() + 1) / 2
    variance = torch.exp(fraction * math.log(beta) + (1 - fraction) * math.log(tilde))
    divergence = kl_divergence(
        Normal(posterior_mean(images.double()), math.sqrt(tilde)),
        Normal(posterior_mean(estimate), variance.sqrt()),
    )
    expected = (eps - noise).square() + divergence / math.log(2)
    found = loss_of(name, timestep, images, noise, eps, v).double()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@BOTH
def test_at_the_lowest_level_the_bound_is_the_likelihood_of_8_bit_values(name):
    images, noise, eps, v = draws()
    images = (images * 127.5).round() / 127.5
    images[0, 0, 0, 0], images[0, 0, 0, 1] = -1.0, 1.0
    sigma, alpha_bar = learned(name).level(0), ALPHA_BAR[name]
    estimate = images + sigma * (noise - eps)
    first, beta = 1 - alpha_bar[0], 1 - alpha_bar[1] / alpha_bar[0]
    tilde = beta * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    fraction = ((v + 1) / 2).double()
    std = torch.exp(0.5 * (fraction * math.log(first) + (1 - fraction) * math.log(tilde)))
    distribution = stats.norm(estimate.double().numpy(), std.numpy())
    values = images.double().numpy()
    upper, lower = distribution.cdf(values + 1 / 255), distribution.cdf(values - 1 / 255)
    upper[values > 0.999], lower[values < -0.999] = 1, 0
    bits = -np.log2(np.maximum(upper - lower, 1e-12))
    expected = (eps - noise).square().double().numpy() + bits
    found = loss_of(name, 0, images, noise, eps, v).double().numpy()
    assert found == pytest.approx(expected, rel=5e-3, abs=5e-3)


@BOTH
@pytest.mark.parametrize("timestep", [0, 1, 300])
def test_the_bound_trains_the_variance_and_never_the_mean(name, timestep):
    images, noise, eps, v = draws()
    eps.requires_grad_(), v.requires_grad_()
    loss_of(name, timestep, images, noise, eps, v).sum().backward()
    torch.testing.assert_close(eps.grad, 2 * (eps - noise).detach(), rtol=1e-3, atol=1e-3)
    assert (v.grad != 0).all()


@pytest.mark.parametrize(("name", "num_steps"), [("ddpm", 50), ("ddpm", 1000), ("iddpm", 1000)])
def test_the_bound_of_exact_estimates_is_the_closed_form_of_gaussian_data(name, num_steps):
    precond = learned(name, diffusion_steps=num_steps)
    images = MEAN + STD * randn(5000, 1, 4, 4, dtype=torch.float32)
    found, expected = 0.0, 0.0
    for timestep in range(1, num_steps, max(num_steps // 20, 1)):
        sigma, below = precond.level(timestep), precond.level(timestep - 1)
        fraction = exact_fraction(sigma, below)
        network = exact_network(precond, fraction)
        denoiser = Denoiser(network, precond, with_variance=True)
        noise = randn(*images.shape, seed=timestep, dtype=torch.float32)
        sigmas = torch.full([len(images)], sigma)
        loss = hybrid_loss(denoiser, images, sigmas, noise, None, precond)
        plain = Denoiser(network, precond)
        error = denoising_loss(plain, images, sigmas, noise, None, precond.weight)
        bound = (loss - error).mean().item() * 1000 / num_steps
        # With the true variance the expected divergence is half the logarithm of its excess.
        lowest, highest = posterior_variances(sigma, below)
        excess = 0.5 * fraction * math.log2(highest / lowest)
        assert bound == pytest.approx(excess, rel=0.06, abs=2e-4)
        found, expected = found + bound, expected + excess
    assert found == pytest.approx(expected, rel=0.01)


# Guidance.


def two_estimates(x, sigma, context):
    """A denoiser with variance whose conditional and null estimates are known."""
    given = context.vector.view(-1, 1, 1, 1)
    return torch.cat([x + given, x * 0 + 10 * given], dim=1)


def guided(x, **settings):
    config = GuidanceConfig(cfg_scale=3.0, **settings)
    contexts = [Context(vector=torch.full([len(x), 1], value)) for value in (2.0, 1.0)]
    return classifier_free(two_estimates, *contexts, config, PRECOND)(x, 1.0)


def test_guidance_leaves_the_variance_and_unguided_channels_conditional():
    x = randn(2, 4, 3, 3, dtype=torch.float32)
    everywhere = guided(x)
    torch.testing.assert_close(everywhere[:, :4], x + 1 + 3 * (2 - 1))
    assert (everywhere[:, 4:] == 20).all()
    first_three = guided(x, cfg_channels=3)
    torch.testing.assert_close(first_three[:, :3], everywhere[:, :3])
    torch.testing.assert_close(first_three[:, 3:4], x[:, 3:] + 2)
    assert (first_three[:, 4:] == 20).all()


def test_autoguidance_guides_the_same_channels():
    config = GuidanceConfig(cfg_scale=3.0, cfg_channels=1)
    x = torch.zeros(1, 2, 1, 1)
    found = autoguidance(lambda x, s: x + 2, lambda x, s: x + 1, config)(x, 1.0)
    assert found.flatten().tolist() == [4, 2]


def test_the_power_cosine_follows_the_original_timesteps():
    config = GuidanceConfig(cfg_scale=4.4, cfg_schedule="power-cosine", cfg_power=4.0)
    scale = {t: guidance_scale(config, PRECOND.level(t), PRECOND) for t in (0, 200, 999)}
    assert scale[999] == pytest.approx(1, abs=1e-9)
    assert scale[0] == 4.4
    assert (scale[200] - 1) / 3.4 == pytest.approx(0.36, abs=0.005)
    assert (scale[200] - 1) / 3.4 == pytest.approx((1 - math.cos(math.pi * 0.8**4)) / 2)
