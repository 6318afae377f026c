"""Preconditioners, their training distributions and the denoising loss."""

import math

import numpy as np
import pytest
import torch

from diffusion.config import PrecondConfig
from diffusion.denoiser import Denoiser
from diffusion.losses import denoising_loss
from diffusion.precond import EDMPrecond, TablePrecond, VEPrecond, VPPrecond, make_precond
from diffusion.schedules import cosine_sigmas
from dnnlib.config import from_dict, to_dict

NAMES = ("edm", "vp", "ve", "iddpm")


def make(name):
    return make_precond(PrecondConfig(precond=name))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def optimal_network(precond, sigma, mean, std):
    """Return the raw network whose denoiser is exact for data N(mean, std^2) at one sigma."""

    def network(x, c_noise, context):
        c_skip, c_out, c_in, _ = precond.scalings(torch.tensor(sigma))
        noisy = x / c_in
        exact = (mean * sigma**2 + noisy * std**2) / (sigma**2 + std**2)
        return (exact - c_skip * noisy) / c_out

    return network


def test_edm_gives_network_input_and_target_unit_variance():
    precond = EDMPrecond(sigma_data=0.5)
    images = 0.5 * torch.randn(200_000, generator=generator(1))
    for sigma in (0.01, 0.3, 5.0, 60.0):
        noisy = images + sigma * torch.randn(200_000, generator=generator(2))
        c_skip, c_out, c_in, _ = precond.scalings(torch.tensor(sigma))
        assert (c_in * noisy).var().item() == pytest.approx(1, rel=0.02)
        assert ((images - c_skip * noisy) / c_out).var().item() == pytest.approx(1, rel=0.02)
        assert (precond.weight(torch.tensor(sigma)) * c_out**2).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "expected"),
    # c_skip, c_out, c_in at sigma = 2, from EDM's Table 1 with sigma_data = 0.5.
    [
        ("edm", (0.25 / 4.25, 1 / math.sqrt(4.25), 1 / math.sqrt(4.25), math.log(2) / 4)),
        (
            "vp",
            (1, -2, 1 / math.sqrt(5), 999 * (math.sqrt(0.01 + 39.8 * math.log(5)) - 0.1) / 19.9),
        ),
        ("ve", (1, 2, 1, 0)),
        ("iddpm", (1, -2, 1 / math.sqrt(5), 705)),
    ],
)
def test_scalings_are_those_of_the_published_table(name, expected):
    if name == "iddpm":
        expected = (*expected[:3], 999 - np.abs(cosine_sigmas() - 2).argmin())
    got = make(name).scalings(torch.tensor(2.0))
    assert [value.item() for value in got] == pytest.approx(expected, rel=1e-5)
    weight = (4 + 0.25) / (2 * 0.5) ** 2 if name == "edm" else 1 / 4
    assert make(name).weight(torch.tensor(2.0)).item() == pytest.approx(weight)


@pytest.mark.parametrize("name", NAMES)
def test_denoiser_scales_around_the_network(name):
    precond, seen = make(name), {}
    x = torch.randn(3, 2, 4, 4, generator=generator())
    sigma = torch.tensor([0.1, 1.0, 30.0])

    def network(x, c_noise, context):
        seen.update(x=x, c_noise=c_noise, context=context)
        return x.sin()

    denoised = Denoiser(network, precond)(x, sigma, "context")
    for row in range(3):
        c_skip, c_out, c_in, c_noise = precond.scalings(sigma[row])
        assert torch.allclose(seen["x"][row], c_in * x[row])
        assert seen["c_noise"][row] == c_noise
        expected = c_skip * x[row] + c_out * (c_in * x[row]).sin()
        assert torch.allclose(denoised[row], expected, rtol=1e-5, atol=1e-5)
    assert seen["c_noise"].shape == (3,)
    assert seen["context"] == "context"


def test_denoiser_takes_one_sigma_as_number_or_tensor():
    denoise = Denoiser(lambda x, c_noise, context: x * c_noise.view(-1, 1, 1, 1), VPPrecond())
    x = torch.randn(2, 1, 3, 3, generator=generator())
    expected = denoise(x, 0.7)
    for sigma in (torch.tensor(0.7), torch.full([2], 0.7), torch.full([2, 1, 1, 1], 0.7)):
        assert torch.equal(denoise(x, sigma), expected)
    assert denoise(x.double(), 0.7).dtype == torch.float32


