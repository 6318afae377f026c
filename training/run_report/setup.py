"""The settings of a run, its files, and the commands for the next steps."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.files import file_sizes
from dnnlib.text import format_count, format_time
from training.run_report.files import PREDICTION_FILE, Run
from training.run_report.markup import Html, details, section, show, table, tag
from training.run_report.rows import flat, is_finite, read_object

_LONG_COMMAND = 80  # Characters.


def configuration_section(run: Run) -> Html:
    """Return the section on the configuration: facts, changes to the preset, settings, command."""
    options = run.options
    description = options.get("description")
    facts = {"data": options.get("data"), **(description if isinstance(description, dict) else {})}
    facts["predicted"] = _predicted(read_object(run.run_dir / PREDICTION_FILE))
    rows = [(name, _fact(value)) for name, value in facts.items() if value is not None]
    parts = [table([], rows, label="The run in words")] if rows else []
    parts += [tag("h3", "Difference from the preset"), _changes(run)]
    if run.settings:
        full = table(
            ["Setting", "Value"],
            [(k, show(v)) for k, v in run.settings.items()],
            label="Configuration",
        )
        search = tag(
            "input", type="search", class_="filter", aria_label="Show settings that contain"
        )
        parts.append(details("The whole configuration", tag("p", search, hidden=True), full))
    parts.append(details("Command and environment", _environment(run)))
    return section("configuration", "Configuration", parts)


def _predicted(found: dict[str, Any]) -> str | None:
    """Return the contents of ``prediction.json`` as text; None if there are none."""
    show = {
        "memory": lambda v: f"{format_count(v, 'B')} of memory a rank",
        "disk": lambda v: f"{format_count(v, 'B')} of disk",
        "images_per_sec": lambda v: f"{v:,.4g} images/s",
        "total_sec": lambda v: f"{format_time(v)} in all",
    }
    texts = [text(found[name]) for name, text in show.items() if is_finite(found.get(name))]
    return ", ".join(texts) or None


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        count = value.get("num_images")
        images = f", {count:,} images" if type(count) is int else ""
        return f"{show(value.get('name'))}{images}"
    return show(value)


def _changes(run: Run) -> Html:
    changes, preset = run.options.get("changes"), show(run.settings.get("preset", "unknown"))
    if not isinstance(changes, list):
        return tag("p", f"The files do not say how the run differs from preset {preset}.")
    changes = [change for change in changes if isinstance(change, dict)]
    if not changes:
        return tag("p", f"None: the run uses preset {preset} unchanged.")
    rows = [
        (
            show(change.get("setting")),
            show(change.get("option") or "set by the data or the machine"),
            show(change.get("preset")),
            tag("span", show(change.get("run")), class_="changed"),
        )
        for change in changes
    ]
    return table(
        ["Setting", "Option", f"Preset {preset}", "This run"],
        rows,
        label="Difference from the preset",
    )


def _environment(run: Run) -> Html:
    options, command = run.options, run.options.get("command")
    words = shlex.join(map(str, command)) if isinstance(command, list) else "unknown"
    rows = [("Command", tag("code", words)), ("Folder", tag("code", run.run_dir))]
    rows += [("Ranks", show(options.get("world_size"))), ("Device", show(options.get("device")))]
    rows += [(name, show(value)) for name, value in flat(options.get("packages")) if name]
    warm = read_object(run.run_dir / "warm-start.json")
    rows += [
        (f"Start: {name}", show(value)) for name, value in flat(warm) if not isinstance(value, list)
    ]
    return table([], rows, label="Command and environment")


def next_section(run: Run) -> Html:
    """Return the section with commands for the next steps, such as to resume, sample and score."""
    shown = [
        tag(
            "div",
            tag("div", tag("h3", title), _copy_button(title), class_="step-head"),
            tag("pre", tag("code", _folded(command)), tabindex=0, aria_label=f"Command: {title}"),
            class_="step",
        )
        for title, command in next_steps(run)
    ]
    return section("next", "What comes next", shown)


def _copy_button(title: str) -> Html:
    label = f"Copy the command: {title}"
    look = dict(type="button", class_="small copy", aria_label=label)
    return tag("button", "Copy", hidden=True, **look)


def _folded(command: str) -> str:
    """Return a shell command, continued over several lines if it is long."""
    if len(command) <= _LONG_COMMAND:
        return command
    return re.sub(r" (?=--[a-z])", " \\\\\n    ", command)


def next_steps(run: Run) -> Iterator[tuple[str, str]]:
    """Yield titles and commands: to continue the run, and whatever else its files allow."""
    folder, world_size = shlex.quote(str(run.run_dir)), run.options.get("world_size")
    several = type(world_size) is int and world_size > 1
    start = f"torchrun --standalone --nproc_per_node={world_size}" if several else "python"
    if run.is_complete:
        yield (
            "Train for longer",
            f"{start} train.py --resume={folder} --kimg={2 * run.total_kimg:g}",
        )
    else:
        yield "Resume", f"{start} train.py --resume={folder}"
    values = {"run": folder}
    if run.snapshots:
        values["network"] = shlex.quote(str(run.snapshots[-1]))
    steps = run.options.get("next_steps")
    if not isinstance(steps, dict):
        network = "python generate.py --network={network} --outdir={run}/samples --seeds=0-63"
        steps = {"Generate 64 images": network}
    for title, command in steps.items():
        names = set(re.findall(r"\{(network|run)\}", str(command)))
        if names <= values.keys():
            yield title, re.sub(r"\{(network|run)\}", lambda m: values[m[1]], str(command))
    stds = run.settings.get("training.ema_stds")
    if isinstance(stds, list) and stds and run.snapshots:
        command = f"python -m training.posthoc_ema {folder} --std=0.05,0.10,0.15"
        yield "Make averages of other lengths", f"{command} --outdir={folder}/averages"
    if run.reference is not None:
        picture = f"--out={folder}/check.png"
        yield "See it inside the bands of other seeds", f"python fid.py check {folder} {picture}"
    yield (
        "Compare it with another run",
        f"python fid.py report {folder} OTHER_RUN --out=comparison.html",
    )


def files_section(run: Run) -> Html:
    """Return the section with the snapshots and training states of a run."""
    rows = [
        (path.name, kind, _size(path))
        for kind, own in (("snapshot", run.snapshots), ("training state", run.states))
        for path in reversed(own)
    ]
    if not rows:
        return section("files", "Files", tag("p", "No snapshot and no training state yet."))
    found = table(["File", "Kind", "Size"], rows, label="Snapshots and training states")
    return section(
        "files",
        "Files",
        details(f"{len(run.snapshots)} snapshots, {len(run.states)} training states", found),
    )


def _size(path: Path) -> str:
    found = file_sizes(path)  # A state can be a folder of parts.
    return format_count(sum(found.values()), "B") if found else "gone"
