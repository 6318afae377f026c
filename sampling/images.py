"""Images from a network: one seed per image, independent of batch size and number of ranks."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

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
from torch_utils import cpu_matmul, distributed
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
    """A network with its whole sampling protocol.

    ``guide`` is a second network whose errors are extrapolated away from (autoguidance). Guidance
    by the dropped condition needs a network that was trained with ``label_drop``. ``codec`` decodes
    what the network makes.
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
        """Return uint8 images [N, C, H, W], one per seed, on the device.

        Args:
            seeds: One integer per image, taken modulo 2**32.
            labels: One class index per image; by default each image's seed draws its class.
        """
        return self.codec.decode(self._sample(seeds, labels))

    @torch.no_grad()
    def path(
        self, seeds: Sequence[int], labels: Sequence[int] | None, num_frames: int
    ) -> list[Frame]:
        """Return up to ``num_frames`` of the states on the way to :meth:`generate`'s images.

        States are shown scaled to the variance of images; the last frame are the images.
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
        """Return the guided estimate of x0 [N, C, h, w], float32, of noisy x at a noise level.

        ``labels`` are as for :meth:`generate`; without them, images are unconditional.
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
        """C, H, W of the images."""
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
        """Return :meth:`_context` as a sampler's many steps take it."""
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
        """Return what a score row says of the sampling: sampler, evaluations, guidance."""
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
    """Return what a score row states of the sampler and its noise levels."""
    facts = to_dict(config)
    # Rows and folders of before know of no subsets of timesteps or of noise levels.
    return {k: v for k, v in facts.items() if v is not None or k not in ("respacing", "grid_steps")}


def describe_sampling(protocol: Mapping[str, Any]) -> str:
    """Return the sampler, its steps and the guidance of a generator's protocol in one line."""
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
    """Return what a score row states of the arithmetic and of the way to uint8 images."""
    return dict(
        **codec.facts(),
        rounding="uint8, clip(127.5 x + 128)",
        tf32=torch.backends.cuda.matmul.allow_tf32,
        precision=str(autocast_dtype or torch.float32).removeprefix("torch."),
        # Rows and folders of before know of neither another library nor of compiled networks.
        **(dict(compiled=True) if network.is_compiled else {}),
        **({} if cpu_matmul.in_use() == "mkl" else dict(cpu_matmul=cpu_matmul.in_use())),
    )


def check_guide(snapshot: Snapshot, guide: Snapshot, guidance: GuidanceConfig) -> None:
    """Raise ValueError if ``guide`` makes other images than a snapshot, or has no weight."""
    if guidance.cfg_scale == 1.0:
        raise ValueError("--guide has no effect with --cfg-scale=1; give the weight, such as 1.7.")
    same = []
    for config in (snapshot.config, guide.config):
        same.append((config.model.input_shape, config.model.num_classes, config.precond))
    # That of imported weights is not known.
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
    """Return how the images of :func:`generate_for_rank` are made, for a score row.

    ``training`` and the ``progress`` of a snapshot tell which average the weights are, of which
    ``snapshot_hash`` is the identity, where it is known.
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
    """Return the seeds of ``num_images`` images as a score row states them, such as ``0-49999``."""
    return f"{first_seed}-{first_seed + num_images - 1}"


def labels_like_data(class_counts: Sequence[int]) -> np.ndarray:
    """Return class indices, one per training image, of which any first part is in proportion.

    All of them hold every class exactly as often as the data; the first n hold class c about
    n * share(c) times. Deterministic.
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
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this rank's share of the images of ``indices``, each batch with its indices.

    A batch is ``(int64 [N] on the CPU, uint8 [N, C, H, W] on the device)``. Image i has seed
    first_seed + i and, for a conditional model, the i-th class of the data's proportions.
    ``on_batch`` receives the number of images that all ranks made meanwhile, if they are equally
    fast.
    """
    labels = None
    if generator.num_classes and sum(class_counts):
        labels = labels_like_data(class_counts)
    mine = indices[distributed.rank() :: distributed.world_size()]
    for start in range(0, len(mine), batch):
        rows = mine[start : start + batch]
        own = None if labels is None else [int(labels[row % len(labels)]) for row in rows]
        yield torch.tensor(list(rows)), generator.generate([first_seed + row for row in rows], own)
        if on_batch is not None:
            on_batch(len(rows) * distributed.world_size())
