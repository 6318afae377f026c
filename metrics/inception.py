"""The Inception-v3 network that published FIDs are measured with, in plain PyTorch.

It is the network of TensorFlow's ``inception-2015-12-05`` graph: that of Szegedy et al.,
arXiv:1512.00567, with 1008 outputs and the deviations of that graph, which are noted where they
occur. Modules have the names of the published checkpoint (those of torchvision's Inception3).
"""

import os
import types
from collections.abc import Callable, Collection, Sequence
from typing import Self

import torch
from torch import nn

from dnnlib.config import unknown
from metrics.network import NetworkDetector
from metrics.weights import load_weights
from torch_utils import distributed

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_VARIABLE = "SETDIFFIT_INCEPTION"
IMAGE_SIZE = 299
Size = int | tuple[int, int]
_NUM_SPATIAL = 7


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: Size, stride: int = 1, padding: Size = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_dim, eps=1e-3)
        self.bn.num_batches_tracked = None  # A counter of training steps, not a weight.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self.bn(self.conv(x)), inplace=True)


def _average_pool(x: torch.Tensor) -> torch.Tensor:
    """3x3 average that leaves padding out of the mean, as TensorFlow does and torchvision not."""
    return nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.max_pool2d(x, 3, stride=1, padding=1)


def _halving_pool(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.max_pool2d(x, 3, stride=2)


class Block(nn.Module):
    """Parallel branches of convolutions and one of pooling, with concatenated outputs.

    Args:
        in_dim: Channels of the input.
        branches: The steps of each branch of convolutions. A step is one convolution, or a list of
            convolutions of the same input, which must come last. A convolution is (name, output
            channels, kernel), which keeps the size, or (name, output channels, kernel, 2), which
            has stride 2 and no padding.
        pool: Pooling of the last branch.
        pool_dim: Output channels of the 1x1 convolution after the pooling; 0 for none.
    """

    def __init__(
        self, in_dim: int, branches: Sequence[Sequence], pool: Callable, pool_dim: int = 0
    ) -> None:
        super().__init__()
        self.pool = pool
        self._branches: list[list[list[str]]] = []
        for branch in branches:
            dim, names = in_dim, []
            for step in branch:
                rows = step if isinstance(step, list) else [step]
                for name, out_dim, kernel, *stride in rows:
                    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    padding = 0 if stride else (height // 2, width // 2)
                    self.add_module(name, ConvNorm(dim, out_dim, kernel, *stride, padding=padding))
                dim = out_dim
                names.append([name for name, *_ in rows])
            self._branches.append(names)
        self.branch_pool = ConvNorm(in_dim, pool_dim, 1) if pool_dim else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for branch in self._branches:
            found = [x]
            for names in branch:
                found = [getattr(self, name)(found[0]) for name in names]
            outputs += found
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


def block_a(in_dim: int, pool_dim: int) -> Block:
    """Mixed_5b to 5d, at 35x35: 1x1, 5x5, double 3x3 and pooled branches."""
    branches = (
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    )
    return Block(in_dim, branches, _average_pool, pool_dim)


def block_b(in_dim: int) -> Block:
    """Mixed_6a: from 35x35 to 17x17."""
    branches = (
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    )
    return Block(in_dim, branches, _halving_pool)


def block_c(in_dim: int, mid_dim: int) -> Block:
    """Mixed_6b to 6e, at 17x17: factorised 7x7 convolutions of ``mid_dim`` channels."""
    branches = (
        [("branch1x1", 192, 1)],
        [
            ("branch7x7_1", mid_dim, 1),
            ("branch7x7_2", mid_dim, (1, 7)),
            ("branch7x7_3", 192, (7, 1)),
        ],
        [
            ("branch7x7dbl_1", mid_dim, 1),
            ("branch7x7dbl_2", mid_dim, (7, 1)),
            ("branch7x7dbl_3", mid_dim, (1, 7)),
            ("branch7x7dbl_4", mid_dim, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
    )
    return Block(in_dim, branches, _average_pool, 192)


def block_d(in_dim: int) -> Block:
    """Mixed_7a: from 17x17 to 8x8."""
    branches = (
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
    )
    return Block(in_dim, branches, _halving_pool)


def block_e(in_dim: int, pool: Callable) -> Block:
    """Mixed_7b and 7c, at 8x8: 3x3 convolutions that fan out into a row and a column."""
    single = [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]
    double = [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]
    branches = (
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), single],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), double],
    )
    return Block(in_dim, branches, pool, 192)


