"""LPIPS, the perceptual distance of two images (Zhang et al., arXiv:1801.03924), in plain PyTorch.

It is version 0.1 of the published metric ("lin"). Modules have the names used in the two published
files: torchvision's AlexNet or VGG16, and the linear weights of the package lpips.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from dnnlib.config import unknown
from dnnlib.errors import refusal
from metrics.network import arithmetic, network_hash
from metrics.weights import load_weights
from torch_utils import distributed

WEIGHTS_VARIABLE = "SETDIFFIT_LPIPS"
# Mean and standard deviation of each channel of the backbones' training data, scaled to [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
_MAX_PIXELS = 2**21  # Per pass, of either side of the pairs; bounds the memory of activations.
_LINEAR_URL = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
)


class _Layout(NamedTuple):
    """One backbone: its layers, those whose activations are compared, and its published files."""

    # A convolution's output channels, kernel, stride and padding; the output channels alone for a
    # 3x3 one that keeps the size; None for pooling. A ReLU follows each convolution.
    layers: tuple[tuple[int, int, int, int] | int | None, ...]
    pool: int  # Window of the poolings; their stride is 2.
    taps: tuple[int, ...]  # Positions, in the network's ``features``, of the ReLUs to compare.
    min_size: int  # Smallest side in pixels for which the last pooling has an output.
    backbone: tuple[str, str]  # Address and SHA-256.
    linear: tuple[str, str]


LAYOUTS = {
    "alex": _Layout(
        layers=((64, 11, 4, 2), None, (192, 5, 1, 2), None, 384, 256, 256),
        pool=3,
        taps=(1, 4, 7, 9, 11),
        min_size=31,
        backbone=(
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        ),
        linear=(
            _LINEAR_URL + "alex.pth",
            "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        ),
    ),
    "vgg": _Layout(
        layers=(64, 64, None, 128, 128, None, *(256,) * 3, None, *(512,) * 3, None, *(512,) * 3),
        pool=2,
        taps=(3, 8, 15, 22, 29),
        min_size=16,
        backbone=(
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        ),
        linear=(
            _LINEAR_URL + "vgg.pth",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        ),
    ),
}


def _linear(in_dim: int) -> nn.ModuleDict:
    """One non-negative weight per channel; the identity takes the place of the original dropout."""
    convolution = nn.Conv2d(in_dim, 1, 1, bias=False)
    return nn.ModuleDict({"model": nn.Sequential(nn.Identity(), convolution)})


class LpipsNetwork(nn.Module):
    """Backbone and linear weights; ``net`` is a key of :data:`LAYOUTS`."""

    def __init__(self, net: str) -> None:
        super().__init__()
        layout = LAYOUTS[net]
        self.features = nn.Sequential()
        self._taps = layout.taps
        in_dim = 3
        for layer in layout.layers:
            if layer is None:
                self.features.append(nn.MaxPool2d(layout.pool, stride=2))
                continue
            out_dim, *rest = layer if isinstance(layer, tuple) else (layer, 3, 1, 1)
            self.features.extend([nn.Conv2d(in_dim, out_dim, *rest), nn.ReLU(inplace=True)])
            in_dim = out_dim
        for index, tap in enumerate(layout.taps):
            self.add_module(f"lin{index}", _linear(self.features[tap - 1].out_channels))
        self.register_buffer("_shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("_scale", torch.tensor(_SCALE)[:, None, None], persistent=False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the distances [N] of images [N, 3, H, W] in [-1, 1] (Eq. 1 of the paper)."""
        x = (torch.cat([a, b]) - self._shift) / self._scale
        total = a.new_zeros(len(a))
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._taps:
                length = x.square().sum(dim=1, keepdim=True).sqrt()  # Over channels, per position.
                first, second = (x / (length + _EPS)).chunk(2)
                linear = getattr(self, f"lin{self._taps.index(index)}")["model"]
                total = total + linear((first - second).square()).mean(dim=(1, 2, 3))
        return total


