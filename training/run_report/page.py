"""A page as one file: head, sections, style and script, which may load nothing and run no other."""

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from training.run_report import compare, gallery, measures, overview, setup
from training.run_report.charts import Canvas
from training.run_report.files import Run
from training.run_report.markup import Html, embedded_json, join, tag
from training.run_report.pictures import Picture

GENERATOR = "SetDiffiT report"
_SHORT = dict(levels="Noise levels", others="Other", next="What comes next")
Pictures = dict[str, list[Picture]]


@functools.cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def is_page(path: Path) -> bool:
    """Return whether a file is a page of this kind."""
    with open(path, "rb") as file:
        return f'content="{GENERATOR}"'.encode() in file.read(1000)


def run_page(run: Run, pictures: Pictures, footer: str) -> str:
    """Return the page about one run."""
    canvas = Canvas()
    sections = [
        overview.warnings_section(run),
        gallery.samples_section(run, pictures),
        measures.training_section([run], canvas),
        measures.levels_section([run], canvas),
        measures.scores_section([run], canvas),
        measures.conditions_section(run, canvas),
        measures.others_section([run], canvas),
        setup.configuration_section(run),
        setup.next_section(run),
        setup.files_section(run),
    ]
    head = join(overview.header(run), overview.tiles(run))
    return _page(run.name, head, sections, canvas, footer)


def comparison_page(runs: Sequence[Run], pictures: Sequence[Pictures], footer: str) -> str:
    """Return the page about several runs."""
    canvas = Canvas()
    canvas.content["shared"] = True  # A run that is hidden in one chart is hidden in all.
    sections = compare.body(runs, canvas, pictures)
    title = f"Comparison of {len(runs)} runs"
    return _page(title, compare.header(runs), sections, canvas, footer)


def _page(
    title: str, head: Html, sections: Sequence[Html | None], canvas: Canvas, footer: str
) -> str:
    sections = [part for part in sections if part is not None]
    names = [re.match(r'<section id="([\w-]+)"', part)[1] for part in sections]
    items = [tag("li", tag("a", _SHORT.get(n, n.capitalize()), href=f"#{n}")) for n in names]
    style, script = Html(_asset("page.css")), Html(_asset("page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    top = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
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
        tag("main", sections, id="content", tabindex=-1),
        tag("footer", tag("p", footer)),
        embedded_json("data", canvas.content),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', top, body, lang='en')}\n"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
