"""The model card of an exported snapshot: architecture, training data, scores and usage."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnnlib.config import to_dict
from dnnlib.errors import refusal
from dnnlib.files import atomic_write
from dnnlib.text import format_kimg
from metrics.rows import read_rows
from torch_utils.misc import count_parameters
from torch_utils.pictures import is_our_image
from training.checkpoint import Snapshot, pictures_path
from training.family import of as family_of
from training.portable import CONFIG, WEIGHTS, find_snapshot, open_header, save_portable

_PICTURE = "samples.png"
_TAGS = ("setdiffit", "diffusion", "diffusion-transformer")
_PROTOCOL = ("nfe", "seeds", "labels", "precision", "detector", "preprocessing")


def scores_of(snapshot: Snapshot, folder: Path) -> list[dict[str, Any]]:
    """Return the last score row of each metric in a run folder that scores a snapshot's weights.

    Files that cannot be read as score rows are skipped.
    """
    found = {}
    for path in sorted(folder.glob("metric-*.jsonl")):
        try:
            rows = read_rows(path)
        except ValueError:
            continue
        own = [row for row in rows if row.get("snapshot_hash") == snapshot.sha256]
        found.update({str(row["metric"]): row for row in own})
    return list(found.values())


def check_export_folder(folder: Path, source: str, overwrite: bool) -> None:
    """Raise ValueError if an export would replace foreign files, or the files it is made from.

    Args:
        folder: Where the export is to be written.
        source: The snapshot or export that it is made from, as ``--network`` names it.
        overwrite: Whether foreign files may be replaced.
    """
    there = [name for name in (WEIGHTS, CONFIG, "README.md", _PICTURE) if (folder / name).exists()]
    if not there:
        return
    weights = find_snapshot(source)
    if folder.samefile(weights if weights.is_dir() else weights.parent):
        but = f"{folder} is the folder of --network"
        raise refusal("--dest", but=but, remedy="choose another name")
    if not (overwrite or _is_export(folder, there)):
        but = f"{folder} holds {there[0]} and is not an export of this command"
        raise refusal("--dest", but=but, remedy="choose another name, or give --overwrite")


def _is_export(folder: Path, there: Sequence[str]) -> bool:
    """Return whether files are those of an export.

    An interrupted export counts too: it has the picture, or the picture and the card.
    """
    if (folder / CONFIG).exists():
        try:
            return bool(open_header(folder))
        except ValueError:
            return False
    if (folder / "README.md").is_file():
        return b'\nlibrary_name: "setdiffit"' in (folder / "README.md").read_bytes()[:200]
    return there == [_PICTURE] and is_our_image(folder / _PICTURE)


def write_export(snapshot: Snapshot, folder: Path, *, location: str) -> None:
    """Write a snapshot's weights, configuration and model card into a folder.

    Scores and a picture of samples are taken from the snapshot's folder, if it has them.
    ``location`` is the name by which users will load the export.
    """
    rows = scores_of(snapshot, snapshot.path.parent)
    picture = None
    if "cur_nimg" in snapshot.progress:
        made = pictures_path(snapshot.path.parent, snapshot.progress["cur_nimg"])
        picture = made if made.is_file() else None
    text = model_card(snapshot, rows, location=location, picture=picture and _PICTURE)
    if picture is not None:
        with atomic_write(folder / _PICTURE) as file:
            file.write(picture.read_bytes())
    with atomic_write(folder / "README.md") as file:
        file.write(text.encode("utf-8", "replace"))  # File names may contain lone surrogates.
    save_portable(snapshot, folder)


def model_card(
    snapshot: Snapshot,
    rows: Sequence[Mapping[str, Any]],
    *,
    location: str,
    picture: str | None = None,
) -> str:
    """Return a model card in Markdown, with the metadata that the Hugging Face hub reads.

    Args:
        snapshot: The snapshot to describe.
        rows: Score rows of its weights.
        location: The name by which users load it, such as ``hf://ORG/NAME``; the last part is the
            model's name.
        picture: Name of a picture of samples beside the card; None without one.
    """
    config, data = snapshot.config, snapshot.data
    name = Path(location).name
    network = snapshot.build()
    shape = "x".join(map(str, config.model.input_shape))
    facts = {
        "Architecture": f"{config.model.family}, preset `{config.preset}`",
        "Parameters": f"{count_parameters(network):,}",
        "Denoises": f"{shape} (channels, height, width)",
        "Training data": f"{data.name}, {data.num_images:,} images of {data.resolution} pixels",
        "Identity of the data": f"`{data.content_hash[:16]}`",
        "Weights": f"`{snapshot.sha256[:16]}` (SHA-256 of names, shapes and values)",
        **family_of(config).describe(config),
    }
    if data.class_names:
        facts["Classes"] = _listed(data.class_names)
    if "cur_nimg" in snapshot.progress:
        facts["Trained for"] = f"{format_kimg(snapshot.progress['cur_nimg'] / 1000)} kimg"
    parts = [_metadata(name, data.name, rows), f"# {_plain(name)}"]
    if picture is not None:
        parts.append(f"![Samples]({picture})")
    parts += [_table(("", ""), [(_plain(k), _plain(v)) for k, v in facts.items()])]
    parts.append("## Scores")
    if rows:
        values = [
            (_plain(name), f"{value:.4g}", _num_images(row))
            for row in rows
            for name, value in _values(row).items()
        ]
        parts.append(_table(("metric", "value", "images"), values))
        parts.append("How they were computed. Compare them only with scores for which this agrees:")
        parts += _protocols(rows)
    else:
        parts.append("No scores of these weights are known.")
    parts += ["## Use", _USE.format(location=location)]
    settings = json.dumps(to_dict(config), indent=2)
    parts += ["## Configuration", f"```json\n{settings}\n```"]
    return "\n\n".join(parts) + "\n"


_USE = """```python
import setdiffit

model = setdiffit.load("{location}")
print(model)
images = model.generate(seeds=range(4))
```

