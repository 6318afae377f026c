"""The contract of a kind of model: all that a run, the sampler and the scores need to know of it.

An implementation is one file in ``families/``, registered there by name. The loop, the sampler and
the commands ask :func:`of` for the family of a run, and never what kind of model, dataset or
snapshot they handle. docs/extending.md adds a family step by step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dnnlib.config import from_dict
from training.asked import Asked, GeneratorOptions

if TYPE_CHECKING:  # The contract is known, and options with it, before torch is needed.
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
        name: Of the file or folder, for the run folder's name.
        num_images: Number of images.
        num_classes: Classes of the labels that are delivered; 0 without any.
        class_names, class_counts: Of those classes.
        resolution, img_channels: Of the images, in pixels.
        content_hash: Identity of the data.
        remote_bytes: That an item takes from a server, on average; 0 of data of this machine.
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
        """Have what a batch is read from fetched in the background, if it is at an address."""
        ...

    def __getitems__(self, keys: Sequence[Any]) -> tuple[torch.Tensor, Cond]:
        """Return a batch, as stored, and its conditions."""
        ...

    def is_same_as(self, content_hash: str) -> bool:
        """Return whether an identity is that of the data, by the rule of the identity's version."""
        ...

    def summary(self) -> dict[str, Any] | None:
        """Return what a snapshot keeps of the data besides the attributes above."""
        ...

    def preview(self, num: int) -> Preview:
        """Return about ``num`` items for a picture of the data."""
        ...


class Codec(Protocol):
    """What a loader's batch is to the network, and back."""

    def draw(self, step: rng.Step) -> Any:
        """Return the random numbers that :meth:`encode` takes for a step's global batch."""
        ...

    def encode(self, batch: torch.Tensor, cond: Cond, drawn: Any) -> tuple[torch.Tensor, Cond]:
        """Return what the network denoises, float32 [N, C, h, w], and its conditions.

        With ``drawn`` None nothing is random.
        """
        ...

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the network denoises, float32 [N, c, h, w], of uint8 images [N, C, H, W]."""
        ...

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return uint8 images [N, C, H, W] of what the network makes."""
        ...

    def pictures(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, C, H, W] of a loader's batch."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what a score row states of the decoding."""
        ...


