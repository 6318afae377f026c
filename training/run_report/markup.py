"""HTML made of parts, in which every text is escaped that is not HTML already."""

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = {"img", "input", "meta", "link", "br", "hr"}


class Html(str):
    """Text that is HTML. Whatever else becomes part of a page is escaped."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return an element. A child is text, HTML, None for nothing, or several of them in turn.

    Attributes are named as in HTML, with ``_`` for a hyphen and ``class_`` for class. Values are
    escaped as children are. True is one without value; None and False leave it out.
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
    """Return children of :func:`tag` after one another, without an element around them."""
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
    """Return a script element with data that a script finds by ``name``.

    No character of the data can end the element or begin a comment.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')


def table(
    heading: Iterable[Any], rows: Iterable[Iterable[Any]], *, label: str, class_: str | None = None
) -> Html:
    """Return a table with a first column of headings; it scrolls by itself.

    ``heading`` is that of its columns; empty for none.
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
    """Return a section of a page, with its heading, which links can name."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def details(summary: Any, *children: Any, class_: str | None = None, open_: bool = False) -> Html:
    """Return what is hidden until its summary is clicked."""
    return tag("details", tag("summary", summary), *children, class_=class_, open_=open_)


def show(value: Any) -> str:
    """Return a plain value as people read it; of lists, the elements."""
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
