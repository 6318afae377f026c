"""The plain networks that benchmarks compare with."""

from benchmarks.plain_diffit import PlainDiffiT
from benchmarks.plain_latent_diffit import PlainLatentDiffiT
from models import ModelConfig, Network, build_network
from models.diffit import DiffiTConfig
from models.latent_diffit import LatentDiffiTConfig

_BACKBONES = {DiffiTConfig: PlainDiffiT, LatentDiffiTConfig: PlainLatentDiffiT}


def build_plain_network(config: ModelConfig) -> Network:
    """Return the network of ``config`` with the plain backbone and the same initial weights."""
    network = build_network(config)
    plain = _BACKBONES[type(config)](config)
    plain.load_state_dict(network.backbone.state_dict())
    network.backbone = plain
    return network
