"""HTML composed of parts; every text that is not HTML already is escaped."""

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = {"img", "input", "meta", "link", "br", "hr"}


class Html(str):
    """Text that is HTML; any other text is escaped when it becomes part of a page."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return an element. A child is text, HTML, None for nothing, or an iterable of children.

    Attributes are named as in HTML, with ``_`` for a hyphen and ``class_`` for class. Values are
    escaped like children. True gives an attribute without a value; None and False leave it out.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            text = value if isinstance(value, Html) else html.escape(str(value))
            words.append(f'{key}="{text}"')
    start = f"<{' '.join(words)}>"
    return Html(start if name in _VOID else f"{start}{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    """Return children, as :func:`tag` takes them, without an element around them."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, Iterable) and not isinstance(child, str | bytes | Mapping):
            parts.append(join(*child))
        elif child is not None:
            parts.append(html.escape(str(child)))
    return Html("".join(parts))


def embedded_json(name: str, content: Any) -> Html:
    """Return a script element of JSON data, which a script finds by its id ``name``.

    Characters of the data that could end the element or begin a comment are escaped. Raises
    ValueError for numbers that are not finite.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')


def table(
    heading: Iterable[Any], rows: Iterable[Iterable[Any]], *, label: str, class_: str | None = None
) -> Html:
    """Return a scrollable table whose first column holds row headings.

    ``heading`` holds the column headings; empty for none.
    """
    body = []
    for row in rows:
        first, *rest = row
        body.append(tag("tr", tag("th", first, scope="row"), [tag("td", cell) for cell in rest]))
    cells = [tag("th", cell, scope="col") for cell in heading]
    head = tag("thead", tag("tr", cells)) if cells else None
    inner = tag("table", head, tag("tbody", body), class_=class_)
    return tag("div", inner, class_="scroll", role="region", aria_label=label, tabindex=0)


def section(name: str, title: str, *children: Any) -> Html:
    """Return a section of a page with its heading; links refer to it by ``name``."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def details(summary: Any, *children: Any, class_: str | None = None, open_: bool = False) -> Html:
    """Return content that is hidden until its summary is clicked, or shown if ``open_``."""
    return tag("details", tag("summary", summary), *children, class_=class_, open_=open_)


def show(value: Any) -> str:
    """Return a plain value as readable text; the elements of a list are joined by commas."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        return ", ".join(map(show, value)) or "none"
    return str(value)
