"""The page docs/scaling.md: computes its numbers and fills them into the template page.md."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from benchmarks.scaling import hardware
from benchmarks.scaling.cost import (
    STALL_SEC_PER_GB,
    Facts,
    Plan,
    efficiency,
    images_per_second,
    reliability,
    step,
    with_fixed_batch,
    with_growing_batch,
)
from benchmarks.scaling.hardware import GPUS, Gpu
from benchmarks.scaling.host import FITTED, PREDICTED, Measured, fit
from dnnlib.text import format_count

PAGE = Path("docs/scaling.md")
PICTURE = Path("docs/images/scaling.png")
_TEMPLATE, _HOST_TEMPLATE = (Path(__file__).with_name(name) for name in ("page.md", "host.md"))
NUMBERS = tuple(2**power for power in range(13))  # Numbers of GPUs: 1 to 4,096.
GOAL = 0.8
_SHOWN = "imagenet256"
_IN_PICTURE = ("cifar10", "ffhq64", "imagenet256", "imagenet256-s", "nanodit", "fsdm-depth6")
_CAUSES = {
    "launches": ("launching kernels", "a larger `--batch`"),
    "update": ("the weight update", "`--shard=hybrid`, or a larger `--batch`"),
    "traffic": ("summing gradients", "a larger `--batch`"),
    "stragglers": ("waiting for the slowest", "find and replace slow GPUs"),
}
_NOT_MEASURED = """
Not measured yet. On an otherwise idle machine, `python benchmark.py scaling --measure`
times 1, 2, 4 and 8 processes, and `--write` puts the fit to the first three, its prediction for 8,
and the error of that prediction here.
"""
_NO_ROWS = ("no rows left", "a larger `--batch`")
_FAILURES = ("failures", "write states more often")

Planner = Callable[[Facts, int], Plan | None]


def page(measured: Measured | None, facts: Mapping[str, Facts]) -> str:
    """Return the text of docs/scaling.md, with the measurements of a host if there are any."""
    host = _NOT_MEASURED
    if measured is not None:
        host = _filled(_HOST_TEMPLATE, _host_values(measured))
    return _filled(_TEMPLATE, dict(_gpu_values(facts), host=host.strip()))


def _filled(template: Path, values: Mapping[str, str]) -> str:
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def series(facts: Mapping[str, Facts]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the lines of the chart as (GPUs, efficiency), by panel title and preset."""
    h100, panels = GPUS["h100"], {}
    for title, plan in (
        ("the preset's batch, shared by all GPUs", with_fixed_batch),
        ("an eighth of the preset's batch for each GPU", with_growing_batch),
    ):
        panels[title] = {name: _line(facts[name], h100, plan) for name in _IN_PICTURE}
    return panels


def _line(facts: Facts, gpu: Gpu, planner: Planner) -> list[tuple[int, float]]:
    alone, plans = planner(facts, 1), [(num, planner(facts, num)) for num in NUMBERS]
    return [(num, efficiency(facts, gpu, plan, alone)) for num, plan in plans if plan is not None]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


# This host.


def _host_values(measured: Measured) -> dict[str, str]:
    constants = fit(measured)
    errors = []

    def row(num: int, shard: str, rows: int, seconds: float, note: str) -> list[str]:
        predicted = constants.step(measured, num, rows, shard)
        if note == "predicted":
            predicted = measured.predicted[shard]
            errors.append(abs(predicted / seconds - 1))
        error = f"{round(predicted / seconds - 1, 3) + 0.0:+.1%}"  # Never -0.0%.
        return [f"{num}", f"`{shard}`", f"{rows}", *map(_ms, (seconds, predicted)), error, note]

    rows = [
        row(t.num, t.shard, t.rows, t.seconds, "fitted" if t.num in FITTED else "predicted")
        for t in sorted(measured.steps, key=lambda t: (t.shard != "none", t.num, t.rows))
    ]
    head = ["processes", "`--shard`", "rows each", "measured, ms", "model, ms", "error", ""]
    sums = [
        [f"{t.num}", _size(t.num_bytes), _ms(t.seconds), _ms(constants.sum(t.num, t.num_bytes))]
        for t in measured.sums
    ]
    return dict(
        hardware=measured.hardware,
        cores=f"{measured.num_cores}",
        command=measured.command,
        weights=_size(measured.weight_bytes),
        steps_table=table(head, rows),
        sums_table=table(["processes", "size", "measured, ms", "model, ms"], sums),
        fixed=_ms(constants.fixed),
        row=_ms(constants.row),
        slowdown=f"{constants.slowdown:.2f}",
        crowding=f"{constants.crowding:.3f}",
        rate=f"{1 / constants.byte / 1e9:.2f}",
        message=f"{constants.message * 1e6:.0f}",
        gathering=_ms(constants.gathering),
        fitted=" and ".join([", ".join(map(str, FITTED[:-1])), str(FITTED[-1])]),
        predicted_num=f"{PREDICTED}",
        worst_error=f"{max(errors):.1%}",
    )


