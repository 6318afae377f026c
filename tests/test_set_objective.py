"""The loss of sets of images, the divergence of their context, and what is told of both."""

import dataclasses
import math

import pytest
import torch
from set_networks import TINY, build_active

from data.fewshot.config import SetConfig
from data.images.codec import PixelCodec
from diffusion.config import PrecondConfig, SamplingConfig
from diffusion.denoiser import Denoiser
from diffusion.losses import denoising_loss
from diffusion.precond import make_precond
from diffusion.samplers import sample
from families.runs import SetRun
from models import build_network
from torch_utils.parameters import Parameters
from torch_utils.rng import Step
from training.optimizer import GuardedAdam
from training.set_objective import SetObjective
from training.watching.set_context import SetContextWatcher
from training.watching.watch import Judge

CPU = torch.device("cpu")
EDM = make_precond(PrecondConfig())


def tiny(**changes):
    return dataclasses.replace(TINY, sample_size=3, **changes)


def active(config):
    return build_active(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def make(config, *, precond=EDM, label_drop=0.0, network=None, **changes):
    network = active(config) if network is None else network
    config = SetConfig(**changes)
    return SetObjective(network, precond, PixelCodec(), label_drop=label_drop, config=config)


def batch_of(config, num_sets=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_sets, config.sample_size, *config.input_shape, generator=generator)


def draw(objective, config, num_sets=3, cur_nimg=0):
    return objective.draw(Step(0, cur_nimg, num_sets, config.input_shape, CPU))


@pytest.mark.parametrize("mode", ["film", "lag"])
def test_the_loss_is_that_of_each_image_under_the_context_of_the_others(mode):
    config = tiny(mode_conditioning=mode)
    objective, images = make(config), batch_of(config)
    draws = draw(objective, config)
    found = objective(images, {}, draws).unflatten(0, images.shape[:2])
    denoise = Denoiser(objective.network, EDM)
    for row in range(len(images)):
        for place in range(config.sample_size):
            others = [index for index in range(config.sample_size) if index != place]
            context = objective.network.context({"support": images[row, others][None]})
            expected = denoising_loss(
                denoise,
                images[row, place][None],
                draws.sigma[row : row + 1],
                draws.noise[row, place][None],
                context,
                EDM.weight,
            )
            torch.testing.assert_close(found[row, place], expected[0], rtol=1e-4, atol=1e-5)


def test_a_set_has_one_noise_level_and_each_image_noise_of_its_own():
    config = tiny()
    draws = draw(make(config), config, num_sets=5)
    assert draws.sigma.shape == (5,)
    assert draws.noise.shape == (5, config.sample_size, *config.input_shape)
    assert len({image.sum().item() for image in draws.noise.flatten(0, 1)}) == 15


def test_ranks_share_the_draws_of_the_global_batch():
    config = tiny(mode_context="variational")
    objective = make(config, context_drop=0.5, label_drop=0.5)
    images, draws = batch_of(config, 4), draw(objective, config, 4, cur_nimg=1000)
    whole = objective(images, {}, draws)
    halves = [
        objective(images[s], {}, draws.rows(s.start, s.stop)) for s in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-4, atol=1e-5)
    again = draw(objective, config, 4, cur_nimg=1000)
    assert torch.equal(again.noise, draws.noise)
    assert not torch.equal(draw(objective, config, 4, cur_nimg=1004).noise, draws.noise)


def test_absent_images_cost_nothing_and_every_set_weighs_the_same():
    config = tiny()
    objective, images = make(config), batch_of(config)
    draws = draw(objective, config)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    loss = objective(images, {"mask": mask}, draws).unflatten(0, (3, 3))
    assert (loss[~mask] == 0).all()
    garbage = torch.where(mask[..., None, None, None], images, torch.nan)
    torch.testing.assert_close(objective(garbage, {"mask": mask}, draws).unflatten(0, (3, 3)), loss)
    # A set of two weighs its images by 3 / 2, of one by 3.
    alone = objective(images[1:2, :, :], {"mask": mask[1:2]}, draws.rows(1, 2))
    torch.testing.assert_close(loss[1], alone, rtol=1e-4, atol=1e-5)
    denoise = Denoiser(objective.network, EDM)
    context = objective.network.context({"support": images[1:2, 1:2]})
    expected = denoising_loss(
        denoise, images[1, :1], draws.sigma[1:2], draws.noise[1, :1], context, EDM.weight
    )
    torch.testing.assert_close(loss[1, 0], 1.5 * expected[0], rtol=1e-4, atol=1e-5)


def test_dropped_contexts_and_labels_are_those_drawn():
    config = tiny(num_classes=4)
    objective, images = make(config, context_drop=0.5, label_drop=0.5), batch_of(config, 16)
    draws = draw(objective, config, 16)
    assert 0 < draws.context_drop.sum() < 16
    assert 0 < draws.drop.sum() < 16
    assert not torch.equal(draws.drop, draws.context_drop)
    labels = torch.arange(16) % 4
    context = objective.context(images, {"label": labels}, draws)
    rows = context.vector.unflatten(0, (16, -1))
    null = objective.network.conditioner.null
    for row in range(16):
        assert torch.equal(rows[row, 0], null) == bool(draws.context_drop[row])
    table = objective.network.conditioner.table.embedding_table.weight
    gone = draws.drop | draws.context_drop
    expected = table[torch.where(gone, 4, labels)].repeat_interleave(3, dim=0)
    torch.testing.assert_close(context.label, expected)


@pytest.mark.parametrize("scale", ["dimensions", "elbo"])
def test_the_divergence_joins_the_loss_of_every_target_with_its_scale_and_warm_up(scale):
    config = tiny(mode_context="variational")
    objective = make(config, kl_weight=2.0, kl_rampup=6.0, kl_scale=scale)
    images = batch_of(config)
    dim, n, numbers = config.encoder_dim, 3, math.prod(config.input_shape)
    factor = {"dimensions": dim * math.log(2) * n, "elbo": math.log(2) * n * numbers}[scale]
    for cur_nimg, share in ((0, 0.0), (3000, 0.5), (6000, 1.0), (60_000, 1.0)):
        draws = draw(objective, config, cur_nimg=cur_nimg)
        plain = dataclasses.replace(draws, kl_weight=torch.zeros(3))
        difference = objective(images, {}, draws) - objective(images, {}, plain)
        kl = objective.context(images, {}, draws).kl
        assert kl.shape == (9,)
        expected = (2 * share * kl / factor)[:, None, None, None].expand_as(difference)
        torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-4)