class Objective(Protocol):
    """A ``torch.nn.Module`` from a batch to its loss, which DDP wraps.

    One that is validated, watched over (``--watch``) or distilled also has what
    :class:`training.objective.Objective` does.
    """

    num_shapes: int  # Shapes of inputs that occur; a compiled network has a graph for each.

    def phase(self, cur_nimg: int) -> int:
        """Return a number that changes where the loss of the next step is another one."""
        ...

    def warm_up(self, run: Callable[..., torch.Tensor], batch: int, device: torch.device) -> None:
        """Have every graph of a compiled network made, by one pass of ``batch`` rows each."""
        ...

    def draw(self, step: rng.Step) -> Any:
        """Return the randomness of a step's global batch; ``.rows(start, stop)`` are a rank's."""
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
        """Return the sum over rows, a scalar, whose mean over the global batch is minimised."""
        ...

    def report(self, stats: StatsCollector, loss: torch.Tensor, draws: Any) -> None:
        """Add the loss of a pass to the statistics of the tick."""
        ...

    def diagnose(
        self, x: torch.Tensor, cond: Cond, draws: Any, loss_scale: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return what else to record of the last pass of a tick, and of its gradients."""
        ...

    def dropped(self, draws: Any) -> dict[str, tuple[torch.Tensor, float]]:
        """Return which rows lose each condition, bool [N], and the probability of it."""
        ...

    def contexts(self, x: torch.Tensor, cond: Cond, draws: Any) -> dict[str, torch.Tensor]:
        """Return what the network gets of each condition, [N, ...], if nothing is dropped."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """The share of one rank in every global batch: ``batch_gpu`` rows a pass.

    After a rollback, of which there were ``num_rollbacks``, batches are other ones.
    """

    rank: int
    world_size: int
    batch_gpu: int
    num_rollbacks: int = 0

    @property
    def share(self) -> dict[str, int]:
        """What a batch sampler needs to know of the share."""
        return dict(rank=self.rank, world_size=self.world_size, batch_gpu=self.batch_gpu)


@dataclasses.dataclass(frozen=True)
class Steps:
    """What one rank reads.

    Attributes:
        sampler: Yields the keys of one pass after the other, without end.
        shape_at: Returns the shape [C, h, w] of the step that begins at ``cur_nimg`` images.
    """

    sampler: Iterable[list[Any]]
    shape_at: Callable[[int], tuple[int, int, int]]


class Generator(Protocol):
    """A network with its whole sampling protocol: one seed an image."""

    def generate(self, seeds: Sequence[int], labels: Sequence[int] | None = None) -> Any:
        """Return uint8 images, one per seed: [N, C, H, W], or a list of [C, H, W] of any sizes.

        ``labels`` number what each image is made from: a class, a support, a prompt.
        """
        ...

    def path(
        self, seeds: Sequence[int], labels: Sequence[int] | None, num_frames: int
    ) -> list[Any]:
        """Return at most ``num_frames`` :class:`sampling.trajectory.Frame`; images are the last."""
        ...

    def denoise(
        self, x: torch.Tensor, sigma: float, labels: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the guided estimate of x0, float32, of noisy x [N, C, h, w] at a noise level."""
        ...

    def protocol(self) -> dict[str, Any]:
        """Return what a score row states of the sampling."""
        ...


class Requests(Protocol):
    """What images are made from: classes, supports or prompts, checked and numbered.

    Attributes:
        num_parts: Number of supports or prompts; each makes an image of every seed.
        has_folders: Whether each of them gets a folder of its own.
        facts: What the note beside the images states of them.
    """

    num_parts: int
    has_folders: bool
    facts: dict[str, Any]

    def label(self, part: int, seed: int) -> int | None:
        """Return the number that tells :meth:`Generator.generate` what to make."""
        ...

    def bind(self, generator: Any, device: torch.device) -> Generator:
        """Return ``generator`` for these requests, which are encoded now. Collective."""
        ...

    def picture(
        self,
        images: Sequence[torch.Tensor],
        labels: Sequence[int | None],
        columns: int,
        heading: str,
    ) -> Image:
        """Return one picture of images, uint8 [C, H, W], of one part after the other.

        ``labels`` say by :meth:`label` what each is made from; every part has equally many.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where pictures and scores of a run go, and what may end them early.

    Attributes:
        run_dir: The run folder, in which rank 0 writes.
        telemetry: A :class:`~training.telemetry.Telemetry` on rank 0, None elsewhere.
        stop_signal: By which a rank hears of a stop.
    """

    run_dir: Path
    telemetry: Any
    stop_signal: StopSignal


class Evaluator(Protocol):
    """Pictures and scores of a run's averaged weights. Every method is collective.

    A stop raises :class:`~torch_utils.stop_signal.StopRequested` anywhere in them.
    """

    def save_pictures(
        self, generator: Any, outputs: Outputs, cur_nimg: int
    ) -> Sequence[torch.Tensor] | None:
        """Write ``fakes-KIMG.png``; return the samples, uint8 [C, H, W] each, on rank 0."""
        ...

    def score(self, generator: Any, outputs: Outputs, cur_nimg: int) -> None:
        """Record what is not recorded yet."""
        ...


class Family(Protocol):
    """A kind of model, from its options to its scores.

    Attributes:
        run: The configuration of its runs, a subclass of RunConfig with ``family`` as its name.
        library_bytes: Main memory that the libraries of its encoders take in training.
    """

    run: type[RunConfig]
    library_bytes: int

    # Before anything is opened.

    def check(self, run: RunConfig, given: Collection[str]) -> RunConfig:
        """Return ``run`` with the options that stand for others resolved.

        ``given`` names the fields that were typed. Raises ValueError for metrics that the model
        does not have and for options without effect.
        """
        ...

    def settle_in(
        self, run: RunConfig, source: RunConfig, trained_nimg: int, given: Collection[str]
    ) -> RunConfig:
        """Return ``run`` with what suits a start from the weights of a run of ``source``.

        These were trained on ``trained_nimg`` images.
        """
        ...

    def distil(self, run: RunConfig, source: RunConfig, given: Collection[str]) -> RunConfig:
        """Return ``run`` as one of students of the network of a run of ``source``.

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
        """Return ``run`` with what the data decide; without data, as for ``num_classes`` classes.

        Raises ValueError if the run asks for what the data cannot give.
        """
        ...

    def open_codec(
        self, run: RunConfig, data: TrainingData, device: torch.device
    ) -> tuple[RunConfig, Codec]:
        """Load what encodes and decodes, and return ``run`` with what that decides. Collective."""
        ...

    def steps(self, run: RunConfig, data: TrainingData, start_nimg: int, part: Part) -> Steps:
        """Return what a rank reads from ``start_nimg`` images on."""
        ...

    def places(self, data: TrainingData, keys: Sequence[Any]) -> np.ndarray:
        """Return where in the data the first image of each key lies, int64 [N]."""
        ...

    def inspected(
        self, run: RunConfig, data: TrainingData, codec: Codec, device: torch.device, number: int
    ) -> Any:
        """Return a small sample that shows what is wrong with the data; a larger one as number 1.

        It is a :class:`training.watching.inspection.sample.Sample`, of at most 16 MB as stored, and
        a function of the seed of the run and the number.
        """
        ...

    def objective(self, run: RunConfig, network: Network, codec: Codec) -> Any:
        """Return the :class:`Objective` of ``network``."""
        ...

    def validation(self, run: RunConfig, data: TrainingData) -> Any:
        """Return on what the validation loss is measured; None where nothing is held out.

        That is a :class:`training.validation.examples.Examples`.
        """
        ...

    def start_from(self, run: RunConfig, network: Network, snapshot: Any, data: Any) -> Any:
        """Copy a snapshot's weights; return the :class:`~training.transfer.Transfer`.

        ``data`` is the summary of the run's data. Raises ValueError if the weights do not fit.
        """
        ...

    def generator(
        self, run: RunConfig, network: Network, codec: Codec, device: torch.device
    ) -> Any:
        """Return what samples ``network`` by the run's own protocol."""
        ...

    def evaluator(self, run: RunConfig, data: TrainingData, device: torch.device) -> Evaluator:
        """Return what makes pictures and scores; detectors and references load now. Collective."""
        ...

    def describe(self, run: RunConfig) -> dict[str, str]:
        """Return rows for the description of a run, in addition to the rows of every model."""
        ...

    def describe_data(self, data: TrainingData) -> list[str]:
        """Return words for a run folder's name, such as ``cond``."""
        ...

    def next_steps(self, run: RunConfig) -> dict[str, str]:
        """Return the commands that sample and judge a snapshot of the run, by what they do.

        In them ``{network}`` stands for the snapshot and ``{run}`` for the run folder.
        """
        ...

    # A snapshot.

    def load(self, snapshot: Any, device: torch.device, options: GeneratorOptions) -> Any:
        """Return the generator of a snapshot. Raises ValueError for what it cannot give."""
        ...

    def check_sampling(self, snapshot: Any, options: GeneratorOptions) -> None:
        """Raise ValueError for a protocol under which a snapshot cannot be sampled."""
        ...

    def requests(self, snapshot: Any, asked: Asked) -> Requests:
        """Return what images are made from; raises ValueError for what the model does not take."""
        ...

    def images(self, snapshot: Any, generator: Callable[[], Any], first_seed: int, batch: int):
        """Return the images that a snapshot is scored by (an ``evaluation.images.ImageSource``).

        Raises ValueError if it makes none without being asked for something.
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

        ``features`` is what a snapshot keeps of those that it was trained on, by whose statistics
        stored ones are normalised; by default the data's own. Raises ValueError for a model without
        conditions, and for data that do not fit.
        """
        ...

    # A benchmark, without data.

    def example_run(self, run: RunConfig, num_classes: int) -> RunConfig:
        """Return ``run`` as fitted to data of that many classes, or of a usual number for 0."""
        ...

    def unprompted(self, generator: Any) -> Any:
        """Return ``generator`` with made-up inputs for its images."""
        ...


_FAMILIES: dict[str, Callable[[], Family]] = {}
# Files from before runs named their family have that of their model alone.
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
    """Return the run of :func:`dnnlib.config.to_dict`'s result, also as older versions wrote it.

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
