"""Normalised queries and keys: the function, in every attention of every family."""

import dataclasses

import pytest
import torch
from set_networks import build_active, random_images
from torch import nn
from torch.nn import functional

from configs.presets import PRESETS
from models import build_network
from models.attention import HeadNorm, attend
from models.attention_probe import record_attention
from models.layers import TMSA, CrossAttention, SelfAttention, merge_heads, split_heads
from models.set_encoder import EncoderAttention
from torch_utils.misc import count_parameters

HEADS, DIM = 2, 6


def active(module):
    """Return a module in float64 whose weights, scales included, are random."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return module


def random(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_hand(x, norm):
    """RMS norm of the last dimension, from its formula."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.scale


def expected(module, q, k, v, scale=None):
    """Attention of split heads, each query and key normalised."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = by_hand(q, module.q_norm) @ by_hand(k, module.k_norm).transpose(-1, -2) * scale
    return module.proj(merge_heads(scores.softmax(-1) @ v))


def test_self_attention_normalises_each_head():
    module, x = active(SelfAttention(DIM, HEADS, qk_norm=True)), random(3, 5, DIM)
    q, k, v = split_heads(module.qkv(x), DIM // HEADS).chunk(3, dim=1)
    torch.testing.assert_close(module(x), expected(module, q, k, v))


def test_cross_attention_normalises_and_keeps_normalised_keys():
    module = active(CrossAttention(DIM, 4, HEADS, qk_norm=True))
    x, context = random(3, 5, DIM), random(3, 7, 4)
    q = split_heads(module.q(x), DIM // HEADS)
    k, v = split_heads(module.kv(context), DIM // HEADS).chunk(2, dim=1)
    torch.testing.assert_close(module(x, context), expected(module, q, k, v))
    kept = module.keys_values(context)
    torch.testing.assert_close(module(x, context, keys_values=kept), module(x, context))


def test_the_encoder_of_sets_normalises_before_its_temperature():
    module = active(EncoderAttention(DIM, HEADS, 4, locality=True, qk_norm=True))
    x = random(3, 5, DIM)
    q, k, v = split_heads(module.qkv(x), 4).chunk(3, dim=1)
    found = module(x, None)
    torch.testing.assert_close(found, expected(module, q, k, v, module.log_temperature.exp()))


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_windowed_attention_normalises_beside_its_bias(attention):
    module = active(TMSA(DIM, 3, HEADS, window=2, attention=attention, qk_norm=True))
    x, t = random(2, 2, 2, DIM), random(2, 3)  # One window.
    qkv = (module.qkv(x) + module.qkv_temb(t)[:, None, None]).flatten(1, 2)
    q, k, v = split_heads(qkv, DIM // HEADS).chunk(3, dim=1)
    y = attend(by_hand(q, module.q_norm), by_hand(k, module.k_norm), v, module.bias())
    torch.testing.assert_close(module(x, t).flatten(1, 2), module.proj(merge_heads(y)))


def test_half_precision_keeps_its_type_and_survives_what_overflows_its_square():
    norm = HeadNorm(4)
    x = torch.full((1, 1, 1, 4), 6e4, dtype=torch.float16)
    y = norm(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y))


@pytest.mark.parametrize("mode", ["film", "lag"])
def test_larger_weights_of_queries_and_keys_change_nothing(mode):
    """Without the norm, scores would grow by the square of the factor."""

    def outputs(qk_norm):
        network = build_active(qk_norm=qk_norm, mode_conditioning=mode).double()
        results = []
        for factor in (1.0, 1e3):
            with torch.no_grad():
                for module in network.modules():
                    if isinstance(module, SelfAttention | EncoderAttention):
                        module.qkv.weight[: 2 * len(module.qkv.weight) // 3] *= factor
                        if module.qkv.bias is not None:
                            module.qkv.bias[: 2 * len(module.qkv.bias) // 3] *= factor
                    elif isinstance(module, CrossAttention):
                        for layer, rows in ((module.q, 1), (module.kv, 2)):
                            layer.weight[: len(layer.weight) // rows] *= factor
                            layer.bias[: len(layer.bias) // rows] *= factor
                x = random_images(2, dtype=torch.float64)
                support = random_images(2, 3, seed=3, dtype=torch.float64)
                context = network.context({"support": support})
                results.append(network(x, torch.tensor([0.1, 0.7]).double(), context))
        return results

    torch.testing.assert_close(*outputs(True), rtol=1e-4, atol=1e-4)
    plain = outputs(False)
    assert (plain[0] - plain[1]).abs().max() > 1e-2


SMALL = ("digits", "digits-latent", "fsdm-digits", "fsdm-cifar100-lag", "nanodit-tiny")


@pytest.mark.parametrize("name", SMALL)
def test_every_attention_gets_two_scales_a_dimension_of_a_head_and_nothing_else(name):
    config = PRESETS[name].run.model
    assert not config.qk_norm
    with torch.device("meta"):
        plain = build_network(config)
        normed = build_network(dataclasses.replace(config, qk_norm=True))
    kinds = (TMSA, SelfAttention, CrossAttention, EncoderAttention)
    found = [n for n, module in normed.named_modules() if isinstance(module, kinds)]
    assert found
    added = normed.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"{n}.{part}_norm.scale" for n in found for part in "qk"}
    assert plain.state_dict().keys() <= normed.state_dict().keys()
    scales = [m for m in normed.modules() if isinstance(m, HeadNorm)]
    more = sum(module.scale.numel() for module in scales)
    assert count_parameters(normed) == count_parameters(plain) + more


def test_the_initial_weights_are_those_without_it():
    networks = []
    for qk_norm in (False, True):
        torch.manual_seed(0)
        run = PRESETS["digits"].run
        networks.append(build_network(dataclasses.replace(run.model, qk_norm=qk_norm)))
    own = networks[1].state_dict()
    assert all(torch.equal(own[name], value) for name, value in networks[0].state_dict().items())


def test_a_report_on_attention_sees_normalised_scores():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.cross = active(CrossAttention(DIM, 4, HEADS, qk_norm=True)).float()

    holder, x, context = Holder(), random(2, 3, DIM).float(), random(2, 5, 4).float()
    with record_attention(holder, {"a": 2, "b": 3}) as mass:
        holder.cross(x, context)
    q = functional.normalize(split_heads(holder.cross.q(x), 3), dim=-1) * 3**0.5
    k = split_heads(holder.cross.kv(context), 3).chunk(2, dim=1)[0]
    k = functional.normalize(k, dim=-1) * 3**0.5
    q, k = q * holder.cross.q_norm.scale, k * holder.cross.k_norm.scale
    weights = (q @ k.transpose(-1, -2) * 3**-0.5).softmax(-1)
    shares = mass.by_layer()[0]
    assert shares["a"] == pytest.approx(weights[..., :2].sum(-1).mean().item(), abs=1e-5)
