"""Flow matching: its preconditioner, loss, samplers and guidance, against what is known exactly."""

import dataclasses

import pytest
import torch

from diffusion.config import DualGuidanceConfig, PrecondConfig, SamplingConfig
from diffusion.denoiser import Denoiser
from diffusion.flow import FLOW_SAMPLERS, Velocity, flow_times, sample_flow
from diffusion.guidance import branch_weights, weighted_branches
from diffusion.losses import denoising_loss, velocity_loss
from diffusion.precond import FlowPrecond, make_precond
from diffusion.samplers import dpmpp_2m, euler, heun, sampling_sigmas

MEAN, STD = 0.7, 0.4


def gaussian_velocity(z, t, context=None):
    """E[eps - x0 | z] for x0 normal with MEAN and STD."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = z - (1 - t) * MEAN
    x0 = MEAN + (1 - t) * STD**2 / variance * centred
    eps = t / variance * centred
    return eps - x0


def exact_end(noise):
    """Where the flow of Gaussian data ends: the same quantile of the data."""
    return MEAN + STD * noise


def noise_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_samplers_reach_gaussian_data_at_their_order(name, order):
    noise = noise_of(64, 1, 1, 1)
    errors = []
    for steps in (40, 80):
        x0 = FLOW_SAMPLERS[name](gaussian_velocity, noise, flow_times(steps))
        errors.append((x0 - exact_end(noise)).abs().max().item())
    assert errors[1] < 0.03
    assert errors[0] / errors[1] > 0.65 * 2**order  # The first step is of first order.


def test_euler_in_time_is_euler_in_sigma_from_a_common_start():
    times = flow_times(20)[1:]
    z = noise_of(8, 1, 2, 2)
    sigmas = [t / (1 - t) for t in times]

    def denoise(x, sigma):
        t = sigma / (1 + sigma)
        return x / (1 + sigma) - t * gaussian_velocity(x / (1 + sigma), t)

    in_time = FLOW_SAMPLERS["euler"](gaussian_velocity, z, times)
    torch.testing.assert_close(in_time, euler(denoise, z / (1 - times[0]), sigmas))
    in_time = FLOW_SAMPLERS["dpmpp_2m"](gaussian_velocity, z, times)
    torch.testing.assert_close(in_time, dpmpp_2m(denoise, z / (1 - times[0]), sigmas))
    in_time = FLOW_SAMPLERS["heun"](gaussian_velocity, z, times)
    in_sigma = heun(denoise, z / (1 - times[0]), sigmas)
    assert (in_time - in_sigma).abs().max() > 1e-5


def test_heun_is_textbook_heun_with_a_last_euler_step():
    times, z = flow_times(3), noise_of(4, 1, 1, 1)
    expected = z
    for t, t_next in ((1, 2 / 3), (2 / 3, 1 / 3)):
        v = gaussian_velocity(expected, t)
        ahead = gaussian_velocity(expected + (t_next - t) * v, t_next)
        expected = expected + (t_next - t) * (v + ahead) / 2
    expected = expected - 1 / 3 * gaussian_velocity(expected, 1 / 3)
    torch.testing.assert_close(FLOW_SAMPLERS["heun"](gaussian_velocity, z, times), expected)


def test_no_sampler_asks_beyond_its_times_and_each_is_asked_as_often_as_it_says():
    for name, calls in (("euler", 5), ("heun", 9), ("dpmpp_2m", 5)):
        asked = []

        def velocity(z, t, asked=asked):
            asked.append(t)
            return gaussian_velocity(z, t)

        config = SamplingConfig(sampler=name, grid="time", steps=5)
        x0 = sample_flow(velocity, noise_of(2, 1, 1, 1), config)
        assert x0.isfinite().all()
        assert len(asked) == calls
        assert (max(asked), min(asked)) == (1.0, pytest.approx(0.2))


def test_euler_agrees_with_the_scheduler_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    z = noise_of(2, 3, 4, 4).float()
    theirs = z
    for timestep in scheduler.timesteps:
        velocity = gaussian_velocity(theirs, float(timestep) / 1000)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
    ours = FLOW_SAMPLERS["euler"](gaussian_velocity, z, flow_times(10))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_times_fall_from_one_to_zero_and_shift_towards_noise():
    assert flow_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = flow_times(4, 3.0)
    assert (shifted[0], shifted[-1]) == (1.0, 0.0)
    assert shifted[2] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_training_times_are_logit_normal_shifted_and_clamped():
    precond = FlowPrecond(logit_mean=0.5, logit_std=0.8)
    t = precond.time(precond.draw_sigma(20_000, torch.Generator().manual_seed(0), "cpu"))
    logit = (t / (1 - t)).log()
    assert logit.mean() == pytest.approx(0.5, abs=0.02)
    assert logit.std() == pytest.approx(0.8, abs=0.02)
    # The same numbers with a shift of 3.
    shifted = FlowPrecond(logit_mean=0.5, logit_std=0.8, shift=3.0)
    s = shifted.time(shifted.draw_sigma(20_000, torch.Generator().manual_seed(0), "cpu"))
    torch.testing.assert_close(s, 3 * t / (1 + 2 * t), rtol=1e-4, atol=1e-6)
    wide = FlowPrecond(logit_std=20.0)
    t = wide.time(wide.draw_sigma(1000, torch.Generator().manual_seed(0), "cpu"))
    assert t.min() == pytest.approx(0.001, rel=1e-3)
    assert t.max() == pytest.approx(0.999, rel=1e-5)


def test_the_options_of_the_preconditioner_act():
    default = make_precond(PrecondConfig(precond="flow"))
    for change in (dict(logit_mean=1.0), dict(logit_std=0.2), dict(flow_shift=2.0)):
        other = make_precond(PrecondConfig(precond="flow", **change))
        draws = [p.draw_sigma(8, torch.Generator().manual_seed(0), "cpu") for p in (default, other)]
        assert not torch.equal(*draws)


def test_the_denoising_loss_of_the_preconditioner_is_the_error_of_the_velocity():
    precond = FlowPrecond()
    images, noise = noise_of(4, 2, 3, 3).float(), noise_of(4, 2, 3, 3, seed=1).float()
    sigma = torch.tensor([0.05, 0.5, 1.0, 30.0])

    def network(z, t, context):
        return torch.sin(3 * z) + t.reshape(-1, 1, 1, 1)

    weighted = denoising_loss(
        Denoiser(network, precond), images, sigma, noise, None, precond.weight
    )
    loss, velocity = velocity_loss(Velocity(network), images, precond.time(sigma), noise, None)
    torch.testing.assert_close(weighted, loss, rtol=1e-3, atol=1e-4)
    t = precond.time(sigma).reshape(-1, 1, 1, 1)
    z = (1 - t) * images + t * noise
    torch.testing.assert_close(velocity, network(z, t.flatten(), None))
    torch.testing.assert_close(loss, (velocity - (noise - images)).square())


def test_mean_squares_of_the_best_velocity_and_its_loss_add_up_to_those_of_the_target():
    # Unit variance: E|eps - x0|^2 = 2 (per element), at every time.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(20_000, 1, 1, 1, generator=generator)
    noise = torch.randn(20_000, 1, 1, 1, generator=generator)
    t = torch.full([20_000], 0.3)

    def best(z, t, context):
        t = t.reshape(-1, 1, 1, 1)
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * z

    loss, velocity = velocity_loss(Velocity(best), images, t, noise, None)
    assert (loss.mean() + velocity.square().mean()).item() == pytest.approx(2, abs=0.05)


class Rows:
    """A context that is one number per image, which is the estimate."""

    def __init__(self, values):
        self.values = values

    def concat(self, *others):
        return Rows(torch.cat([self.values, *(other.values for other in others)]))

    def index(self, rows):
        return Rows(self.values[rows])


U, T, D, F = 1.0, 10.0, 100.0, 1000.0
ESTIMATES = dict(none=U, text=T, visual=D, both=F)


def guided(config, **given):
    weights = branch_weights(config, **given)
    calls = []

    def estimate(x, level, context):
        calls.append(len(x))
        return context.values.reshape(-1, 1, 1, 1).expand_as(x)

    contexts = [Rows(torch.full([2], ESTIMATES[name])) for name in weights]
    result = weighted_branches(estimate, contexts, list(weights.values()))(
        torch.zeros(2, 1, 1, 1), 0.5
    )
    return result.flatten()[0].item(), calls


def dual(form, text, visual, **kwargs):
    return DualGuidanceConfig(guidance_form=form, text_scale=text, visual_scale=visual, **kwargs)


def test_forms_of_guidance_are_their_formulas():
    assert guided(dual("nested", 3.0, 2.5))[0] == pytest.approx(U + 2.5 * (D - U) + 3.0 * (F - D))
    assert guided(dual("seed", 3.0, 2.5))[0] == pytest.approx(U + 3.0 * (T - U) + 2.5 * (D - U))
    assert guided(dual("joint", 3.0, 2.5, joint_scale=1.5))[0] == pytest.approx(
        U + 3.0 * (T - U) + 2.5 * (D - U) + 1.5 * (F - T - D + U)
    )
    for form in ("nested", "seed", "joint"):
        config = dual(form, 3.0, 2.5)
        assert guided(config, has_visual=False)[0] == pytest.approx(U + 3.0 * (T - U))
        assert guided(config, has_text=False)[0] == pytest.approx(U + 2.5 * (D - U))


def test_branches_without_weight_are_not_evaluated_and_the_others_at_once():
    for form, text, visual, branches in (
        ("nested", 3.0, 2.5, 3),
        ("seed", 3.0, 2.5, 3),
        ("nested", 1.0, 1.0, 1),
        ("joint", 1.0, 1.0, 1),
        ("seed", 1.0, 0.0, 1),
        ("seed", 0.0, 0.0, 1),
        ("nested", 2.0, 2.0, 2),
    ):
        weights = branch_weights(dual(form, text, visual))
        assert len(weights) == branches
        assert sum(weights.values()) == pytest.approx(1)
        assert guided(dual(form, text, visual))[1] == [2 * branches]
    assert len(branch_weights(dual("joint", 3.0, 2.5, joint_scale=1.5))) == 4
    assert branch_weights(dual("nested", 1.0, 1.0)) == {"both": 1.0}
    # The published form at scales of one is not the estimate with both conditions.
    assert "both" not in branch_weights(dual("seed", 1.0, 1.0))
    assert branch_weights(dual("nested", 3, 2), has_text=False, has_visual=False) == {"none": 1.0}


def test_branches_are_evaluated_one_by_one_where_memory_does_not_suffice():
    calls = []

    def estimate(x, level, context):
        calls.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return context.values.reshape(-1, 1, 1, 1).expand_as(x)

    contexts = [Rows(torch.full([2], value)) for value in (U, D, F)]
    denoise = weighted_branches(estimate, contexts, [-1.5, -0.5, 3.0])
    for _ in range(2):
        result = denoise(torch.zeros(2, 1, 1, 1), 0.5)
        assert result.flatten()[0].item() == pytest.approx(-1.5 * U - 0.5 * D + 3 * F)
    assert calls == [6, 2, 2, 2, 2, 2, 2]


def test_an_image_that_alone_is_too_much_for_the_memory_is_an_error():
    def estimate(x, level, context):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        weighted_branches(estimate, [Rows(torch.zeros(1))], [1.0])(torch.zeros(1, 1, 1, 1), 0.5)


def test_settings_without_effect_on_a_flow_are_refused():
    config = SamplingConfig(sampler="euler", grid="time")
    with pytest.raises(ValueError, match="--sampler: got ddim"):
        dataclasses.replace(config, sampler="ddim")
    with pytest.raises(ValueError, match="--sigma-grid: got time"):
        sampling_sigmas(config, FlowPrecond())
