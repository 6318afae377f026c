"""The plain networks that benchmarks compare with."""

from benchmarks.plain_diffit import PlainDiffiT
from benchmarks.plain_latent_diffit import PlainLatentDiffiT
from benchmarks.plain_set_dit import LoopConditioner, PlainSetDiT
from models import ModelConfig, Network, build_network
from models.diffit import DiffiTConfig
from models.latent_diffit import LatentDiffiTConfig
from models.set_dit import SetDiTConfig

_BACKBONES = {
    DiffiTConfig: PlainDiffiT,
    LatentDiffiTConfig: PlainLatentDiffiT,
    SetDiTConfig: PlainSetDiT,
}
_CONDITIONERS = {SetDiTConfig: LoopConditioner}


def build_plain_network(config: ModelConfig) -> Network:
    """Return the network of ``config`` with the plain parts and the same initial weights."""
    network = build_network(config)
    plain = _BACKBONES[type(config)](config)
    plain.load_state_dict(network.backbone.state_dict())
    network.backbone = plain
    make_conditioner = _CONDITIONERS.get(type(config))
    if make_conditioner is not None:
        conditioner = make_conditioner(config, plain.context_dim)
        conditioner.load_state_dict(network.conditioner.state_dict())
        network.conditioner = conditioner
    return network