def test_network_runs_in_autocast_and_scalings_stay_in_float32():
    seen = {}
    conv = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.ones_(conv.weight)

    def network(x, c_noise, context):
        seen["input"], seen["output"] = x.dtype, (result := conv(x)).dtype
        return result

    x = torch.randn(2, 1, 4, 4, generator=generator())
    denoised = Denoiser(network, EDMPrecond(), torch.bfloat16)(x, 1e-4)
    assert seen == dict(input=torch.float32, output=torch.bfloat16)
    assert denoised.dtype == torch.float32
    # c_skip is near 1 and c_out near 0 here: in bfloat16 the error would be about 4e-3.
    assert (denoised - x).abs().max() < 1e-3


def test_a_network_with_other_output_channels_is_refused():
    with pytest.raises(AssertionError, match="network returned"):
        Denoiser(lambda x, c_noise, context: torch.cat([x, x], 1), EDMPrecond())(
            torch.zeros(1, 3, 4, 4), 1.0
        )


@pytest.mark.parametrize("name", NAMES)
def test_loss_of_the_exact_denoiser_equals_its_closed_form(name):
    precond, mean, std = make(name), 0.2, 0.4
    for level in (0.05, 0.5, 3.0):
        sigma = precond.round_sigma(level)
        denoise = Denoiser(optimal_network(precond, sigma, mean, std), precond)
        images = mean + std * torch.randn(400, 1, 16, 16, generator=generator(3))
        noise = torch.randn(images.shape, generator=generator(4))
        sigmas = torch.full([400], sigma)
        loss = denoising_loss(denoise, images, sigmas, noise, None, precond.weight)
        assert loss.shape == images.shape
        weight = precond.weight(torch.tensor(sigma)).item()
        expected = weight * std**2 * sigma**2 / (std**2 + sigma**2)
        assert loss.mean().item() == pytest.approx(expected, rel=0.02)


def test_loss_weights_each_image_by_its_own_noise_level():
    images = torch.zeros(3, 1, 2, 2)
    sigma = torch.tensor([1.0, 2.0, 3.0])
    loss = denoising_loss(
        lambda x, sigma, context: x, images, sigma, torch.ones_like(images), None, lambda s: s
    )
    assert torch.allclose(loss.mean([1, 2, 3]), sigma**3)


def test_edm_training_noise_is_lognormal():
    sigma = EDMPrecond(P_mean=-0.4, P_std=1.0).draw_sigma(100_000, generator(), "cpu")
    assert sigma.dtype == torch.float32
    assert sigma.log().mean().item() == pytest.approx(-0.4, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("precond", "time"),
    [
        (VPPrecond(), VPPrecond().sigma_inv),
        (VEPrecond(), lambda s: (s / 0.02).log() / math.log(5000)),
    ],
)
def test_vp_and_ve_training_noise_is_uniform_in_their_time(precond, time):
    t = time(precond.draw_sigma(100_000, generator(), "cpu")).sort().values
    assert (t - torch.linspace(0, 1, len(t))).abs().max() < 0.01


def test_iddpm_training_noise_is_uniform_over_the_positive_levels():
    table = torch.tensor(cosine_sigmas(), dtype=torch.float32)
    sigma = TablePrecond(cosine_sigmas()).draw_sigma(50_000, generator(), "cpu")
    counts = (sigma[:, None] == table).sum(0)
    assert counts.sum() == 50_000
    assert counts[-1] == 0
    assert counts[:-1].min() > 15
    assert counts[:-1].max() < 100


def test_iddpm_table_has_the_published_range():
    table = cosine_sigmas()
    assert len(table) == 1001
    assert table[-1] == 0
    assert (np.diff(table) < 0).all()
    assert table[8] == pytest.approx(80.2, abs=0.1)  # sigma_max is about 80 at j0 = 8
    assert table[0] == pytest.approx(20291, rel=1e-3)
    # Away from the limited first ratios it is the noise-to-signal ratio of the cosine schedule.
    abar = np.sin(0.5 * np.pi * np.arange(1001) / 1008) ** 2
    ratio = abar[1000] / abar[200] * (1 + table[1000] ** 2)
    assert table[200] == pytest.approx(math.sqrt(ratio - 1), rel=1e-9)