# GPUs.


def _gpu_values(facts: Mapping[str, Facts]) -> dict[str, str]:
    h100, a100 = GPUS["h100"], GPUS["a100"]
    columns = [f"{num:,}" for num in NUMBERS]
    matrices = {
        name: table(
            ["preset", *columns],
            [[f"`{own.preset}`", *_percents(own, h100, planner)] for own in facts.values()],
        )
        for name, planner in (
            ("fixed_matrix", with_fixed_batch),
            ("growing_matrix", with_growing_batch),
        )
    }
    shown = facts[_SHOWN]
    return dict(
        **matrices,
        gpus_table=_gpus_table(),
        utilisation=f"{hardware.UTILISATION:.0%}",
        link_share=f"{hardware.LINK_SHARE:.0%}",
        operator=f"{hardware.OPERATOR_SEC * 1e6:g}",
        spread=f"{hardware.STEP_SPREAD:.0%}",
        call=f"{hardware.CALL_SEC * 1e6:g}",
        nvlink_step=f"{hardware.NVLINK_STEP_SEC * 1e6:g}",
        network_step=f"{hardware.NETWORK_STEP_SEC * 1e6:g}",
        bucket=f"{hardware.BUCKET_BYTES >> 20}",
        failure_hours=f"{hardware.HOURS_BETWEEN_FAILURES:,.0f}",
        write_rate=f"{hardware.WRITE_RATE / 1e9:g}",
        restart=f"{hardware.RESTART_SEC:g}",
        stall_rate=f"{STALL_SEC_PER_GB:g}",
        goal=f"{GOAL:.0%}",
        shown=_SHOWN,
        stops_table=_stops_table(facts.values(), h100),
        sharding_table=_sharding_table(facts.values(), h100),
        memory_table=_memory_table(facts.values()),
        fixed_steps=breakdown(shown, h100, with_fixed_batch),
        growing_steps=breakdown(shown, h100, with_growing_batch),
        failures_table=_failures_table(facts.values()),
        sensitivity_table=_sensitivity_table(facts.values(), h100, a100),
    )


def _percents(facts: Facts, gpu: Gpu, planner: Planner) -> list[str]:
    found = dict(_line(facts, gpu, planner))
    return [f"{100 * found[num]:.0f}" if num in found else "" for num in NUMBERS]


def last_good(
    facts: Facts, gpu: Gpu, planner: Planner, utilisation: float = hardware.UTILISATION
) -> int:
    """Return the largest of :data:`NUMBERS` up to which efficiency never falls below the goal."""
    last, alone = 1, planner(facts, 1)
    for num in NUMBERS:
        plan = planner(facts, num)
        if plan is None or efficiency(facts, gpu, plan, alone, utilisation) < GOAL:
            return last
        last = num
    return last


def why_it_stops(facts: Facts, gpu: Gpu, planner: Planner) -> tuple[str, str]:
    """Return the largest added cost at twice the last good number of GPUs, and a remedy.

    Both are empty if every number of GPUs is good.
    """
    num = 2 * last_good(facts, gpu, planner)
    if num > NUMBERS[-1]:
        return "", ""
    plan, alone = planner(facts, num), planner(facts, 1)
    if plan is None:
        return _NO_ROWS
    took, took_alone = step(facts, gpu, plan), step(facts, gpu, alone)
    costs = {
        cause: getattr(took, cause) / plan.rows - getattr(took_alone, cause) / alone.rows
        for cause in _CAUSES
    }
    largest = max(costs, key=costs.__getitem__)
    if reliability(facts, num).lost * took.total / plan.rows > costs[largest]:
        return _FAILURES
    return _CAUSES[largest]


