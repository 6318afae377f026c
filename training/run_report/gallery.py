"""Pictures on a page: a slider through each series, with real images beside it."""

from collections.abc import Sequence
from typing import Any

from training.run_report.files import Run
from training.run_report.markup import Html, details, join, tag
from training.run_report.pictures import Picture

_TRAINING_IMAGES = "Training images"


def samples(run: Run, pictures: dict[str, list[Picture]]) -> Html:
    """Return the figures of a run's pictures, or a sentence if there is none."""
    shown = figures_of(run, pictures)
    return join(shown or tag("p", "No picture is there yet; one is made with every snapshot."))


def samples_of_all(runs: Sequence[Run], pictures: Sequence[dict[str, list[Picture]]]) -> Html:
    """Return the figures of several runs, one run below another, or a sentence if there is none."""
    parts = [
        details(run.name, figures_of(run, own), open_=True)
        for run, own in zip(runs, pictures, strict=True)
        if any(own.values())
    ]
    return join(parts or tag("p", "No picture is there yet."))


def figures_of(run: Run, pictures: dict[str, list[Picture]]) -> list[Html]:
    """Return a figure for each series, ``fakes`` with real images beside them.

    Without ``fakes``, the real images have a figure of their own.
    """
    reals = pictures.get("reals", [])
    series = {name: own for name, own in pictures.items() if name != "reals" and own}
    found = []
    for name, own in series.items():
        title = "Generated images" if name == "fakes" else name.replace("_", " ").capitalize()
        num = len(run.pictures.get(name, own))
        note = f"{len(own)} of {num} pictures, evenly by log(kimg)." if num > len(own) else None
        found.append(_slider(title, own, reals if name == "fakes" else [], note))
    if reals and "fakes" not in series:
        head = tag("figcaption", tag("h3", _TRAINING_IMAGES))
        found.append(tag("figure", head, _image(reals[0], _TRAINING_IMAGES), class_="grids"))
    return found


def _slider(title: str, pictures: list[Picture], reals: list[Picture], note: str | None) -> Html:
    last = len(pictures) - 1
    captions = [_caption(picture) for picture in pictures]
    images = [
        _image(picture, f"{title} at {caption}", hidden=index < last, data_caption=caption)
        for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
    ]
    label = f"{title}: snapshot"
    slider = tag("input", type="range", min=0, max=last, step=1, value=last, aria_label=label)
    stepper = tag("div", slider, tag("output", captions[-1]), class_="stepper", hidden=True)
    head = tag("figcaption", tag("h3", title), note and tag("p", note, class_="note"))
    made = tag("div", tag("p", captions[-1], class_="note caption"), images, class_="stack")
    beside = [
        tag("div", tag("p", _TRAINING_IMAGES, class_="note"), _image(real, _TRAINING_IMAGES))
        for real in reals[:1]
    ]
    pair = tag("div", made, beside, class_="pair")
    return tag("figure", head, stepper if last else None, pair, class_="grids")


def _caption(picture: Picture) -> str:
    kimg = "" if picture.kimg is None else f"kimg {picture.kimg:g} "
    return f"{kimg}({picture.name})"


def _image(picture: Picture, alt: str, **attributes: Any) -> Html:
    # pictures.Album finds embedded pictures by the first three attributes, in this order.
    return tag(
        "img",
        data_source=picture.name,
        data_stamp=picture.stamp,
        src=Html(picture.address),  # It is long, and base64 needs no escaping.
        alt=alt,
        **attributes,
    )
