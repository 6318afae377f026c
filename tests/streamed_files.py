"""Feature folders of random values in several shards, for tests."""

import hashlib
import io
import json
import tarfile
import zlib

import numpy as np

from data.features.record import (
    FEATURES,
    KEYS,
    RECORD_FILE,
    STATISTICS,
    BucketRecord,
    FeatureRecord,
)

VISUAL_DIM, TEXT_DIM, CHANNELS = 16, 12, 4
# Width, height, and the samples of each shard of the training split.
SHARDS = {(64, 64): (8, 8, 4), (96, 48): (4, 3), (48, 96): (3,)}


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def sample(number, width, height):
    """Return the members of a sample, whose number is the first value of its CLS features."""
    rng = np.random.default_rng([number, width])
    length = int(rng.integers(3, 12))
    num_patches = (width // 16) * (height // 16)
    cls = rng.normal(size=VISUAL_DIM)
    cls[0] = number
    arrays = {
        "vae.npy": 3 * rng.normal(size=(CHANNELS, height // 8, width // 8)) + 1,
        "dinov3.npy": cls,
        "dinov3_patches.npy": rng.normal(size=(num_patches, VISUAL_DIM)),
        "t5h.npy": rng.normal(size=(length, TEXT_DIM)),
    }
    members = {key: npy(array.astype(np.float16)) for key, array in arrays.items()}
    members["t5m.npy"] = npy(np.ones(length, bool))
    members["json"] = json.dumps(dict(caption=f"number {number}")).encode()
    return members


def write_shard(path, samples, columns, index):
    """Write one shard and add its rows to the columns of a manifest."""
    with tarfile.open(path, "w") as tar:
        for name, members in samples.items():
            columns["id"].append(name)
            columns["shard"].append(index)
            columns["truncated"].append(False)
            for feature in FEATURES:
                columns["fingerprint"][feature].append("00")
            for key in KEYS:
                info = tarfile.TarInfo(f"{name}.{key}")
                info.size = len(members[key])
                columns["offset"][key].append(tar.offset + 512)
                columns["size"][key].append(info.size)
                columns["crc32"][key].append(zlib.crc32(members[key]))
                tar.addfile(info, io.BytesIO(members[key]))
    num, num_bytes = len(samples), path.stat().st_size
    moments = {name: dict(count=0, mean=[], m2=[]) for name in STATISTICS}
    return dict(file=path.name, num_samples=num, num_bytes=num_bytes, sha256="", moments=moments)


def write_features(root, *, vae=("nowhere", "0"), shards=SHARDS, num_held_out=2):
    """Write a feature folder, numbers running over all its samples; return it.

    ``vae`` is folder and hash of the autoencoder that its latents are said to be of.
    """
    buckets, number = [], 0
    for (width, height), sizes in shards.items():
        name = f"{width}x{height}"
        for split, parts in (("train", sizes), ("validation", (num_held_out,))):
            folder = root / split / f"bucket_{name}"
            folder.mkdir(parents=True)
            columns = dict(id=[], shard=[], truncated=[])
            columns |= {group: {key: [] for key in KEYS} for group in ("offset", "size", "crc32")}
            columns["fingerprint"] = {feature: [] for feature in FEATURES}
            listed = []
            for index, num in enumerate(parts):
                samples = {}
                for _ in range(num):
                    key = hashlib.sha256(f"{number}".encode()).hexdigest()[:16]
                    samples[key] = sample(number, width, height)
                    number += 1
                path = folder / f"shard-{index:06d}.tar"
                listed.append(write_shard(path, samples, columns, index))
            manifest = dict(format="setdiffit-feature-shards", version=1, bucket=name, split=split)
            manifest |= dict(shards=listed, columns=columns)
            (folder / "manifest.json").write_text(json.dumps(manifest))
        buckets.append(
            BucketRecord(
                name=name,
                width=width,
                height=height,
                latent_shape=(CHANNELS, height // 8, width // 8),
                patch_grid=(height // 16, width // 16),
                num=dict(train=sum(sizes), validation=num_held_out),
            )
        )

    def statistics(dim, mean, std):
        return dict(count=30, mean=[mean] * dim, std=[std] * dim)

    exact = dict(precision="fp32")
    normalisation = dict(channels=CHANNELS, downsampling=8, scale=1.0, shift=0.0)
    record = FeatureRecord(
        name="numbers/of random",
        source_hash="1",
        buckets=tuple(buckets),
        validation_share=0.1,
        shard_size=8,
        vae=dict(zip(("location", "hash"), map(str, vae), strict=True), **exact, **normalisation),
        visual=dict(
            location="v", hash="1", **exact, patch_size=16, num_registers=4, dim=VISUAL_DIM
        ),
        text=dict(location="t", hash="1", **exact, dim=TEXT_DIM, max_tokens=32),
        captions=dict(num_truncated=0),
        statistics=dict(
            vae=statistics(CHANNELS, 1.0, 3.0),
            cls=statistics(VISUAL_DIM, 0.0, 1.0),
            patches=statistics(VISUAL_DIM, 0.0, 1.0),
        ),
        content_hash="abc",
        packages=dict(python="3"),
    )
    (root / RECORD_FILE).write_text(json.dumps(record.to_dict()))
    return root
