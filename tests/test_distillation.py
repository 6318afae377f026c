"""Distillation against its definition: two steps of the sampler, exact maps of Gaussian data."""

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from set_networks import TINY as TINY_SETS
from torch import nn

import families
from configs import get_preset
from data.images.codec import PixelCodec
from diffusion.config import DualGuidanceConfig, GuidanceConfig, PrecondConfig
from diffusion.flow import Velocity, flow_euler
from diffusion.guidance import BRANCHES, branch_weights, classifier_free
from diffusion.precond import EDMPrecond, make_precond
from diffusion.samplers import ddim
from models import build_network
from models.architectures.feature_dit import FeatureDiTConfig
from models.context import Context
from torch_utils.parameters import Parameters
from torch_utils.rng import Step
from training.distillation.course import course_of
from training.distillation.objective import DistillationObjective, Teacher
from training.ema import EMA, ema_beta
from training.objective import Objective
from training.optimizer import GuardedAdam, learning_rate

CPU = torch.device("cpu")
GUIDANCE = GuidanceConfig(cfg_scale=2.5, cfg_interval=(0.05, 20.0))


def active(model):
    """Return a network without dropout with random numbers added to all weights."""
    torch.manual_seed(0)
    network = build_network(model).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return network


def taught_by(run, network, guidance, steps, codec=None, **sampling):
    """Return the objective of a student of ``network``, which is its own teacher."""
    objective = families.of(run).objective(run, network, codec or PixelCodec())
    teacher = Teacher(objective=objective, filled=contextlib.nullcontext, guidance=guidance)
    student = DistillationObjective(objective, teacher)
    settings = dataclasses.replace(run.sampling, sampler="euler", steps=steps, **sampling)
    student.aim(settings, CPU)
    return student, objective, objective.levels(dataclasses.replace(settings, steps=2 * steps))


def end_of_step(target, x, level, below):
    """Return where one Euler step from ``x`` lands with ``target`` as its estimate."""
    return x + (below - level) * (x - target.double()) / level


def assert_close(found, expected):
    scale = expected.square().mean().sqrt().clamp(min=1)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [GuidanceConfig(), GUIDANCE], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("precond", "sampling"),
    [
        (dict(precond="edm"), {}),
        (dict(precond="vp"), dict(grid="vp", clip_denoised=True)),
        (dict(precond="ve"), dict(grid="ve")),
        (dict(precond="iddpm"), dict(grid="iddpm")),
        (dict(precond="ddpm", learned_variance=True), dict(grid="timesteps")),
    ],
    ids=lambda value: value.get("precond"),
)
def test_one_step_to_the_target_is_two_steps_of_ddim(precond, sampling, guidance):
    run = get_preset("digits").run
    run = dataclasses.replace(run, precond=PrecondConfig(**precond), guidance=guidance)
    run = run.changed("training", label_drop=0.1)
    run = families.of(run).fit(run, None, 10).changed("model", hidden_dim=16, base_dim=8)
    network = active(run.model)
    steps = 4
    student, _objective, levels = taught_by(
        run, network, guidance, steps, grid_steps=4 * steps, **sampling
    )
    sampler = dataclasses.replace(run.sampling, sampler="ddim", **sampling)
    run = dataclasses.replace(run, sampling=sampler)
    generator = families.of(run).generator(run, network, PixelCodec(), CPU)
    labels = torch.arange(steps) % 10
    images = torch.randn(steps, 1, 8, 8)
    draws = student.draw(Step(0, 0, steps, (1, 8, 8), CPU))
    draws = student._at(draws, torch.arange(steps))
    draws = dataclasses.replace(draws, drop=None)
    target = student.target(images, {"label": labels}, draws)

    def denoise(x, sigma, label):
        found = generator.denoise(x, sigma, label)
        return found.clamp(-1, 1) if sampling.get("clip_denoised") else found

    for row in range(steps):
        level, middle, below = levels[2 * row : 2 * row + 3]
        assert draws.sigma[row].item() == pytest.approx(level)
        x = (images + level * draws.noise)[row : row + 1].double()
        own = labels[row : row + 1]
        expected = ddim(lambda x, s: denoise(x, s, own), x, [level, middle, below])  # noqa: B023
        assert_close(end_of_step(target[row : row + 1], x, level, below), expected)


def test_targets_of_sets_are_those_of_each_image_under_its_own_context():
    run = get_preset("fsdm-digits").run
    model = dataclasses.replace(TINY_SETS, sample_size=3, encoder_time=True)
    run = dataclasses.replace(run, model=model, guidance=GUIDANCE)
    network = active(model)
    student, objective, levels = taught_by(run, network, GUIDANCE, 2, grid_steps=8)
    images = torch.randn(2, 3, *model.input_shape)
    draws = student._at(student.draw(Step(0, 0, 2, model.input_shape, CPU)), torch.tensor([1, 0]))
    draws = dataclasses.replace(draws, context_drop=None)
    target = student.target(images, {}, draws).unflatten(0, (2, 3))
    for row, step in enumerate((1, 0)):
        level, middle, below = levels[2 * step : 2 * step + 3]
        for place in range(3):
            others = [index for index in range(3) if index != place]
            cond = {"support": images[row, others][None]}
            contexts = [network.context(cond, drop) for drop in (None, torch.ones(1, dtype=bool))]
            denoise = classifier_free(
                objective._denoise, *contexts, GUIDANCE, make_precond(run.precond)
            )
            x = (images[row, place] + level * draws.noise[row, place])[None].double()
            expected = ddim(denoise, x, [level, middle, below])
            assert_close(end_of_step(target[row, place][None], x, level, below), expected)


