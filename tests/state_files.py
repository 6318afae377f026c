"""For tests: training states as earlier versions wrote them, and ones that are made by hand."""

import json

import torch

from dnnlib.config import to_dict
from dnnlib.files import sha256_of_file
from dnnlib.saver import MANIFEST, manifest_checksum, remove_state
from training.checkpoint import load_state


def write_state_file(path, payload, config):
    """Write a training state as one file, as versions before folders did."""
    header = dict(format="setdiffit-training-state", version=2)
    torch.save(dict(header, **payload, config=to_dict(config)), path)


def as_file(folder):
    """Replace a state by the file of an earlier version with the same content; return its path."""
    path = folder.with_name(f"{folder.name}.pt")
    torch.save(dict(format="setdiffit-training-state", version=2, **load_state(folder)), path)
    remove_state(folder)
    return path


def edit_manifest(folder, change):
    """Change what the manifest of a state says, with a checksum that fits."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    path.write_text(json.dumps(dict(content, checksum=manifest_checksum(content))))


def empty_state(folder, text=None):
    """Make a state in which nothing is but a part that is empty and tells of a ``text``, if any."""
    folder.mkdir(parents=True)
    about = dict(format="setdiffit-training-state", version=2, config={}, tree={}, parts=[])
    if text is not None:
        header = json.dumps({"__metadata__": {"order": "{}", "text": text}}).encode()
        part = folder / "part-00000.safetensors"
        part.write_bytes(len(header).to_bytes(8, "little") + header)
        about["parts"] = [dict(name=part.name, sha256=sha256_of_file(part), first_rows={})]
        about["config"] = dict(text=text)
    about["tree"] = {"dict": [["net", {"dict": []}]]}
    (folder / MANIFEST).write_text(json.dumps(dict(about, checksum=manifest_checksum(about))))
