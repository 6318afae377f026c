"""Images from a network, each determined by its seed, whatever the batch size or rank count."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data.resumable import progress_of_ranks, share
from diffusion.config import GuidanceConfig, SamplingConfig
from diffusion.denoiser import Denoiser, autocast
from diffusion.guidance import autoguidance, classifier_free
from diffusion.precond import Precond
from diffusion.samplers import num_evaluations, reads_variance, sample
from dnnlib.config import to_dict
from models import ModelConfig
from models.context import Context
from models.network import Network
from sampling.trajectory import Frame, Trajectory
from torch_utils import cpu_matmul
from torch_utils.fingerprints import package_versions, weights_hash
from torch_utils.reuse import fixed_weights
from torch_utils.rng import SeededNoise
from training.checkpoint import Snapshot
from training.config import TrainingConfig
from training.ema import describe_average
from training.family import Codec
from training.portable import open_snapshot

cached_snapshot = functools.lru_cache(maxsize=2)(open_snapshot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageGenerator:
    """A network with its complete sampling protocol.

    ``guide`` is a second network, from whose errors autoguidance extrapolates away. Without it,
    guidance is classifier-free and needs a network that was trained with ``label_drop``. ``codec``
    decodes the network's output to images.
    """

    network: Network
    precond: Precond
    model: ModelConfig
    sampling: SamplingConfig
    guidance: GuidanceConfig
    device: torch.device
    codec: Codec
    autocast_dtype: torch.dtype | None = None
    guide: Network | None = None
    guide_hash: str | None = None

    @torch.no_grad()
    def generate(self, seeds: Sequence[int], labels: Sequence[int] | None = None) -> torch.Tensor:
        """Return images [N, C, H, W], uint8, one per seed, on the device.

        Args:
            seeds: One integer per image, taken modulo 2^32.
            labels: One class index per image; by default each image's seed draws its class.
        """
        return self.codec.decode(self._sample(seeds, labels))

    @torch.no_grad()
    def path(
        self, seeds: Sequence[int], labels: Sequence[int] | None, num_frames: int
    ) -> list[Frame]:
        """Return up to ``num_frames`` frames of the sampler's states, the last with the images.

        States are shown scaled to the variance of images. Other arguments are as in
        :meth:`generate`.
        """
        trajectory = Trajectory(num_frames - 1)
        images = self.codec.decode(self._sample(seeds, labels, trajectory))

        def decode(x: torch.Tensor, sigma: float) -> torch.Tensor:
            levels = torch.tensor([sigma, self.precond.sigma_min], dtype=torch.float64)
            scales = self.precond.scalings(levels)[2]
            return self.codec.decode(x * (scales[0] / scales[1]).item())

        return [*trajectory.frames(decode), Frame(0.0, list(images.cpu()))]

    def _sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        trajectory: Trajectory | None = None,
    ) -> torch.Tensor:
        noise = SeededNoise(seeds, self.device)
        latents = noise.randn(self.model.input_shape)
        chosen = None
        if self.num_classes:
            drawn = noise.randint(self.num_classes)
            chosen = drawn if labels is None else torch.as_tensor(labels).to(self.device)
        denoise = self._estimate(chosen, len(seeds))
        networks = [own for own in (self.network, self.guide) if own is not None]
        with fixed_weights(*networks), autocast(self.device, self.autocast_dtype):
            if trajectory is None:
                return sample(denoise, latents, self.sampling, self.precond, noise)
            through, callback = trajectory.through(denoise), trajectory.end_step
            return sample(through, latents, self.sampling, self.precond, noise, callback)

    @torch.no_grad()
    def denoise(
        self, x: torch.Tensor, sigma: float, labels: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the guided x0 estimate [N, C, h, w], float32, from noisy x at noise level sigma.

        ``labels`` has one class index per image. Without them, a class-conditional model gives its
        unconditional estimate, which is not guided.
        """
        if labels is None and self.num_classes:
            nothing = torch.zeros(len(x), dtype=torch.int64, device=self.device)
            context = self._prepared(self.network, nothing, len(x), dropped=True)
            estimate = self._denoiser(self.network)(x, sigma, context)
        else:
            chosen = None if labels is None else torch.as_tensor(labels).to(self.device)
            estimate = self._estimate(chosen, len(x))(x, sigma)
        return estimate[:, : x.shape[1]].to(torch.float32)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images."""
        return self.model.img_channels, self.model.resolution, self.model.resolution

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an unconditional model."""
        return self.model.num_classes

    def _denoiser(self, network: Network) -> Denoiser:
        with_variance = reads_variance(self.sampling, self.precond)
        return Denoiser(network, self.precond, self.autocast_dtype, with_variance=with_variance)

    def _context(
        self, network: Network, chosen: torch.Tensor | None, num: int, *, dropped: bool = False
    ) -> Context:
        """Return the context of ``num`` images of the ``chosen`` classes [num]."""
        cond = {} if chosen is None else {"label": chosen}
        drop = torch.ones(num, dtype=torch.bool, device=self.device) if dropped else None
        return network.context(cond, drop, num=num)

    def _prepared(
        self, network: Network, chosen: torch.Tensor | None, num: int, *, dropped: bool = False
    ) -> Context:
        """Return :meth:`_context`, prepared once for the many steps of a sampler."""
        with autocast(self.device, self.autocast_dtype):
            return network.prepare(self._context(network, chosen, num, dropped=dropped))

    def _conditional(
        self, network: Network, chosen: torch.Tensor | None, num: int
    ) -> Callable[[torch.Tensor, float], torch.Tensor]:
        denoiser = self._denoiser(network)
        context = self._prepared(network, chosen, num)
        return lambda x, sigma: denoiser(x, sigma, context)

    def _estimate(
        self, chosen: torch.Tensor | None, num: int
    ) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """Return the guided denoiser of ``num`` images of the ``chosen`` classes [num]."""
        network = self.network
        if self.guide is not None:
            guide = self._conditional(self.guide, chosen, num)
            main = self._conditional(network, chosen, num)
            return autoguidance(main, guide, self.guidance, self.precond)
        if self.guidance.cfg_scale == 1.0 or chosen is None:
            return self._conditional(network, chosen, num)
        return classifier_free(
            self._denoiser(network),
            self._prepared(network, chosen, num),
            self._prepared(network, chosen, num, dropped=True),
            self.guidance,
            self.precond,
        )

    def protocol(self) -> dict[str, Any]:
        """Return what a score row records about sampling: sampler, evaluations, guidance."""
        sampling = sampling_facts(self.sampling)
        if reads_variance(self.sampling, self.precond):
            sampling["variance"] = "learned"
        return dict(
            sampling=sampling,
            nfe=num_evaluations(self.sampling, self.precond),
            guidance=to_dict(self.guidance),
            guide_hash=self.guide_hash,
            **decoding_facts(self.codec, self.network, self.autocast_dtype),
        )


