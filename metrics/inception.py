"""The Inception-v3 that published FIDs are measured with, in plain PyTorch.

It is the network of TensorFlow's ``inception-2015-12-05`` graph: Szegedy et al., arXiv:1512.00567,
with 1008 outputs and the deviations of that graph, which are named where they occur. Modules carry
the names of the published checkpoint (those of torchvision's Inception3).
"""

import os
import types
from collections.abc import Collection

import torch
from torch import nn

from dnnlib.config import did_you_mean
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
_NUM_SPATIAL = 7
_EXPECTED_LAYOUT = f"Expected a state dict in the layout of {WEIGHTS_URL.rpartition('/')[2]}."


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_dim, eps=1e-3)
        self.bn.num_batches_tracked = None  # Counts training steps: no weight.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self.bn(self.conv(x)), inplace=True)


def _row(in_dim: int, out_dim: int, length: int) -> ConvNorm:
    return ConvNorm(in_dim, out_dim, (1, length), padding=(0, length // 2))


def _column(in_dim: int, out_dim: int, length: int) -> ConvNorm:
    return ConvNorm(in_dim, out_dim, (length, 1), padding=(length // 2, 0))


def _average_pool(x: torch.Tensor) -> torch.Tensor:
    """3x3 average in which padding does not count, as in TensorFlow (in torchvision it does)."""
    return nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(nn.Module):
    """Mixed_5b to 5d, at 35x35: 1x1, 5x5, double 3x3 and pooled branches."""

    def __init__(self, in_dim: int, pool_dim: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(in_dim, 64, 1)
        self.branch5x5_1 = ConvNorm(in_dim, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(in_dim, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(in_dim, pool_dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average_pool(x)),
        ]
        return torch.cat(branches, dim=1)


class BlockB(nn.Module):
    """Mixed_6a: from 35x35 to 17x17."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(in_dim, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(in_dim, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            nn.functional.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class BlockC(nn.Module):
    """Mixed_6b to 6e, at 17x17: factorised 7x7 convolutions of ``mid_dim`` channels."""

    def __init__(self, in_dim: int, mid_dim: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(in_dim, 192, 1)
        self.branch7x7_1 = ConvNorm(in_dim, mid_dim, 1)
        self.branch7x7_2 = _row(mid_dim, mid_dim, 7)
        self.branch7x7_3 = _column(mid_dim, 192, 7)
        self.branch7x7dbl_1 = ConvNorm(in_dim, mid_dim, 1)
        self.branch7x7dbl_2 = _column(mid_dim, mid_dim, 7)
        self.branch7x7dbl_3 = _row(mid_dim, mid_dim, 7)
        self.branch7x7dbl_4 = _column(mid_dim, mid_dim, 7)
        self.branch7x7dbl_5 = _row(mid_dim, 192, 7)
        self.branch_pool = ConvNorm(in_dim, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average_pool(x)),
        ]
        return torch.cat(branches, dim=1)


class BlockD(nn.Module):
    """Mixed_7a: from 17x17 to 8x8."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(in_dim, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(in_dim, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factorised = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = [
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(factorised),
            nn.functional.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class BlockE(nn.Module):
    """Mixed_7b and 7c, at 8x8: 3x3 convolutions that fan out into a row and a column.

    Mixed_7c of the 2015-12-05 graph pools by the maximum; 7b, and the paper, by the average.
    """

    def __init__(self, in_dim: int, max_pool: bool) -> None:
        super().__init__()
        self.pool = _max_pool if max_pool else _average_pool
        self.branch1x1 = ConvNorm(in_dim, 320, 1)
        self.branch3x3_1 = ConvNorm(in_dim, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = ConvNorm(in_dim, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = ConvNorm(in_dim, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = self.pool(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)


class Inception(nn.Module):
    """Inception-v3 up to its global average pool; ``fc`` makes its 1008 logits of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool_dim=32)
        self.Mixed_5c = BlockA(256, pool_dim=64)
        self.Mixed_5d = BlockA(288, pool_dim=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, mid_dim=128)
        self.Mixed_6c = BlockC(768, mid_dim=160)
        self.Mixed_6d = BlockC(768, mid_dim=160)
        self.Mixed_6e = BlockC(768, mid_dim=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, max_pool=False)
        self.Mixed_7c = BlockE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(
        self, x: torch.Tensor, outputs: Collection[str] = ("features",)
    ) -> dict[str, torch.Tensor]:
        """Return ``outputs`` of preprocessed images [N, 3, H, W] (H, W of at least 75) in one pass.

        ``features`` [N, 2048] are the global average pool. ``spatial`` [N, H' W' 7] (2,023 at
        299x299), for sFID, are the first 7 channels of Mixed_6d's 1x1 branch in the order [H', W',
        7], as ADM takes them from the tensor ``mixed_6/conv:0`` (Nash et al., arXiv:2103.03841).
        ``logits`` [N, 1008], for the Inception Score, leave out the bias, as ADM and StyleGAN3 do.
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
    """Return float32 images [N, C, size, size], resized as TensorFlow 1 resizes bilinearly.

    Output pixel i takes its value from position i * in / out: neither pixel centres nor corners
    are aligned, and reduction does not average (``tf.image.resize_bilinear``).
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

    The convention of the FID of StyleGAN3 and EDM: resize in [0, 255], then (x - 128) / 128.
    """
    return (resize_tensorflow(images, IMAGE_SIZE) - 128) / 128


def preprocess_pytorch_fid(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images [N, C, H, W] as float32 [N, C, 299, 299] in [-1, 1].

    The convention of pytorch-fid: pixel centres are aligned in the bilinear resize, without
    averaging in reduction, then 2 x / 255 - 1.
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
    """The outputs of :class:`Inception`, under one of the two published input conventions."""

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
        """``convention`` is a key of :data:`CONVENTIONS`; ValueError for any other."""
        if convention not in CONVENTIONS:
            raise ValueError(
                f"Unknown input convention {convention!r} of Inception; accepted: "
                f"{', '.join(CONVENTIONS)}.{did_you_mean(convention, CONVENTIONS)}"
            )
        self._convert, self.preprocessing = CONVENTIONS[convention]
        identity = f"inception-2015-12-05, {self.preprocessing}"
        super().__init__(network, device, identity=identity, precision=precision)
        self._network.to(memory_format=torch.channels_last)

    @classmethod
    def load(
        cls,
        weights: str | None,
        device: torch.device | str,
        convention: str = "tensorflow",
        precision: str = "float32",
    ) -> "InceptionDetector":
        """Return the detector with weights from a path or URL. Collective: rank 0 reads them.

        Without ``weights``, $SETDIFFIT_INCEPTION names them; without that, the published file is
        downloaded once and its checksum verified.
        """
        weights = weights or os.environ.get(WEIGHTS_VARIABLE)
        state = distributed.on_main_tree(lambda: read_weights(weights))
        with torch.device("meta"):
            network = Inception()
        network.load_state_dict(state, strict=False, assign=True)
        return cls(network, device, convention=convention, precision=precision)

    def _preprocess(self, images: torch.Tensor) -> torch.Tensor:
        return self._convert(images)

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        return self._network(x, outputs)


def read_weights(weights: str | None = None) -> dict[str, torch.Tensor]:
    """Return the checked state dict of an Inception checkpoint, float32 on the CPU.

    Args:
        weights: Path or URL of a file in the layout of the published one, which is the default.

    Raises ValueError for a missing file, a failed download, a file that holds anything but
    tensors (nothing in it is executed), and names or shapes that are not this network's.
    """
    with torch.device("meta"):
        wanted = Inception().state_dict()
    return load_weights(
        weights or WEIGHTS_URL,
        wanted,
        network="Inception",
        sha256=None if weights else WEIGHTS_SHA256,
        expected=_EXPECTED_LAYOUT,
        remedy=f"A local copy can be named by ${WEIGHTS_VARIABLE}.",
        left_out=r"\.num_batches_tracked$",
    )
