"""Letters drawn in the fonts of matplotlib: each letter is a class, with images in many faces."""

import collections
import dataclasses
import functools
import importlib.util
import string
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.convert.source import Source
from data.images.transforms import Size
from dnnlib.errors import refusal
from dnnlib.progress import progress

# The text faces of matplotlib. Its other fonts contain symbols, parts of brackets, or the same box
# for every character.
TRAIN_FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    *("DejaVuSansMono", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmb10", "cmss10", "cmti10"),
)
# One face of each design; none of their images are trained on.
TEST_FACES = (
    *("DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneralBolIta", "cmtt10"),
)
FACES = {"train": TRAIN_FACES, "test": TEST_FACES, "all": (*TRAIN_FACES, *TEST_FACES)}
# Scripts whose letters are never trained on, by their Unicode names.
HELD_OUT_SCRIPTS = {"val": ("LAO",), "test": ("ARMENIAN", "GEORGIAN")}
MIN_FACES = 8  # A letter in fewer faces is left out.
DRAWINGS = 2  # In each face: one as it is, one slightly distorted.
RESOLUTION = 28

_CATEGORIES = ("Lu", "Ll", "Lt", "Lo")  # All Unicode letters except modifiers.
_MIN_SIZE, _MAX_SIZE = 8, 128
_FONT_SIZE = 96
_FILLED = 0.86  # Longer side of the letter, as a share of the image's edge.
_SUPERSAMPLING = 4
_COMPARED_SIZE = 16  # Letters are compared at this size, regardless of the output.
# Letters whose root mean square difference of pixels in 0..1, averaged over the faces that both
# have, is smaller count as one: such as the Latin, the Greek and the Cyrillic A.
_ALIKE = 0.08
_SAME = 0.01  # The same limit for two faces of one letter.
_MAX_TURN, _MAX_SHEAR, _MAX_SHRINK, _MAX_SHIFT = 0.08, 0.10, 0.12, 0.05


@dataclasses.dataclass(frozen=True)
class Glyph:
    """A letter to draw in a face: a small object that other processes can work on."""

    font: Path
    letter: str
    size: int
    drawing: int = 0

    def pixels(self) -> np.ndarray:
        """Return the letter, light on dark, uint8 [size, size].

        It is centred, and its longer side is scaled to the same length in every face. Drawing 0
        shows the letter undistorted; others are slightly rotated, slanted, shrunk and shifted, as a
        function of letter, face and drawing number alone. A blank letter gives a black image.
        """
        font = _font(self.font)
        left, top, right, bottom = font.getbbox(self.letter)
        width, height = right - left, bottom - top
        if min(width, height) < 1:
            return np.zeros((self.size, self.size), np.uint8)
        ink = Image.new("L", (width, height))
        ImageDraw.Draw(ink).text((-left, -top), self.letter, font=font, fill=255)
        edge = self.size * _SUPERSAMPLING
        scale = max(width, height) / (_FILLED * edge)
        matrix, shift = self._change()
        matrix = matrix * scale  # From image to ink coordinates, relative to both centres.
        start = np.array([width, height]) / 2 - matrix @ (edge * (0.5 + shift))
        places = (*matrix[0], start[0], *matrix[1], start[1])
        transform = Image.Transform.AFFINE
        image = ink.transform((edge, edge), transform, places, Image.Resampling.BILINEAR)
        return np.asarray(image.reduce(_SUPERSAMPLING))

    def _change(self) -> tuple[np.ndarray, np.ndarray]:
        """Return this drawing's linear map [2, 2], and its shift [2] as a share of the edge."""
        if self.drawing == 0:
            return np.eye(2), np.zeros(2)
        seed = [ord(self.letter), zlib.crc32(self.font.stem.encode()), self.drawing]
        rng = np.random.default_rng(seed)
        turn, shear, *shift = rng.uniform(-1, 1, 4)
        turn, shrink = turn * _MAX_TURN, 1 + rng.uniform(0, _MAX_SHRINK)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        slant = np.array([[1, shear * _MAX_SHEAR], [0, 1]])
        return shrink * rotation @ slant, np.array(shift) * _MAX_SHIFT


@functools.lru_cache(maxsize=len(FACES["all"]))
def _font(path: Path) -> ImageFont.FreeTypeFont:
    # The basic layout engine, because the other one depends on system libraries.
    return ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


@dataclasses.dataclass(frozen=True)
class Letters:
    """Letters to draw: those with enough faces, without look-alikes."""

    faces: dict[str, tuple[Path, ...]]  # By letter, the faces that draw it differently.
    num_alike: int  # Number of letters left out as look-alikes.

    @property
    def splits(self) -> dict[str, list[int]]:
        """Indices of the letters by split; letters of held-out scripts are never trained on."""
        found: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        for index, letter in enumerate(self.faces):
            found[split_of(letter)].append(index)
        return found


def split_of(letter: str) -> str:
    """Return the split of a letter by its script: ``train``, ``val`` or ``test``."""
    words = script_words(letter)
    for split, scripts in HELD_OUT_SCRIPTS.items():
        if words & set(scripts):
            return split
    return "train"


def script_words(letter: str) -> set[str]:
    """Return the words of a letter's Unicode name, one of which is its script."""
    return set(unicodedata.name(letter, "").split())


