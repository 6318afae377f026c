"""The picture of a conditioning report: bars of each condition's effect, and attention by layer."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from evaluation.conditioning.report import ALL_LEVELS, CHANGES, Report

_WIDTH, _MARGIN, _LABEL = 1200, 32, 150
_BAR, _GAP, _GROUP_GAP = 18, 3, 14
_INK, _PALE, _LINE = (34, 34, 34), (130, 130, 130), (225, 225, 225)
_COLOURS = dict(dropped=(38, 84, 124), shuffled=(239, 131, 84), swapped=(255, 190, 92))
_SEGMENTS = ((86, 98, 140), (214, 93, 77), (103, 160, 130), (190, 170, 90))
_TITLE, _HEAD, _TEXT, _SMALL = 22, 17, 14, 12


def report_picture(report: Report, title: str) -> Image.Image:
    """Return a report as one picture: changes of output and loss side by side, attention below."""
    conditions = list(dict.fromkeys(row["condition"] for row in report.rows))
    group = len(CHANGES) * (_BAR + _GAP) + _GROUP_GAP
    top = 118
    middle = top + 34 + len(conditions) * group
    height = middle + 60 + (len(report.attention) * (_BAR + _GAP) if report.attention else 0)
    picture = Image.new("RGB", (_WIDTH, height + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, 22), title, _INK, font=_font(_TITLE))
    draw.text((_MARGIN, 52), report.rows[0]["panel"], _PALE, font=_font(_TEXT))
    _legend(draw, _MARGIN, 80, _COLOURS)

    half = (_WIDTH - 3 * _MARGIN) // 2
    rows = {
        (row["condition"], row["change"]): row for row in report.rows if row["sigma"] == ALL_LEVELS
    }
    for column, (name, heading) in enumerate(
        (
            ("output_change", "Change of the output (1: as images of the panel differ)"),
            ("loss_change", "Change of the loss, relative"),
        )
    ):
        left = _MARGIN + column * (half + _MARGIN)
        draw.text((left, top), heading, _INK, font=_font(_HEAD))
        _bars(draw, (left, top + 34, half), rows, conditions, name)
    draw.text((_MARGIN, middle + 10), "Attention by layer", _INK, font=_font(_HEAD))
    if report.attention:
        names = list(report.attention[0])
        colours = dict(zip(names, _SEGMENTS, strict=False))
        _legend(draw, _MARGIN + 170, middle + 12, colours)
        _stack(draw, (_MARGIN, middle + 44), report.attention, colours)
    else:
        draw.text((_MARGIN + 170, middle + 12), report.reason, _PALE, font=_font(_TEXT))
    return picture


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int, colours: dict[str, Any]) -> None:
    for name, colour in colours.items():
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=colour)
        draw.text((x + 18, y), name, _INK, font=_font(_TEXT))
        x += 36 + round(draw.textlength(name, font=_font(_TEXT)))


def _bars(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int, int],
    rows: dict[tuple[str, str], dict[str, Any]],
    conditions: Sequence[str],
    name: str,
) -> None:
    """Draw a bar with its standard error for every condition and change; absent ones say why."""
    left, y, width = place
    start = left + _LABEL
    values = [row["values"] for row in rows.values() if row["values"]]
    largest = max((abs(v[name]) + v[f"{name}_se"] for v in values), default=0.0) or 1.0
    lowest = min((v[name] - v[f"{name}_se"] for v in values), default=0.0)
    room = width - _LABEL - 76
    # Where a loss falls, bars begin further right.
    scale = room / (largest + max(-lowest, 0.0))
    zero = start + round(max(-lowest, 0.0) * scale)
    for condition in conditions:
        draw.text((left, y + _BAR), condition, _INK, font=_font(_TEXT))
        for change in CHANGES:
            row = rows[condition, change]
            if not row["values"]:
                draw.text((zero + 6, y + 2), row["reason"], _PALE, font=_font(_SMALL))
            else:
                value, error = row["values"][name], row["values"][f"{name}_se"]
                end = zero + round(value * scale)
                draw.rectangle((min(zero, end), y, max(zero, end), y + _BAR), _COLOURS[change])
                spread = [zero + round((value + sign * error) * scale) for sign in (-1, 1)]
                draw.line((spread[0], y + _BAR // 2, spread[1], y + _BAR // 2), _INK, 1)
                text = f"{value:+.1%}" if name == "loss_change" else f"{value:.3f}"
                draw.text((max(*spread, zero) + 6, y + 2), text, _INK, font=_font(_SMALL))
            y += _BAR + _GAP
        draw.line((left, y + _GROUP_GAP // 2, left + width, y + _GROUP_GAP // 2), _LINE)
        y += _GROUP_GAP
    draw.line((zero, place[1] - 4, zero, y - _GROUP_GAP), _PALE)


def _stack(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    layers: Sequence[dict[str, float]],
    colours: dict[str, Any],
) -> None:
    """Draw a bar of the whole width for each layer, divided as its attention is."""
    left, y = place
    start, width = left + 80, _WIDTH - 2 * _MARGIN - 80
    for index, layer in enumerate(layers):
        draw.text((left, y + 2), f"layer {index}", _INK, font=_font(_SMALL))
        done = 0.0
        for name, share in layer.items():
            x0, x1 = start + round(done * width), start + round((done + share) * width)
            draw.rectangle((x0, y, x1, y + _BAR), fill=colours[name])
            text = f"{share:.0%}"
            if x1 - x0 > draw.textlength(text, font=_font(_SMALL)) + 8:
                draw.text((x0 + 6, y + 2), text, "white", font=_font(_SMALL))
            done += share
        y += _BAR + _GAP
