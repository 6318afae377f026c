"""Judging generated letters: whether they are the right letter, and whether they are copies."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data.convert.glyphs import DRAWINGS
from data.fewshot.episodes import Episodes
from data.images.dataset import ImageDataset
from demos.steps import minimise
from evaluation.fewshot import support_distances

_BATCH = 128
_NUM_STEPS = 800


@dataclasses.dataclass(frozen=True)
class Judge:
    """A classifier of letters."""

    network: nn.Module
    classes: np.ndarray  # int64 [K], indices in the dataset of the classes that it knows.

    @torch.no_grad()
    def classify(self, images: Tensor) -> np.ndarray:
        """Return the most likely classes, int64 [N], of uint8 images [N, 1, H, W]."""
        found = [self.network(_floats(part)).argmax(1) for part in images.split(500)]
        return self.classes[torch.cat(found).numpy()]


def train_judge(
    images: ImageDataset, classes: Sequence[int], *, num_steps: int = _NUM_STEPS, seed: int = 0
) -> Judge:
    """Return a judge: a small convolutional network, trained on all images of some classes.

    Images are augmented by rotation, slant, scale, shift and stroke weight, so that the network
    generalises to faces that it has not seen.
    """
    classes = np.array(classes)
    rows = np.flatnonzero(np.isin(images.labels, classes))
    pixels = _floats(images.__getitems__(rows.tolist())[0])
    labels = torch.from_numpy(np.searchsorted(classes, images.labels[rows]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _make_network(images.resolution, len(classes))
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        chosen = torch.randint(len(pixels), [_BATCH], generator=generator)
        found = network(_changed(pixels[chosen], generator))
        return functional.cross_entropy(found, labels[chosen], label_smoothing=0.1)

    minimise(loss, torch.optim.Adam(network.parameters()), num_steps, "Judge")
    return Judge(network.eval(), classes)


def _make_network(resolution: int, num_classes: int) -> nn.Module:
    def block(num_in: int, num_out: int, stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(num_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 24, 1),
        *block(24, 48, 2),
        *block(48, 96, 2),
        nn.Flatten(),
        nn.Linear(96 * (-(-resolution // 4)) ** 2, 192),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(192, num_classes),
    )


def _floats(images: Tensor) -> Tensor:
    return images.to(torch.float32) / 255


def _changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images [N, 1, H, W] in [0, 1], each augmented at random."""
    turn, slant, width, height, left, top, weight = (
        2 * torch.rand(7, len(images), generator=generator) - 1
    )
    matrix = torch.stack([1 + 0.15 * width, 0.3 * slant + 0.1 * turn, 0.1 * left], dim=1)
    below = torch.stack([-0.1 * turn, 1 + 0.15 * height, 0.1 * top], dim=1)
    places = functional.affine_grid(
        torch.stack([matrix, below], dim=1), list(images.shape), align_corners=False
    )
    moved = functional.grid_sample(images, places, align_corners=False)
    # A third of the images are blended with a 3x3 maximum, which makes strokes bolder by up to a
    # pixel, and a third with a 3x3 minimum, which makes them thinner.
    weight = weight[:, None, None, None]
    bold = functional.max_pool2d(moved, 3, 1, 1)
    thin = -functional.max_pool2d(-moved, 3, 1, 1)
    moved = moved + (weight - 1 / 3).clamp(min=0) * (bold - moved)
    return moved + (-weight - 1 / 3).clamp(min=0) * (thin - moved)


@dataclasses.dataclass(frozen=True)
class Copying:
    """Distances to the nearest image of a support: root mean squares of pixels in [0, 1]."""

    generated: np.ndarray  # Of generated images.
    same_faces: np.ndarray  # Of other drawings of the support's faces: what copies would score.
    other_faces: np.ndarray  # Of real images of the letter in faces that are in no support.

    def describe(self) -> str:
        """Return a phrase with the medians, and the share of generated images that are too near."""
        near = np.quantile(self.other_faces, 0.01)
        return (
            f"distance to the support {np.median(self.generated):.3f}, of the letter in other "
            f"faces {np.median(self.other_faces):.3f}, of the same faces drawn again "
            f"{np.median(self.same_faces):.3f} (medians); ratio {self.ratio:.2f}; "
            f"{(self.generated < near).mean():.1%} are nearer than 99% of other faces"
        )

    @property
    def ratio(self) -> float:
        """Median distance of generated images over that of other faces.

        It is near 0 for copies, and near 1 for new letters.
        """
        return float(np.median(self.generated) / np.median(self.other_faces))


def measure_copying(
    samples: Tensor, episodes: Episodes, images: ImageDataset, others: ImageDataset
) -> Copying:
    """Return how near generated images are to their supports, with real distances to compare.

    Args:
        samples: uint8 [S, m, 1, H, W], m images from each of the S supports of ``episodes``.
        images: The dataset of the supports, in the order of ``--source=glyphs``.
        others: The same classes in other faces.
    """
    rows = np.arange(len(samples)).repeat(samples.shape[1])
    generated = support_distances(samples.flatten(0, 1), episodes, rows).numpy()
    # The drawings of a letter in one face have consecutive indices.
    first = episodes.indices // DRAWINGS * DRAWINGS  #  [S, k]
    drawings = (first[:, :, None] + np.arange(DRAWINGS)).reshape(len(first), -1)
    again = [np.setdiff1d(*pair) for pair in zip(drawings, episodes.indices, strict=True)]
    elsewhere = [np.flatnonzero(others.labels == index) for index in episodes.classes]
    same_faces, other_faces = (
        _distances(data, chosen, episodes)
        for data, chosen in ((images, again), (others, elsewhere))
    )
    return Copying(generated, same_faces, other_faces)


def _distances(
    images: ImageDataset, chosen: Sequence[np.ndarray], episodes: Episodes
) -> np.ndarray:
    """Return the distances to each episode's support of the images chosen for it."""
    found = [
        support_distances(images.__getitems__(rows.tolist())[0], episodes, [episode] * len(rows))
        for episode, rows in enumerate(chosen)
        if len(rows)
    ]
    return torch.cat(found).numpy()