def test_iddpm_network_is_told_the_timestep_of_the_nearest_level():
    precond, table = TablePrecond(cosine_sigmas()), cosine_sigmas()
    levels = torch.tensor(table[:-1], dtype=torch.float32)
    assert torch.equal(precond.scalings(levels)[3], torch.arange(999.0, -1, -1))
    assert precond.round_sigma(table[500]) == table[500]
    between = 0.6 * table[500] + 0.4 * table[501]
    assert precond.round_sigma(between) == table[500]
    assert precond.scalings(torch.tensor(between, dtype=torch.float32))[3] == 499
    assert precond.round_sigma(1e9) == table[0]
    assert precond.round_sigma(1e-9) == table[999]
    assert precond.round_sigma(0.0) == 0


def test_ranges_of_the_networks_are_the_published_ones():
    assert (VPPrecond().sigma_min, VPPrecond().sigma_max) == pytest.approx(
        (0.001, 152.17), rel=1e-3
    )
    assert (VEPrecond().sigma_min, VEPrecond().sigma_max) == (0.02, 100)
    assert (EDMPrecond().sigma_min, EDMPrecond().sigma_max) == (0, math.inf)


@pytest.mark.parametrize("name", NAMES)
def test_noise_fraction_rises_from_zero_to_one(name):
    precond = make(name)
    low, high = precond.noise_range
    fractions = [precond.noise_fraction(sigma) for sigma in np.geomspace(low / 2, high * 2, 300)]
    assert fractions == sorted(fractions)
    assert fractions[0] == pytest.approx(0, abs=1e-4)
    assert fractions[-1] == pytest.approx(1, abs=1.1e-3)
    assert fractions[0] >= 0
    assert fractions[-1] <= 1


def test_noise_fraction_of_vp_is_its_time():
    precond = VPPrecond()
    sigma = precond.sigma(torch.tensor(0.3, dtype=torch.float64)).item()
    assert precond.noise_fraction(sigma) == pytest.approx(0.3)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    # Tensors of the meta device have no values, so that reading one on the host fails.
    precond = make(name)
    network = torch.nn.Conv2d(3, 3, 1, device="meta")
    denoise = Denoiser(lambda x, c_noise, context: network(x) * c_noise.view(-1, 1, 1, 1), precond)
    images = torch.zeros(2, 3, 8, 8, device="meta")
    sigma = precond.draw_sigma(2, generator(), "cpu").to("meta")
    loss = denoising_loss(denoise, images, sigma, torch.randn_like(images), None, precond.weight)
    assert loss.is_meta
    assert denoise(images, 1.0).is_meta


def test_sampling_first_does_not_disturb_training():
    precond = TablePrecond(cosine_sigmas())
    conv = torch.nn.Conv2d(1, 1, 1)
    denoise = Denoiser(lambda x, c_noise, context: conv(x) * c_noise.view(-1, 1, 1, 1), precond)
    images = torch.ones(2, 1, 4, 4)
    with torch.inference_mode():
        denoise(images, 1.0)
    sigma = precond.draw_sigma(2, generator(), "cpu")
    denoising_loss(denoise, images, sigma, images, None, precond.weight).sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_the_configuration_reaches_the_preconditioner():
    config = PrecondConfig(sigma_data=0.7, P_mean=-0.5, P_std=1.5)
    precond = make_precond(from_dict(PrecondConfig, to_dict(config)))
    assert (precond.sigma_data, precond.P_mean, precond.P_std) == (0.7, -0.5, 1.5)
    kinds = [type(make(name)) for name in NAMES]
    assert kinds == [EDMPrecond, VPPrecond, VEPrecond, TablePrecond]


def test_a_misspelled_preconditioner_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"--precond: got 'iddpn'.*Did you mean 'iddpm'"):
        PrecondConfig(precond="iddpn")
