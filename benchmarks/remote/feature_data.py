"""Feature folders with random values, for timing the loader."""

from pathlib import Path

import numpy as np

from data.features.buckets import Bucket
from data.features.manifests import MANIFEST_FILE, Manifest, shard_name
from data.features.record import RECORD_FILE, STATISTICS, BucketRecord, FeatureRecord, bucket_folder
from data.features.shards import to_npy, write_shard
from dnnlib.files import write_json

_CHANNELS, _VISUAL_DIM, _TEXT_DIM, _NUM_TOKENS = 16, 1024, 4096, 260
_DOWNSAMPLING, _PATCH_SIZE = 8, 16
_SAMPLES_PER_SHARD = 16


def make_features(folder: Path, num_images: int, bucket: Bucket) -> Path:
    """Write random features of one bucket, with the widths of FLUX.1, DINOv3-L and T5-XXL."""
    latent = (_CHANNELS, bucket.height // _DOWNSAMPLING, bucket.width // _DOWNSAMPLING)
    grid = bucket.height // _PATCH_SIZE, bucket.width // _PATCH_SIZE
    shapes = {
        "vae.npy": latent,
        "dinov3.npy": (_VISUAL_DIM,),
        "dinov3_patches.npy": (grid[0] * grid[1], _VISUAL_DIM),
        "t5h.npy": (_NUM_TOKENS, _TEXT_DIM),
    }
    mask = to_npy(np.ones(_NUM_TOKENS, bool))

    def sample(index: int) -> tuple[str, dict, dict[str, bytes]]:
        rng = np.random.default_rng(index)
        members = {
            key: to_npy(rng.standard_normal(shape, np.float32).astype(np.float16))
            for key, shape in shapes.items()
        }
        description = dict(caption=str(index), truncated=False, fingerprint={})
        return f"{index:016x}", description, {**members, "t5m.npy": mask}

    for split, numbers in (("train", range(num_images)), ("validation", range(0))):
        own = Path(bucket_folder(folder, split, bucket.name))
        firsts = range(0, len(numbers), _SAMPLES_PER_SHARD)
        parts = [numbers[first : first + _SAMPLES_PER_SHARD] for first in firsts]
        shards = [
            write_shard(own / shard_name(index), split, bucket.name, map(sample, part))
            for index, part in enumerate(parts)
        ]
        manifest = Manifest.join(own, split, bucket.name, shards)
        write_json(own / MANIFEST_FILE, manifest.to_dict())
    record = _record(bucket, latent, grid, num_images)
    write_json(folder / RECORD_FILE, record.to_dict())
    return folder


def _record(
    bucket: Bucket, latent: tuple[int, int, int], grid: tuple[int, int], num_images: int
) -> FeatureRecord:
    made = dict(location="none", hash="none", precision="fp32")
    dims = zip(STATISTICS, (_CHANNELS, _VISUAL_DIM, _VISUAL_DIM), strict=True)
    return FeatureRecord(
        name="random features",
        source_hash="none",
        buckets=[
            BucketRecord(
                name=bucket.name,
                width=bucket.width,
                height=bucket.height,
                latent_shape=latent,
                patch_grid=grid,
                num=dict(train=num_images, validation=0),
            )
        ],
        validation_share=0.0,
        shard_size=_SAMPLES_PER_SHARD,
        vae=dict(made, channels=_CHANNELS, downsampling=_DOWNSAMPLING, scale=1.0, shift=0.0),
        visual=dict(made, patch_size=_PATCH_SIZE, num_registers=4, dim=_VISUAL_DIM),
        text=dict(made, dim=_TEXT_DIM, max_tokens=512),
        captions=dict(num_truncated=0),
        statistics={name: dict(count=1, mean=[0.0] * dim, std=[1.0] * dim) for name, dim in dims},
        content_hash="none",
        packages={},
    )
