"""Checks a feature folder: what is there, whether it is whole, up to date, and aligned."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.features.buckets import fit_image, parse_buckets
from data.features.preparation.inventory import find_shards, read_index
from data.features.preparation.manifests import hash_of_shards, index_of, statistics_of
from data.features.preparation.plan import (
    Encoders,
    PlannedImage,
    fingerprint_of,
    read_images,
    shapes_of,
)
from data.features.preparation.staging import read_staged
from data.features.record import (
    AGAIN,
    CLAIM_FILE,
    FEATURES,
    MANIFEST_FILE,
    SPLITS,
    FeatureRecord,
    Manifest,
    bucket_folder,
    read_feature_record,
    read_manifest,
)
from data.features.shards import (
    Shapes,
    ShardIndex,
    check_shard,
    from_npy,
    index_shard,
    merge_moments,
    read_member,
    sample_moments,
)
from data.images.archive import open_archive
from data.images.decode import decode_image
from data.images.members import Archive
from dnnlib.parallel import num_usable_cores
from dnnlib.progress import progress
from encoders.visual import VisualEncoder, load_visual_encoder
from training.feature_alignment import misalignment

STATES = ("ok", "missing", "stale", "corrupt")
_TOLERANCE = 1e-6  # Of statistics.
_MAX_THREADS = 8

Key = tuple[str, str, str]  # Split, bucket and feature.


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        counts: Number of samples in each of STATES, by split, bucket and feature.
        patches: Number of samples by their number of patches, by bucket.
        problems: A sentence for each.
    """

    counts: dict[Key, collections.Counter[str]]
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
    folder = Path(path)
    checker = _Checker(folder, num_threads or min(num_usable_cores(), _MAX_THREADS))
    archive = None
    if visual is not None and source is None:
        raise ValueError("--visual: needs --source, the images to be encoded again.")
    if source is not None:
        archive = open_archive(source)
    encoder = None
    if visual is not None:
        facts = checker.facts.get("visual") or {}
        encoder = load_visual_encoder(
            visual,
            device,
            expected_hash=facts.get("hash"),
            precision=facts.get("precision", "fp32"),
        )
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
    """A verification under way."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        self.folder = folder
        self.num_threads = num_threads
        self.problems: list[str] = []
        self.counts: dict[Key, collections.Counter[str]] = {}
        self.patches: dict[str, collections.Counter[int]] = {}
        self.record: FeatureRecord | None = None
        self.facts: Encoders = {}
        self.buckets: tuple[str, ...] = ()
        self.images: list[PlannedImage] = []
        self.manifests: dict[tuple[str, str], Manifest] = {}
        self.named: set[Path] = set()  # Shards that a manifest names.
        self.indexes: dict[Path, ShardIndex] = {}
        self.moments: dict[Path, dict[str, Any]] = {}
        self.changed: set[str] = set()  # Names of samples whose image is another now.
        self._read_description()
        self.shapes = {name: shapes_of(parse_buckets(name)[0], self.facts) for name in self.buckets}

    def _read_description(self) -> None:
        """Read record, or claim, list of images and manifests, as far as they are readable."""
        with self._noting():
            self.record = read_feature_record(self.folder)
        if self.record is not None:
            self.facts = {feature: getattr(self.record, feature) for feature in FEATURES}
            self.buckets = tuple(bucket.name for bucket in self.record.buckets)
        else:
            with self._noting():
                self.facts, self.buckets = _read_claim(self.folder)
        with self._noting():
            self.images = read_images(self.folder)
        for split in SPLITS:
            for bucket in self.buckets:
                file = bucket_folder(self.folder, split, bucket) / MANIFEST_FILE
                if self.record is None and not file.exists():
                    continue  # It is written at the end.
                with self._noting():
                    self.manifests[split, bucket] = read_manifest(self.folder, split, bucket)
                    self.named.update(self.manifests[split, bucket].files)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Make a problem of an error that tells of a damaged file."""
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))

    # Shards.

    def check_shards(self) -> None:
        """Read all shards and compare them with their manifests."""
        paths = find_shards(self.folder)
        for path in sorted(self.named - set(paths)):
            self.problems.append(f"{path}: is missing; {AGAIN}.")
        for path in paths:
            if self.record is not None and path not in self.named:
                self.problems.append(f"{path}: is in no manifest; {AGAIN}.")
        with (
            ThreadPoolExecutor(self.num_threads) as pool,
            progress(total=len(paths), label=f"Verifying {self.folder}", unit="shard") as bar,
        ):
            for path, found in zip(paths, pool.map(self._check_shard, paths), strict=True):
                index, problems, moments, histogram = found
                self.indexes[path] = index
                self.problems += [f"{path}: {problem}; {AGAIN}." for problem in problems]
                self.patches.setdefault(index.bucket, collections.Counter()).update(histogram)
                if moments is not None:
                    self.moments[path] = moments
                bar.update()
        for bucket, histogram in self.patches.items():
            self._check_patches(bucket, histogram)

    def _check_shard(
        self, path: Path
    ) -> tuple[ShardIndex, list[str], dict[str, Any] | None, collections.Counter[int]]:
        manifest = self.manifests.get((path.parent.parent.name, path.parent.name[len("bucket_") :]))
        known = None if manifest is None else index_of(manifest, path.name)
        known = known or read_index(path)
        histogram: collections.Counter[int] = collections.Counter()
        if known is None:
            bucket = path.parent.name.removeprefix("bucket_")
            index = index_shard(path, bucket, self.shapes.get(bucket, Shapes()))
            return index, [], None, histogram
        shapes = self.shapes.get(known.bucket, Shapes())
        index, problems = check_shard(path, known, shapes)
        moments: dict[str, Any] | None = None
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for row in range(len(index.ids)):
                with contextlib.suppress(ValueError):  # Which is a problem already.
                    keys = ("vae.npy", "dinov3.npy", "dinov3_patches.npy")
                    members = {key: read_member(descriptor, index, row, key) for key in keys}
                    histogram[len(from_npy(members["dinov3_patches.npy"]))] += 1
                    if not problems:
                        part = sample_moments(members)
                        moments = {
                            name: merge_moments(moments and moments[name], part[name])
                            for name in part
                        }
        finally:
            os.close(descriptor)
        return index, problems, moments, histogram

    def _check_patches(self, bucket: str, histogram: Mapping[int, int]) -> None:
        """Tell what a number of patches may come from that is not the bucket's."""
        expected = self.shapes.get(bucket, Shapes()).num_patches
        visual = self.facts.get("visual")
        if expected is None or visual is None:
            return
        other_grid = math.prod(parse_buckets(bucket)[0].grid(14))
        for num, count in histogram.items():
            if num == expected:
                continue
            reason = ""
            if num == 196:
                reason = ", the grid of a square of 224 with patches of 16"
            elif num == other_grid:
                reason = (
                    f", the grid of patches of 14, but this encoder's are {visual['patch_size']}"
                )
            elif num == expected + visual["num_registers"]:
                reason = f", as if the {visual['num_registers']} registers were patches"
            self.problems.append(
                f"{self.folder}: bucket {bucket} has {count} sample(s) of {num} patches, not "
                f"{expected}{reason}; {AGAIN}."
            )

    # The source.

    def check_source(self, archive: Archive) -> None:
        """Note which images are others than those that features were made of."""
        positions = {name: index for index, name in enumerate(archive.names)}

        def differs(image: PlannedImage) -> bool:
            position = positions.get(image.scanned.file)
            if position is None:
                return True
            try:
                data = archive.read(position)
            except ValueError:
                return True
            return hashlib.sha256(data).hexdigest() != image.scanned.sha256

        with (
            ThreadPoolExecutor(self.num_threads) as pool,
            progress(total=len(self.images), label=f"Comparing {archive.path}") as bar,
        ):
            for image, is_other in zip(self.images, pool.map(differs, self.images), strict=True):
                bar.update()
                if is_other:
                    self.changed.add(image.id)
                    self.problems.append(
                        f"{archive.path}/{image.scanned.file}: is not what features were made of "
                        f"any more; {AGAIN}."
                    )

    # Samples.

    def count(self) -> None:
        """Count the samples of each feature by state, and look for what is there twice."""
        rows: dict[str, list[tuple[Path, int]]] = collections.defaultdict(list)
        for path, index in self.indexes.items():
            if path.parent.name.startswith("bucket_"):
                for row, name in enumerate(index.ids):
                    rows[name].append((path, row))
        for split in SPLITS:
            for bucket in self.buckets:
                for feature in FEATURES:
                    self.counts[split, bucket, feature] = collections.Counter()
        for name, places in rows.items():
            if len(places) > 1:
                where = " and ".join(f"{p.parent.parent.name}/{p.parent.name}" for p, _ in places)
                self.problems.append(f"{self.folder}: {name} is there twice, in {where}; {AGAIN}.")
        planned = {image.id for image in self.images}
        others = [name for name in rows if name not in planned]
        if others and self.images:
            self.problems.append(
                f"{self.folder}: {len(others)} sample(s) are of no image that was asked for, as "
                f"{others[0]}; {AGAIN}."
            )
        for image in self.images:
            folder = bucket_folder(self.folder, image.split, image.bucket.name)
            own = [
                (path, row)
                for path, row in rows.get(image.id, ())
                if path.parent == folder and (self.record is None or path in self.named)
            ]
            for feature in FEATURES:
                state = self._state(image, feature, own)
                counts = self.counts.setdefault(
                    (image.split, image.bucket.name, feature), collections.Counter()
                )
                counts[state] += 1
        for (split, bucket, feature), counts in self.counts.items():
            for state in STATES[1:]:
                if counts[state]:
                    self.problems.append(
                        f"{self.folder}: {split}, bucket {bucket}: {counts[state]} {feature} "
                        f"feature(s) {state}; {AGAIN}."
                    )

    def _state(self, image: PlannedImage, feature: str, places: Sequence[tuple[Path, int]]) -> str:
        wanted = fingerprint_of(image, feature, self.facts)
        if not places:
            shapes = self.shapes.get(image.bucket.name, Shapes())
            is_staged = self.record is None and wanted is not None
            if is_staged and read_staged(self.folder, feature, image.id, wanted, shapes):
                return "ok"
            return "missing"
        path, row = places[0]
        found = self.indexes[path].fingerprint[feature][row]
        if found is None:
            return "corrupt"
        if found != wanted or (feature != "text" and image.id in self.changed):
            return "stale"
        return "ok"

    # The record.

    def check_record(self, record: FeatureRecord) -> None:
        """Compare counts, hash and statistics of the record with the shards."""
        file = f"{self.folder}/features.json"
        shards, train = [], []
        for split in SPLITS:
            for bucket in record.buckets:
                manifest = self.manifests.get((split, bucket.name))
                if manifest is None:
                    return
                if len(manifest) != bucket.num[split]:
                    self.problems.append(
                        f"{file}: says {bucket.num[split]} samples of {split} in bucket "
                        f"{bucket.name}, but there are {len(manifest)}; {AGAIN}."
                    )
                for path, shard in zip(manifest.files, manifest.shards, strict=True):
                    shards.append((split, bucket.name, path.name, shard["sha256"]))
                    if split == "train":
                        train.append(self.moments.get(path))
        if hash_of_shards(shards) != record.content_hash:
            self.problems.append(f"{file}: is not of these shards (content_hash); {AGAIN}.")
        if None in train or not train:
            return  # A problem of a shard, which is known already.
        for name, found in statistics_of(train).items():
            said = record.statistics[name]
            same = found["count"] == said["count"] and all(
                np.allclose(found[key], said[key], rtol=_TOLERANCE, atol=_TOLERANCE)
                for key in ("mean", "std")
            )
            if not same:
                self.problems.append(
                    f"{file}: its statistics of {name} are not those of the training split; "
                    f"{AGAIN}."
                )

    # Alignment.

    def check_alignment(self, archive: Archive, encoder: VisualEncoder, num_samples: int) -> None:
        """Encode some images of each bucket again and compare their patches."""
        by_id = {image.id: image for image in self.images}
        positions = {name: index for index, name in enumerate(archive.names)}
        for bucket in self.buckets:
            chosen = self._choose(bucket, num_samples, by_id)
            for image, manifest, row in chosen:
                index = positions[image.scanned.file]
                fitted, _ = fit_image(decode_image(archive.read(index)), image.bucket)
                pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None]
                fresh = encoder.encode(pixels)[1][0].cpu()
                path = manifest.files[manifest.shard[row]]
                with open(path, "rb") as file:
                    file.seek(manifest.offset["dinov3_patches.npy"][row])
                    data = file.read(int(manifest.size["dinov3_patches.npy"][row]))
                stored = torch.from_numpy(from_npy(data).astype(np.float32))
                problem = misalignment(stored, fresh)
                if problem is not None:
                    self.problems.append(
                        f"{path}: {image.id} ({image.scanned.file}): patches are misaligned, "
                        f"{problem}; make them again with --overwrite."
                    )

    def _choose(
        self, bucket: str, num_samples: int, by_id: Mapping[str, PlannedImage]
    ) -> list[tuple[PlannedImage, Manifest, int]]:
        """Return samples of a bucket, spread evenly, whose patches and image can be compared."""
        rows = []
        for split in SPLITS:
            manifest = self.manifests.get((split, bucket))
            for row, name in enumerate(manifest.ids if manifest else ()):
                path = manifest.files[manifest.shard[row]]
                index = self.indexes.get(path)
                if index is None or name not in by_id or name in self.changed:
                    continue
                if index.fingerprint["visual"][index.ids.index(name)] is not None:
                    rows.append((by_id[name], manifest, row))
        num = min(num_samples, len(rows))
        return [rows[i * len(rows) // num] for i in range(num)]


def _read_claim(folder: Path) -> tuple[Encoders, tuple[str, ...]]:
    """Return encoders and buckets that a preparation under way has claimed the folder for."""
    file = folder / CLAIM_FILE
    try:
        claim = json.loads(file.read_text(encoding="utf-8"))
        facts = {feature: claim[feature] for feature in FEATURES}
        return facts, tuple(bucket.name for bucket in parse_buckets(",".join(claim["buckets"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {AGAIN}.") from None