FEATURES = FeatureDiTConfig(
    hidden_dim=32,
    num_blocks=1,
    num_heads=4,
    resolution=64,
    latent_channels=4,
    text_dim=12,
    visual_dim=10,
    buckets=("64x64",),
    max_text_tokens=16,
)


@pytest.mark.parametrize("form", ["nested", "seed", "joint"])
def test_targets_of_flows_are_two_steps_of_euler_whatever_a_row_is_conditioned_on(form):
    run = dataclasses.replace(get_preset("nanodit-tiny").run, model=FEATURES)
    guidance = DualGuidanceConfig(text_scale=3, visual_scale=2, guidance_form=form, joint_scale=0.5)
    network = active(FEATURES)
    student, objective, levels = taught_by(run, network, guidance, 4, time_shift=2.0)
    images, cond = objective.example(4, CPU)
    images = torch.randn_like(images)
    cond |= {name: torch.randn_like(cond[name]) for name in ("text", "cls", "patches")}
    draws = student.draw(Step(0, 0, 4, tuple(images.shape[1:]), CPU))
    draws = student._at(draws, torch.arange(4))
    drop = torch.tensor([[False] * 3, [False, True, True], [True, False, False], [True] * 3])
    draws = dataclasses.replace(draws, drop=drop, patch_bias=None)
    target = student.target(images, cond, draws)
    assert draws.sigma[0] == math.inf
    assert objective(images, cond, dataclasses.replace(draws, target=target)).isfinite().all()
    velocity = Velocity(network)
    for row in range(4):
        level, middle, below = levels[2 * row : 2 * row + 3]
        own = {k: v if k == "size" else v[row : row + 1] for k, v in cond.items()}
        has_text, has_visual = not drop[row, 0], not drop[row, 1]
        weights = branch_weights(guidance, has_text=has_text, has_visual=has_visual)

        def guided(z, t):
            total = 0
            for name, weight in weights.items():  # noqa: B023
                text, visual = BRANCHES[name]
                lost = torch.tensor([[not text, not visual, not visual]]) | drop[row]  # noqa: B023
                context = network.context(own, lost, num=1)  # noqa: B023
                total = total + weight * velocity(z, t, context)
            return total

        z = torch.lerp(images, draws.noise, level)[row : row + 1].double()
        expected = flow_euler(guided, z, [level, middle, below])
        assert_close(end_of_step(target[row : row + 1], z, level, below), expected)


# Gaussian data, whose exact denoiser is affine in x.

MEAN, STD = 0.3, 0.5
BASE_STEPS = 512  # Whose own error is 0.6%.
BATCH = 256


class Affine(nn.Module):
    """A network that knows a gain and an offset for each of some noise levels."""

    config = SimpleNamespace(images_per_row=1, input_shape=(1, 1, 1), num_classes=0)

    def __init__(self, precond, levels):
        super().__init__()
        sigma = torch.tensor(levels)
        c_skip, c_out, c_in, self.c_noise = precond.scalings(sigma)
        total = STD**2 + sigma**2
        self.gain = nn.Parameter((STD**2 / total - c_skip) / (c_out * c_in))
        self.offset = nn.Parameter(MEAN * sigma**2 / total / c_out)

    def context(self, cond, drop=None, num=None):
        return Context()

    def forward(self, x, c_noise, context):
        level = (self.c_noise - c_noise[:, None]).abs().argmin(1)
        shape = (-1, 1, 1, 1)
        return self.gain[level].reshape(shape) * x + self.offset[level].reshape(shape)


def test_students_of_gaussian_data_reach_the_exact_map_in_one_step():
    students = (256, 128, 64, 32, 16, 8, 4, 2, 1)
    run = get_preset("digits").run.changed("training", batch=BATCH, iters=120 * len(students))
    run = run.changed("training", lr=0.05, lr_rampup=1, lr_schedule="cosine", ema_kimg=1)
    run = run.changed("training", ema_rampup=None)
    run = run.changed("distillation", distill_steps=students, distill_cfg_scale=1.0)
    run = run.changed("sampling", sampler="euler", steps=256, grid_steps=BASE_STEPS)
    precond = EDMPrecond()
    levels = Objective(Affine(precond, [1.0]), precond, PixelCodec()).levels(
        dataclasses.replace(run.sampling, steps=BASE_STEPS)
    )
    network = Affine(precond, levels[:-1])
    parameters = Parameters(network)
    make = lambda other: Objective(other, precond, PixelCodec())  # noqa: E731
    course, ema = course_of(run, make(network), parameters, make), EMA(parameters)
    optimizer = GuardedAdam(parameters, beta2=0.9)
    for cur_nimg in range(0, run.total_nimg, BATCH):
        course.begin(cur_nimg, ema, optimizer)
        step = Step(0, cur_nimg, BATCH, (1, 1, 1), CPU)
        images = MEAN + STD * torch.randn(BATCH, 1, 1, 1, generator=step.generator(0))
        optimizer.zero_grad()
        course.objective(images, {}, course.objective.draw(step)).mean().backward()
        since = cur_nimg - course.stage.start_nimg
        optimizer.step(learning_rate(run.training, since, BATCH, course.stage.num_images))
        ema.update(ema_beta(since, BATCH, run.training.ema_kimg, None), optimizer.skipped)

    # Along the probability flow a point keeps its place in its Gaussian.
    top, generator = levels[0], torch.Generator().manual_seed(0)
    x = top * torch.randn(1000, 1, 1, 1, generator=generator)
    exact = MEAN + (x - MEAN) * STD / math.sqrt(STD**2 + top**2)
    with torch.no_grad():
        found = make(ema.network).estimate(x, torch.full([1000, 1, 1, 1], top), Context())
    assert course.sampled.sampling.steps == 1
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.01