def test_the_bound_s_scale_counts_timesteps():
    config = tiny(mode_context="variational")
    precond = make_precond(PrecondConfig(precond="ddpm", diffusion_steps=50))
    draws = draw(make(config, precond=precond, kl_scale="elbo", kl_rampup=0), config, cur_nimg=1)
    numbers = math.prod(config.input_shape)
    expected = torch.full([3], 1 / (math.log(2) * 3 * 50 * numbers))
    torch.testing.assert_close(draws.kl_weight, expected)


def test_a_time_aware_encoder_sees_the_noise_level_of_its_set():
    config = tiny(encoder_time=True)
    objective, images = make(config), batch_of(config)
    draws = draw(objective, config)
    context = objective.context(images, {}, draws)
    c_noise = EDM.scalings(draws.sigma)[3].repeat_interleave(3)
    waiting = objective.network.context({"set": images})
    expected = objective.network.conditioner.resolve(waiting, c_noise)
    torch.testing.assert_close(context.vector, expected.vector)
    other = objective.network.conditioner.resolve(waiting, c_noise + 1)
    assert not torch.allclose(other.vector, expected.vector)


def test_a_learned_variance_trains_on_sets_too():
    config = tiny(learned_variance=True)
    precond = make_precond(PrecondConfig(precond="ddpm", diffusion_steps=50, learned_variance=True))
    objective = make(config, precond=precond)
    images = batch_of(config).clamp(-1, 1)
    loss = objective(images, {}, draw(objective, config))
    assert loss.shape == (9, *config.input_shape)
    loss.sum().backward()
    assert objective.network.backbone.head.weight.grad.abs().sum() > 0