class Inception(nn.Module):
    """Inception-v3 up to its global average pool, and ``fc``, which maps that to 1008 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = block_a(192, pool_dim=32)
        self.Mixed_5c = block_a(256, pool_dim=64)
        self.Mixed_5d = block_a(288, pool_dim=64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, mid_dim=128)
        self.Mixed_6c = block_c(768, mid_dim=160)
        self.Mixed_6d = block_c(768, mid_dim=160)
        self.Mixed_6e = block_c(768, mid_dim=192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, _average_pool)
        # The 2015-12-05 graph takes the maximum here; Mixed_7b and the paper take the average.
        self.Mixed_7c = block_e(2048, _max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(
        self, x: torch.Tensor, outputs: Collection[str] = ("features",)
    ) -> dict[str, torch.Tensor]:
        """Return ``outputs`` of preprocessed images [N, 3, H, W], H and W at least 75, in one pass.

        ``features`` [N, 2048] is the global average pool. ``spatial`` [N, H' W' 7] (2,023 values at
        299x299), for sFID, holds the first 7 channels of Mixed_6d's 1x1 branch in the order
        [H', W', 7], as ADM takes them from the tensor ``mixed_6/conv:0`` (Nash et al.,
        arXiv:2103.03841). ``logits`` [N, 1008], for the Inception Score, omits the bias, as ADM and
        StyleGAN3 do.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
        x = nn.functional.max_pool2d(x, 3, stride=2)  # [N, 64, 73, 73]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # [N, 192, 71, 71]
        x = nn.functional.max_pool2d(x, 3, stride=2)  # [N, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [N, 288, 35, 35]
        x = self.Mixed_6a(x)  # [N, 768, 17, 17]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))  # [N, 768, 17, 17]
        found = {}
        if "spatial" in outputs:
            # The 1x1 branch comes first among the concatenated ones.
            found["spatial"] = x[:, :_NUM_SPATIAL].permute(0, 2, 3, 1).flatten(1)
        if set(outputs) <= set(found):
            return found
        x = self.Mixed_7a(self.Mixed_6e(x))  # [N, 1280, 8, 8]
        x = self.Mixed_7c(self.Mixed_7b(x))  # [N, 2048, 8, 8]
        features = x.float().mean(dim=(2, 3))  # [N, 2048]
        if "features" in outputs:
            found["features"] = features
        if "logits" in outputs:
            found["logits"] = nn.functional.linear(features, self.fc.weight)
        return found


def resize_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return float32 images [N, C, size, size], resized by TensorFlow 1's bilinear interpolation.

    As in ``tf.image.resize_bilinear``, output pixel i is interpolated at input position i * in /
    out: neither pixel centres nor corners are aligned, and there is no antialiasing.
    """
    x = images.to(torch.float32)
    for dim in (3, 2):
        length = x.shape[dim]
        if length == size:
            continue
        position = torch.arange(size, dtype=torch.float64) * length / size
        low = position.floor().long()
        high = (low + 1).clamp(max=length - 1).to(x.device)
        weight = (position - low).to(x.device, torch.float32)
        weight = weight if dim == 3 else weight[:, None]
        first = x.index_select(dim, low.to(x.device))
        x = first + (x.index_select(dim, high) - first) * weight
    return x


def preprocess_tensorflow(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images [N, C, H, W] as float32 [N, C, 299, 299] in [-1, 1).

    This is the convention of StyleGAN3's and EDM's FID: resize in [0, 255], then (x - 128) / 128.
    """
    return (resize_tensorflow(images, IMAGE_SIZE) - 128) / 128


def preprocess_pytorch_fid(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images [N, C, H, W] as float32 [N, C, 299, 299] in [-1, 1].

    This is the convention of pytorch-fid: bilinear resize with aligned pixel centres and without
    antialiasing, then 2 x / 255 - 1.
    """
    x = nn.functional.interpolate(
        images.to(torch.float32) / 255, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear"
    )
    return 2 * x - 1


CONVENTIONS = {
    "tensorflow": (preprocess_tensorflow, "TensorFlow-style bilinear to 299, (x - 128) / 128"),
    "pytorch-fid": (preprocess_pytorch_fid, "half-pixel bilinear to 299, 2 x / 255 - 1"),
}


class InceptionDetector(NetworkDetector):
    """The outputs of :class:`Inception` with one of the two published input conventions."""

    name = "inception"
    outputs = types.MappingProxyType(dict(features=2048, spatial=17 * 17 * 7, logits=1008))

    def __init__(
        self,
        network: Inception,
        device: torch.device | str,
        *,
        convention: str = "tensorflow",
        precision: str = "float32",
    ) -> None:
        """``convention`` is a key of :data:`CONVENTIONS`; raises ValueError for any other."""
        if convention not in CONVENTIONS:
            raise unknown("Inception input convention", convention, CONVENTIONS)
        self._convert, self.preprocessing = CONVENTIONS[convention]
        super().__init__(network, device, f"inception-2015-12-05, {self.preprocessing}", precision)
        self._network.to(memory_format=torch.channels_last)

    @classmethod
    def load(cls, weights: str | None, device: torch.device | str, **settings: str) -> Self:
        """Return the detector with weights from a path or URL. Collective: rank 0 reads them.

        Without ``weights``, the environment variable SETDIFFIT_INCEPTION names them; if it is not
        set, the published file is downloaded once and its checksum verified. ``settings`` are the
        constructor's keyword arguments.
        """
        weights = weights or os.environ.get(WEIGHTS_VARIABLE)
        state = distributed.on_main_tree(lambda: read_weights(weights))
        with torch.device("meta"):
            network = Inception()
        network.load_state_dict(state, strict=False, assign=True)
        return cls(network, device, **settings)

    def _preprocess(self, images: torch.Tensor) -> torch.Tensor:
        return self._convert(images)

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        return self._network(x, outputs)


def read_weights(weights: str | None = None) -> dict[str, torch.Tensor]:
    """Return the state dict of an Inception checkpoint, float32 on the CPU.

    ``weights`` is the path or URL of a file with the layout of the published one, which is the
    default; names and shapes are checked. Raises ValueError as
    :func:`~metrics.weights.load_weights` does.
    """
    with torch.device("meta"):
        wanted = Inception().state_dict()
    return load_weights(
        weights or WEIGHTS_URL,
        wanted,
        network="Inception",
        sha256=None if weights else WEIGHTS_SHA256,
        expected=f"Expected a state dict in the layout of {WEIGHTS_URL.rpartition('/')[2]}.",
        remedy=f"Name a local copy with ${WEIGHTS_VARIABLE}, or choose kid_pixels or fd_pixels, "
        "which need no download.",
        left_out=r"\.num_batches_tracked$",
    )
