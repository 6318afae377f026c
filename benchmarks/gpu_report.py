"""The output of benchmark.py gpu: results merged into one file, tables, goals and advice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dnnlib.errors import refusal

FORMAT = "setdiffit-gpu-benchmark"
# Smallest speed-up for which a default should change.
_GAIN = 1.05
_MFU_GOAL, _SPEED_GOAL, _SHARE_GOAL = 0.50, 3.0, 0.95


def read_results(path: Path) -> dict[str, Any] | None:
    """Return the results in a file, or None if it does not exist.

    Raises ValueError if the file holds anything else.
    """
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] != FORMAT or not isinstance(results["parts"], dict):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        but, remedy = "it holds no results of benchmark.py gpu", "choose another name"
        raise refusal("--out", path, but=but, remedy=remedy) from None
    return results


def results_for(path: Path, card: str) -> dict[str, Any]:
    """Return a card's results from a file, or empty ones; raises ValueError for another card's."""
    results = read_results(path) or dict(format=FORMAT, card=card, parts={})
    if results["card"] != card:
        but = f"it holds results of {results['card']}, and this is {card}"
        raise refusal("--out", path, but=but, remedy="give a file of its own for each card")
    return results


def merged(results: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results with one part replaced or added."""
    return {**results, "parts": {**results["parts"], name: dict(part)}}


# Tables.


def markdown(results: Mapping[str, Any]) -> str:
    """Return all parts as Markdown tables, with their left-out measurements and the goals."""
    parts, blocks = results["parts"], [f"# {results['card']}"]
    for name, part in parts.items():
        software = f"torch {part['torch']}, CUDA {part['cuda']}, {part['seconds']:.0f} s"
        blocks.append(f"## {name}\n\n{software}")
        if rows := _TABLES[name](part):
            head = f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}\n"
            blocks.append(head + "\n".join(f"| {' | '.join(row)} |" for row in rows[1:]))
        if part["left_out"]:
            blocks.append("Left out:\n\n" + "\n".join(f"- {note}" for note in part["left_out"]))
    if found := goals(parts):
        blocks.append("## Goals\n\n" + "\n".join(f"- {line}" for line in found))
    return "\n\n".join(blocks) + "\n"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _gemm_rows(part: Mapping[str, Any]) -> list[list[str]]:
    rows = [["arithmetic", "m x n x k", "TFLOP/s"]]
    for row in part["rows"]:
        rows.append([row["arithmetic"], "x".join(map(str, row["size"])), _number(row["tflops"])])
    return [*rows, *([f"**{name}**", "best", _number(v)] for name, v in part["best"].items())]


def _attention_rows(part: Mapping[str, Any]) -> list[list[str]]:
    rows = [["arithmetic", "tokens", "way", "forward and backward, ms", "error of bias gradient"]]
    for row in part["rows"]:
        numbers = [_number(row["ms"]), f"{row['bias_error']:.1e}"]
        rows.append([row["arithmetic"], str(row["tokens"]), row["way"], *numbers])
    return rows


def _train_rows(part: Mapping[str, Any]) -> list[list[str]]:
    if not part["rows"]:
        return []
    names = list(part["rows"][0]["parts_ms"])
    head = ["preset", "network", "batch", *(f"{name}, ms" for name in names), "step, ms"]
    rows = [[*head, "images/s", "TFLOP/s", "MFU", "memory, GiB"]]
    for row in part["rows"]:
        network = f"{'plain ' * (row['side'] == 'plain')}{row['arithmetic']}"
        network += ", compiled" * row["compiled"]
        times = [*(row["parts_ms"][name] for name in names), row["step_ms"]]
        numbers = [*times, row["images_per_sec"], row["tflops"]]
        cells = [*map(_number, numbers), _percent(row["mfu"]), _number(row["memory_gib"])]
        rows.append([row["preset"], network, str(row["batch"]), *cells])
    return rows


def _sample_rows(part: Mapping[str, Any]) -> list[list[str]]:
    rows = [["preset", "precision", "batch", "evaluations", "images/s", "forward pass alone"]]
    for row in part["rows"]:
        counts = [str(row["batch"]), str(row["evaluations"]), _number(row["images_per_sec"])]
        rows.append([row["preset"], row["precision"], *counts, _percent(row["share"])])
    return rows


def _metrics_rows(part: Mapping[str, Any]) -> list[list[str]]:
    rows = [["precision", "images/s", "network alone, images/s", "share"]]
    for row in part["rows"]:
        rates = [_number(row["images_per_sec"]), _number(row["bare_per_sec"])]
        rows.append([row["precision"], *rates, _percent(row["share"])])
    return rows


def _loading_rows(part: Mapping[str, Any]) -> list[list[str]]:
    rows = [["what", "loader processes", "images/s", "MB/s"]]
    for row in part["rows"]:
        rates = [_number(row["images_per_sec"]), _number(row["mb_per_sec"])]
        rows.append([row["preset"], str(row["workers"]), *rates])
    if state := part["state"]:
        text = f"training state of {state['preset']}: {state['seconds']:.2f} s for "
        text += f"{state['gigabytes']:.2f} GB, {state['sec_per_gb']:.2f} s a GB"
        rows.append([text, "", "", _number(1000 / state["sec_per_gb"])])
    return rows


