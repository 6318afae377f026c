"""A page as one file: head, sections, style and script.

Its content security policy lets it load nothing, and run no script but its own.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from training.run_report import compare, gallery, measures, overview, setup
from training.run_report.charts import Canvas
from training.run_report.files import Run
from training.run_report.markup import Html, embedded_json, join, section, tag
from training.run_report.pictures import Picture

GENERATOR = "SetDiffiT report"
_SHORT = dict(levels="Noise levels", others="Other", next="What comes next")
_SAMPLES, _FOOTER = Html("<!--samples-->"), Html("<!--footer-->")


@functools.cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def is_page(path: Path) -> bool:
    """Return whether a file is a page that :class:`Draft` made."""
    with open(path, "rb") as file:
        return f'content="{GENERATOR}"'.encode() in file.read(1000)


class Draft:
    """A page without pictures; its size decides how much room is left for them.

    Attributes:
        num_bytes: Size of the page so far.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs, canvas = runs, Canvas()
        if len(runs) == 1:
            head = join(overview.header(runs[0]), overview.tiles(runs[0]))
            parts, title = _sections(runs[0], canvas), runs[0].name
        else:
            canvas.content["shared"] = True  # A run that is hidden in one chart is hidden in all.
            head, title = compare.header(runs), f"Comparison of {len(runs)} runs"
            parts = compare.sections(runs, canvas, _SAMPLES)
        self._text = document(title, head, parts, canvas)
        self.num_bytes = len(_encoded(self._text))

    def finish(self, pictures: Sequence[dict[str, list[Picture]]], footer: str) -> bytes:
        """Return the whole page, UTF-8, with the pictures of each run."""
        if len(self._runs) == 1:
            samples = gallery.samples(self._runs[0], pictures[0])
        else:
            samples = gallery.samples_of_all(self._runs, pictures)
        # Text from files is escaped, so that it cannot contain the marks.
        for mark, content in ((_SAMPLES, samples), (_FOOTER, join(footer))):
            before, _, after = self._text.partition(mark)
            self._text = f"{before}{content}{after}"
        return _encoded(self._text)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")  # JSON text can contain lone surrogates.


def _sections(run: Run, canvas: Canvas) -> list[Html | None]:
    return [
        overview.warnings_section(run),
        section("samples", "Samples", _SAMPLES),
        measures.training_section([run], canvas),
        measures.levels_section([run], canvas),
        measures.scores_section([run], canvas),
        measures.conditions_section(run, canvas),
        measures.others_section([run], canvas),
        setup.configuration_section(run),
        setup.next_section(run),
        setup.files_section(run),
    ]


def document(
    title: str,
    head: Html,
    parts: Sequence[Html | None],
    canvas: Canvas,
    *,
    footer: Html = _FOOTER,
    generator: str = GENERATOR,
) -> str:
    """Return the HTML of a page: ``head``, the sections ``parts``, and the charts of ``canvas``.

    Parts that are None are left out; ``generator`` identifies the kind of page.
    """
    parts = [part for part in parts if part is not None]
    names = [re.match(r'<section id="([\w-]+)"', part)[1] for part in parts]
    items = [tag("li", tag("a", _SHORT.get(n, n.capitalize()), href=f"#{n}")) for n in names]
    style, script = Html(_asset("page.css")), Html(_asset("page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    top = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=generator),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag("header", head),
        tag("nav", tag("ul", items), aria_label="Sections"),
        tag("main", parts, id="content", tabindex=-1),
        tag("footer", tag("p", footer)),
        embedded_json("data", canvas.content),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', top, body, lang='en')}\n"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
