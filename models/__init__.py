"""Networks: a backbone, and the conditioner that prepares its context.

Configurations need no torch: the code of a network is imported only when the network is built.
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

    Its constants are buffers outside the state dict, so loading weights into a network that was
    made on the meta device leaves them without values.
    """
    from models.network import Network

    return Network(config)


def attention_backend(config: ModelConfig, device: "torch.device | str") -> str:
    """Return the attention implementation, of models/attention.py, for training on ``device``.

    On a CPU and without a learned bias it is chosen for every call, which the returned text says.
    Raises ValueError if the configured implementation cannot be trained there.
    """
    import torch

    from models.attention import choose_attention

    device = torch.device(device)
    if not config.has_attention_bias and device.type == "cpu":
        return "sdpa or explicit, by type and number of tokens"
    return choose_attention(config.attention, device, needs_grad=True)
