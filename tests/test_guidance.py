"""Guidance: its arithmetic, its schedule and what it costs."""

import dataclasses
import math

import pytest
import torch

from configs import PRESETS
from diffusion.config import GuidanceConfig, SamplingConfig
from diffusion.guidance import autoguidance, classifier_free, guidance_scale
from diffusion.precond import EDMPrecond, TablePrecond, VPPrecond
from diffusion.samplers import num_evaluations, sample
from diffusion.schedules import cosine_sigmas
from families.sampled import check_levels


@dataclasses.dataclass(frozen=True)
class Shift:
    """A context of one vector an image; counts how often contexts are joined."""

    vector: torch.Tensor
    joined: list = dataclasses.field(default_factory=list)

    def concat(self, *others):
        self.joined.append(len(others))
        return Shift(torch.cat([self.vector, *(other.vector for other in others)]))

    def index(self, rows):
        return Shift(self.vector[rows])


class Recorder:
    """A denoiser sigma x + context that records the batch of every evaluation."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, context):
        self.batches.append(len(x))
        return sigma * x + context.vector[:, None, None, None]


def contexts():
    return Shift(torch.tensor([1.0, 2.0, 3.0])), Shift(torch.tensor([0.5, 0.0, -0.5]))


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def test_guided_estimate_extrapolates_from_the_null_one():
    recorder, (context, null) = Recorder(), contexts()
    denoise = classifier_free(recorder, context, null, GuidanceConfig(cfg_scale=2.5), EDMPrecond())
    expected = 1.5 * X + (null.vector + 2.5 * (context.vector - null.vector))[:, None, None, None]
    assert torch.allclose(denoise(X, 1.5), expected)
    assert recorder.batches == [6]


def test_contexts_are_joined_once_for_all_steps():
    recorder, (context, null) = Recorder(), contexts()
    config = SamplingConfig(steps=5)
    denoise = classifier_free(recorder, context, null, GuidanceConfig(cfg_scale=2.0), EDMPrecond())
    sample(denoise, X, config, EDMPrecond())
    assert context.joined == [1]
    assert recorder.batches == [6] * num_evaluations(config)


def test_scale_one_evaluates_the_condition_alone():
    recorder, (context, null) = Recorder(), contexts()
    denoise = classifier_free(recorder, context, null, GuidanceConfig(), EDMPrecond())
    assert torch.equal(denoise(X, 2.0), Recorder()(X, 2.0, context))
    assert recorder.batches == [3]
    assert context.joined == []


def test_scale_zero_ignores_the_condition():
    context, null = contexts()
    denoise = classifier_free(
        Recorder(), context, null, GuidanceConfig(cfg_scale=0.0), EDMPrecond()
    )
    assert torch.allclose(denoise(X, 2.0), Recorder()(X, 2.0, null))


def test_outside_the_interval_the_condition_is_evaluated_alone():
    recorder, (context, null) = Recorder(), contexts()
    config = GuidanceConfig(cfg_scale=3.0, cfg_interval=(0.5, 2.0))
    denoise = classifier_free(recorder, context, null, config, EDMPrecond())
    plain = Recorder()(X, 0.5, context)
    for sigma in (0.1, 0.5, 0.6, 2.0, 2.1):
        result = denoise(X, sigma)
        if sigma == 0.5:
            assert torch.equal(result, plain)
    assert recorder.batches == [3, 3, 6, 6, 3]


def test_power_cosine_rises_from_one_to_the_scale():
    precond = TablePrecond(cosine_sigmas())
    config = GuidanceConfig(cfg_scale=4.4, cfg_schedule="power-cosine")
    assert guidance_scale(config, precond.sigma_max, precond) == pytest.approx(1, abs=1e-6)
    assert guidance_scale(config, precond.sigma_min, precond) == pytest.approx(4.4)
    # At timestep 200 of 1000: 36% of the way (DiffiT's published schedule at power 4).
    sigma = precond._ascending[200]
    expected = 0.5 * (1 - math.cos(math.pi * 0.8**4))
    assert expected == pytest.approx(0.36, abs=0.005)
    assert guidance_scale(config, sigma, precond) == pytest.approx(1 + 3.4 * expected)


def test_power_cosine_follows_its_power_and_interval():
    precond = VPPrecond()
    sigma = precond.sigma(torch.tensor(0.5, dtype=torch.float64)).item()
    config = GuidanceConfig(cfg_scale=2.0, cfg_schedule="power-cosine", cfg_power=1.0)
    assert guidance_scale(config, sigma, precond) == pytest.approx(1.5)
    config = dataclasses.replace(config, cfg_interval=(0.0, 0.1))
    assert guidance_scale(config, sigma, precond) == 1


def test_autoguidance_extrapolates_from_the_guide():
    calls = []

    def main(x, sigma):
        calls.append("main")
        return x + sigma

    def guide(x, sigma):
        calls.append("guide")
        return x - sigma

    config = GuidanceConfig(cfg_scale=3.0, cfg_interval=(1.0, 4.0))
    denoise = autoguidance(main, guide, config)
    assert torch.allclose(denoise(X, 2.0), X - 2 + 3 * 4)
    assert sorted(calls) == ["guide", "main"]
    calls.clear()
    assert torch.equal(denoise(X, 0.5), X + 0.5)
    assert calls == ["main"]


def test_autoguidance_follows_the_schedule():
    config = GuidanceConfig(cfg_scale=2.0, cfg_schedule="power-cosine", cfg_power=1.0)
    precond = VPPrecond()
    sigma = precond.sigma(torch.tensor(0.5, dtype=torch.float64)).item()
    denoise = autoguidance(lambda x, s: x + 1, lambda x, s: x, config, precond)
    assert torch.allclose(denoise(X, sigma), X + 1.5)
    with pytest.raises(ValueError, match="needs the preconditioner"):
        autoguidance(lambda x, s: x, lambda x, s: x, config)


def test_bad_guidance_options_say_what_is_accepted():
    with pytest.raises(
        ValueError, match=r"--cfg-scale: got -1\.0; accepted: a number of at least 0"
    ):
        GuidanceConfig(cfg_scale=-1.0)
    with pytest.raises(ValueError, match=r"--cfg-schedule: got 'cosine'.*power-cosine"):
        GuidanceConfig(cfg_schedule="cosine")
    with pytest.raises(ValueError, match="--cfg-interval: got 2,1; accepted: two noise levels"):
        GuidanceConfig(cfg_interval=(2.0, 1.0))


@pytest.mark.parametrize(
    ("section", "values", "is_known"),
    [
        ("guidance", dict(cfg_scale=3.0, cfg_interval=(80.0, 100.0)), False),
        ("guidance", dict(cfg_scale=3.0, cfg_interval=(79.0, 80.0)), True),
        ("sampling", dict(s_churn=10.0, s_max=0.0), False),
        ("sampling", dict(s_churn=10.0, s_min=80.0), True),
        ("sampling", dict(s_churn=10.0, s_min=81.0), False),
    ],
)
def test_limits_that_no_noise_level_meets_are_refused(section, values, is_known):
    """The levels are 0.002 to 80; guidance acts above its lower limit, churn also at it."""
    run = PRESETS["digits"].run.changed("sampling", sampler="heun").changed(section, **values)
    if is_known:
        check_levels(run)
    else:
        with pytest.raises(ValueError, match="the sampler visits no noise level there"):
            check_levels(run)