def _stops_table(all_facts: Iterable[Facts], gpu: Gpu) -> str:
    rows = []
    for facts in all_facts:
        fixed, growing = (last_good(facts, gpu, p) for p in (with_fixed_batch, with_growing_batch))
        why, change = why_it_stops(facts, gpu, with_fixed_batch)
        later, change_later = why_it_stops(facts, gpu, with_growing_batch)
        rows.append(
            [
                *(f"`{facts.preset}`", f"{facts.batch}", f"{fixed:,}", why, change),
                *(f"{growing:,}" if later else f"{growing:,} or more", later, change_later),
            ]
        )
    head = ["preset", "batch", "GPUs", "what limits it", "what to change"]
    return table([*head, "GPUs with growing batch", "what limits it", "what to change"], rows)


def breakdown(facts: Facts, gpu: Gpu, planner: Planner) -> str:
    """Return a table of the time of a preset's step, by cause and number of GPUs."""
    rows, alone = [], planner(facts, 1)
    for num in NUMBERS:
        plan = planner(facts, num)
        if plan is None:
            break
        took = step(facts, gpu, plan)
        lost = reliability(facts, num).lost
        rows.append(
            [f"{num:,}", f"{plan.rows:g}"]
            + [f"{1e3 * seconds:.1f}" for seconds in (*vars(took).values(), took.total)]
            + [f"{lost:.2%}", f"{images_per_second(facts, gpu, plan):,.0f}"]
            + [f"{efficiency(facts, gpu, plan, alone):.0%}"]
        )
    head = ["GPUs", "rows each", "rows, ms", "launches, ms", "update, ms", "traffic, ms"]
    head += ["stragglers, ms", "step, ms", "lost to failures", "images/s", "efficiency"]
    return table(head, rows)


def _sharding_table(all_facts: Iterable[Facts], gpu: Gpu) -> str:
    numbers, rows = (8, 64, 512, 4096), []
    for facts in all_facts:
        cells, alone = [f"`{facts.preset}`"], with_growing_batch(facts, 1)
        for num in numbers:
            plans = (with_growing_batch(facts, num, shard) for shard in ("none", "full", "hybrid"))
            shares = [efficiency(facts, gpu, plan, alone) for plan in plans]
            cells.append(", ".join(f"{100 * share:.0f}" for share in shares))
        rows.append(cells)
    return table(["preset", *(f"{num:,} GPUs" for num in numbers)], rows)


def _memory_table(all_facts: Iterable[Facts]) -> str:
    rows = [
        [f"`{f.preset}`", f"{f.parameters / 1e6:,.1f} M", f"{f.batch_gpu} of {f.batch // 8}"]
        + [_size(size) for size in (*f.memory.values(), f.state_bytes)]
        for f in all_facts
    ]
    head = ["preset", "parameters", "rows per pass", "`--shard=none`", "`--shard=full`", "state"]
    return table(head, rows)


def _failures_table(all_facts: Iterable[Facts]) -> str:
    numbers, rows = (8, 64, 512, 4096), []
    for facts in all_facts:
        cells = [f"`{facts.preset}`"]
        for num in numbers:
            best, hourly = reliability(facts, num), reliability(facts, num, 3600)
            cells.append(f"{_duration(best.interval)} ({best.lost:.2%}, {hourly.lost:.2%})")
        rows.append(cells)
    per_hour = [f"{reliability(facts, num).failures_per_hour:.2g}" for num in numbers]
    return table(
        ["preset", *(f"{num:,} GPUs" for num in numbers)],
        [["failures per hour", *per_hour], *rows],
    )


def _sensitivity_table(all_facts: Iterable[Facts], h100: Gpu, a100: Gpu) -> str:
    rows = [
        [f"`{facts.preset}`"]
        + [f"{last_good(facts, h100, with_fixed_batch, share):,}" for share in (0.2, 0.4, 0.6)]
        + [f"{last_good(facts, a100, with_fixed_batch):,}"]
        for facts in all_facts
    ]
    return table(["preset", "H100, 20%", "H100, 40%", "H100, 60%", "A100, 40%"], rows)


def _gpus_table() -> str:
    rows = [
        [
            *(gpu.name, f"{gpu.flops / 1e12:g}", f"{gpu.memory_rate / 1e12:g}"),
            *(f"{gpu.nvlink_rate / 1e9:g}", f"{gpu.network_rate / 1e9:g}", gpu.source),
        ]
        for gpu in GPUS.values()
    ]
    head = ["GPU", "bf16, TFLOP/s", "memory, TB/s", "NVLink, GB/s", "network, GB/s"]
    return table([*head, "source"], rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _size(num_bytes: float) -> str:
    return f"{format_count(num_bytes)}B"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{math.floor(minutes / 6 + 0.5) / 10:g} h"
