"""Brings a feature folder to what is planned: encodes what is missing, and packs it into shards."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from data.features.manifests import Manifest
from data.features.preparation import pack
from data.features.preparation.encode import Batch, FeatureEncoder
from data.features.preparation.plan import Key, Plan, PlannedImage
from data.features.preparation.stage import Stage
from data.features.record import FEATURES, FeatureRecord
from data.images.members import Archive
from data.resumable import BackgroundWriter, progress_of_ranks, share
from dnnlib.parallel import thread_map
from torch_utils import distributed

_BATCHES_PER_ROUND = 32  # Of each rank, between two moments at which shards are packed.


class Making:
    """Brings a feature folder to a plan, with what is there and still right.

    All methods are collective. Nothing that is right is deleted before it is elsewhere: a feature
    goes from its encoder, or from a shard that is not right any more, to the stage, and from there
    to its shard.
    """

    def __init__(
        self,
        folder: Path,
        archive: Archive,
        plan: Plan,
        encoders: Mapping[str, Any],
        batch_size: int,
        num_threads: int,
    ) -> None:
        """``encoders`` are of the features to be made, by name."""
        self._folder = folder
        self._plan = plan
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._stage = Stage(folder)
        self._encoder = FeatureEncoder(
            plan, archive, encoders, self._stage, num_threads=num_threads
        )

    def num_made(self) -> dict[str, int]:
        """Return how many of each feature were made by all ranks."""
        parts = distributed.gather_objects(dict(self._encoder.num_made))
        return {feature: sum(part.get(feature, 0) for part in parts) for feature in FEATURES}

    def stage_missing(self) -> None:
        """Stage what is missing of the plan's features; shards and record stay as they are."""
        distributed.on_main(lambda: self._plan.write(self._folder))
        indexes = pack.look_at_shards(self._folder, self._plan, self._num_threads)
        rows = [key for index in indexes.values() for _, key in pack.wanted_rows(self._plan, index)]
        self._encode(self._plan.shards(self._folder), self._staged() | _gathered(rows))

    def make_all(self, *, anew: bool = False) -> tuple[FeatureRecord, int]:
        """Make everything; return the record and how many shards were written.

        ``anew`` deletes what is there before.
        """
        folder, plan = self._folder, self._plan
        if anew:
            distributed.on_main(lambda: pack.remove_all(folder, self._stage))
        indexes = pack.look_at_shards(folder, plan, self._num_threads)
        planned = plan.shards(folder)
        right = {
            path
            for path, index in indexes.items()
            if path in planned and pack.is_right(plan, planned[path], index)
        }
        others = {path: index for path, index in indexes.items() if path not in right}
        wrong = set(planned) - _gathered(right)
        is_open = bool(wrong or _gathered(others))
        distributed.on_main(lambda: self._claim(is_open))
        there = self._staged()
        there |= self._unpack(others, there)
        shards = {path: images for path, images in planned.items() if path in wrong}
        self._encode(shards, there, is_packed=True)
        record = distributed.on_main(lambda: pack.finish(folder, plan, self._stage))
        return record, len(shards)

    def _claim(self, is_open: bool) -> None:
        self._plan.write(self._folder)
        if is_open:
            pack.open_up(self._folder)

    # What is there.

    def _staged(self) -> set[Key]:
        """Return what is staged of the plan, whole; what is damaged is deleted."""
        wanted = {key for image in self._plan.images for key in self._plan.keys(image)}
        found = [key for key in distributed.on_main(self._stage.keys) if key in wanted]
        shapes = {image.id: self._plan.shapes(image.bucket) for image in self._plan.images}

        def check(key: Key) -> Key | None:
            if self._stage.get(*key, shapes[key[0]]) is not None:
                return key
            self._stage.remove([key])
            return None

        with distributed.together():
            checked = list(
                thread_map(check, share(found), self._num_threads, 4 * self._num_threads)
            )
        return _gathered(filter(None, checked))

    def _unpack(self, indexes: Mapping[Path, Manifest], there: Collection[Key]) -> set[Key]:
        """Stage what is right in this rank's shards that are not, and delete these; return what."""
        done: list[Key] = []
        total = sum(distributed.gather_objects(len(indexes)))
        bar = progress_of_ranks(total, len(indexes), "Unpacking shards", "shard")
        with distributed.together(), bar as on_done:
            for path, index in indexes.items():
                done += pack.unpack(path, index, self._plan, self._stage, there)
                on_done()
        return _gathered(done)

    # What is missing.

    def _encode(
        self,
        shards: Mapping[Path, Sequence[PlannedImage]],
        there: Collection[Key],
        *,
        is_packed: bool = False,
    ) -> None:
        """Encode what shards lack, and write them if ``is_packed``, some shards at a time.

        Ranks share the batches, then the shards: while they encode for some, they write those
        before.
        """
        self._encode_texts(list(chain(*shards.values())), there)
        paths, ranks = list(shards), distributed.world_size()
        batches = {path: self._batches(images, there) for path, images in shards.items()}
        num_images = self._batch_size * _BATCHES_PER_ROUND
        size = ranks * max(num_images // self._plan.shard_size, 1)  # Shards in a round.
        rounds = [paths[first : first + size] for first in range(0, len(paths), size)]
        mine = [share(list(chain(*(batches[path] for path in part)))) for part in rounds]
        total, own = (sum(map(len, chain(*parts))) for parts in (batches.values(), mine))
        bar = progress_of_ranks(total, own, "Encoding images")
        with bar as on_done, BackgroundWriter(1, size) as packer:
            for part, batches_of_rank in zip(rounds, mine, strict=True):
                with distributed.together():
                    self._encoder.encode_images(batches_of_rank, on_done)
                    packer.wait()
                for path in share(part) if is_packed else ():
                    packer.submit(pack.pack, path, self._plan, shards[path], self._stage)
            with distributed.together():
                packer.wait()

    def _encode_texts(self, images: Sequence[PlannedImage], there: Collection[Key]) -> None:
        wanted = [image for image in images if "text" in self._missing(image, there)]
        wanted.sort(key=lambda image: (len(image.caption), image.id))  # So that few are padded.
        size = self._batch_size
        mine = share([wanted[first : first + size] for first in range(0, len(wanted), size)])
        bar = progress_of_ranks(len(wanted), sum(map(len, mine)), "Encoding captions")
        with bar as on_done, distributed.together():
            self._encoder.encode_texts(mine, on_done)

    def _batches(self, images: Sequence[PlannedImage], there: Collection[Key]) -> list[Batch]:
        """Return batches of those images of a shard that lack latents or visual features.

        They are the same for any number of ranks.
        """
        rows = [(image, self._missing(image, there) - {"text"}) for image in images]
        rows = [row for row in rows if row[1]]
        size = self._batch_size
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _missing(self, image: PlannedImage, there: Collection[Key]) -> frozenset[str]:
        """Return the features that a sample lacks, of those to be made."""
        return frozenset(key[1] for key in self._plan.keys(image) if key not in there)


def _gathered(items: Iterable[Any]) -> set[Any]:
    """Return the items of all ranks. Collective."""
    return {item for part in distributed.gather_objects(list(items)) for item in part}
