"""Faults of the training itself: learning rate, averages, precision, layers, samples, context."""

import functools

import torch

from faults import Fault
from models import attention, layers, network
from torch_utils import rng
from training import ema, loop, optimizer

ALL = ("digits", "fsdm-digits", "digits-latent", "nanodit-tiny")


def _scaled_rate(factor):
    original = loop.learning_rate
    loop.learning_rate = lambda *args: factor * original(*args)


def _average_stands_still():
    original = ema.EMA.update

    def update(self, beta, skip):
        if beta == 0:  # The first step, in which it begins.
            original(self, beta, skip)

    ema.EMA.update = update


def _average_far_behind():
    original = loop.ema_beta
    loop.ema_beta = lambda *args: max(original(*args), 0.9999) if args[0] else original(*args)


def _rounded_weights():
    step = optimizer.GuardedAdam.step

    @torch.no_grad()
    def rounding(self, lr):
        norm = step(self, lr)
        for param in self._parameters.own:
            param.copy_(param.bfloat16())
        return norm

    optimizer.GuardedAdam.step = rounding


def _with_mlp(change):
    """Change the MLP of the last block of the network that is built."""
    original = loop.build_network

    def build(config):
        network = original(config)
        *_, block = config.sharded_parts(network.backbone)
        change(next(module for module in block.modules() if isinstance(module, layers.MLP)))
        return network

    loop.build_network = build


@torch.no_grad()
def _kill(mlp):
    mlp.fc1.bias = None
    mlp.fc1.register_forward_hook(lambda module, args, output: output - 1e4)


def _blow_up(mlp):
    mlp.register_forward_hook(lambda module, args, output: 300 * output)


def _sharp_attention():
    original = attention.attend

    @functools.wraps(original)
    def attend(q, k, v, *args, **kwargs):
        return original(1000 * q, k, v, *args, **kwargs)

    layers.attend = attend


def _one_seed_for_all():
    original = rng.SeededNoise.__init__

    def init(self, seeds, device="cpu"):
        original(self, [0] * len(seeds), device)

    rng.SeededNoise.__init__ = init


def _one_context_for_all():
    own = network.Network.forward

    def forward(self, x, c_noise, context):
        same = context._map(lambda value: value.amax(0, keepdim=True).expand_as(value))
        return own(self, x, c_noise, same)

    network.Network.forward = forward


FAULTS = (
    Fault("rate_x30", ALL, "learning_rate_high", functools.partial(_scaled_rate, 30)),
    Fault("rate_x0.003", ALL, "learning_rate_low", functools.partial(_scaled_rate, 0.003)),
    Fault("average_stands_still", ALL, "average_not_updated", _average_stands_still),
    Fault("average_far_behind", ALL, "average_behind", _average_far_behind),
    Fault("rounded_weights", ALL, "weights_rounded", _rounded_weights),
    Fault("dead_layer", ALL, "layer_dead", functools.partial(_with_mlp, _kill)),
    Fault("exploding_layer", ALL, "layer_exploding", functools.partial(_with_mlp, _blow_up)),
    Fault("sharp_attention", ALL, "attention_saturated", _sharp_attention),
    # Pictures of features all have prompts of their own, and differ even so.
    Fault("one_seed", ALL[:3], "samples_collapsed", _one_seed_for_all, ("--snap=1",)),
    Fault("one_context", ALL, "context_unused", _one_context_for_all),
)