# What a run tells.


def diagnosis(objective, config, images, **kwargs):
    draws = draw(objective, config, len(images))
    objective(images, {}, draws).sum().backward()
    return objective.diagnose(images, {}, draws, **kwargs), draws


@pytest.mark.parametrize("mode", ["film", "lag"])
def test_diagnostics_are_what_their_names_say(mode):
    config = tiny(mode_conditioning=mode)
    objective, images = make(config), batch_of(config)
    found, draws = diagnosis(objective, config, images)
    context = objective.context(images, {}, draws)
    vectors = context.vector[:, None] if mode == "film" else context.tokens
    expected = dict(
        context_norm=vectors.square().sum(-1).sqrt().mean(),
        context_mean=vectors.abs().mean(),
        context_max=vectors.abs().amax(-1).mean(),
        context_std=vectors.std(),
        context_batch_std=vectors.mean(1).unflatten(0, (3, 3)).mean(1).std(0).mean(),
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[f"debug/{name}"].mean(), value, rtol=1e-4, atol=1e-6)
    shuffled = context.index(torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5]))
    own, other = (objective._loss_of_sets(images, draws, it).mean() for it in (context, shuffled))
    torch.testing.assert_close(found["debug/context_gap"], other - own, rtol=1e-3, atol=1e-5)
    modules = {
        "encoder": objective.network.conditioner.encoder,
        "dit": objective.network.backbone,
        "dit_layer_0": objective.network.backbone.blocks[0],
        "dit_layer_1": objective.network.backbone.blocks[1],
    }
    assert set(found) == {f"debug/{name}" for name in (*expected, "context_gap")} | {
        f"debug/{name}_grad_norm" for name in modules
    }
    for name, module in modules.items():
        grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        torch.testing.assert_close(
            found[f"debug/{name}_grad_norm"], grads.norm(), rtol=1e-4, atol=0
        )


def test_gradient_norms_are_of_the_unscaled_loss_and_nothing_is_left_changed():
    config = tiny(encoder_dropout=0.5)
    objective, images = make(config), batch_of(config)
    objective.network.train()
    found, draws = diagnosis(objective, config, images)
    grads = [p.grad.clone() for p in objective.network.parameters() if p.grad is not None]
    scaled = objective.diagnose(images, {}, draws, torch.tensor(4.0))
    for name, value in found.items():
        factor = 4 if name.endswith("grad_norm") else 1
        torch.testing.assert_close(scaled[name] * factor, value)  # Without dropout, hence equal.
    assert objective.network.training
    after = [p.grad for p in objective.network.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))


def test_a_context_that_is_the_same_for_all_sets_is_told_apart_from_one_that_is_not():
    config = tiny()
    objective, images = make(config), batch_of(config)
    found, _ = diagnosis(objective, config, images[:1].expand(3, -1, -1, -1, -1).contiguous())
    assert found["debug/context_std"] > 0.1
    assert found["debug/context_batch_std"] == pytest.approx(0, abs=1e-5)


def test_diagnostics_cost_nothing_when_off():
    config = tiny()
    objective = make(config, diagnostics=False)
    calls = []
    objective.network.register_forward_hook(lambda *args: calls.append(1))
    images = batch_of(config)
    assert objective.diagnose(images, {}, draw(objective, config)) == {}
    assert calls == []


def test_the_encoder_has_no_gradient_in_the_first_two_steps():
    config = tiny()
    torch.manual_seed(0)
    network = build_network(config)
    objective, images = make(config, network=network), batch_of(config)
    optimizer = GuardedAdam(Parameters(network))
    norms = []
    for step in range(4):
        optimizer.zero_grad()
        draws = draw(objective, config, cur_nimg=step)
        objective(images, {}, draws).sum().backward()
        norms.append(objective.diagnose(images, {}, draws)["debug/encoder_grad_norm"].item())
        optimizer.step(1e-2)
    assert norms[:2] == [0, 0]
    assert min(norms[2:]) > 0


