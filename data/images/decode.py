"""Decodes image files to upright 8-bit grayscale or RGB pixels."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
)
# Only these decoders may try a file, whatever its name: some of the others start programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TOO_DEEP = "has more than 8 bits per channel ({}); convert it to 8 bits first"
_MAX_PIXELS = 1 << 28  # 16384x16384; a larger file is no photograph and would fill the memory.
_PPM_HEADER_BYTES = 1 << 12  # Including comments.
_JPEG2000_BEGIN = b"\xff\x4f\xff\x51"  # SOC and SIZ.
_TIFF_BITS_PER_SAMPLE = 258  # Tag number.
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


class ImageError(ValueError):
    """An image file cannot be used: the message is one sentence that starts with the file's name.

    A DataLoader re-raises a worker's exception with the worker's traceback as the message; only
    the sentence at its end is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("ImageError: ")[2].strip())


class UnfitImageError(ValueError):
    """An image is intact but cannot be used: the message gives the reason and a remedy."""


def is_image_name(name: str) -> bool:
    """Return whether a file is an image, judged by the end of its name."""
    return name.lower().endswith(SUFFIXES)


def decode_image(data: bytes, *, exact: bool = False) -> Image.Image:
    """Return the upright image in a file's bytes, in mode ``L`` (grayscale) or ``RGB``.

    The EXIF orientation is applied. Transparency is composited on white; palette, CMYK and other
    colour images become RGB, and bilevel images grayscale. Only the first of several frames is
    used. With ``exact``, conversions that would change pixels are refused instead: transparency,
    colours other than grayscale, RGB and palettes, and more than 8 bits per channel.

    Raises ValueError with the reason for a damaged file, and UnfitImageError for an image that is
    refused. Images of more than 2**28 pixels always are, and so are 16-bit grayscale and
    floating-point images, because a conversion to 8 bits would have to guess their range.
    """
    from PIL import Image, ImageOps
    from PIL.PngImagePlugin import PngImageFile

    try:
        if data.startswith(_PNG_SIGNATURE):
            image = PngImageFile(io.BytesIO(data))
        else:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > _MAX_PIXELS:
            size = f"is {image.width}x{image.height}, more than {_MAX_PIXELS:,} pixels"
            raise UnfitImageError(f"{size}; make it smaller first")
        if exact and _has_deep_channels(image, data):
            raise UnfitImageError(_TOO_DEEP.format("16-bit"))
        image.load()
        if image.format != "PNG" or "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        if image.mode not in ("L", "RGB") or "transparency" in image.info:
            if exact:
                _check_exact(image)
            image = _to_plain_mode(image)
    except UnfitImageError:
        raise
    except Image.DecompressionBombError:
        raise UnfitImageError("has too many pixels; make it smaller first") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except Exception as error:  # A damaged file can fail in any way inside a decoder.
        known = isinstance(error, OSError | SyntaxError | ValueError) and not error.__cause__
        told = str(error) if known else ""
        raise ValueError(told or "damaged, or only part of an image") from None
    return image


def _has_deep_channels(image: Image.Image, data: bytes) -> bool:
    """Return whether Pillow would cut the channels of an image that is not loaded yet to 8 bits."""
    if image.format == "PNG":
        return data[24] > 8
    if image.format == "TIFF":
        return max(image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,))) > 8
    if image.format == "PPM" and data[:2] in (b"P3", b"P6"):
        return int(re.sub(rb"#[^\r\n]*", b"", data[:_PPM_HEADER_BYTES]).split()[3]) > 255
    if image.format == "JPEG2000":
        # SIZ (ISO 15444-1, A.5.1): the depth less 1 and a sign bit, every third byte from 40 on.
        begin = data.find(_JPEG2000_BEGIN)
        if begin < 0:
            return False
        size = begin + 2
        end = size + 2 + int.from_bytes(data[size + 2 : size + 4], "big")
        return any(depth & 0x7F > 7 for depth in data[size + 40 : end : 3])
    return False


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info


def _check_exact(image: Image.Image) -> None:
    example = "first, for example with dataset_tool.py convert"
    if _is_transparent(image):
        problem = f"has transparency (mode {image.mode}), and a background would change its pixels"
        remedy = f"drop the alpha channel or composite it {example}, which puts it on white"
        raise UnfitImageError(f"{problem}; {remedy}")
    if image.mode not in ("1", "L", "P", "RGB", *_DEEP_MODES):
        problem = f"is neither grayscale nor RGB (mode {image.mode})"
        raise UnfitImageError(f"{problem}; convert it {example}")


def _to_plain_mode(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in _DEEP_MODES:
        raise UnfitImageError(_TOO_DEEP.format(f"mode {image.mode}"))
    if _is_transparent(image):
        gray = image.mode in ("L", "LA", "La", "1")
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        return canvas.convert("L" if gray else "RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def encode_png(image: Image.Image) -> bytes:
    """Return a PNG file of an image in mode ``L`` or ``RGB`` without any metadata.

    It is stored uncompressed, as in EDM's datasets: about a third larger, but decoded in half the
    time.
    """
    from PIL import Image

    buffer = io.BytesIO()
    clean = Image.new(image.mode, image.size)
    clean.paste(image)
    clean.save(buffer, format="png", compress_level=0)
    return buffer.getvalue()
