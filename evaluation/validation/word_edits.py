"""Captions with words replaced, so that a model that uses them generates a different image."""

import re

# The words of a pair replace each other. Of the first group with a word in the caption, all words
# are replaced.
_GROUPS = (
    "red/blue green/purple yellow/black white/orange pink/turquoise brown/silver golden/gray "
    "crimson/teal",
    "man/woman men/women boy/girl boys/girls dog/cat dogs/cats horse/elephant bird/butterfly "
    "birds/butterflies car/boat cars/boats house/castle temple/lighthouse tree/tower trees/towers "
    "flower/mushroom flowers/mushrooms mountain/beach mountains/beaches forest/desert street/river "
    "table/bed guitar/umbrella",
    "day/night summer/winter sunny/snowy bright/dark old/young large/tiny indoors/outdoors",
)
FALLBACK = "At night, in blue light: "


def edit_caption(caption: str) -> tuple[str, list[str]]:
    """Return a caption with words replaced, and the replacements, such as ``red -> blue``.

    Colours are replaced by other colours; if there are none, things by other things; if there are
    none of these either, circumstances. A caption without any of these words is put after
    :data:`FALLBACK`, which comes first because long captions are cut at their end. The result
    always differs from the caption.
    """
    for group in _GROUPS:
        pairs = [pair.split("/") for pair in group.split()]
        swapped = {**dict(pairs), **{second: first for first, second in pairs}}
        replaced: dict[str, None] = {}

        def other(match: re.Match, swapped: dict = swapped, replaced: dict = replaced) -> str:
            word = match[0]
            new = swapped[word.lower()]
            replaced[f"{word.lower()} -> {new}"] = None
            if word.isupper() and len(word) > 1:
                return new.upper()
            return new.capitalize() if word[0].isupper() else new

        edited = re.sub(rf"\b(?:{'|'.join(swapped)})\b", other, caption, flags=re.IGNORECASE)
        if replaced:
            return edited, list(replaced)
    return FALLBACK + caption, [f"+ {FALLBACK.rstrip(': ')}"]
