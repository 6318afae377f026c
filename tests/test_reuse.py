"""What does not change over the steps of a sampler is computed once, and changes no result."""

import contextlib
import dataclasses
from unittest import mock

import pytest
import test_feature_dit as feature_networks
import torch
from helpers import TINY_SETS, succeed, toy_data, train_tiny, trained_snapshot
from set_networks import build_active, random_images
from torch.nn import functional

import generate
from models import layers
from models.context import Context
from torch_utils import cpu_matmul, reuse


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("reuse")


@contextlib.contextmanager
def counted(owner, name):
    """Count the calls of a method."""
    method, calls = getattr(owner, name), []

    def call(self, *args, **kwargs):
        calls.append(args)
        return method(self, *args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield calls


def of_sets(**changes):
    network = build_active(mode_conditioning="lag", **changes).eval()
    return network, network.context({"support": random_images(3, 2)}), random_images(3)


def of_features(**changes):
    config = dataclasses.replace(feature_networks.TINY, **changes)
    network = feature_networks.network_of(config)
    context = network.context(feature_networks.features(config))
    return network, context, torch.randn(3, *config.latent_shape(64, 64))


CASES = {
    "sets": (of_sets, {}, 2),
    "sets, one layer": (of_sets, dict(cross_attn_layers=(1,)), 1),
    "sets, normalised": (of_sets, dict(use_context_layernorm=True), 2),
    "features": (of_features, {}, 2),
    "features, time in a token": (of_features, dict(cls_token_time=True), None),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_keys_and_values_are_made_once_for_many_noise_levels(name):
    make, changes, num_layers = CASES[name]
    network, context, x = make(**changes)
    levels = torch.tensor([0.1, 0.5, 0.9])
    prepared = network.prepare(context)
    assert (prepared.keys_values is None) == (num_layers is None)
    for level in levels:
        expected = network(x, level.expand(3), context)
        with counted(layers.CrossAttention, "keys_values") as calls:
            found = network(x, level.expand(3), prepared)
        torch.testing.assert_close(found, expected)
        assert len(calls) == (0 if num_layers else 2)
    if num_layers:
        # They are what attention sees, and rows of a batch are those of their images.
        assert prepared.keys_values.shape[:2] == (3, num_layers)
        joined = prepared.concat(prepared).index(torch.tensor([5, 0, 1]))
        torch.testing.assert_close(
            network(x, levels, joined)[0],
            network(x, levels, prepared.index(torch.tensor([2, 0, 1])))[0],
        )
        nothing = dataclasses.replace(prepared, keys_values=torch.zeros_like(prepared.keys_values))
        assert not torch.allclose(network(x, levels, nothing), network(x, levels, prepared))


@torch.no_grad()
def test_keys_and_values_that_would_take_too_much_memory_are_not_kept(monkeypatch):
    network, context, _ = of_sets()
    kept = network.prepare(context).keys_values
    monkeypatch.setattr(layers, "_MAX_KEPT_BYTES", kept.nbytes)
    assert network.prepare(context).keys_values is not None
    monkeypatch.setattr(layers, "_MAX_KEPT_BYTES", kept.nbytes - 1)
    assert network.prepare(context) is context


def test_a_context_that_waits_for_the_noise_level_is_left_alone():
    network = build_active(mode_conditioning="film")
    context = Context(vector=torch.zeros(3, 12))
    assert network.prepare(context) is context


def test_nothing_is_kept_of_what_takes_part_in_a_gradient_or_outlives_the_block():
    weight, calls = torch.ones(2, requires_grad=True), []

    def make():
        calls.append(len(calls))
        return 2 * weight

    with reuse.fixed_weights():
        reuse.once("double", make), reuse.once("double", make)
        assert len(calls) == 2
        with torch.no_grad():
            first = reuse.once("double", make)
            with reuse.fixed_weights():
                assert reuse.once("double", make) is not first
            assert reuse.once("double", make) is first
    with torch.no_grad(), reuse.fixed_weights():
        assert reuse.once("double", make) is not first


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling_makes_biases_once_and_enters_autocast_once(base, precision):
    counts = []
    for steps in (2, 5):
        options = [f"--network={trained_snapshot(base)}", "--seeds=0-1", f"--steps={steps}"]
        options += [f"--outdir={base / precision / str(steps)}", "--cfg-scale=2", "--batch=2"]
        with (
            counted(layers.TMSA, "bias") as biases,
            counted(torch.autocast, "__enter__") as entries,
        ):
            succeed(generate, *options, f"--precision={precision}")
        counts.append((len(biases), len(entries)))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_sampling_from_supports_makes_keys_and_values_once(base, tmp_path):
    options = ("--mode-conditioning=lag", "--context-drop=0.2")
    run_dir = train_tiny(base / "lag", toy_data(base), *options, tiny=TINY_SETS).run_dir
    snapshot = max(run_dir.glob("network-snapshot-*.pkl"))
    with counted(layers.CrossAttention, "keys_values") as calls:
        options = [f"--network={snapshot}", "--seeds=0-1", f"--outdir={tmp_path / 'out'}"]
        succeed(generate, *options, "--episodes=1", "--cfg-scale=2", "--steps=6")
    assert len(calls) == 2  # One layer, with the support and without.


@pytest.mark.parametrize("is_autocast", [True, False])
def test_a_layer_and_its_gelu_are_one_call_where_onednn_multiplies(is_autocast):
    if not cpu_matmul.is_by_onednn(torch.bfloat16):
        pytest.skip("oneDNN does not multiply bfloat16 on this CPU")
    layer = torch.nn.Linear(24, 40)
    x = torch.randn(2, 5, 24)
    expected = functional.gelu(layer(x).double(), approximate="tanh").float()
    if not is_autocast:
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        plain = layers.linear_gelu(layer, x)
        with torch.no_grad(), mock.patch.object(functional, "gelu", side_effect=AssertionError):
            fused = layers.linear_gelu(layer, x)
    assert fused.dtype == plain.dtype == torch.bfloat16
    assert plain.grad_fn is not None
    for found in (plain, fused):
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    # Where MKL multiplies, it stays as it is.
    with torch.no_grad():
        exact = layers.linear_gelu(layer.float(), x.float())
    torch.testing.assert_close(exact, expected, rtol=0.02, atol=0.02)
