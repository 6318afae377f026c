"""The contract of a family of models: what training, sampling and scoring need to know about it.

An implementation is one file in ``families/``, registered there by name. The loop, the sampler and
the commands get the family of a run from :func:`of`, and never ask what kind of model, dataset or
snapshot they handle. docs/extending.md adds a family step by step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dnnlib.config import from_dict
from training.asked import Asked, GeneratorOptions

if TYPE_CHECKING:  # Families and their options are known without an import of torch.
    import numpy as np
    import torch
    from PIL.Image import Image

    from data.images.dataset import Cond
    from data.preview import Preview
    from models.network import Network
    from torch_utils import rng
    from torch_utils.stats import StatsCollector
    from torch_utils.stop_signal import StopSignal
    from training.config import RunConfig


class TrainingData(Protocol):
    """A dataset, opened by every rank.

    Attributes:
        name: Name of the file or folder, for the run folder's name.
        num_images: Number of images.
        num_classes: Number of classes of the labels that are delivered; 0 without labels.
        class_names, class_counts: Names of those classes, and their numbers of images.
        resolution, img_channels: Side of the images in pixels, and their number of channels.
        content_hash: Identity of the data.
        remote_bytes: Average number of bytes fetched from a server per item; 0 for local data.
    """

    name: str
    num_images: int
    num_classes: int
    class_names: Sequence[str]
    class_counts: Sequence[int]
    resolution: int
    img_channels: int
    content_hash: str
    remote_bytes: float

    def prefetch(self, keys: Sequence[Any]) -> None:
        """Fetch in the background what the items of ``keys`` are read from, if it is remote."""
        ...

    def __getitems__(self, keys: Sequence[Any]) -> tuple[torch.Tensor, Cond]:
        """Return the items of ``keys`` as a batch, as they are stored, and its conditions."""
        ...

    def is_same_as(self, content_hash: str) -> bool:
        """Return whether an identity, of this or an older version, is that of the data."""
        ...

    def summary(self) -> dict[str, Any] | None:
        """Return what a snapshot keeps of the data besides the attributes above."""
        ...

    def preview(self, num: int) -> Preview:
        """Return about ``num`` items for a picture of the data."""
        ...


class Codec(Protocol):
    """Turns a loader's batch into what the network denoises, and that into images."""

    def draw(self, step: rng.Step) -> Any:
        """Return the random numbers that :meth:`encode` takes for a step's global batch."""
        ...

    def encode(self, batch: torch.Tensor, cond: Cond, drawn: Any) -> tuple[torch.Tensor, Cond]:
        """Return what the network denoises, float32 [N, C, h, w], and its conditions.

        Nothing is random if ``drawn`` is None.
        """
        ...

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the network denoises, float32 [N, c, h, w], of uint8 images [N, C, H, W]."""
        ...

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the network generates, [N, c, h, w], as uint8 images [N, C, H, W]."""
        ...

    def pictures(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a loader's batch as uint8 images [N, C, H, W]."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what a score row states about the decoding."""
        ...


class Objective(Protocol):
    """A ``torch.nn.Module`` from a batch to its loss, which DDP wraps.

    One that is validated, watched (``--watch``) or distilled also has the other methods of
    :class:`training.objective.Objective`.
    """

    num_shapes: int  # Number of input shapes; a compiled network has a graph for each.

    def phase(self, cur_nimg: int) -> int:
        """Return a number that changes where the definition of the loss does."""
        ...

    def warm_up(self, run: Callable[..., torch.Tensor], batch: int, device: torch.device) -> None:
        """Make every graph of a compiled network, by one ``run`` of ``batch`` rows for each."""
        ...

    def draw(self, step: rng.Step) -> Any:
        """Return the random draws of a step's global batch; ``.rows(start, stop)`` is a part."""
        ...

    def prepare(
        self, batch: torch.Tensor, cond: Cond, draws: Any, device: torch.device
    ) -> tuple[torch.Tensor, Cond]:
        """Return a loader's batch on ``device``, encoded."""
        ...

    def __call__(self, x: torch.Tensor, cond: Cond, draws: Any) -> torch.Tensor:
        """Return the loss of every element [N, C, h, w]."""
        ...

    def total(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the sum over images, a scalar, whose mean over the global batch is minimised."""
        ...

    def report(self, stats: StatsCollector, loss: torch.Tensor, draws: Any) -> None:
        """Add the loss of a pass to the statistics of the tick."""
        ...

    def diagnose(
        self, x: torch.Tensor, cond: Cond, draws: Any, loss_scale: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return further statistics of the last pass of a tick and of its gradients, by name."""
        ...

    def dropped(self, draws: Any) -> dict[str, tuple[torch.Tensor, float]]:
        """Return for each condition which rows lose it, bool [N], and the probability of that."""
        ...

    def contexts(self, x: torch.Tensor, cond: Cond, draws: Any) -> dict[str, torch.Tensor]:
        """Return what the network receives of each condition, [N, ...], if nothing is dropped."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """The share of one rank in every global batch: at most ``batch_gpu`` rows per pass.

    Every rollback changes the batches that follow; there were ``num_rollbacks`` so far.
    """

    rank: int
    world_size: int
    batch_gpu: int
    num_rollbacks: int = 0

    @property
    def share(self) -> dict[str, int]:
        """The share as arguments of a batch sampler."""
        return dict(rank=self.rank, world_size=self.world_size, batch_gpu=self.batch_gpu)


@dataclasses.dataclass(frozen=True)
class Steps:
    """What one rank reads.

    Attributes:
        sampler: Yields the keys of one pass after another, without end.
        shape_at: Returns the input shape [C, h, w] of the step that begins at ``cur_nimg`` images.
    """

    sampler: Iterable[list[Any]]
    shape_at: Callable[[int], tuple[int, int, int]]


class Generator(Protocol):
    """A network with its whole sampling protocol; every image has one seed."""

    def generate(self, seeds: Sequence[int], labels: Sequence[int] | None = None) -> Any:
        """Return uint8 images, one per seed: [N, C, H, W], or a list of [C, H, W] of any sizes.

        ``labels`` number what each image is made from: a class, a support, a prompt.
        """
        ...

    def path(
        self, seeds: Sequence[int], labels: Sequence[int] | None, num_frames: int
    ) -> list[Any]:
        """Return up to ``num_frames`` :class:`sampling.trajectory.Frame`; images are the last."""
        ...

    def denoise(
        self, x: torch.Tensor, sigma: float, labels: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the guided x0 estimate, float32, of noisy ``x`` [N, C, h, w] at a noise level."""
        ...

    def protocol(self) -> dict[str, Any]:
        """Return what a score row states about the sampling."""
        ...


class Requests(Protocol):
    """What images are made from: classes, supports or prompts, checked and numbered.

    Attributes:
        num_parts: Number of supports or prompts, each of which makes an image for every seed.
        has_folders: Whether each of them gets a folder of its own.
        facts: What the note beside the images states about them.
    """

    num_parts: int
    has_folders: bool
    facts: dict[str, Any]

    def label(self, part: int, seed: int) -> int | None:
        """Return the number that tells :meth:`Generator.generate` what to make."""
        ...

    def bind(self, generator: Any, device: torch.device) -> Generator:
        """Encode these requests, and return ``generator`` for them. Collective."""
        ...

    def picture(
        self,
        images: Sequence[torch.Tensor],
        labels: Sequence[int | None],
        columns: int,
        heading: str,
    ) -> Image:
        """Return one picture of images, each uint8 [C, H, W], in the order of their parts.

        ``labels`` has the :meth:`label` of each image; all parts have equally many images.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where pictures and scores of a run go, and what may end them early.

    Attributes:
        run_dir: The run folder, in which rank 0 writes.
        telemetry: A :class:`~training.telemetry.Telemetry` on rank 0, None elsewhere.
        stop_signal: Tells a rank of a stop.
    """

    run_dir: Path
    telemetry: Any
    stop_signal: StopSignal


class Evaluator(Protocol):
    """Pictures and scores of a run's averaged weights. Every method is collective.

    A stop raises :class:`~torch_utils.stop_signal.StopRequested` at any point within them.
    """

    def save_pictures(
        self, generator: Any, outputs: Outputs, cur_nimg: int
    ) -> Sequence[torch.Tensor] | None:
        """Write ``fakes-KIMG.png``; return the samples, uint8 [C, H, W] each, on rank 0."""
        ...

    def score(self, generator: Any, outputs: Outputs, cur_nimg: int) -> None:
        """Compute and record the scores that are not recorded yet."""
        ...


class Family(Protocol):
    """A kind of model, from its options to its scores.

    Attributes:
        run: The configuration of its runs, a subclass of RunConfig with ``family`` as its name.
        library_bytes: Bytes of main memory that the libraries of its encoders take in training.
    """

    run: type[RunConfig]
    library_bytes: int

    # Before anything is opened.

    def check(self, run: RunConfig, given: Collection[str]) -> RunConfig:
        """Return ``run`` with options that stand for others replaced by those.

        ``given`` names the fields that were typed. Raises ValueError for metrics that the model
        does not have and for options without effect.
        """
        ...

    def settle_in(
        self, run: RunConfig, source: RunConfig, trained_nimg: int, given: Collection[str]
    ) -> RunConfig:
        """Return ``run`` with settings for a start from the weights of a run of ``source``.

        Those weights were trained on ``trained_nimg`` images.
        """
        ...

    def distil(self, run: RunConfig, source: RunConfig, given: Collection[str]) -> RunConfig:
        """Return ``run`` with settings for students of a teacher, trained in a run of ``source``.

        Raises ValueError for settings that a student cannot have.
        """
        ...

    # A training run.

    def open_data(
        self, run: RunConfig, path: str | None = None, split: str = "train"
    ) -> TrainingData:
        """Return the data of a run, at ``path`` if they have moved.

        Raises ValueError if there are none, or if they are of the wrong kind for the model.
        """
        ...

    def fit(self, run: RunConfig, data: TrainingData | None, num_classes: int = 0) -> RunConfig:
        """Return ``run`` with the settings that its data determine.

        Without data, ``num_classes`` does. Raises ValueError if the data cannot give what is asked.
        """
        ...

    def open_codec(
        self, run: RunConfig, data: TrainingData, device: torch.device
    ) -> tuple[RunConfig, Codec]:
        """Return the codec, loaded, and ``run`` with what that determines. Collective."""
        ...

    def steps(self, run: RunConfig, data: TrainingData, start_nimg: int, part: Part) -> Steps:
        """Return what a rank reads from ``start_nimg`` images on."""
        ...

    def places(self, data: TrainingData, keys: Sequence[Any]) -> np.ndarray:
        """Return the position in the data of the first image of each key, int64 [N]."""
        ...

    def inspected(
        self, run: RunConfig, data: TrainingData, codec: Codec, device: torch.device, number: int
    ) -> Any:
        """Return a small sample that shows problems of the data; ``number`` 1 is a larger one.

        It is a :class:`training.watching.inspection.sample.Sample` of at most 16 MB as stored,
        which depends only on the seed of the run and ``number``.
        """
        ...

    def objective(self, run: RunConfig, network: Network, codec: Codec) -> Any:
        """Return the :class:`Objective` of ``network``."""
        ...

    def validation(self, run: RunConfig, data: TrainingData) -> Any:
        """Return what the validation loss is measured on; None if nothing is held out.

        It is a :class:`training.validation.examples.Examples`.
        """
        ...

    def start_from(self, run: RunConfig, network: Network, snapshot: Any, data: Any) -> Any:
        """Load a snapshot's weights in ``network``; return a :class:`~training.transfer.Transfer`.

        ``data`` is the summary of the run's data. Raises ValueError if the weights do not fit.
        """
        ...

    def generator(
        self, run: RunConfig, network: Network, codec: Codec, device: torch.device
    ) -> Any:
        """Return what samples ``network`` by the run's own protocol."""
        ...

    def evaluator(self, run: RunConfig, data: TrainingData, device: torch.device) -> Evaluator:
        """Return what makes pictures and scores; loads detectors and references. Collective."""
        ...

    def describe(self, run: RunConfig) -> dict[str, str]:
        """Return rows for the description of a run, besides those that every model has."""
        ...

    def describe_data(self, data: TrainingData) -> list[str]:
        """Return words for a run folder's name, such as ``cond``."""
        ...

    def next_steps(self, run: RunConfig) -> dict[str, str]:
        """Return the commands that sample and judge a snapshot of the run, by their purpose.

        In them ``{network}`` stands for the snapshot and ``{run}`` for the run folder.
        """
        ...

    # A snapshot.

    def load(self, snapshot: Any, device: torch.device, options: GeneratorOptions) -> Any:
        """Return the generator of a snapshot; raises ValueError for options it does not support."""
        ...

    def check_sampling(self, snapshot: Any, options: GeneratorOptions) -> None:
        """Raise ValueError for options with which a snapshot cannot be sampled."""
        ...

    def requests(self, snapshot: Any, asked: Asked) -> Requests:
        """Return what images are made from; raises ValueError for what the model does not take."""
        ...

    def images(self, snapshot: Any, generator: Callable[[], Any], first_seed: int, batch: int):
        """Return the images by which a snapshot is scored (an ``evaluation.images.ImageSource``).

        Raises ValueError if the model makes images only from requests.
        """
        ...

    def encoder_codec(self, run: RunConfig, data: TrainingData, device: torch.device) -> Codec:
        """Return a codec that encodes ``data`` and need not decode."""
        ...

    def panel(
        self,
        run: RunConfig,
        data: str | None,
        num: int,
        device: torch.device,
        features: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return about ``num`` images with their conditions (``evaluation.conditioning.Panel``).

        ``features`` is what a snapshot keeps about the features it was trained on: their statistics
        normalise the stored ones, by default the data's own do. Raises ValueError for a model
        without conditions, and for data that do not fit.
        """
        ...

    # A benchmark, without data.

    def example_run(self, run: RunConfig, num_classes: int) -> RunConfig:
        """Return ``run`` fitted to data of so many classes; 0 stands for a usual number."""
        ...

    def unprompted(self, generator: Any) -> Any:
        """Return ``generator`` with made-up inputs for its images."""
        ...


_FAMILIES: dict[str, Callable[[], Family]] = {}
# Files of older versions name only the family of their model.
_FAMILY_OF_MODEL = {
    "diffit": "image",
    "latent-diffit": "latent",
    "set-dit": "sets",
    "feature-dit": "features",
}


def register(name: str, load: Callable[[], Family]) -> None:
    """Make a family known under ``name``; ``load`` is called when it is first needed."""
    _FAMILIES[name] = load


def named(name: str) -> Family:
    """Return the family of that name; raises ValueError for a name that is not registered."""
    if name not in _FAMILIES:
        raise ValueError(f"Unknown family {name!r}; this version knows {', '.join(_FAMILIES)}.")
    return _FAMILIES[name]()


def of(run: RunConfig) -> Family:
    """Return the family of a run."""
    return named(run.family)


def restore_run(values: Mapping[str, Any]) -> RunConfig:
    """Return the run that :func:`dnnlib.config.to_dict` gave, also as older versions wrote it.

    Raises ValueError for settings that are unknown or out of range.
    """
    values = dict(values)
    if "transfer_allow" in (values.get("features") or {}):
        features = dict(values["features"])
        values["training"] = dict(values["training"], transfer_allow=features.pop("transfer_allow"))
        values["features"] = features
    if "family" not in values:
        values = {name: value for name, value in values.items() if value is not None}
        if "dual_guidance" in values:
            values["guidance"] = values.pop("dual_guidance")
        model = values["model"]["family"]
        values["family"] = _FAMILY_OF_MODEL.get(model, model)
    if values["family"] == "features":
        values.setdefault("summed_loss", True)
    return from_dict(named(values["family"]).run, values)
