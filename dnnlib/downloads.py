"""Files from web servers, downloaded once into the cache and verified on every use."""

import hashlib
import sys
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

from dnnlib.addresses import AddressError, download
from dnnlib.errors import refusal
from dnnlib.files import atomic_write, cache_dir, check_source, sha256_of_file
from dnnlib.progress import progress

MAX_BYTES = 16 << 30  # No file of weights or statistics is larger.


def fetch(location: str, sha256: str | None = None, *, max_bytes: int = MAX_BYTES) -> Path:
    """Return a local path for a file named by a path or an http(s) URL.

    A URL is downloaded once into :func:`cache_dir`, and the digest of the download is kept beside
    the file as NAME.sha256. A cached file with another digest is downloaded again, with a warning.
    With ``sha256`` (all or the first hexadecimal digits), the file must also have that checksum.
    Raises ValueError for a missing file, a failed download, one of more than ``max_bytes``, or a
    wrong checksum.
    """
    if urlparse(str(location)).scheme not in ("http", "https"):
        check_source(location, folder=False)
        if sha256 is not None:
            _verify(sha256_of_file(location), sha256, location)
        return Path(location)
    name = Path(urlparse(location).path).name
    key = hashlib.sha256(location.encode()).hexdigest()[:16]
    path = cache_dir() / "downloads" / f"{key}-{name}"
    record = path.with_name(f"{path.name}.sha256")
    if path.is_file():
        found = sha256_of_file(path)
        known = record.read_text().strip() if record.is_file() else found
        if found == known and found.startswith((sha256 or "").lower()):
            _write_record(record, found)
            return path
        told = (
            f"Warning: {path} is no longer what was downloaded from {location}; "
            "it is downloaded again"
        )
        print(f"{told}.", file=sys.stderr)
    _write_record(record, _download(location, path, sha256, max_bytes))
    return path


def _write_record(record: Path, digest: str) -> None:
    if not record.is_file() or record.read_text().strip() != digest:
        with atomic_write(record, "w") as file:
            file.write(digest + "\n")


def _verify(found: str, sha256: str, label: Any) -> None:
    if not found.startswith(sha256.lower()):
        but = f"its SHA-256 is {found[:16]}..., not {sha256[:16]}..."
        raise refusal(label, but=but, remedy="download the file again")


def _download(url: str, target: Path, sha256: str | None, max_bytes: int) -> str:
    """Write the file at a URL to ``target``, whole or not at all; return its SHA-256."""
    from fsspec.callbacks import TqdmCallback

    shown = dict(label=f"Downloading {target.name}", unit="B")
    with (
        atomic_write(target, "w+b") as file,
        TqdmCallback(tqdm_cls=progress, tqdm_kwargs=shown) as callback,
    ):
        try:
            download(url, file, callback, max_bytes)
        except AddressError as error:
            remedy = f"download it elsewhere and give its local path, or place it at {target}"
            raise ValueError(f"{str(error).rstrip('.')}; {remedy}.") from None
        digest = _digest(file)
        if sha256 is not None:
            _verify(digest, sha256, url)
        return digest


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
