"""Layout of a feature folder, and the record of what it holds (docs/formats.md)."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from data.features.buckets import Bucket
from data.features.config import SPLITS
from data.features.quantised import BITS
from dnnlib.addresses import AddressError, is_address, under
from dnnlib.remote.files import read_all
from dnnlib.typed import JsonFormat, typed

T = TypeVar("T")

FORMAT = "setdiffit-features"
FORMAT_VERSION = 1
_EIGHT_BIT_VERSION = 2  # Format version of records whose patches are in 8 bits.
RECORD_FILE = "features.json"  # Written last.
CLAIM_FILE = "preparing.json"  # Written when a preparation begins.
FEATURES = ("vae", "visual", "text")
PATCHES = "dinov3_patches.npy"
# The members of a sample that hold each feature, in the order in which shards store them.
KEYS_OF = {
    "vae": ("vae.npy",),
    "visual": ("dinov3.npy", PATCHES),
    "text": ("t5h.npy", "t5m.npy"),
}
KEYS = ("json", *(key for feature in FEATURES for key in KEYS_OF[feature]))
STATISTICS = ("vae", "cls", "patches")
_MAX_JSON_BYTES = 1 << 30
AGAIN = "start the same dataset_tool.py features again, which makes what is missing"

# The types of nested values.
_ENCODER = dict(location=str, hash=str, precision=str)
_VAE = dict(**_ENCODER, channels=int, downsampling=int, scale=float, shift=float)
VaeFacts = TypedDict("VaeFacts", _VAE)
VisualFacts = TypedDict("VisualFacts", dict(**_ENCODER, patch_size=int, num_registers=int, dim=int))
TextFacts = TypedDict("TextFacts", dict(**_ENCODER, dim=int, max_tokens=int))

_STATISTIC = dict(count=int, mean=list[float], std=list[float])
Statistic = TypedDict("Statistic", _STATISTIC)
Statistics = TypedDict("Statistics", dict.fromkeys(STATISTICS, Statistic))
Captions = TypedDict("Captions", dict.fromkeys(("num_truncated",), int))
Counts = TypedDict("Counts", dict.fromkeys(SPLITS, int))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketRecord:
    """One bucket of a feature folder.

    Attributes:
        latent_shape: Shape (c, h, w) of its latents.
        patch_grid: Rows and columns of its patches.
        num: Number of samples in each split.
    """

    name: str
    width: int
    height: int
    latent_shape: tuple[int, int, int]
    patch_grid: tuple[int, int]
    num: Counts

    @property
    def bucket(self) -> Bucket:
        """The image size of this bucket."""
        return Bucket(self.width, self.height)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """The record of a feature folder: the content of ``features.json``.

    Attributes:
        name: Name of the folder or zip of the images.
        source_hash: Identity of the images with their names and captions.
        buckets: All buckets, including those without images.
        vae, visual, text: Facts about the encoders.
        captions: ``num_truncated``, the number of captions that were cut.
        statistics: Per-channel statistics of ``vae`` (raw latents), ``cls`` and ``patches``, over
            the training split of all buckets.
        content_hash: Identity of all shards.

    Raises ValueError, with the reason, if values contradict one another.
    """

    name: str
    source_hash: str
    buckets: list[BucketRecord]
    validation_share: float
    shard_size: int
    vae: VaeFacts
    visual: VisualFacts
    text: TextFacts
    captions: Captions
    statistics: Statistics
    content_hash: str
    packages: dict[str, str]

    def __post_init__(self) -> None:
        channels, dim = self.vae["channels"], self.visual["dim"]
        for bucket in self.buckets:
            if bucket.name != bucket.bucket.name:
                raise ValueError(f"bucket {bucket.name} is {bucket.bucket.name}")
            if min(bucket.latent_shape) < 1 or bucket.latent_shape[0] != channels:
                raise ValueError(f"latent_shape is {list(bucket.latent_shape)}")
            if min(bucket.patch_grid) < 1:
                raise ValueError(f"patch_grid is {list(bucket.patch_grid)}")
            if min(bucket.num.values()) < 0:
                raise ValueError(f"bucket {bucket.name} has {bucket.num} samples")
        if not self.buckets or self.shard_size < 1:
            raise ValueError(f"{len(self.buckets)} buckets, shard_size {self.shard_size}")
        if self.feature_bits not in BITS:
            raise ValueError(f"the bits of visual are {self.feature_bits!r}")
        if not self.vae["scale"]:
            raise ValueError("the scale of vae is 0")
        for name, length in zip(STATISTICS, (channels, dim, dim), strict=True):
            mean, std = self.statistics[name]["mean"], self.statistics[name]["std"]
            if not len(mean) == len(std) == length or min(std, default=0) < 0:
                raise ValueError(f"statistics of {name} are not those of {length} channels")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``features.json``."""
        version = FORMAT_VERSION if self.feature_bits == 16 else _EIGHT_BIT_VERSION
        return dict(format=FORMAT, version=version, **dataclasses.asdict(self))

    @property
    def feature_bits(self) -> int:
        """Bits per value of the stored patch features: 16 or 8."""
        return bits_of_facts(self.visual)

    def num_samples(self, split: str) -> int:
        """Return the number of samples of a split, all buckets together."""
        return sum(bucket.num[split] for bucket in self.buckets)