class LPIPS:
    """The perceptual distance with the backbone ``net``, computed in float32.

    The paper's authors recommend ``alex`` as a metric. Equal values of ``hash`` mean equal
    distances.
    """

    def __init__(self, network: LpipsNetwork, net: str, device: torch.device | str) -> None:
        self.net = net
        self.device = torch.device(device)
        self.hash = network_hash(network, f"LPIPS v0.1, {net}, x / 127.5 - 1, {_SHIFT}, {_SCALE}")
        self._network = network.eval().requires_grad_(False).to(self.device)

    @classmethod
    def load(
        cls, net: str = "alex", weights: Sequence[str] = (), device: torch.device | str = "cpu"
    ) -> "LPIPS":
        """Return the distance with weights read by :func:`read_weights`. Collective: rank 0 reads.

        Without ``weights``, the environment variable SETDIFFIT_LPIPS names them, separated by a
        comma; if it is not set, the published files are downloaded once and their checksums
        verified.
        """
        named = os.environ.get(WEIGHTS_VARIABLE, "").split(",")
        weights = tuple(weights) or tuple(filter(None, named))
        state = distributed.on_main_tree(lambda: read_weights(net, weights))
        # The initial values are overwritten; drawing them must not advance the random state.
        with torch.random.fork_rng(devices=[]):
            network = LpipsNetwork(net)
        network.load_state_dict(state)
        return cls(network, net, device)

    @torch.inference_mode()
    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the distances [N], float32 on ``self.device``, between images ``a`` and ``b``.

        Both are [N, 3, H, W], uint8 or floating point in [-1, 1], on any device. A pair's distance
        depends on that pair alone. Raises ValueError for other shapes, and for sides shorter than
        the backbone needs (31 pixels for ``alex``, 16 for ``vgg``).
        """
        smallest = LAYOUTS[self.net].min_size
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < smallest:
            got = f"images of shapes {list(a.shape)} and {list(b.shape)}"
            expected = f"two equal [N, 3, H, W] with sides of at least {smallest} pixels"
            raise ValueError(f"LPIPS ({self.net}) got {got}; expected {expected}.")
        size = max(_MAX_PIXELS // math.prod(a.shape[2:]), 1)
        parts = [torch.empty(0, device=self.device)]
        for start in range(0, len(a), size):
            first, second = (self._input(images[start : start + size]) for images in (a, b))
            with arithmetic(self.device, "float32"):
                parts.append(self._network(first, second))
        return torch.cat(parts)

    def _input(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(self.device, torch.float32)
        if images.dtype == torch.uint8:
            return x / 127.5 - 1
        assert x.abs().max() <= 1 + 1e-4, "floating-point images are in [-1, 1]"
        return x


def read_weights(net: str, weights: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Return the state dict of :class:`LpipsNetwork`, float32 on the CPU, names and shapes checked.

    ``weights`` are paths or URLs: none for the published files, one for a file with both parts, or
    two for the backbone and the linear weights. The classifier in torchvision's files is left out.
    Raises ValueError for an unknown ``net``, for more than two files, and as
    :func:`~metrics.weights.load_weights` does.
    """
    if net not in LAYOUTS:
        raise unknown("LPIPS backbone", net, LAYOUTS)
    if len(weights) > 2:
        accepted = "one file with both parts or two, the backbone and the linear weights"
        raise refusal("LPIPS weights", f"{len(weights)} ({', '.join(weights)})", accepted=accepted)
    with torch.device("meta"):
        wanted = LpipsNetwork(net).state_dict()
    published = LAYOUTS[net].backbone, LAYOUTS[net].linear
    names = [url.rpartition("/")[2] for url, _ in published]
    prefixes = ("features.", "lin")
    expected = [f"the names of the published {name}" for name in names]
    if len(weights) == 1:
        prefixes, expected = ("",), [f"all names of both {' and '.join(names)}"]
    files = [(location, None) for location in weights] or published
    state = {}
    for (location, sha256), holds, prefix in zip(files, expected, prefixes, strict=True):
        state |= load_weights(
            location,
            {name: value for name, value in wanted.items() if name.startswith(prefix)},
            network="LPIPS",
            sha256=sha256,
            expected=f"Expected {holds}.",
            remedy=f"A local copy can be named by ${WEIGHTS_VARIABLE}, as FILE or BACKBONE,LINEAR.",
            left_out=r"^classifier\.",
        )
    return state
