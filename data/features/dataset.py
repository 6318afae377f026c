"""The dataset of a feature folder: latents, and text and visual features, of several sizes."""

import functools
import hashlib
import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.features.buckets import Bucket
from data.features.manifests import Manifest, read_manifest
from data.features.quantised import as_float16, bits_of
from data.features.record import KEYS, PATCHES, BucketRecord, read_feature_record
from data.features.shards import from_npy
from data.images.dataset import Cond
from data.images.decode import ImageError
from data.preview import Preview, evenly_spaced, rows_of
from data.split import check_split, is_held_out
from dnnlib.addresses import AddressError, is_address, without_query
from dnnlib.errors import refusal
from dnnlib.remote.files import Known, OpenFiles, location_of
from dnnlib.typed import parse_json
from torch_utils.pictures import Titles

# An item: its name in error messages, and a function that returns a member's data by key.
_Item = tuple[str, Callable[[str], bytes]]
LISTED = "dataset_tool.py verify lists every such"


class FeatureDataset(Dataset):
    """Raw latents with text and visual features; items are ordered by bucket.

    Any number of processes may read at once, including from copies made by fork or pickle.

    Args:
        path: Folder made by ``dataset_tool.py features`` (see docs/formats.md), or its address.
        split: ``train`` or ``validation``.
        text_lengths: Increasing lengths to which texts are padded. A batch uses the first that
            fits its longest text; texts longer than the last are cut.
        validation_share: If the folder has no validation split, the share of its images that forms
            one, chosen by the contents of their latents.

    Attributes:
        record: The folder's record.
        buckets: Image sizes of which the split has any images.
        counts: Number of images of each bucket.
        shard_sizes: Number of images of each shard of each bucket, in the order of the items.
        remote_bytes: Average number of bytes to download per item; 0 for a local folder.
        ids: Name of each item.

    Raises ValueError, one sentence that names the file, for data that are damaged or incomplete.
    """

    labels = None
    num_classes = 0
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "train",
        *,
        text_lengths: Sequence[int] = (128, 256, 384, 512),
        validation_share: float = 0.0,
    ) -> None:
        self.path = location_of(path)
        self.split = split
        self.record = read_feature_record(path)
        # The name in a remote record may contain characters that file names cannot.
        stored = re.sub(r"[^\w.-]+", "-", self.record.name)
        self.name = stored if is_address(path) else self.path.resolve().name
        self.text_lengths = tuple(text_lengths)
        self._share = 0.0 if self.record.num_samples("validation") else validation_share
        of_folder = "train" if self._share else split
        found = [b for b in self.record.buckets if b.num[of_folder] > 0]
        manifests = [self._read_manifest(of_folder, b) for b in found]
        if self._share:
            manifests = self._chosen(manifests)
            found = [b for b, own in zip(found, manifests, strict=True) if len(own)]
        self._manifests: list[Manifest] = [own for own in manifests if len(own)]
        self.buckets = [Bucket(b.width, b.height) for b in found]
        self.counts = [len(manifest) for manifest in self._manifests]
        self._shapes = [tuple(b.latent_shape) for b in found]
        self._grids = [tuple(b.patch_grid) for b in found]
        # Counts only images of the split; shards without any are left out.
        self.shard_sizes = [
            np.unique(manifest.shard, return_counts=True)[1].tolist()
            for manifest in self._manifests
        ]
        self._files = [manifest.files for manifest in self._manifests]
        self.firsts = np.cumsum([0, *self.counts])  # The first item of each bucket.
        self.ids = [name for manifest in self._manifests for name in manifest.ids]
        self.num_images = len(self.ids)
        self.resolution = round(max((b.width * b.height for b in found), default=0) ** 0.5)
        self.img_channels = 3
        self._open = OpenFiles(_known_shards(self._manifests) if is_address(path) else {})
        self._spans = [_spans_of(manifest) for manifest in self._manifests]
        self.remote_bytes = 0.0
        if is_address(path) and self.num_images:
            total = sum(int((ends - starts).sum()) for starts, ends in self._spans)
            self.remote_bytes = total / self.num_images

    def _read_manifest(self, split: str, bucket: BucketRecord) -> Manifest:
        manifest, count = read_manifest(self.path, split, bucket.name), bucket.num[split]
        if len(manifest) != count:
            names = f"the manifest of {split}/{bucket.name} names {len(manifest)} images"
            remedy = "run dataset_tool.py features again"
            raise refusal(self.path, but=f"{names}, but the record {count}", remedy=remedy)
        return manifest

    def _chosen(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Return the rows of the manifests that belong to the split; some may be empty."""
        held_out = [
            is_held_out(own.size["vae.npy"], own.crc32["vae.npy"], self._share) for own in manifests
        ]
        num_images = sum(map(len, manifests))
        every = np.concatenate([*held_out, np.zeros(0, bool)])
        check_split(every, self._share, f"the {num_images} images of {self.name}")
        wanted = self.split == "validation"
        return [own.of_rows(rows == wanted) for own, rows in zip(manifests, held_out, strict=True)]

    def __len__(self) -> int:
        return self.num_images

    @property
    def content_hash(self) -> str:
        """Identity of all shards, and of the share that is held out of them."""
        stored = self.record.content_hash
        if not self._share:
            return stored
        return hashlib.sha256(f"{stored} without {self._share!r}".encode()).hexdigest()

    def is_same_as(self, content_hash: str) -> bool:
        """Return whether an identity is that of the data."""
        return content_hash == self.content_hash

    def summary(self) -> dict[str, Any]:
        """Return what a snapshot keeps of the features: buckets, statistics and location."""
        record = self.record
        return dict(
            buckets={b.name: num for b, num in zip(self.buckets, self.counts, strict=True)},
            statistics={name: dict(record.statistics[name]) for name in record.statistics},
            path=self.path if is_address(self.path) else str(self.path.resolve()),
        )

    def preview(self, num: int) -> Preview:
        """Return up to ``num`` raw latents, in rows of up to 8, spread evenly over the items."""
        chosen = evenly_spaced(num, self.num_images).tolist()
        rows = rows_of([self.latents(index) for index in chosen])
        return Preview(rows, Titles(captions=[self.caption(index) for index in chosen]))

    def of_split(self, split: str) -> "FeatureDataset":
        """Return the dataset of another split of the same folder."""
        settings = dict(text_lengths=self.text_lengths, validation_share=self._share)
        return FeatureDataset(self.path, split, **settings)

    def bucket_index(self, index: int) -> int:
        """Return the index in ``buckets`` of an item's bucket."""
        return int(np.searchsorted(self.firsts, index, side="right")) - 1

    def latent_shape(self, bucket: int) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of a bucket."""
        return self._shapes[bucket]

    def patch_grid(self, bucket: int) -> tuple[int, int]:
        """Return rows and columns of the patches of a bucket."""
        return self._grids[bucket]

    def longer_text(self, limit: int) -> tuple[str, int] | None:
        """Return name and number of tokens of an item with more than ``limit``, or None."""
        for first, manifest in zip(self.firsts, self._manifests, strict=False):
            # The mask has at least one byte per token, so shorter files need not be read.
            for row in np.flatnonzero(manifest.size["t5m.npy"] > limit):
                index = int(first) + int(row)
                num_tokens = int(from_npy(self._read(index, "t5m.npy")).sum())
                if num_tokens > limit:
                    return self.ids[index], num_tokens
        return None

    def facts(self, index: int) -> dict[str, Any]:
        """Return the content of an item's json: caption, source, crop and more."""
        return parse_json(self._read(index, "json"))

    def caption(self, index: int) -> str:
        """Return the caption of an item."""
        return self.facts(index)["caption"]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Cond]:
        latents, cond = self.__getitems__([index])
        return latents[0], {k: v if k == "size" else v[0] for k, v in cond.items()}

    def __getitems__(
        self, indices: Sequence[int], *, with_patches: bool = True
    ) -> tuple[torch.Tensor, Cond]:
        """Return a batch of items of one bucket: raw latents, float16 [B, c, h, w], and conditions.

        Conditions are ``text`` [B, L, T], ``cls`` [B, D] and ``patches`` [B, P, D] in float16,
        ``text_mask``, bool [B, L], and ``size``: width and height, int64 [2]. Patches make up most
        of an item; without ``with_patches`` they are neither read nor delivered.
        """
        buckets = {self.bucket_index(index) for index in indices}
        assert len(buckets) == 1, f"A batch has images of one size, not of {len(buckets)}."
        return self._batch(buckets.pop(), [self._item(index) for index in indices], with_patches)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start fetching the data of some items in the background, if they are remote."""
        items = np.asarray(indices, np.int64)
        buckets = np.searchsorted(self.firsts, items, side="right") - 1
        for bucket in np.unique(buckets).tolist():
            rows = items[buckets == bucket] - self.firsts[bucket]
            starts, ends = self._spans[bucket]
            shards = self._manifests[bucket].shard[rows]
            for shard in np.unique(shards).tolist():
                own = rows[shards == shard]
                file = self._open(self._files[bucket][shard])
                file.prefetch(starts[own], ends[own] - starts[own])

    def latents(self, index: int) -> torch.Tensor:
        """Return the raw latents of an item, float16 [c, h, w]."""
        target = np.empty(self._shapes[self.bucket_index(index)], np.float16)
        _read_array(self._item(index), "vae.npy", target)
        return torch.from_numpy(target)

    def _batch(
        self, bucket: int, items: Sequence[_Item], with_patches: bool
    ) -> tuple[torch.Tensor, Cond]:
        batch, dim = len(items), self.record.visual["dim"]
        latents = np.empty((batch, *self._shapes[bucket]), np.float16)
        cls = np.empty((batch, dim), np.float16)
        num_patches = math.prod(self._grids[bucket]) if with_patches else 0
        patches = np.empty((batch, num_patches, dim), np.float16)
        texts = []
        for row, item in enumerate(items):
            _read_array(item, "vae.npy", latents[row])
            _read_array(item, "dinov3.npy", cls[row])
            if with_patches:
                _read_patches(item, self.record.feature_bits, patches[row])
            texts.append(_read_text(item, self.record.text["dim"]))
        text, mask = pad_texts(texts, self.text_lengths)
        arrays = dict(text=text, text_mask=mask, cls=cls)
        if with_patches:
            arrays["patches"] = patches
        cond = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return torch.from_numpy(latents), dict(cond, size=torch.tensor(self.buckets[bucket].size))

    def _read(self, index: int, key: str) -> bytes:
        bucket = self.bucket_index(index)
        manifest, row = self._manifests[bucket], index - int(self.firsts[bucket])
        path = self._files[bucket][manifest.shard[row]]
        offset, size = int(manifest.offset[key][row]), int(manifest.size[key][row])
        crc32 = manifest.crc32[key][row]
        try:
            file = self._open(path)
            data = file.pread(size, offset)
            if zlib.crc32(data) != crc32:
                file.forget(size, offset)  # A power failure may have damaged a cached block.
                data = file.pread(size, offset)
        except AddressError as error:
            raise ImageError(str(error)) from None
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror}).") from None
        where = without_query(str(path))
        if len(data) != size:
            problem = f"ends in the middle of {self.ids[index]}.{key}"
            raise ImageError(f"{where}: {problem}; {LISTED} file.")
        if zlib.crc32(data) != crc32:
            problem = f"{self.ids[index]}.{key} differs from its checksum"
            raise ImageError(f"{where}: {problem}; {LISTED} file.")
        return data

    def _item(self, index: int) -> _Item:
        folder = self._manifests[self.bucket_index(index)].folder
        where = f"{without_query(str(folder))}: {self.ids[index]}"
        return where, functools.partial(self._read, index)


def _spans_of(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Return the byte range of each sample that training reads: starts and ends, int64 [N] each.

    It covers all members except ``json``, which are adjacent in a shard.
    """
    keys = [key for key in KEYS if key != "json"]
    starts = np.min([manifest.offset[key] for key in keys], axis=0)
    return starts, np.max([manifest.offset[key] + manifest.size[key] for key in keys], axis=0)


