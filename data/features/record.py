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
_EIGHT_BIT_VERSION = 2  # Of the record of a folder whose patches are in 8 bits.
RECORD_FILE = "features.json"  # Written last.
CLAIM_FILE = "preparing.json"  # There from the beginning of a preparation on.
FEATURES = ("vae", "visual", "text")
PATCHES = "dinov3_patches.npy"
# The members that each feature has in a sample, in the order of a shard.
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
        latent_shape: c, h, w of its latents.
        patch_grid: Rows and columns of its patches.
        num: Number of samples of each split.
    """

    name: str
    width: int
    height: int
    latent_shape: tuple[int, int, int]
    patch_grid: tuple[int, int]
    num: Counts

    @property
    def bucket(self) -> Bucket:
        """Its size, as images are brought to."""
        return Bucket(self.width, self.height)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """All that is known of a feature folder: the content of ``features.json``.

    Attributes:
        name: The name of the images' folder or zip.
        source_hash: Identity of names, images and captions.
        buckets: All sizes, those without images included.
        captions: num_truncated, and what else is known of the captions.
        statistics: Of ``vae`` (raw latents), ``cls`` and ``patches``, over the training split of
            all buckets.
        content_hash: Identity of all shards.

    Raises ValueError, with what is wrong, for values that do not fit one another.
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
        """Bits of each value of the stored patch features: 16 or 8."""
        return bits_of_facts(self.visual)

    def num_samples(self, split: str) -> int:
        """Return the number of samples of a split, all buckets together."""
        return sum(bucket.num[split] for bucket in self.buckets)


def bits_of_facts(visual: Mapping[str, Any]) -> Any:
    """Return the bits of patch features that facts of a visual encoder state.

    Those in 16 bits state nothing, as before there were others.
    """
    return visual.get("bits", 16)


def is_feature_folder(path: str | os.PathLike) -> bool:
    """Return whether a path is a folder of features, complete or not."""
    return any((Path(path) / name).is_file() for name in (RECORD_FILE, CLAIM_FILE))


def is_complete(path: str | os.PathLike) -> bool:
    """Return whether a path is a folder of features that are all there."""
    return (Path(path) / RECORD_FILE).is_file()


def bucket_folder(path: str | os.PathLike, split: str, bucket_name: str) -> Path | str:
    """Return where the shards of one split and bucket lie: an address if ``path`` is one."""
    assert split in SPLITS
    return under(path, split, f"bucket_{bucket_name}")


def read_feature_record(path: str | os.PathLike) -> FeatureRecord:
    """Return the record of a feature folder, which may be an address (see dnnlib/addresses.py).

    Raises ValueError if there is none, if it is damaged or of another version.
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
    """Return what ``parse`` makes of the object in a JSON file of a format, perhaps at an address.

    ``newest`` is the highest version of the format that is read.

    Raises ValueError, one sentence, if the file is of another format or version, or damaged:
    no JSON, or values at which ``parse`` raises ValueError or OverflowError.
    """
    try:
        content = read_all(file, _MAX_JSON_BYTES)
    except AddressError as error:
        remedy = "give the address of a folder made by dataset_tool.py features"
        raise ValueError(f"{str(error).rstrip('.')}; {remedy}.") from None
    written = JsonFormat(expected_format, newest, "dataset_tool.py features", AGAIN)
    return written.parse(content, file, parse)
