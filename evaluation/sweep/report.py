"""The result of a sweep as text: rounds, winner, trade-offs, and commands to use the winner."""

import shlex
from collections.abc import Callable, Sequence

from dnnlib.axes import options_of, value_text
from dnnlib.text import format_count
from evaluation.config import ScoreConfig
from evaluation.sweep.grid import Cell
from evaluation.sweep.search import Plan, Round
from evaluation.sweep.sweep import Compared, Result

_MAX_ALIKE = 10
_PROTOCOL = ("sampling", "guidance")


def describe_plan(plan: Plan, num_cells: int) -> str:
    """Return a sentence on the most images that a search takes."""
    whole = num_cells * plan.counts[-1]
    return (
        f"At most {plan.budget:,} images ({plan.budget / whole:.1%} of the whole grid's "
        f"{whole:,}): {plan.counts[0]:,} of each cell, then up to {plan.counts[-1]:,} of the best."
    )


def describe_round(found: Round, cells: Sequence[Cell]) -> str:
    """Return a line on the cells that were compared in a round, and on those that go on."""
    return (
        f"{found.num_images:,} images of {len(found.estimates)} cells: best "
        f"{cells[found.best].name}; "
        f"{len(found.alike) - 1} cannot be told apart from it, {len(found.followed)} go on"
    )


def describe_result(result: Result) -> str:
    """Return the winner with its scores, cells as good within chance, and trade-offs by axis."""
    found, first = result.found, result.names[0]
    low, high = result.interval()
    row = result.winner_rows[0]
    lines = [
        f"Best: {result.winner.cell.name}",
        f"  {first} {row['value']:.6g} ({100 * found.plan.confidence:g}% interval {low:.6g} to "
        f"{high:.6g}) of {row['num_images']:,} fresh images, seeds {row['seeds']}",
    ]
    others = [f"{name} {result.winner.values[name]:.6g}" for name in result.names[1:]]
    lines += [f"  {', '.join(others)}"] if others else []
    lines += [f"  warning: {text}" for text in row["warnings"]]
    lines += _alike(result)
    for name, values in result.grid.axes.items():
        lines += ["", *_trade_off(result, name, values)]
    if {"precision", "recall"} <= set(result.names):
        lines += ["", *_front(result)]
    lines += ["", _describe_images(result)]
    return "\n".join(lines)


def _alike(result: Result) -> list[str]:
    alike = [result.compared[number] for number in result.found.alike()]
    if not alike:
        return ["  No other cell is as good within chance."]
    shown = [f"    {own.cell.name}: {_behind(result, own)}" for own in alike[:_MAX_ALIKE]]
    if len(alike) > _MAX_ALIKE:
        shown.append(f"    ... and {len(alike) - _MAX_ALIKE} more")
    return [f"  Not told apart from it: {len(alike)} cells", *shown]


def _behind(result: Result, own: Compared) -> str:
    """Return the difference from the winner as text, with the sign that it has in the metric."""
    return f"{result.sign * own.behind:+.4g} +- {own.error:.2g} ({own.num_images:,} images)"


def best_where(result: Result, fits: Callable[[Compared], bool]) -> Compared | None:
    """Return the best of the cells for which ``fits`` is true; None if there is none."""
    own = [compared for compared in result.compared if fits(compared)]
    return min(own, key=lambda compared: compared.behind, default=None)


def _trade_off(result: Result, name: str, values: Sequence[object]) -> list[str]:
    """Return a table of the best cell at each value of an axis, as lines."""
    rows = []
    for value in values:
        best = best_where(result, lambda own, value=value: own.cell.values[name] == value)
        shown = " ".join(
            f"{axis}={value_text(own)}"
            for axis, own in best.cell.values.items()
            if axis != name and axis in result.grid.axes
        )
        first = f"{best.values[result.names[0]]:.6g}"
        rows.append((value_text(value), first, _behind(result, best), shown))
    heading = (name, result.names[0], "from the best", "with")
    title = f"The best at each {name} ({result.names[0]} as on the fresh images)"
    return [title, *_table(heading, rows)]


def front(result: Result, first: str, second: str) -> list[Compared]:
    """Return the Pareto front: the cells that no other cell beats in both values.

    Higher values are better. The cells are in descending order of ``first``.
    """
    order = sorted(result.compared, key=lambda own: (-own.values[first], -own.values[second]))
    kept: list[Compared] = []
    for own in order:
        if not kept or own.values[second] > kept[-1].values[second]:
            kept.append(own)
    return kept


def _front(result: Result) -> list[str]:
    rows = [
        (f"{own.values['precision']:.4f}", f"{own.values['recall']:.4f}", own.cell.name)
        for own in front(result, "precision", "recall")
    ]
    title = "Precision against recall: cells that no other cell beats in both"
    return [title, *_table(("precision", "recall", "cell"), rows)]


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    return [
        "  "
        + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in [heading, *rows]
    ]


def _describe_images(result: Result) -> str:
    found, plan = result.found, result.found.plan
    whole = len(result.compared) * plan.counts[-1]
    return (
        f"Images: {found.num_images:,} in the search ({found.num_images / whole:.1%} of "
        f"{format_count(whole)}), and {plan.counts[-1]:,} fresh ones of the best cell."
    )


def commands(
    result: Result, base: ScoreConfig, network: str, how: Sequence[str], scoring: Sequence[str]
) -> dict[str, str]:
    """Return the commands that score the winner again and that generate its images, by purpose.

    Args:
        base: The protocol stored in its snapshot, whose options are not repeated.
        network: Path of that snapshot.
        how: Options on how images are generated, as typed.
        scoring: Options on how images are scored, as typed.
    """
    row, config = result.winner_rows[0], result.winner.cell.config
    protocol = options_of(config, base, _PROTOCOL)
    seeds = [f"--num-images={row['num_images']}", f"--seed={row['seeds'].partition('-')[0]}"]
    given = [f"--network={network}", *how]
    score = ["python", "fid.py", "calc", *given, *scoring, *seeds, *protocol]
    generate = ["python", "generate.py", *given, "--outdir=out", "--seeds=0-63", *protocol]
    return {"score it again": shlex.join(score), "make its images": shlex.join(generate)}
