"""A preparation of features under way: what is there, what is missing, and how that is made."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from data.features.buckets import Bucket
from data.features.preparation import inventory
from data.features.preparation.encode import Batch, FeatureMaker
from data.features.preparation.manifests import Contents, write_record
from data.features.preparation.plan import (
    Encoders,
    PlannedImage,
    PlannedShard,
    describe_sample,
    fingerprint_of,
    hash_of_source,
    is_right,
    plan_shards,
    shapes_of,
    write_images,
)
from data.features.preparation.staging import clear_staged, read_staged, staged_names, unstage
from data.features.record import (
    CLAIM_FILE,
    FEATURES,
    KEYS_OF,
    RECORD_FILE,
    FeatureRecord,
    is_complete,
)
from data.features.shards import Members, Shapes, ShardIndex, read_member, write_shard
from data.images.members import Archive
from dnnlib.files import write_json
from dnnlib.progress import progress
from torch_utils import distributed

T = TypeVar("T")

CLAIM_FORMAT = "setdiffit-feature-preparation"
_BATCHES_PER_ROUND = 32  # Of each rank, between two moments at which shards are packed.
_ALTERED = "was altered while it was in use; start the same command again"


class FeatureWork:
    """Brings a feature folder to what is planned, with what is there and still right.

    All methods are collective. Nothing that is right is deleted before it is in its new shard.
    """

    def __init__(
        self,
        folder: Path,
        archive: Archive,
        images: Sequence[PlannedImage],
        encoders: Mapping[str, Any],
        facts: Encoders,
        *,
        buckets: Sequence[Bucket],
        validation_share: float,
        shard_size: int,
        batch_size: int,
        num_threads: int,
    ) -> None:
        """``encoders`` and ``facts`` are of the features to be made, by name."""
        self._folder = folder
        self._archive = archive
        self._images = {image.id: image for image in images}
        self._facts = facts
        self._buckets = buckets
        self._validation_share = validation_share
        self._shard_size = shard_size
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._shapes = {bucket.name: shapes_of(bucket, facts) for bucket in buckets}
        self._fingerprints = {
            image.id: {feature: fingerprint_of(image, feature, facts) for feature in facts}
            for image in images
        }
        self._maker = FeatureMaker(
            folder, archive, encoders, self._fingerprints, num_threads=num_threads
        )
        self._indexes: dict[Path, ShardIndex] = {}
        # Where each right feature of a sample is: a row of a shard, or None if it is staged.
        self._places: dict[tuple[str, str], tuple[Path, int] | None] = {}

    def num_made(self) -> dict[str, int]:
        """Return how many of each feature were made by all ranks."""
        parts = distributed.gather_objects(dict(self._maker.num_made))
        return {feature: sum(part.get(feature, 0) for part in parts) for feature in FEATURES}

    def make_one(self, feature: str) -> None:
        """Stage what is missing of one feature; shards and record stay as they are."""
        distributed.on_main(self._write_claim)
        self._take_inventory()
        self._find_places()
        missing = self._missing(feature)
        if feature == "text":
            self._make_texts(missing)
            return
        batches = [b for shard in self._plan() for b in self._batches(shard, {feature: missing})]
        with self._image_bar(batches) as on_done, distributed.together():
            self._maker.make_images(_share(batches), on_done)

    def make_all(self, *, anew: bool = False) -> tuple[FeatureRecord, int]:
        """Make everything; return the record and how many shards were written.

        ``anew`` deletes what is there before.
        """
        if anew:
            distributed.on_main(self._delete)
        shards = self._plan()
        self._take_inventory()
        wrong = [
            shard
            for shard in shards
            if not is_right(shard, self._indexes.get(self._path(shard)), self._fingerprints)
        ]
        kept = {self._path(shard) for shard in shards} - {self._path(shard) for shard in wrong}
        others = [
            path
            for path in self._indexes
            if path not in kept and path.parent.name != inventory.OLD_FOLDER
        ]
        moved = distributed.on_main(lambda: self._claim(wrong, others))
        self._indexes = {moved.get(path, path): index for path, index in self._indexes.items()}
        self._find_places()
        missing = {feature: self._missing(feature) for feature in FEATURES}
        self._make_texts(missing["text"])
        self._make_shards(wrong, missing)
        record = distributed.on_main(lambda: self._finish(shards))
        return record, len(wrong)

    def _finish(self, shards: Sequence[PlannedShard]) -> FeatureRecord:
        parts = [(s.split, s.bucket.name, s.path(self._folder).name) for s in shards]
        indexes = [self._indexes[self._path(shard)] for shard in shards]
        record = write_record(
            self._folder,
            Contents(tuple(self._buckets), list(zip(parts, indexes, strict=True))),
            self._facts,
            name=self._archive.path.stem,
            source_hash=hash_of_source(list(self._images.values())),
            validation_share=float(self._validation_share),
            shard_size=self._shard_size,
        )
        inventory.clear(self._folder, [bucket.name for bucket in self._buckets])
        clear_staged(self._folder)
        return record

    def _plan(self) -> list[PlannedShard]:
        return plan_shards(list(self._images.values()), self._buckets, self._shard_size)

    def _path(self, shard: PlannedShard) -> Path:
        return shard.path(self._folder)

    # What is there.

    def _take_inventory(self) -> None:
        self._indexes = inventory.take_inventory(
            self._folder,
            lambda bucket: self._shapes.get(bucket, Shapes()),
            check_all=distributed.on_main(lambda: is_complete(self._folder)),
            num_threads=self._num_threads,
        )

    def _find_places(self) -> None:
        for path, index in self._indexes.items():
            for feature in self._facts:
                for row, name in enumerate(index.ids):
                    wanted = self._fingerprints.get(name, {}).get(feature)
                    if wanted is not None and index.fingerprint[feature][row] == wanted:
                        self._places[feature, name] = (path, row)
        staged = [
            (feature, name)
            for feature, name in distributed.on_main(lambda: list(staged_names(self._folder)))
            if feature in self._facts and name in self._images
        ]
        with distributed.together(), ThreadPoolExecutor(self._num_threads) as pool:
            mine = _share(staged)
            parts = pool.map(lambda item: self._read_staged(*item) is not None, mine)
            found = [item for item, is_usable in zip(mine, parts, strict=True) if is_usable]
        for part in distributed.gather_objects(found):
            for item in part:
                self._places.setdefault(item)

    def _read_staged(self, feature: str, name: str) -> tuple[Members, dict[str, Any]] | None:
        wanted = self._fingerprints[name][feature]
        shapes = self._shapes[self._images[name].bucket.name]
        return read_staged(self._folder, feature, name, wanted, shapes)

    def _missing(self, feature: str) -> set[str]:
        return {name for name in self._images if (feature, name) not in self._places}

    # The claim to the folder, by rank 0.

    def _write_claim(self) -> None:
        """Write what the folder is to become; facts of encoders that are not in use stay."""
        claim = self._folder / CLAIM_FILE
        facts: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            facts = dict(json.loads(claim.read_text(encoding="utf-8")))
        write_json(
            claim,
            dict(
                format=CLAIM_FORMAT,
                version=1,
                name=self._archive.path.stem,
                buckets=[bucket.name for bucket in self._buckets],
                validation_share=self._validation_share,
                shard_size=self._shard_size,
                **{feature: self._facts.get(feature, facts.get(feature)) for feature in FEATURES},
            ),
        )
        write_images(self._folder, list(self._images.values()))

    def _claim(self, wrong: Sequence[PlannedShard], others: Sequence[Path]) -> dict[Path, Path]:
        """Make room for the shards to be written; return where shards went that are not right.

        From here on until the end, what the folder holds is told by the index beside each shard.
        """
        self._write_claim()
        if not wrong and not others:
            return {}
        (self._folder / RECORD_FILE).unlink(missing_ok=True)
        inventory.remove_manifests(self._folder)
        return inventory.set_aside(self._folder, others, self._indexes)

    def _delete(self) -> None:
        (self._folder / RECORD_FILE).unlink(missing_ok=True)
        inventory.remove_shards(self._folder)
        clear_staged(self._folder)

    # Making.

    def _make_texts(self, missing: set[str]) -> None:
        images = [self._images[name] for name in missing]
        images.sort(key=lambda image: (len(image.caption), image.id))  # So that few are padded.
        size = self._batch_size
        mine = _share([images[first : first + size] for first in range(0, len(images), size)])
        bar = _bar(len(images), sum(map(len, mine)), "Encoding captions")
        with bar as on_done, distributed.together():
            self._maker.make_texts(mine, on_done)

    def _batches(self, shard: PlannedShard, missing: Mapping[str, set[str]]) -> list[Batch]:
        """Return batches of the images of a shard that lack latents or visual features.

        They are the same for any number of ranks.
        """
        rows = []
        for image in shard.images:
            wanted = frozenset(
                feature for feature in ("vae", "visual") if image.id in missing.get(feature, ())
            )
            if wanted:
                rows.append((image, wanted))
        size = self._batch_size
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _image_bar(
        self, batches: Sequence[Batch]
    ) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        total, own = sum(map(len, batches)), sum(map(len, _share(batches)))
        return _bar(total, own, "Encoding images")

    def _make_shards(self, shards: Sequence[PlannedShard], missing: Mapping[str, set[str]]) -> None:
        """Make the features of images and write shards, some shards at a time.

        Ranks share the batches, then the shards: while they make features for some, they write
        those before.
        """
        batches = [self._batches(shard, missing) for shard in shards]
        packing: list[Future] = []
        packed: dict[Path, ShardIndex] = {}
        bar = self._image_bar([batch for part in batches for batch in part])
        with bar as on_done, ThreadPoolExecutor(1) as packer:
            for part in _rounds([len(own) for own in batches]):
                with distributed.together():
                    self._maker.make_images(
                        _share([batch for i in part for batch in batches[i]]), on_done
                    )
                    packed.update(future.result() for future in packing)
                packing = [packer.submit(self._pack, shards[i]) for i in _share(part)]
            with distributed.together():
                packed.update(future.result() for future in packing)
        for part in distributed.gather_objects(packed):
            self._indexes.update(part)

    def _pack(self, shard: PlannedShard) -> tuple[Path, ShardIndex]:
        """Write a shard and its index, then delete what was staged for it."""
        path = self._path(shard)
        with contextlib.ExitStack() as stack:
            index = write_shard(path, shard.bucket.name, self._samples(shard, stack))
        inventory.write_index(path, index)
        for image in shard.images:
            unstage(self._folder, image.id)
        return path, index

    def _samples(
        self, shard: PlannedShard, stack: contextlib.ExitStack
    ) -> Iterator[tuple[str, dict[str, Any], Members]]:
        descriptors: dict[Path, int] = {}
        for image in shard.images:
            members: dict[str, bytes] = {}
            truncated = False
            for feature in FEATURES:
                place = self._places.get((feature, image.id))
                if place is None:
                    found = self._read_staged(feature, image.id)
                    if found is None:
                        raise ValueError(f"{self._folder}: {image.id}, staged, {_ALTERED}.")
                    members.update(found[0])
                    truncated = found[1].get("truncated", truncated)
                    continue
                path, row = place
                if path not in descriptors:
                    descriptors[path] = os.open(path, os.O_RDONLY)
                    stack.callback(os.close, descriptors[path])
                index = self._indexes[path]
                try:
                    for key in KEYS_OF[feature]:
                        members[key] = read_member(descriptors[path], index, row, key)
                except ValueError:
                    inventory.distrust_index(path, index)
                    raise ValueError(f"{path}: {_ALTERED}.") from None
                if feature == "text":
                    truncated = index.truncated[row]
            yield image.id, describe_sample(image, self._fingerprints[image.id], truncated), members


def _share(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's part."""
    return items[distributed.rank() :: distributed.world_size()]


def _rounds(num_batches: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of shards that are made together, given the batches of each.

    Together they give every rank work, both batches and shards.
    """
    ranks = distributed.world_size()
    part: list[int] = []
    waiting = 0
    for index, num in enumerate(num_batches):
        part.append(index)
        waiting += num
        if waiting >= _BATCHES_PER_ROUND * ranks and len(part) >= ranks:
            yield part
            part, waiting = [], 0
    if part:
        yield part


@contextlib.contextmanager
def _bar(total: int, own: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show how far all ranks are, supposing that they are as far as this one."""
    done = shown = 0
    with progress(total=total, label=label, disable=not distributed.is_main()) as bar:

        def on_done(count: int) -> None:
            nonlocal done, shown
            done += count
            bar.update(round(done * total / own) - shown)
            shown = round(done * total / own)

        yield on_done
