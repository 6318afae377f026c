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

    Raises ValueError if the configured ones cannot be trained there.
    """
    import torch

    from models.attention import choose_attention

    return choose_attention(config.attention, torch.device(device), needs_grad=True)
