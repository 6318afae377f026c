"""The guarded optimizer step and the weight average."""

import copy
import dataclasses

import pytest
import torch

from configs import PRESETS
from models import build_network
from torch_utils.parameters import Parameters
from training.ema import EMA, ema_beta
from training.optimizer import GuardedAdam


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 2)
    return module, GuardedAdam(Parameters(module), **kwargs)


def set_grads(module, value):
    for param in module.parameters():
        param.grad = torch.full_like(param, value)


def test_a_step_is_plain_adam():
    module, optimizer = make()
    reference = copy.deepcopy(module)
    adam = torch.optim.Adam(reference.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for value in (0.5, -0.2, 0.7):
        set_grads(module, value)
        set_grads(reference, value)
        norm = optimizer.step(1e-2)
        adam.step()
    assert norm.item() == pytest.approx(0.7 * 8**0.5)
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_weight_decay_shrinks_matrices_and_no_vectors():
    module, optimizer = make(weight_decay=0.5)
    reference = copy.deepcopy(module)
    set_grads(module, 0.0)
    optimizer.step(1e-2)
    torch.testing.assert_close(module.weight, reference.weight * (1 - 1e-2 * 0.5))
    assert torch.equal(module.bias, reference.bias)
    again, other = make(weight_decay=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(module.state_dict())
    for net, step in ((module, optimizer), (again, other)):
        set_grads(net, 0.3)
        step.step(1e-2)
    assert torch.equal(module.weight, again.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_changes_nothing_but_the_counters(bad):
    module, optimizer = make()
    ema = EMA(Parameters(module))
    set_grads(module, 0.5)
    optimizer.step(1e-2)
    ema.update(0.9, optimizer.skipped)
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()["adam"]))
    average = copy.deepcopy(ema.network.state_dict())
    set_grads(module, 0.5)
    module.bias.grad[0] = bad
    optimizer.step(1e-2)
    ema.update(0.9, optimizer.skipped)
    after = (module.state_dict(), optimizer.state_dict()["adam"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(ema.network.state_dict(), average, rtol=0, atol=0)
    assert optimizer.read_counters() == (1, 1)


def test_counters_tell_the_total_and_the_current_row():
    module, optimizer = make()
    for value in (float("nan"), 0.1, float("nan"), float("nan")):
        set_grads(module, value)
        optimizer.step(1e-3)
    assert optimizer.read_counters() == (3, 2)


def test_clipping_limits_the_norm_and_reports_the_one_before():
    module, optimizer = make(clip_grad=1.0)
    set_grads(module, 100.0)
    norm = optimizer.step(1e-3)
    assert norm.item() == pytest.approx(100 * 8**0.5)
    grads = torch.cat([p.grad.flatten() for p in module.parameters()])
    assert grads.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_a_dynamic_loss_scale_cancels_and_backs_off():
    module, optimizer = make(dynamic_scale=True)
    reference, plain = make()
    scale = optimizer.loss_scale.item()
    set_grads(module, 0.25 * scale)
    set_grads(reference, 0.25)
    assert optimizer.step(1e-2).item() == pytest.approx(plain.step(1e-2).item())
    torch.testing.assert_close(module.state_dict(), reference.state_dict())
    set_grads(module, float("inf"))
    optimizer.step(1e-2)
    assert optimizer.loss_scale.item() == scale / 2


def test_a_restored_optimizer_goes_on_exactly():
    module, optimizer = make(dynamic_scale=True)
    for value in (0.3, float("nan")):
        set_grads(module, value)
        optimizer.step(1e-2)
    other, restored = make(seed=1, dynamic_scale=True)
    other.load_state_dict(module.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((module, optimizer), (other, restored)):
        set_grads(net, 0.4)
        opt.step(1e-2)
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert restored.read_counters() == optimizer.read_counters() == (1, 0)


def test_the_decay_of_the_average_matches_its_closed_form():
    # After one half-life of images, the old weights have half their share.
    beta = ema_beta(10**9, 256, half_life_kimg=500, rampup=0.05)
    assert beta ** (500_000 / 256) == pytest.approx(0.5)
    # Early in a run the half-life is a share of the images so far.
    assert ema_beta(100_000, 100, 500, 0.05) == pytest.approx(0.5 ** (100 / 5000))
    assert ema_beta(100_000, 100, 500, None) == pytest.approx(0.5 ** (100 / 500_000))
    assert ema_beta(0, 256, 500, 0.05) == 0.0


def test_the_average_follows_a_geometric_series():
    module = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    module.weight.fill_(0.0)
    ema = EMA(Parameters(module))
    module.weight.fill_(1.0)
    for _ in range(20):
        ema.update(0.9, torch.zeros([]))
    assert ema.network.weight.item() == pytest.approx(1 - 0.9**20, rel=1e-5)


def test_the_first_step_copies_the_weights():
    module, _ = make()
    ema = EMA(Parameters(module))
    with torch.no_grad():
        module.weight.add_(0.123)
    ema.update(ema_beta(0, 8, 500, 0.05), torch.zeros([]))
    assert torch.equal(ema.network.weight, module.weight)


def test_the_output_of_a_set_encoder_its_positions_and_null_do_not_decay():
    config = dataclasses.replace(PRESETS["fsdm-digits"].run.model, encoder_depth=1)
    network = build_network(config)
    before = {name: value.clone() for name, value in network.named_parameters()}
    optimizer = GuardedAdam(Parameters(network), weight_decay=0.5)
    for param in network.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step(0.1)
    unchanged = {n for n, value in network.named_parameters() if torch.equal(value, before[n])}
    kept = {n for n in unchanged if before[n].ndim > 1 and before[n].abs().sum() > 0}
    encoder = "conditioner.encoder"
    assert kept == {f"{encoder}.head.1.weight", f"{encoder}.cls", f"{encoder}.positions"}
    assert "conditioner.null" in unchanged
    assert f"{encoder}.tokeniser.1.weight" not in unchanged
    assert "backbone.patch_embedding.weight" not in unchanged
