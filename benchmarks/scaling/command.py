"""benchmark.py scaling: predictions for a preset, measurements of this host, and the page."""

import dataclasses
from pathlib import Path

import click

from benchmarks.options import ScalingOptions
from benchmarks.scaling.chart import efficiency_chart
from benchmarks.scaling.cost import with_fixed_batch, with_growing_batch
from benchmarks.scaling.facts import FACTS_FILE, LARGE, facts_of, read_facts
from benchmarks.scaling.hardware import GPUS
from benchmarks.scaling.host import HOST_FILE, read_measured
from benchmarks.scaling.measure import measure
from benchmarks.scaling.page import PAGE, PICTURE, breakdown, page, series
from configs.presets import get_preset
from dnnlib.cli import usage_errors
from dnnlib.files import atomic_write, write_json
from dnnlib.progress import progress
from torch_utils.charts import check_charts

_ROOT = Path(__file__).resolve().parents[2]


def show(options: ScalingOptions) -> None:
    """Run ``benchmark.py scaling``: measure this host, write the page, or print predictions."""
    if options.write:
        check_charts("--write")
    with usage_errors():
        get_preset(options.preset)
    if options.measure:
        measure(HOST_FILE)
    if options.write:
        _write()
    if not (options.measure or options.write):
        facts, gpu = facts_of(options.preset), GPUS[options.gpu]
        for title, planner in (
            (f"A batch of {facts.batch}, shared by all GPUs:", with_fixed_batch),
            (f"{facts.batch // 8} rows for each GPU:", with_growing_batch),
        ):
            click.echo(f"{title}\n\n{breakdown(facts, gpu, planner)}\n")


def _write() -> None:
    """Compute the facts of all large presets, and write them, the page and its chart."""
    found = {}
    with progress(total=len(LARGE), label="Presets", unit="preset") as bar:
        for name in LARGE:
            found[name] = dataclasses.asdict(facts_of(name))
            bar.update(1)
    write_json(FACTS_FILE, found)
    facts = read_facts()
    with atomic_write(_ROOT / PAGE, "w", encoding="utf-8") as file:
        file.write(page(read_measured(), facts))
    with atomic_write(_ROOT / PICTURE, "wb") as file:
        efficiency_chart(series(facts)).save(file, format="PNG", optimize=True)
