"""Networks: a backbone and the conditioner that prepares its context.

Configurations are made without torch. The network of one, and its architecture's module, are
imported when it is built.
"""

from typing import TYPE_CHECKING

from models.config import ARCHITECTURES, LatentModelConfig, ModelConfig, ScaledLatentConfig

if TYPE_CHECKING:
    import torch

    from models.network import Network

__all__ = [
    "ARCHITECTURES",
    "LatentModelConfig",
    "ModelConfig",
    "ScaledLatentConfig",
    "attention_backend",
    "build_network",
]


def build_network(config: ModelConfig) -> "Network":
    """Return the network of a configuration, with initial weights from torch's global generator.

    Constants are not part of its state: a network made on the meta device has no values for them.
    """
    from models.network import Network

    return Network(config)


def attention_backend(config: ModelConfig, device: "torch.device | str") -> str:
    """Return the way to attention, see models/attention.py, that training on ``device`` takes.

    Without a learned bias CPUs choose anew for every call, and the text says so. Raises ValueError
    if the configured ones cannot be trained there.
    """
    import torch

    from models.attention import choose_attention

    device = torch.device(device)
    if not config.has_attention_bias and device.type == "cpu":
        return "sdpa or explicit, by type and number of tokens"
    return choose_attention(config.attention, device, needs_grad=True)
