"""Checks a feature folder: what is there, whether it is whole, up to date, and aligned."""

import collections
import contextlib
import dataclasses
import hashlib
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
from data.features.record import (
    AGAIN,
    FEATURES,
    SPLITS,
    FeatureRecord,
    bucket_folder,
    read_feature_record,
)
from data.features.shards import Members, Tally, check_shard, from_npy, read_member
from data.images.archive import open_archive
from data.images.decode import decode_image
from data.images.members import Archive
from dnnlib.parallel import num_usable_cores, thread_map
from dnnlib.progress import progress
from encoders.visual import VisualEncoder, load_visual_encoder

STATES = ("ok", "missing", "stale", "corrupt")
PATCHES = "dinov3_patches.npy"
MAX_SHIFT = 8  # Rows of patches by which stored and new ones are compared.
MIN_COSINE = 0.99
_COSINE_TOLERANCE = 1e-4  # What rounding may add to a mean cosine.
_TOLERANCE = 1e-6  # Of statistics.
_MAX_THREADS = 8

Place = tuple[str, str, str]  # Split, bucket and feature.


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        counts: Number of samples in each of STATES, by split, bucket and feature.
        patches: Number of samples by their number of patches, by bucket.
        problems: A sentence for each.
    """

    counts: dict[Place, collections.Counter[str]]
    patches: dict[str, collections.Counter[int]]
    problems: list[str]

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


def verify_features(
    path: str | os.PathLike,
    *,
    source: str | None = None,
    visual: str | None = None,
    num_samples: int = 4,
    num_threads: int | None = None,
    device: torch.device | str = "cpu",
) -> Verification:
    """Read a whole feature folder and return what is right and what is not.

    Every member is compared with its checksum, type, shape and range, its fingerprint with what
    record and list of images say, manifests with shards, and counts, statistics and hashes of the
    record with what is there.

    Args:
        source: The folder or zip of images, whose bytes are then compared as well.
        visual: The visual encoder, by which ``num_samples`` of each bucket are encoded again. Their
            patches must be those that are stored, none shifted, with a mean cosine above 0.99.

    Raises ValueError if ``source`` or ``visual`` cannot be used.
    """
    checker = _Checker(Path(path), num_threads or min(num_usable_cores(), _MAX_THREADS))
    if visual is not None and source is None:
        raise ValueError("--visual: needs --source, the images to be encoded again.")
    archive = None if source is None else open_archive(source)
    encoder = None
    if visual is not None:
        facts = checker.plan.encoders.get("visual") or {}
        settings = dict(expected_hash=facts.get("hash"), precision=facts.get("precision", "fp32"))
        encoder = load_visual_encoder(visual, device, **settings)
    checker.check_shards()
    if archive is not None:
        checker.check_source(archive)
    checker.count()
    if checker.record is not None:
        checker.check_record(checker.record)
    if archive is not None and encoder is not None:
        checker.check_alignment(archive, encoder, num_samples)
    return Verification(checker.counts, checker.patches, checker.problems)


class _Checker:
    """A verification under way: what is known of the folder, and the problems so far."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        """Read record, or claim, list of images and manifests, as far as they are readable."""
        self.folder = folder
        self.num_threads = num_threads
        self.problems: list[str] = []
        self.counts: dict[Place, collections.Counter[str]] = {}
        self.patches: dict[str, collections.Counter[int]] = collections.defaultdict(
            collections.Counter
        )
        self.indexes: dict[Path, Manifest] = {}  # Of each shard, without what is damaged.
        self.moments: dict[Path, dict[str, Any] | None] = {}  # Of shards without problems.
        self.changed: set[str] = set()  # Names of samples whose image is another now.
        self.record: FeatureRecord | None = self._try(read_feature_record, folder)
        encoders, buckets = {}, ()
        if self.record is not None:
            encoders = {feature: getattr(self.record, feature) for feature in FEATURES}
            buckets = tuple(bucket.bucket for bucket in self.record.buckets)
        else:
            encoders, buckets = self._try(read_claim, folder) or (encoders, buckets)
        self.plan = Plan(
            images=self._try(read_images, folder) or [],
            buckets=buckets,
            encoders=encoders,
        )
        places = [(split, bucket.name) for split in SPLITS for bucket in buckets]
        if self.record is None:  # They are written at the end.
            places = [p for p in places if (bucket_folder(folder, *p) / MANIFEST_FILE).exists()]
        found = {place: self._try(read_manifest, folder, *place) for place in places}
        self.manifests = {place: manifest for place, manifest in found.items() if manifest}
        # Shards that a manifest names.
        self.named = {path for manifest in self.manifests.values() for path in manifest.files}

    def _try(self, read: Any, *args: Any) -> Any:
        """Return what is read; None, and a problem, where a file is damaged or missing."""
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
        bar = progress(total=len(paths), label=f"Verifying {self.folder}", unit="shard")
        found = thread_map(self._check_shard, paths, self.num_threads, self.num_threads)
        with bar:
            for path, (index, problems, moments, histogram) in zip(paths, found, strict=True):
                for problem in problems:
                    self._add(path, problem)
                self.indexes[path] = index
                self.moments[path] = moments
                self.patches[index.bucket] += histogram
                bar.update()
        for bucket in self.plan.buckets:
            self._check_patches(bucket)

    def _check_shard(
        self, path: Path
    ) -> tuple[Manifest, list[str], dict[str, Any] | None, collections.Counter[int]]:
        """Return index and problems of a shard, its moments if there are none, and patches."""
        known = known_index(path, {m.folder: m for m in self.manifests.values()})
        tally, histogram = Tally(), collections.Counter[int]()

        def visit(members: Members) -> None:
            with contextlib.suppress(KeyError, ValueError):  # Which is a problem already.
                histogram[len(from_npy(members[PATCHES]))] += 1
                tally.add(members)

        index, problems = check_shard(path, known, self.plan.shapes(known.bucket), visit)
        if not known.shards[0]["sha256"]:
            return index, [], None, histogram  # There is nothing that it could be compared with.
        return index, problems, None if problems else tally.moments, histogram

    def _check_patches(self, bucket: Bucket) -> None:
        """Tell what a number of patches may come from that is not the bucket's."""
        visual = self.plan.encoders.get("visual")
        if visual is None:
            return
        expected = math.prod(bucket.grid(visual["patch_size"]))
        reasons = {
            expected + visual["num_registers"]: f", as if the {visual['num_registers']} registers "
            "were patches",
            math.prod(bucket.grid(14)): ", the grid of patches of 14, but this encoder's are "
            f"{visual['patch_size']}",
            196: ", the grid of a square of 224 with patches of 16",
        }
        for num, count in self.patches[bucket.name].items():
            if num != expected:
                self._add(
                    self.folder,
                    f"bucket {bucket.name} has {count} sample(s) of {num} patches, not {expected}"
                    + reasons.get(num, ""),
                )

    # The source.

    def check_source(self, archive: Archive) -> None:
        """Note which images are others than those that features were made of."""
        positions = {name: index for index, name in enumerate(archive.names)}

        def differs(image: PlannedImage) -> bool:
            try:
                data = archive.read(positions[image.file])
            except (KeyError, ValueError):
                return True
            return hashlib.sha256(data).hexdigest() != image.sha256

        images = self.plan.images
        found = thread_map(differs, images, self.num_threads, 4 * self.num_threads)
        with progress(total=len(images), label=f"Comparing {archive.path}") as bar:
            for image, is_other in zip(images, found, strict=True):
                bar.update()
                if is_other:
                    self.changed.add(image.id)
                    where = f"{archive.path}/{image.file}"
                    self._add(where, "is not what features were made of any more")

    # Samples.

    def count(self) -> None:
        """Count the samples of each feature by state, and look for what is there twice."""
        rows: dict[str, list[tuple[Path, int]]] = collections.defaultdict(list)
        for path, index in self.indexes.items():
            if path.parent.name.startswith("bucket_"):
                for row, name in enumerate(index.ids):
                    rows[name].append((path, row))
        for name, places in rows.items():
            if len(places) > 1:
                where = " and ".join(f"{p.parent.parent.name}/{p.parent.name}" for p, _ in places)
                self._add(self.folder, f"{name} is there twice, in {where}")
        planned = {image.id for image in self.plan.images}
        others = [name for name in rows if name not in planned]
        if others and planned:
            what = f"{len(others)} sample(s) are of no image that was asked for, as {others[0]}"
            self._add(self.folder, what)
        for split in SPLITS:
            for bucket in self.plan.buckets:
                for feature in FEATURES:
                    self.counts[split, bucket.name, feature] = collections.Counter()
        for image in self.plan.images:
            for feature in FEATURES:
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
        places = [(split, bucket) for split in SPLITS for bucket in record.buckets]
        manifests = [self.manifests.get((split, bucket.name)) for split, bucket in places]
        if None in manifests:
            return
        for (split, bucket), manifest in zip(places, manifests, strict=True):
            if len(manifest) != bucket.num[split]:
                says = f"says {bucket.num[split]} samples of {split} in bucket {bucket.name}"
                self._add(file, f"{says}, but there are {len(manifest)}")
        if hash_of_shards(manifests) != record.content_hash:
            self._add(file, "is not of these shards (content_hash)")
        train = [self.moments.get(f) for m in manifests if m.split == "train" for f in m.files]
        if None in train or not train:
            return  # A problem of a shard, which is known already.
        for name, found in statistics_of(train).items():
            said = record.statistics[name]
            close = [
                np.allclose(found[key], said[key], rtol=_TOLERANCE, atol=_TOLERANCE)
                for key in ("mean", "std")
            ]
            if found["count"] != said["count"] or not all(close):
                self._add(file, f"its statistics of {name} are not those of the training split")

    # Alignment.

    def check_alignment(self, archive: Archive, encoder: VisualEncoder, num_samples: int) -> None:
        """Encode some images of each bucket again and compare their patches."""
        positions = {name: index for index, name in enumerate(archive.names)}
        for bucket in self.plan.buckets:
            for image, path, row in self._choose(bucket, num_samples):
                data = archive.read(positions[image.file])
                fitted, _ = fit_image(decode_image(data), bucket)
                pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None]
                fresh = encoder.encode(pixels)[1][0].cpu()
                with open(path, "rb") as file:
                    data = read_member(file, self.indexes[path], row, PATCHES)
                stored = torch.from_numpy(from_npy(data).astype(np.float32))
                problem = misalignment(stored, fresh)
                if problem is not None:
                    self.problems.append(
                        f"{path}: {image.id} ({image.file}): patches are misaligned, "
                        f"{problem}; make them again with --overwrite."
                    )

    def _choose(self, bucket: Bucket, num_samples: int) -> list[tuple[PlannedImage, Path, int]]:
        """Return samples of a bucket, spread evenly, whose patches and image can be compared."""
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
    """Return what is wrong with stored patches [N, D] beside those encoded again, or None.

    They are compared at every shift of up to MAX_SHIFT rows.
    """
    if stored.shape != fresh.shape:
        return f"{list(stored.shape)} instead of {list(fresh.shape)}"
    cosines = {}
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        first = stored[max(shift, 0) : len(stored) + min(shift, 0)]
        second = fresh[max(-shift, 0) : len(fresh) + min(-shift, 0)]
        if len(first):
            cosine = torch.nn.functional.cosine_similarity(first, second, dim=1)
            cosines[shift] = float(cosine.mean())
    best = max(cosines, key=lambda shift: (cosines[shift], -abs(shift)))
    if cosines[best] - cosines[0] > _COSINE_TOLERANCE:
        return (
            f"shifted by {best} rows (mean cosine {cosines[best]:.4f}, unshifted {cosines[0]:.4f})"
        )
    if cosines[0] <= MIN_COSINE:
        return f"with a mean cosine of {cosines[0]:.4f} to those encoded again"
    return None