_TABLES = {
    "gemm": _gemm_rows,
    "attention": _attention_rows,
    "train": _train_rows,
    "sample": _sample_rows,
    "metrics": _metrics_rows,
    "loading": _loading_rows,
}


# Goals and advice.


def goals(parts: Mapping[str, Any]) -> list[str]:
    """Return a line for each goal whose measurements exist, with the value and the goal."""
    lines = []
    train = parts.get("train", {}).get("rows", [])
    mfu = [r["mfu"] for r in _own(train, "imagenet256", "bf16", compiled=True) if r["mfu"]]
    if mfu:
        lines.append(_goal("imagenet256, bf16, compiled: MFU", max(mfu), _MFU_GOAL, "{:.1%}"))
    plain = [r for r in train if (r["preset"], r["side"]) == ("cifar10", "plain")]
    own = [r for r in train if (r["preset"], r["side"]) == ("cifar10", "own")]
    if plain and own:
        best = max(row["images_per_sec"] for row in own)
        ratio = best / plain[0]["images_per_sec"]
        lines.append(_goal("cifar10: speed, plain baseline = 1", ratio, _SPEED_GOAL, "{:.2f}"))
    for row in parts.get("sample", {}).get("rows", []):
        name = f"{row['preset']}, {row['precision']}: sampling, of the bare forward pass"
        lines.append(_goal(name, row["share"], _SHARE_GOAL, "{:.1%}"))
    for row in parts.get("metrics", {}).get("rows", []):
        name = f"Inception, {row['precision']}: of the bare forward pass"
        lines.append(_goal(name, row["share"], _SHARE_GOAL, "{:.1%}"))
    return lines


def _goal(name: str, value: float, goal: float, form: str) -> str:
    met = "met" if value >= goal else "missed"
    return f"{name} {form.format(value)} (goal {form.format(goal)}, {met})"


def _own(
    rows: list[dict[str, Any]], preset: str, arithmetic: str, *, compiled: bool
) -> list[dict[str, Any]]:
    asked = ("own", preset, arithmetic, compiled)
    keys = ("side", "preset", "arithmetic", "compiled")
    return [row for row in rows if tuple(row[key] for key in keys) == asked]


def advice(
    parts: Mapping[str, Any], attention: str, presets: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return a line for each default that is slower than an alternative, with both numbers.

    Args:
        parts: Results by the name of the part.
        attention: The attention implementation that ``auto`` means on a GPU.
        presets: The default ``arithmetic`` and ``compiled`` of each preset on a GPU.
    """
    rows = parts.get("train", {}).get("rows", [])
    lines = _attention_advice(parts.get("attention", {}).get("rows", []), attention)
    for name in dict.fromkeys(row["preset"] for row in rows):
        own = [row for row in rows if (row["preset"], row["side"]) == (name, "own")]
        if own and name in presets:
            lines += _training_advice(name, own, presets[name])
    return lines


def _attention_advice(rows: list[dict[str, Any]], default: str) -> list[str]:
    lines = []
    for arithmetic, tokens in dict.fromkeys((row["arithmetic"], row["tokens"]) for row in rows):
        times = {
            row["way"]: row["ms"]
            for row in rows
            if (row["arithmetic"], row["tokens"]) == (arithmetic, tokens)
        }
        current = [ms for way, ms in times.items() if way.split(",")[0] == default]
        best = min(times, key=times.get)
        if current and min(current) > _GAIN * times[best]:
            where = f"--attention=auto at {tokens} tokens in {arithmetic}"
            was = f"{default} takes {min(current):.3g} ms, {best} {times[best]:.3g} ms"
            lines.append(f"{where}: {best} instead of {default} ({was}).")
    return lines


def _training_advice(
    name: str, rows: list[dict[str, Any]], default: Mapping[str, Any]
) -> list[str]:
    """Return the options of arithmetic and compilation that would speed up a preset."""
    rates = {(row["arithmetic"], row["compiled"]): row["images_per_sec"] for row in rows}
    now = (default["arithmetic"], default["compiled"])
    lines = []
    if now not in rates:
        return lines
    changes = {
        "--tf32": ("tf32", now[1]) if now[0] == "fp32" else now,
        "--precision=bf16": ("bf16", now[1]),
        "--precision=fp32": ("fp32", now[1]),
        "--no-compile" if now[1] else "--compile": (now[0], not now[1]),
    }
    for option, other in changes.items():
        if other in rates and rates[other] > _GAIN * rates[now]:
            gain = f"{rates[now]:.4g} -> {rates[other]:.4g} images/s"
            lines.append(f"{name}: {option} ({gain}, {rates[other] / rates[now]:.2f} times).")
    return lines