def fields(**changes):
    values = dict(
        context_norm=4.0,
        encoder_grad_norm=1.0,
        dit_grad_norm=1.0,
        dit_layer_0_grad_norm=1.0,
        dit_layer_1_grad_norm=0.9,
        dit_layer_2_grad_norm=0.8,
    )
    return {f"debug/{k}": dict(num=1, mean=v, std=0.0) for k, v in {**values, **changes}.items()}


@pytest.mark.parametrize(
    ("changes", "reason", "remedy"),
    [
        (dict(context_norm=1e-4), "the context is near zero", "--lr=2e-4"),
        (dict(encoder_grad_norm=1e-4), "the encoder's gradient is far below", "learning rate"),
        (
            dict(dit_layer_1_grad_norm=0.3, dit_layer_2_grad_norm=0.1),
            "falls exponentially from block to block",
            "--depth=6",
        ),
        (
            dict(dit_layer_0_grad_norm=0.1, dit_layer_1_grad_norm=0.3),
            "falls exponentially from block to block",
            "--depth=6",
        ),
    ],
)
def test_the_log_warns_once_with_a_remedy(changes, reason, remedy):
    config = SetRun(preset="x", model=tiny(num_blocks=3))
    watcher = SetContextWatcher(config.model)
    judge = Judge(config, make(config.model), [watcher])

    def told(stats, step):
        return judge.fresh(stats, step * config.step_nimg)

    assert told(fields(**changes), step=10) == []  # Too early to tell.
    assert told(fields(), step=300) == []
    (finding,) = told(fields(**changes), step=400)
    assert reason in finding.message
    assert remedy in finding.remedy
    assert told(fields(**changes), step=500) == []
    assert told(fields(), step=600) == []
    assert told(fields(**changes), step=700) == [finding]
    assert told({}, step=800) == []  # With --no-diagnostics.


# Ancestral sampling as few-shot models do it.


class Fixed:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def randn_like(self, x):
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_steps_have_the_smaller_or_the_larger_variance(variance):
    precond = make_precond(PrecondConfig(precond="ddpm", diffusion_steps=50))
    config = SamplingConfig(sampler="ddpm", grid="timesteps", steps=2, variance=variance)
    noise = torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    found = sample(lambda x, sigma: torch.zeros_like(x), noise, config, precond, Fixed(1))
    assert (found == 0).all()  # The last step gives x0 itself.
    states = []

    def denoise(x, sigma):
        states.append(x.clone())
        return torch.zeros_like(x)

    sample(denoise, noise, config, precond, Fixed(1))
    high, low = precond.level(49), precond.level(0)
    step = high**2 - low**2
    added = low**2 * step / high**2 if variance == "small" else step * (1 + low**2) / (1 + high**2)
    expected = added + (low / high) ** 4 * high**2
    assert states[1].var().item() == pytest.approx(expected, rel=0.02)


def test_clipping_keeps_images_in_range_and_a_learned_variance_as_it_is():
    precond = make_precond(PrecondConfig(precond="ddpm", diffusion_steps=50, learned_variance=True))
    config = SamplingConfig(sampler="ddpm", grid="timesteps", steps=3, clip_denoised=True)
    noise = torch.ones(2, 1, 2, 2)

    def denoise(x, sigma, fraction=2.0):
        return torch.cat([torch.full_like(x, 5.0), torch.full_like(x, fraction)], dim=1)

    clipped = sample(denoise, noise, config, precond, Fixed(0))
    assert (clipped == 1).all()
    plain = dataclasses.replace(config, clip_denoised=False)
    assert (sample(denoise, noise, plain, precond, Fixed(0)) == 5).all()
    states = []
    for fraction in (3.0, 1.0):

        def noting(x, sigma, fraction=fraction):
            states.append(x.clone())
            return denoise(x, sigma, fraction)

        sample(noting, noise, config, precond, Fixed(0))
    assert not torch.allclose(states[1], states[4])  # A fraction above 1 is not clipped to 1.