or `python generate.py --network={location} --outdir=out --seeds=0-63 --grid=out.png`"""


def _metadata(name: str, data: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the card's YAML header. Values are JSON, which is YAML that no text can break."""
    results = [
        dict(
            task=dict(type="unconditional-image-generation", name="Image generation"),
            dataset=dict(type="image-folder", name=data),
            metrics=[dict(type=key, name=key, value=value) for key, value in _values(row).items()],
        )
        for row in rows
    ]
    header: dict[str, Any] = dict(library_name="setdiffit", tags=list(_TAGS))
    if results:
        header["model-index"] = [dict(name=name, results=results)]
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]
    return "\n".join(["---", *lines, "---"])


def _num_images(row: Mapping[str, Any]) -> str:
    num = row.get("num_images", row.get("num"))  # As scores and as validation metrics state it.
    return "" if num is None else f"{num:,}"


def _protocols(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of each protocol, below the names of the metrics that it applies to."""
    metrics: dict[str, list[str]] = {}
    for row in rows:
        own = {key: row[key] for key in _PROTOCOL if key in row}
        for section in ("sampling", "guidance"):
            own.update(row.get(section) or {})
        lines = [(_plain(key), _plain(value)) for key, value in own.items()]
        text = _table(("", ""), lines) if lines else "Their rows do not state a protocol."
        metrics.setdefault(text, []).append(_plain(str(row["metric"])))
    return [part for text, names in metrics.items() for part in (f"{', '.join(names)}:", text)]


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric values of a score row by name."""
    found = row.get("values") or {str(row["metric"]): row.get("value")}
    return {str(name): value for name, value in found.items() if isinstance(value, int | float)}


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    """Return a value as one line of text, escaped so that it is no HTML and stays in its cell."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("![", "!\\[")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"{len(names)}: {shown}" + (", ..." if len(names) > 20 else "")
