"""Images from text and visual features, each determined by its seed and conditions alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data.features.buckets import Bucket
from data.features.codec import FeatureCodec
from data.features.config import FeatureConfig
from data.images.dataset import Cond
from diffusion.config import DualGuidanceConfig, SamplingConfig
from diffusion.denoiser import autocast
from diffusion.flow import Velocity, sample_flow
from diffusion.guidance import BRANCHES, branch_weights, weighted_branches
from diffusion.samplers import num_evaluations
from dnnlib.config import to_dict
from models.architectures.feature_dit import FeatureDiTConfig
from models.context import Context
from models.network import Network
from sampling.images import decoding_facts, sampling_facts
from sampling.trajectory import Frame, Trajectory
from torch_utils.reuse import fixed_weights
from torch_utils.rng import SeededNoise
from training.feature_objective import patch_bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureGenerator:
    """A feature-conditioned network with its complete sampling protocol.

    ``trained_nimg`` is the number of images that it was trained on. It determines the attention
    bias of patches that are being phased in.
    """

    network: Network
    model: FeatureDiTConfig
    features: FeatureConfig
    codec: FeatureCodec
    sampling: SamplingConfig
    guidance: DualGuidanceConfig
    device: torch.device
    trained_nimg: int
    autocast_dtype: torch.dtype | None = None

    @torch.no_grad()
    def generate(
        self,
        seeds: Sequence[int],
        cond: Cond,
        bucket: Bucket,
        *,
        guidance: DualGuidanceConfig | None = None,
    ) -> torch.Tensor:
        """Return images [N, 3, H, W], uint8, of the bucket's size, one per seed, on the device.

        Args:
            seeds: One integer per image, taken modulo 2^32.
            cond: Features of N images as :class:`~data.features.dataset.FeatureDataset` yields
                them. ``text``, or ``cls`` and ``patches``, may be missing: the images are then
                conditioned on the other alone.
            bucket: Size of the images.
            guidance: Replaces the generator's own.
        """
        return self.codec.decode(self.sample_latents(seeds, cond, bucket, guidance=guidance))

    @torch.no_grad()
    def path(
        self, seeds: Sequence[int], cond: Cond, bucket: Bucket, num_frames: int
    ) -> list[Frame]:
        """Return up to ``num_frames`` frames of the sampler's states, the last with the images.

        The arguments are as in :meth:`generate`.
        """
        trajectory = Trajectory(num_frames - 1)
        latents = self.sample_latents(seeds, cond, bucket, trajectory=trajectory)
        frames = trajectory.frames(lambda z, t: self.codec.decode(z))
        return [*frames, Frame(0.0, list(self.codec.decode(latents).cpu()))]

    @torch.no_grad()
    def sample_latents(
        self,
        seeds: Sequence[int],
        cond: Cond,
        bucket: Bucket,
        *,
        guidance: DualGuidanceConfig | None = None,
        trajectory: Trajectory | None = None,
    ) -> torch.Tensor:
        """Return sampled, normalised latents [N, c, h, w], float64.

        ``trajectory`` records the sampler's states; the other arguments are as in :meth:`generate`.
        """
        noise = SeededNoise(seeds, self.device).randn(self.model.latent_shape(*bucket.size))
        guided = self._guided(cond, len(seeds), bucket, guidance or self.guidance)
        with fixed_weights(self.network), autocast(self.device, self.autocast_dtype):
            if trajectory is None:
                return sample_flow(guided, noise, self.sampling)
            through, callback = trajectory.through(guided), trajectory.end_step
            return sample_flow(through, noise, self.sampling, callback)

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, sigma: float, cond: Cond, bucket: Bucket) -> torch.Tensor:
        """Return the guided estimate of x0 [N, c, h, w], float32, from x = x0 + sigma n, float32.

        In flow matching, x corresponds to z = x / (1 + sigma) at time t = sigma / (1 + sigma), and
        the estimate is z - t v(z, t).
        """
        z, t = x / (1 + sigma), sigma / (1 + sigma)
        return z - t * self._guided(cond, len(x), bucket, self.guidance)(z, t)

    def _guided(
        self, cond: Cond, num: int, bucket: Bucket, guidance: DualGuidanceConfig
    ) -> Callable[[torch.Tensor, float], torch.Tensor]:
        contexts, weights = self._branches(cond, num, bucket, guidance)
        velocity = Velocity(self.network, self.autocast_dtype)
        return weighted_branches(velocity, contexts, weights)

    def _branches(
        self, cond: Cond, num: int, bucket: Bucket, guidance: DualGuidanceConfig
    ) -> tuple[list[Context], list[float]]:
        """Return the contexts of the guidance branches with a weight, and those weights."""
        cond = {k: v.to(self.device) for k, v in cond.items() if k != "size"}
        self.network.check(cond)
        cond = self.codec.statistics.normalise_features(cond)
        cond["size"] = torch.tensor(bucket.size)
        shape = self.model.latent_shape(*bucket.size)
        bias = patch_bias(self.features, self.model, self.trained_nimg, shape)
        if bias is not None:
            cond["patch_bias"] = torch.full([num], bias, device=self.device)
        has_text, has_visual = "text" in cond, "cls" in cond
        weights = branch_weights(guidance, has_text=has_text, has_visual=has_visual)
        # No mask is needed where nothing is dropped; a condition not given has no tokens anyway.
        contexts = []
        for name in weights:
            with_text, with_visual = BRANCHES[name]
            drop = None
            if (has_text and not with_text) or (has_visual and not with_visual) or len(weights) > 1:
                row = [not with_text, not with_visual, not with_visual]
                drop = torch.tensor(row, device=self.device).expand(num, 3)
            with autocast(self.device, self.autocast_dtype):
                context = self.network.context(cond, drop, num=num)
                contexts.append(self.network.prepare(context))
        return contexts, list(weights.values())

    def protocol(self) -> dict[str, Any]:
        """Return what a score row records about sampling: sampler, evaluations, guidance."""
        num_branches = len(branch_weights(self.guidance))
        return dict(
            sampling=sampling_facts(self.sampling),
            nfe=num_evaluations(self.sampling) * num_branches,
            guidance=to_dict(self.guidance),
            **decoding_facts(self.codec, self.network, self.autocast_dtype),
        )
