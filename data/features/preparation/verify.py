"""Checks whether a feature folder is complete, intact, up to date and aligned."""

import collections
import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.features.buckets import Bucket, fit_image
from data.features.manifests import MANIFEST_FILE, Manifest, read_manifest
from data.features.preparation.pack import find_shards, hash_of_shards, known_index, statistics_of
from data.features.preparation.plan import Plan, PlannedImage, read_claim, read_images
from data.features.preparation.stage import Stage
from data.features.quantised import as_float16
from data.features.record import (
    AGAIN,
    FEATURES,
    PATCHES,
    SPLITS,
    FeatureRecord,
    bucket_folder,
    read_feature_record,
)
from data.features.shards import Members, Tally, check_shard, from_npy, read_member
from data.images.archive import open_archive
from data.images.decode import decode_image
from data.images.members import Archive
from data.resumable import map_of_ranks
from dnnlib.parallel import num_usable_cores
from encoders.visual import VisualEncoder, load_visual_encoder

STATES = ("ok", "missing", "stale", "corrupt")
MAX_SHIFT = 8  # In rows of the patch array: how far patches are shifted for comparison.
MIN_COSINE = 0.99
_COSINE_TOLERANCE = 1e-4  # By how much rounding may raise a mean cosine.
_TOLERANCE = 1e-6  # Relative and absolute, for statistics.
_MAX_THREADS = 8


def verify_features(
    path: str | os.PathLike,
    *,
    source: str | None = None,
    visual: str | None = None,
    num_samples: int = 4,
    num_threads: int | None = None,
    device: torch.device | str = "cpu",
) -> "Verification":
    """Read a whole feature folder and return what is intact and what is not. Collective.

    Each member is checked against its checksum, dtype, shape and range, and each fingerprint
    against the record and the list of images. Manifests are compared with the shards, and counts,
    statistics and hashes of the record with what is stored.

    Args:
        source: Folder or zip of the images, whose bytes are then compared too.
        visual: Location of the visual encoder, which encodes ``num_samples`` images of each bucket
            again. The stored patches must match the new ones unshifted, with a mean cosine
            similarity above 0.99.
        num_threads: Threads per rank that read shards; by default one per core, up to 8.

    Raises ValueError if ``source`` or ``visual`` cannot be used.
    """
    found = Verification(Path(path), num_threads or min(num_usable_cores(), _MAX_THREADS))
    if visual is not None and source is None:
        raise ValueError("--visual: needs --source, the images to be encoded again.")
    archive = None if source is None else open_archive(source)
    encoder = None
    if visual is not None:
        facts = found.plan.encoders.get("visual") or {}
        settings = dict(expected_hash=facts.get("hash"), precision=facts.get("precision", "fp32"))
        encoder = load_visual_encoder(visual, device, **settings)
    found.check_shards()
    if archive is not None:
        found.check_source(archive)
    found.count()
    if found.record is not None:
        found.check_record(found.record)
    if archive is not None and encoder is not None:
        found.check_alignment(archive, encoder, num_samples)
    return found