def open_glyphs(name: str, split: str = "train", size: Size | None = None) -> Source:
    """Return the letters of matplotlib's fonts in the order of their codes, drawn face by face.

    ``split`` chooses the faces: ``train``, ``test`` or ``all``. The classes, named by their
    letters, are the same for each. Images are as wide and high as ``size[0]``, from 8 to 128, or
    28. Raises ValueError for another size, or if matplotlib is not installed.
    """
    edge = RESOLUTION if size is None else size[0]
    if not _MIN_SIZE <= edge <= _MAX_SIZE:
        raise refusal("--resolution", edge, accepted=f"{_MIN_SIZE} to {_MAX_SIZE} for glyphs")
    letters = find_letters()
    glyphs, labels = [], []
    for index, (letter, fonts) in enumerate(letters.faces.items()):
        chosen = [font for font in fonts if font.stem in FACES[split]]
        glyphs += [
            Glyph(font, letter, edge, number) for font in chosen for number in range(DRAWINGS)
        ]
        labels += [index] * (len(chosen) * DRAWINGS)
    return Source(
        name,
        len(glyphs),
        glyphs.__getitem__,
        lambda index: f"{name}, {glyphs[index].letter} of {glyphs[index].font.stem}",
        np.array(labels, np.int64),
        list(letters.faces),
        letters.splits,
        origin=f"{len(FACES[split])} faces ({split})",
        notes=(
            f"{letters.num_alike} letters are left out, because they look like another one.",
            "Classes of scripts held out of training: "
            + ", ".join(f"{len(letters.splits[s])} for {s}" for s in HELD_OUT_SCRIPTS)
            + ".",
        ),
    )


@functools.cache
def find_letters() -> Letters:
    """Return the letters that at least MIN_FACES faces draw in distinct ways.

    Of letters that look alike in the faces that they share, only the first is kept. Modifier
    letters, which are small copies of others, are left out.
    """
    fonts = _find_fonts()
    held = [_letters_of(font) for font in fonts]
    counts = collections.Counter(letter for letters in held for letter in letters)
    letters = sorted(letter for letter, count in counts.items() if count >= MIN_FACES)
    images = np.zeros((len(fonts), len(letters), _COMPARED_SIZE**2), np.float32)
    with progress(total=len(letters), label="Comparing letters", unit="letter") as bar:
        for column, letter in enumerate(letters):
            for row, font in enumerate(fonts):
                if letter in held[row]:
                    pixels = Glyph(font, letter, _COMPARED_SIZE).pixels()
                    images[row, column] = pixels.flatten() / 255
            bar.update()
    return _different(letters, fonts, images)


def _different(letters: Sequence[str], fonts: Sequence[Path], images: np.ndarray) -> Letters:
    """Return the letters that differ from one another, each with its faces that differ.

    ``images``, float32 [F, N, D] in 0..1, holds the pixels of each letter in each face, all 0 where
    a face lacks the letter.
    """
    inked = images.any(2)  # [F, N]
    alike = _distances(images, inked) < _ALIKE
    faces: dict[str, tuple[Path, ...]] = {}
    kept: list[int] = []
    num_alike = 0
    for index, letter in enumerate(letters):
        own = images[inked[:, index], index]
        same = np.sqrt(np.square(own[:, None] - own).mean(2)) < _SAME
        is_first = ~np.tril(same, -1).any(1)
        if is_first.sum() < MIN_FACES:
            continue
        if alike[index, kept].any():
            num_alike += 1
            continue
        kept.append(index)
        drawing = [font for font, has in zip(fonts, inked[:, index], strict=True) if has]
        faces[letter] = tuple(font for font, first in zip(drawing, is_first, strict=True) if first)
    return Letters(faces, num_alike)


def _distances(images: np.ndarray, inked: np.ndarray) -> np.ndarray:
    """Return distances of letters, float32 [N, N], averaged over the faces that draw both.

    The distance in a face is the root mean square difference of pixels. Letters without a common
    face have infinite distance.
    """
    total = np.zeros(2 * images.shape[1:2], np.float32)
    shared = np.zeros_like(total)
    for own, has in zip(images, inked.astype(np.float32), strict=True):
        squares = np.square(own).sum(1)
        gaps = np.maximum(squares[:, None] + squares - 2 * own @ own.T, 0) / own.shape[1]
        both = has[:, None] * has
        total += np.sqrt(gaps) * both
        shared += both
    return np.where(shared > 0, total / np.maximum(shared, 1), np.inf)


def _letters_of(font: Path) -> set[str]:
    """Return the letters, without modifiers, for which a font has glyphs.

    Of the Computer Modern fonts only ASCII letters count: at other codes they have other glyphs.
    """
    from fontTools.ttLib import TTFont

    with TTFont(font, lazy=True) as file:
        letters = {chr(code) for code in file.getBestCmap()}
    if font.stem.startswith("cm"):
        letters &= set(string.ascii_letters)
    return {letter for letter in letters if unicodedata.category(letter) in _CATEGORIES}


def _find_fonts() -> list[Path]:
    """Return the font files of all faces; raises ValueError if any is missing."""
    found = importlib.util.find_spec("matplotlib")
    if found is None:
        problem = "needs matplotlib, which is not installed: pip install matplotlib"
        raise ValueError(f"--source=glyphs {problem}")
    folder = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    fonts = [folder / f"{face}.ttf" for face in FACES["all"]]
    missing = [font.stem for font in fonts if not font.is_file()]
    if missing:
        remedy = "install matplotlib with pip, which brings its fonts"
        raise refusal("--source=glyphs", but=f"{folder} has no {missing[0]}.ttf", remedy=remedy)
    return fonts