def bits_of_facts(visual: Mapping[str, Any]) -> Any:
    """Return the bits per value of patch features, from the facts about their visual encoder.

    Facts without an entry mean 16 bits, as in earlier versions, which had no others.
    """
    return visual.get("bits", 16)


def is_feature_folder(path: str | os.PathLike) -> bool:
    """Return whether a path is a folder of features, complete or not."""
    return any((Path(path) / name).is_file() for name in (RECORD_FILE, CLAIM_FILE))


def is_complete(path: str | os.PathLike) -> bool:
    """Return whether a path is a complete folder of features."""
    return (Path(path) / RECORD_FILE).is_file()


def bucket_folder(path: str | os.PathLike, split: str, bucket_name: str) -> Path | str:
    """Return the folder of the shards of a split and bucket; an address if ``path`` is one."""
    assert split in SPLITS
    return under(path, split, f"bucket_{bucket_name}")


def read_feature_record(path: str | os.PathLike) -> FeatureRecord:
    """Return the record of a feature folder, which may be an address (see dnnlib/addresses.py).

    Raises ValueError if it is missing, damaged or of a newer version.
    """
    file = under(path, RECORD_FILE)
    if not (is_address(file) or file.is_file()):
        if is_feature_folder(path):
            raise ValueError(f"{Path(path)}: its preparation is not finished; {AGAIN}.")
        raise ValueError(f"{path}: not a folder of features made by dataset_tool.py features.")
    parse = functools.partial(typed, FeatureRecord)
    return read_json(file, FORMAT, parse, newest=_EIGHT_BIT_VERSION)


def read_json(
    file: Path | str,
    expected_format: str,
    parse: Callable[[dict[str, Any]], T],
    newest: int = FORMAT_VERSION,
) -> T:
    """Return ``parse(values)`` for the object in a JSON file, local or at an address.

    ``newest`` is the highest version of the format that can be read.

    Raises ValueError, one sentence, if the file has another format or a newer version, if it is not
    JSON, or if ``parse`` raises ValueError or OverflowError.
    """
    try:
        content = read_all(file, _MAX_JSON_BYTES)
    except AddressError as error:
        remedy = "give the address of a folder made by dataset_tool.py features"
        raise ValueError(f"{str(error).rstrip('.')}; {remedy}.") from None
    written = JsonFormat(expected_format, newest, "dataset_tool.py features", AGAIN)
    return written.parse(content, file, parse)