def _known_shards(manifests: Sequence[Manifest]) -> dict[str, Known]:
    """Return size and checksum of each remote shard, so that no server need be asked for them."""
    return {
        file: Known(shard["num_bytes"], shard["sha256"])
        for manifest in manifests
        for file, shard in zip(manifest.files, manifest.shards, strict=True)
        if shard["sha256"]
    }


def _read_array(item: _Item, key: str, target: np.ndarray) -> None:
    _fill(target, _array(item, key), item, key)


def _read_patches(item: _Item, bits: int, target: np.ndarray) -> None:
    array = _array(item, PATCHES)
    try:
        found, array = bits_of(array), as_float16(array)
    except ValueError as error:
        raise ImageError(f"{item[0]}: {PATCHES} is damaged ({error}).") from None
    if found != bits:
        but = f"{PATCHES} is in {found} bits, not the {bits} of the record"
        raise ImageError(f"{item[0]}: {but}; {LISTED} image.")
    _fill(target, array, item, PATCHES)


def _fill(target: np.ndarray, array: np.ndarray, item: _Item, key: str) -> None:
    if array.shape != target.shape or array.dtype != np.float16:
        found = f"{key} is {array.dtype} of {list(array.shape)}"
        wanted = f"float16 of {list(target.shape)}"
        raise ImageError(f"{item[0]}: {found}, not {wanted}; {LISTED} image.")
    target[...] = array


def _read_text(item: _Item, dim: int) -> np.ndarray:
    text, mask = _array(item, "t5h.npy"), _array(item, "t5m.npy")
    if text.ndim != 2 or text.shape[1] != dim or mask.shape != text.shape[:1]:
        found = f"its text features are of {list(text.shape)} with a mask of {list(mask.shape)}"
        raise ImageError(f"{item[0]}: {found}, not [L, {dim}] and [L]; {LISTED} image.")
    return text[mask]


def _array(item: _Item, key: str) -> np.ndarray:
    label, read = item
    data = read(key)
    try:
        return from_npy(data)
    except ValueError as error:
        raise ImageError(f"{label}: {key} is damaged ({error}).") from None


def pad_texts(texts: Sequence[np.ndarray], lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return texts [L_i, T] as one array, float16 [B, L, T], and its mask of tokens, bool [B, L].

    L is the first of the increasing ``lengths`` that fits the longest text, or else the last; texts
    longer than that are cut.
    """
    longest = max(len(text) for text in texts)
    length = next((n for n in lengths if n >= longest), lengths[-1])
    padded = np.zeros((len(texts), length, texts[0].shape[1]), np.float16)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text[:length]
        mask[row, : len(text)] = True
    return padded, mask