class Verification:
    """What is known about a feature folder, and the problems found so far.

    Attributes:
        counts: Number of samples in each of STATES, by (split, bucket, feature).
        patches: For each bucket, a histogram of the number of patches of its samples.
        problems: One sentence for each problem.
    """

    def __init__(self, folder: Path, num_threads: int) -> None:
        """Read the record or else the claim, the list of images and the manifests, if readable."""
        self.problems: list[str] = []
        self.counts: dict[tuple[str, str, str], collections.Counter[str]] = {}
        self.patches: dict[str, collections.Counter[int]] = {}
        self.folder, self.num_threads = folder, num_threads
        self.indexes: dict[Path, Manifest] = {}  # Manifest of each shard, damage marked.
        self.moments: dict[Path, dict[str, Any] | None] = {}  # None: the shard has problems.
        self.changed: set[str] = set()  # Names of samples whose image has changed.
        self.record: FeatureRecord | None = self._try(read_feature_record, folder)
        encoders, buckets = {}, ()
        if self.record is not None:
            encoders = {feature: getattr(self.record, feature) for feature in FEATURES}
            buckets = tuple(bucket.bucket for bucket in self.record.buckets)
        else:
            encoders, buckets = self._try(read_claim, folder) or (encoders, buckets)
        images = self._try(read_images, folder) or []
        self.plan = Plan(images=images, buckets=buckets, encoders=encoders)
        places = [(split, bucket.name) for split in SPLITS for bucket in buckets]
        if self.record is None:  # Manifests are written at the end of a preparation.
            places = [p for p in places if (bucket_folder(folder, *p) / MANIFEST_FILE).exists()]
        found = {place: self._try(read_manifest, folder, *place) for place in places}
        self.manifests = {place: manifest for place, manifest in found.items() if manifest}
        # The shards that manifests name.
        self.named = {path for manifest in self.manifests.values() for path in manifest.files}

    def table(self) -> Iterator[str]:
        """Yield the counts as lines of text."""
        yield "bucket      split       feature" + "".join(f"{state:>10s}" for state in STATES)
        for (split, bucket, feature), counts in self.counts.items():
            numbers = "".join(f"{counts[state]:10d}" for state in STATES)
            yield f"{bucket:11s} {split:11s} {feature:7s}{numbers}"
        yield ""
        for bucket, histogram in self.patches.items():
            parts = [f"{num} in {count} sample(s)" for num, count in sorted(histogram.items())]
            yield f"{bucket:11s} patches: {', '.join(parts) or 'none'}"

    def _try(self, read: Any, *args: Any) -> Any:
        """Return ``read(*args)``; if it raises ValueError, note the problem and return None."""
        try:
            return read(*args)
        except ValueError as error:
            self.problems.append(str(error))
            return None

    def _add(self, where: Any, problem: str) -> None:
        self.problems.append(f"{where}: {problem}; {AGAIN}.")

    # Shards.

    def check_shards(self) -> None:
        """Read all shards and compare them with their manifests."""
        paths = find_shards(self.folder)
        for path in sorted(self.named - set(paths)):
            self._add(path, "is missing")
        for path in paths:
            if self.record is not None and path not in self.named:
                self._add(path, "is in no manifest")
        label = f"Verifying {self.folder}"
        found = map_of_ranks(self._check_shard, paths, self.num_threads, label, "shard")
        for path, (index, problems, moments, histogram) in zip(paths, found, strict=True):
            for problem in problems:
                self._add(path, problem)
            self.indexes[path], self.moments[path] = index, moments
            self.patches.setdefault(index.bucket, collections.Counter()).update(histogram)
        if self.plan.encoders.get("visual") is not None:
            for bucket in self.plan.buckets:
                self._check_patches(bucket, self.plan.encoders["visual"])

    def _check_shard(
        self, path: Path
    ) -> tuple[Manifest, list[str], dict[str, Any] | None, collections.Counter[int]]:
        """Return a shard's manifest, problems, moments (None with problems) and patch histogram."""
        known = known_index(path, {m.folder: m for m in self.manifests.values()})
        tally, histogram = Tally(), collections.Counter[int]()

        def visit(members: Members) -> None:
            with contextlib.suppress(KeyError, ValueError):  # Reported by check_shard.
                histogram[len(from_npy(members[PATCHES]))] += 1
                tally.add(members)

        index, problems = check_shard(path, known, self.plan.shapes(known.bucket), visit)
        if not known.shards[0]["sha256"]:
            return index, [], None, histogram  # Reconstructed: nothing to compare with.
        return index, problems, None if problems else tally.moments, histogram

    def _check_patches(self, bucket: Bucket, visual: Any) -> None:
        """Add a problem, with a likely cause, for each number of patches but the bucket's own."""
        size, num_registers = visual["patch_size"], visual["num_registers"]
        expected = math.prod(bucket.grid(size))
        reasons = {
            expected + num_registers: f", as if the {num_registers} registers were patches",
            math.prod(
                bucket.grid(14)
            ): f", the grid of patches of 14, but this encoder's are {size}",
            196: ", the grid of a square of 224 with patches of 16",
        }
        for num, count in self.patches.get(bucket.name, {}).items():
            if num != expected:
                found = f"{count} sample(s) of {num} patches, not {expected}{reasons.get(num, '')}"
                self._add(self.folder, f"bucket {bucket.name} has {found}")

    # The source.

    def check_source(self, archive: Archive) -> None:
        """Compare the images with those that the features were made from, and note changes."""
        positions = {name: index for index, name in enumerate(archive.names)}

        def differs(image: PlannedImage) -> bool:
            try:
                data = archive.read(positions[image.file])
            except (KeyError, ValueError):
                return True
            return hashlib.sha256(data).hexdigest() != image.sha256

        images, label = self.plan.images, f"Comparing {archive.path}"
        found = map_of_ranks(differs, images, self.num_threads, label)
        for image in itertools.compress(images, found):
            self.changed.add(image.id)
            where = f"{archive.path}/{image.file}"
            self._add(where, "has changed since the features were made")

    # Samples.

    def count(self) -> None:
        """Count the samples of each feature by state; find duplicate and unplanned samples."""
        rows: dict[str, list[tuple[Path, int]]] = collections.defaultdict(list)
        for path, index in self.indexes.items():
            if path.parent.name.startswith("bucket_"):
                for row, name in enumerate(index.ids):
                    rows[name].append((path, row))
        for name, places in rows.items():
            if len(places) > 1:
                where = " and ".join(f"{p.parent.parent.name}/{p.parent.name}" for p, _ in places)
                self._add(self.folder, f"{name} appears twice, in {where}")
        planned = {image.id for image in self.plan.images}
        others = [name for name in rows if name not in planned]
        if others and planned:
            what = f"{len(others)} sample(s) belong to no requested image, such as {others[0]}"
            self._add(self.folder, what)
        buckets = [bucket.name for bucket in self.plan.buckets]
        for place in itertools.product(SPLITS, buckets, FEATURES):
            self.counts[place] = collections.Counter()
        for image, feature in itertools.product(self.plan.images, FEATURES):
            place = image.split, image.bucket, feature
            counts = self.counts.setdefault(place, collections.Counter())
            counts[self._state(image, feature, rows[image.id])] += 1
        for (split, bucket, feature), counts in self.counts.items():
            for state in STATES[1:]:
                if counts[state]:
                    what = f"{counts[state]} {feature} feature(s) {state}"
                    self._add(self.folder, f"{split}, bucket {bucket}: {what}")

    def _state(self, image: PlannedImage, feature: str, places: list[tuple[Path, int]]) -> str:
        wanted = self.plan.fingerprints[image.id].get(feature)
        folder = bucket_folder(self.folder, image.split, image.bucket)
        for path, row in places:
            if path.parent != folder or (self.record is not None and path not in self.named):
                continue
            found = self.indexes[path].fingerprint[feature][row]
            if not found:
                return "corrupt"
            is_stale = found != wanted or (feature != "text" and image.id in self.changed)
            return "stale" if is_stale else "ok"
        if self.record is None and wanted is not None:
            shapes = self.plan.shapes(image.bucket)
            if Stage(self.folder).get(image.id, feature, wanted, shapes) is not None:
                return "ok"
        return "missing"

    # The record.

    def check_record(self, record: FeatureRecord) -> None:
        """Compare counts, hash and statistics of the record with the shards."""
        file = f"{self.folder}/features.json"
        counts = {(s, bucket.name): bucket.num[s] for s in SPLITS for bucket in record.buckets}
        manifests = [self.manifests.get(place) for place in counts]
        if None in manifests:
            return
        for ((split, bucket), num), manifest in zip(counts.items(), manifests, strict=True):
            if len(manifest) != num:
                says = f"says {num} samples of {split} in bucket {bucket}"
                self._add(file, f"{says}, but there are {len(manifest)}")
        if hash_of_shards(manifests) != record.content_hash:
            self._add(file, "does not match these shards (content_hash)")
        train = [self.moments.get(f) for m in manifests if m.split == "train" for f in m.files]
        if None in train or not train:
            return  # A shard has problems, which are noted already.
        for name, found in statistics_of(train).items():
            said = record.statistics[name]
            near = [np.allclose(found[k], said[k], _TOLERANCE, _TOLERANCE) for k in ("mean", "std")]
            if found["count"] != said["count"] or not all(near):
                self._add(file, f"its statistics of {name} are not those of the training split")

    # Alignment.

    def check_alignment(self, archive: Archive, encoder: VisualEncoder, num_samples: int) -> None:
        """Encode some images of each bucket again and compare their patches with those stored."""
        positions = {name: index for index, name in enumerate(archive.names)}
        for bucket in self.plan.buckets:
            for image, path, row in self._choose(bucket, num_samples):
                data = archive.read(positions[image.file])
                fitted, _ = fit_image(decode_image(data), bucket)
                pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None]
                fresh = encoder.encode(pixels)[1][0].cpu()
                with open(path, "rb") as file:
                    data = read_member(file, self.indexes[path], row, PATCHES)
                stored = torch.from_numpy(as_float16(from_npy(data)).astype(np.float32))
                problem = misalignment(stored, fresh)
                if problem is not None:
                    where = f"{path}: {image.id} ({image.file}): patches are misaligned"
                    remedy = "make them again with --overwrite"
                    self.problems.append(f"{where}, {problem}; {remedy}.")

    def _choose(self, bucket: Bucket, num_samples: int) -> list[tuple[PlannedImage, Path, int]]:
        """Return evenly spaced samples of a bucket whose patches and images can be compared."""
        images = {image.id: image for image in self.plan.images if image.id not in self.changed}
        rows = [
            (images[name], path, row)
            for path, index in self.indexes.items()
            if path in self.named and index.bucket == bucket.name
            for row, name in enumerate(index.ids)
            if name in images and index.fingerprint["visual"][row]
        ]
        num = min(num_samples, len(rows))
        return [rows[i * len(rows) // num] for i in range(num)]


def misalignment(stored: torch.Tensor, fresh: torch.Tensor) -> str | None:
    """Return how stored patches [N, D] differ from freshly encoded ones, or None if they match.

    Both are compared at all shifts of up to MAX_SHIFT rows, in either direction.
    """
    if stored.shape != fresh.shape:
        return f"{list(stored.shape)} instead of {list(fresh.shape)}"
    cosines = {}
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        first = stored[max(shift, 0) : len(stored) + min(shift, 0)]
        second = fresh[max(-shift, 0) : len(fresh) + min(-shift, 0)]
        if len(first):
            cosines[shift] = float(torch.cosine_similarity(first, second, dim=1).mean())
    best = max(cosines, key=lambda shift: (cosines[shift], -abs(shift)))
    if cosines[best] - cosines[0] > _COSINE_TOLERANCE:
        found = f"mean cosine {cosines[best]:.4f}, unshifted {cosines[0]:.4f}"
        return f"shifted by {best} rows ({found})"
    if cosines[0] <= MIN_COSINE:
        return f"with a mean cosine of {cosines[0]:.4f} to those encoded again"
    return None
