"""The pictures of a run, chosen and made small enough for one page."""

import base64
import dataclasses
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dnnlib.files import read_file
from training.run_report.rows import kimg_of_name

_COUNTS = (48, 32, 24, 16, 12, 8, 6, 4, 3, 2)  # Limits on the pictures of a series, tried in turn.
_SLOTS = (8, 4, 2, 1)  # Pictures per doubling of kimg, the densest choice first.
_AS_IT_IS = 200_000  # A PNG of up to so many bytes is not encoded again.
_SIZES = (2100, 1400, 900, 500)  # Limits on the longest edge in pixels, tried in turn.
_SERIES = re.compile(r"((?:fakes|validation_\w+))-\d+(?:\.\d{3})?\.png")
_EMBEDDED = re.compile(
    rb'data-source="([\w.-]+)" data-stamp="(\d+-\d+-\d+)" '
    rb'src="data:(image/(?:png|webp|jpeg));base64,([A-Za-z0-9+/=]+)"'
)
_MAX_OLD_PAGE = 64_000_000


class Source(NamedTuple):
    """A picture file of a run."""

    path: Path
    kimg: float | None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as a page embeds it."""

    name: str  # Name of the file.
    stamp: str  # Changes with the file and with the size to which the picture was reduced.
    kimg: float | None
    mime: str
    data: str  # Base64.

    @property
    def num_bytes(self) -> int:
        return len(self.data) + 200

    @property
    def address(self) -> str:
        return f"data:{self.mime};base64,{self.data}"


def find_pictures(run_dir: Path) -> dict[str, list[Source]]:
    """Return the pictures of a run folder by series, in the order of kimg, ``fakes`` first.

    The series ``reals`` has one picture. Series without pictures are left out.
    """
    found: dict[str, list[Source]] = {"fakes": []}
    reals = run_dir / "reals.png"
    if reals.is_file():
        found["reals"] = [Source(reals, None)]
    for path in run_dir.glob("*.png"):
        if match := _SERIES.fullmatch(path.name):
            found.setdefault(match[1], []).append(Source(path, kimg_of_name(path.name)))
    return {name: sorted(own, key=lambda s: s.kimg or 0.0) for name, own in found.items() if own}


def choose(sources: Sequence[Source], most: int) -> list[Source]:
    """Return at most ``most`` (2 or more) pictures, evenly by log(kimg), with the first and last.

    Each doubling of kimg is divided into slots, and the first picture in a slot is kept. So the
    choice stays the same, except at its end, as a run goes on.
    """
    if len(sources) <= most:
        return list(sources)
    start, chosen = max(sources[0].kimg or 0.0, 1e-3), []
    for slots in _SLOTS:
        kept: dict[int, Source] = {}
        for source in sources:
            doublings = math.log2(max((source.kimg or 0.0) / start, 1.0))
            kept.setdefault(math.floor(slots * doublings + 1e-9), source)
        chosen = list(kept.values())
        chosen += [] if chosen[-1] is sources[-1] else [sources[-1]]
        if len(chosen) <= most:
            return chosen
    return [chosen[round(i * (len(chosen) - 1) / (most - 1))] for i in range(most)]


class Album:
    """Encodes pictures, and keeps the results for the next page.

    The pictures embedded in ``old_page``, a page of the same run, are not encoded again.
    """

    def __init__(self, old_page: Path | None = None) -> None:
        self._known = {} if old_page is None else _embedded(old_page)

    def fit(
        self, series: dict[str, list[Source]], max_bytes: int, max_new: int | None = None
    ) -> dict[str, list[Picture]]:
        """Return pictures of every series that together take at most ``max_bytes`` of a page.

        If there are too many, series are thinned; if even two of each are too large, pictures are
        reduced. Files that are not pictures are left out. At most ``max_new`` pictures are encoded
        in this call, the ends of a series first; None is no limit.
        """
        allowance = _Allowance(max_new)
        found: dict[str, list[Picture]] = {}
        for size in range(len(_SIZES)):
            last = {name: self._encode(own[-1:], size, allowance) for name, own in series.items()}
            for most in _COUNTS:
                chosen = {name: choose(own, most) for name, own in series.items()}
                expected = sum(_total(last[name]) * len(own) for name, own in chosen.items())
                if expected > max_bytes:
                    continue
                found = {name: self._encode(own, size, allowance) for name, own in chosen.items()}
                if sum(map(_total, found.values())) <= max_bytes:
                    return self._remember(found)
        left, found = max_bytes, {}
        for name, own in last.items():  # Show the newest picture of as many series as fit.
            fits = _total(own) <= left
            found[name] = own if fits else []
            left -= _total(found[name])
        return self._remember(found)

    def _encode(
        self, sources: Sequence[Source], size: int, allowance: "_Allowance"
    ) -> list[Picture]:
        order = sorted(range(len(sources)), key=lambda i: (0 < i < len(sources) - 1, -i))
        done: dict[int, Picture] = {}
        for place in order:
            path, kimg = sources[place]
            try:
                status = path.stat()
                stamp = f"{status.st_size}-{status.st_mtime_ns}-{size}"
                if (path.name, stamp) not in self._known:
                    if not allowance.take():
                        continue
                    self._known[path.name, stamp] = encode(path, _SIZES[size])
            except Exception:  # Pillow raises many kinds for a file that a full disk cut off.
                continue
            done[place] = Picture(path.name, stamp, kimg, *self._known[path.name, stamp])
        return [done[place] for place in sorted(done)]

    def _remember(self, found: dict[str, list[Picture]]) -> dict[str, list[Picture]]:
        shown = [picture for own in found.values() for picture in own]
        self._known = {(p.name, p.stamp): (p.mime, p.data) for p in shown}
        return found


class _Allowance:
    """Counts how many pictures may still be encoded; None is no limit."""

    def __init__(self, num: int | None) -> None:
        self._left = num

    def take(self) -> bool:
        """Take one; return whether one was left."""
        if self._left is None:
            return True
        self._left -= 1
        return self._left >= 0


def _total(pictures: Iterable[Picture]) -> int:
    return sum(picture.num_bytes for picture in pictures)


def encode(path: Path, longest: int) -> tuple[str, str]:
    """Return the media type and base64 text of a PNG, reduced to ``longest`` pixels if larger.

    A small file stays a PNG, others become JPEG. Raises what Pillow raises for a file that is not a
    PNG.
    """
    import PIL.Image

    content = read_file(path)
    image = PIL.Image.open(io.BytesIO(content), formats=["PNG"])
    image.load()
    if max(image.size) <= longest and len(content) <= _AS_IT_IS:
        return "image/png", base64.b64encode(content).decode()
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    image.thumbnail((longest, longest), PIL.Image.Resampling.HAMMING, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "image/jpeg", base64.b64encode(buffer.getvalue()).decode()


def _embedded(page: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """Return media type and base64 text of the pictures embedded in a page, by name and stamp."""
    try:
        if page.stat().st_size > _MAX_OLD_PAGE:
            return {}
        content = page.read_bytes()
    except OSError:
        return {}
    parts: Iterable[tuple[bytes, ...]] = _EMBEDDED.findall(content)
    texts = (tuple(part.decode("ascii") for part in found) for found in parts)
    return {(name, stamp): (mime, data) for name, stamp, mime, data in texts}