def sampling_facts(config: SamplingConfig) -> dict[str, Any]:
    """Return what a score row records about the sampler and its noise levels."""
    facts = to_dict(config)
    # Rows and folders of older versions lack these two; left out at None, they still compare equal.
    return {k: v for k, v in facts.items() if v is not None or k not in ("respacing", "grid_steps")}


def describe_sampling(protocol: Mapping[str, Any]) -> str:
    """Return one line with the sampler, steps and guidance of a generator's ``protocol()``."""
    sampling, guidance = protocol["sampling"], protocol["guidance"]
    scales = {name: value for name, value in guidance.items() if name.endswith("_scale")}
    if scales.get("cfg_scale") == 1.0:
        del scales["cfg_scale"]
    if guidance.get("guidance_form") != "joint":
        scales.pop("joint_scale", None)
    parts = [f"{sampling['sampler']}, {sampling['steps']} steps"]
    names = {name: name.replace("cfg", "guidance").replace("_", " ") for name in scales}
    parts += [f"{names[name]} {scale:g}" for name, scale in scales.items()]
    return ", ".join(parts)


def decoding_facts(
    codec: Codec, network: Network, autocast_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return what a score row records about the arithmetic and the conversion to uint8 images."""
    return dict(
        **codec.facts(),
        rounding="uint8, clip(127.5 x + 128)",
        tf32=torch.backends.cuda.matmul.allow_tf32,
        precision=str(autocast_dtype or torch.float32).removeprefix("torch."),
        # Rows and folders of older versions lack both; without them, the usual case compares equal.
        **(dict(compiled=True) if network.is_compiled else {}),
        **({} if cpu_matmul.in_use() == "mkl" else dict(cpu_matmul=cpu_matmul.in_use())),
    )


def check_guide(snapshot: Snapshot, guide: Snapshot, guidance: GuidanceConfig) -> None:
    """Raise ValueError if ``guide`` does not fit a snapshot, or if the guidance scale is 1."""
    if guidance.cfg_scale == 1.0:
        raise ValueError("--guide has no effect with --cfg-scale=1; give the weight, such as 1.7.")
    same = []
    for config in (snapshot.config, guide.config):
        same.append((config.model.input_shape, config.model.num_classes, config.precond))
    # Imported weights do not record their autoencoder.
    autoencoders = {own.config.model.encoder_hashes.get("vae") for own in (snapshot, guide)}
    if same[0] != same[1] or len(autoencoders - {None}) > 1:
        raise ValueError(
            f"--guide: {guide.path} makes images of another size, class count, parametrization or "
            f"autoencoder than {snapshot.path}."
        )


def passport(
    generator: ImageGenerator,
    training: TrainingConfig,
    class_counts: Sequence[int],
    progress: Mapping[str, Any] | None = None,
    snapshot_hash: str | None = None,
) -> dict[str, Any]:
    """Return what a score row records about how :func:`generate_for_rank` makes its images.

    Args:
        training: Settings of the run, which tell the kind of weight average.
        class_counts: Images per class of the training data; empty without classes.
        progress: Progress of the snapshot, which tells the average's length.
        snapshot_hash: Hash of the weights; computed if None.
    """
    labels = "as in the training data" if class_counts else "drawn by each seed"
    return dict(
        snapshot_hash=snapshot_hash or weights_hash(generator.network.state_dict()),
        ema=describe_average(training, progress or {}),
        labels=labels if generator.num_classes else "none",
        **generator.protocol(),
        packages=package_versions(),
    )


def seed_range(first_seed: int, num_images: int) -> str:
    """Return the seeds of ``num_images`` images in the form of score rows, such as ``0-49999``."""
    return f"{first_seed}-{first_seed + num_images - 1}"


def labels_like_data(class_counts: Sequence[int]) -> np.ndarray:
    """Return class indices, one per training image, in a fixed order that mixes them evenly.

    Together they hold every class exactly as often as the data; the first n hold class c about
    n * share(c) times.

    Args:
        class_counts: Images per class of the training data.

    Returns int64 [sum(class_counts)].
    """
    labels = np.repeat(np.arange(len(class_counts)), class_counts)
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in class_counts])
    return labels[np.argsort(places, kind="stable")]


def generate_for_rank(
    generator: ImageGenerator,
    indices: Sequence[int],
    *,
    batch: int,
    first_seed: int = 0,
    class_counts: Sequence[int] = (),
    label: str = "Generating",
    transient: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this rank's share of the images numbered ``indices``, in batches with their indices.

    A batch is ``(indices [N], int64, on the CPU; images [N, C, H, W], uint8, on the device)``.
    Image i has seed first_seed + i and, for a conditional model, entry i of
    :func:`labels_like_data`, which repeats. ``label`` is the title of the progress bar on rank 0,
    which ``transient`` erases at the end.
    """
    labels = None
    if generator.num_classes and sum(class_counts):
        labels = labels_like_data(class_counts)
    mine = share(indices)
    with progress_of_ranks(len(indices), len(mine), label, transient=transient) as on_done:
        for start in range(0, len(mine), batch):
            rows = mine[start : start + batch]
            seeds = [first_seed + row for row in rows]
            own = None if labels is None else [int(labels[row % len(labels)]) for row in rows]
            yield torch.tensor(list(rows)), generator.generate(seeds, own)
            on_done(len(rows))
