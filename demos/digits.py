"""The digits of scikit-learn as a testbed: classifiers that judge samples, and an autoencoder."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import fisher_exact

from data.fewshot.classes import NUM_TRANSFORMS, transform_images
from data.fewshot.sets import SetDataset
from data.images.dataset import ImageDataset
from demos.steps import minimise, small_autoencoder

_KL_WEIGHT = 1e-3


def class_agreement(images: np.ndarray, labels: Sequence[int]) -> float:
    """Return the share of images that a 3-nearest-neighbour classifier assigns to their class.

    The classifier is fitted on the 1,797 real digits.

    Args:
        images: uint8 [N, 8, 8], or with further dimensions of size one; generated images.
        labels: [N], the class that each image was generated for.
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    digits = load_digits()
    classifier = KNeighborsClassifier(n_neighbors=3).fit(digits.data, digits.target)
    features = images.reshape(len(images), -1) * (16 / 255)
    return float(np.mean(classifier.predict(features) == np.asarray(labels)))


def set_classifier(dataset: SetDataset) -> Callable[[np.ndarray], np.ndarray]:
    """Return a 3-nearest-neighbour classifier of the real digits, and of their transformed classes.

    It maps uint8 images [N, 1, 8, 8] to int64 classes [N], with -1 for those of turned or mirrored
    digits.
    """
    from sklearn.neighbors import KNeighborsClassifier

    images, labels = [], []
    for index in range(dataset.images.num_classes):
        rows = np.flatnonzero(dataset.images.labels == index)
        pixels, _ = dataset.images.__getitems__(rows.tolist())
        for transform in dataset.transforms_of(index):
            images.append(transform_images(pixels, transform).flatten(1).numpy())
            labels += [index * NUM_TRANSFORMS + transform] * len(rows)
    classifier = KNeighborsClassifier(n_neighbors=3).fit(np.concatenate(images), labels)

    def classify(images: np.ndarray) -> np.ndarray:
        found = classifier.predict(images.reshape(len(images), -1))
        return np.where(found % NUM_TRANSFORMS == 0, found // NUM_TRANSFORMS, -1)

    return classify


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassShare:
    """How many images show a class: ``hits`` of ``num`` made from its supports, and a control.

    The control is images made from supports of other classes.
    """

    name: str
    hits: int
    num: int
    control_hits: int
    control_num: int

    def describe(self) -> str:
        """Return a phrase with both shares and the p-value of their difference."""
        return (
            f"{self.name} {self.hits / self.num:.1%} of {self.num}, control "
            f"{self.control_hits / self.control_num:.1%} of {self.control_num}, one-sided p "
            f"{self.p_value:.2g}"
        )

    @property
    def p_value(self) -> float:
        """One-sided p-value of Fisher's exact test: the support makes no difference."""
        pairs = ((self.hits, self.num), (self.control_hits, self.control_num))
        table = [[hits, num - hits] for hits, num in pairs]
        return float(fisher_exact(table, alternative="greater").pvalue)


def class_shares(
    predictions: Mapping[int, np.ndarray], class_names: Sequence[str]
) -> list[ClassShare]:
    """Return the share of each class among the images made from its supports.

    ``predictions`` maps each class to the classes predicted for these images. The control is the
    share of the class among images made with the same seeds from supports of all other classes.
    """
    shares = []
    for index, found in predictions.items():
        others = np.concatenate([other for key, other in predictions.items() if key != index])
        own = dict(hits=int((found == index).sum()), num=len(found))
        control = dict(control_hits=int((others == index).sum()), control_num=len(others))
        shares.append(ClassShare(name=class_names[index], **own, **control))
    return shares


def train_autoencoder(
    data: str | Path, folder: str | Path, *, num_steps: int = 400, batch: int = 128, seed: int = 0
) -> float:
    """Train a small AutoencoderKL on a dataset, write it to ``folder``, and return its last error.

    Latents have 4 channels and half the edge of the images. The ``scaling_factor`` gives them unit
    variance, as in latent diffusion (Rombach et al., arXiv 2112.10752). The error is the mean
    squared error of pixels in [-1, 1] on the last batch.
    """
    dataset = ImageDataset(data)
    torch.manual_seed(seed)
    sizes = dict.fromkeys(("in_channels", "out_channels"), dataset.img_channels)
    sizes |= dict(latent_channels=4, sample_size=dataset.resolution)
    vae = small_autoencoder(block_out_channels=(32, 64), **sizes)
    images = dataset.__getitems__(range(len(dataset)))[0].to(torch.float32) / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    errors: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        chosen = images[torch.randint(len(images), [batch], generator=generator)]
        posterior = vae.encode(chosen).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        errors[:] = [(decoded - chosen).square().mean()]
        return errors[0] + _KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    minimise(loss, torch.optim.Adam(vae.parameters()), num_steps)
    with torch.no_grad():
        std = vae.encode(images).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / std)
    vae.save_pretrained(folder)
    return errors[0].item()