def test_diagnostics_are_of_whole_contexts_and_of_images_that_are_there():
    config = tiny(mode_context="variational")
    objective, images = make(config, context_drop=1.0), batch_of(config)
    found, draws = diagnosis(objective, config, images)
    assert draws.context_drop.all()
    vector = objective.network.context({"set": images}).vector
    torch.testing.assert_close(found["debug/context_norm"].flatten(), vector.norm(dim=1))
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    some = objective.diagnose(images, {"mask": mask}, draws)
    assert some["debug/context_norm"].numel() == 6
    garbage = torch.where(mask[..., None, None, None], images, 1e3)
    again = objective.diagnose(garbage, {"mask": mask}, draws)
    for name, value in some.items():
        torch.testing.assert_close(again[name], value)


def test_in_half_precision_too_an_image_leaves_no_trace_in_its_own_context():
    config = tiny(encoder_tokenizer="per_sample_mean")
    objective, images = make(config), batch_of(config)
    objective._denoise.autocast_dtype = torch.bfloat16
    other = images.clone()
    other[:, 1] = 3 * torch.randn(other[:, 1].shape)
    draws = draw(objective, config)
    rows = [
        objective.context(x, {}, draws).vector.unflatten(0, (3, 3))[:, 1] for x in (images, other)
    ]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(mode_conditioning="lag"), dict(mode_conditioning="lag", context_pool_size=1)],
    ids=["film", "lag", "pooled"],
)
def test_at_first_the_encoder_alone_learns_to_predict_each_image_from_the_others(changes):
    config = tiny(reconstructs=True, **changes)
    objective, images = make(config, pretrain_encoder=1.0), batch_of(config)
    network = objective.network
    plain = make(config, network=network)
    first, later = (draw(objective, config, cur_nimg=nimg) for nimg in (999, 1000))
    # Before 1 kimg, DiT and noise have no part in the loss; the null context has none at all.
    error = objective(images, {}, first)
    prediction = objective.context(images, {}, first).prediction
    assert prediction.shape == images.flatten(0, 1).shape
    torch.testing.assert_close(error, (prediction - images.flatten(0, 1)).square())
    error.mean().backward()
    norms = {name: param.grad.norm() for name, param in network.named_parameters()}
    assert all(norm == 0 for name, norm in norms.items() if name.startswith("backbone."))
    assert norms["conditioner.reconstruction.weight"] > 0
    assert sum(norm for name, norm in norms.items() if ".encoder." in name) > 0
    # Each image is predicted from the others.
    changed = images.clone()
    changed[0, 0] += 1
    moved = (objective.context(changed, {}, first).prediction - prediction).unflatten(0, (3, -1))
    assert moved[0, 0].abs().max() < 1e-5 < moved[0, 1].abs().max()
    assert moved[1:].abs().max() == 0
    # From 1 kimg on, the loss is what it is without pre-training.
    network.zero_grad()
    loss = objective(images, {}, later)
    torch.testing.assert_close(loss, plain(images, {}, draw(plain, config, cur_nimg=1000)))
    loss.mean().backward()
    assert network.conditioner.reconstruction.weight.grad.norm() == 0
    assert network.backbone.head.weight.grad.norm() > 0


def test_a_network_that_reconstructs_has_all_gradients_when_it_does_not_pre_train():
    config = tiny(reconstructs=True)
    for kimg, is_student in ((0.0, False), (1.0, True)):
        objective = make(config, pretrain_encoder=kimg)
        draws = draw(objective, config, cur_nimg=0)
        draws = objective.of_student(draws) if is_student else draws
        objective(batch_of(config), {}, draws).mean().backward()
        grads = {name: param.grad for name, param in objective.network.named_parameters()}
        assert [name for name, grad in grads.items() if grad is None] == []
        assert grads["conditioner.reconstruction.weight"].norm() == 0
        assert grads["backbone.head.weight"].norm() > 0


def test_pre_training_lowers_the_error_of_the_prediction():
    config = tiny(reconstructs=True)
    objective = make(config, pretrain_encoder=1e6)
    images = batch_of(config)[:, :1].expand(-1, config.sample_size, -1, -1, -1)
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    errors = []
    for step in range(40):
        error = objective(images, {}, draw(objective, config, cur_nimg=step)).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
