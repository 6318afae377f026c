"""Pictures on a page: a slider through those of each series, with real images beside."""

from typing import Any

from training.run_report.files import Run
from training.run_report.markup import Html, section, tag
from training.run_report.pictures import Picture


def samples_section(run: Run, pictures: dict[str, list[Picture]]) -> Html:
    """Return the pictures of a run: a slider through each series, with real images beside."""
    shown = figures_of(run, pictures)
    text = "No picture is there yet; one is made with every snapshot."
    return section("samples", "Samples", shown or tag("p", text))


def figures_of(run: Run, pictures: dict[str, list[Picture]]) -> list[Html]:
    """Return a figure for each series of pictures; of real images alone, if there are no others."""
    reals = pictures.get("reals", [])
    series = {name: own for name, own in pictures.items() if name != "reals" and own}
    found = []
    for name, own in series.items():
        title = "Samples" if name == "fakes" else name.replace("_", " ").capitalize()
        num = len(run.pictures.get(name, own))
        note = f"{len(own)} of {num} pictures, evenly by log(kimg)." if num > len(own) else None
        found.append(_slider(title, own, reals if name == "fakes" else [], note))
    if reals and "fakes" not in series:
        found.append(
            tag(
                "figure",
                tag("figcaption", tag("h3", "Training images")),
                _image(reals[0], "Training images"),
            )
        )
    return found


def _slider(title: str, pictures: list[Picture], reals: list[Picture], note: str | None) -> Html:
    last = len(pictures) - 1
    captions = [_caption(picture) for picture in pictures]
    images = [
        _image(picture, f"{title} at {caption}", hidden=index < last, data_caption=caption)
        for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
    ]
    slider = tag(
        "input", type="range", min=0, max=last, step=1, value=last, aria_label=f"{title}: snapshot"
    )
    stepper = tag("div", slider, tag("output", captions[-1]), class_="stepper", hidden=True)
    caption = tag("figcaption", tag("h3", title), note and tag("p", note, class_="note"))
    beside = [
        tag("div", tag("p", "Training images", class_="note"), _image(real, "Training images"))
        for real in reals[:1]
    ]
    stack = tag(
        "div", stepper if last else tag("p", captions[0], class_="note"), images, class_="stack"
    )
    return tag("figure", caption, stack, beside, class_="grids")


def _caption(picture: Picture) -> str:
    kimg = "" if picture.kimg is None else f"kimg {picture.kimg:g} "
    return f"{kimg}({picture.name})"


def _image(picture: Picture, alt: str, **attributes: Any) -> Html:
    # A later page finds the picture by the first three, see pictures.Album.
    return tag(
        "img",
        data_source=picture.name,
        data_stamp=picture.stamp,
        src=picture.address,
        alt=alt,
        **attributes,
    )
