"""The files of a sweep: score rows, and a page of heat maps and trade-offs."""

from collections.abc import Mapping
from pathlib import Path

from dnnlib.files import atomic_write, write_json
from evaluation.sweep.page import sweep_page
from evaluation.sweep.sweep import Result

WINNER, CELLS, PAGE = "winner.json", "cells.json", "report.html"


def write_results(folder: Path, result: Result, commands: Mapping[str, str]) -> None:
    """Write the rows of the winner and of all cells, and the page, each file atomically."""
    write_json(folder / WINNER, {"rows": list(result.winner_rows)})
    write_json(folder / CELLS, {"rows": list(result.rows)})
    with atomic_write(folder / PAGE, "w", encoding="utf-8") as file:
        file.write(sweep_page(result, commands))
