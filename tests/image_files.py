"""Image files for tests, and dataset_tool.py run on them in this process."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

import dataset_tool


def run_tool(*args):
    """Run dataset_tool.py in this process; return (exit code, everything printed)."""
    from helpers import call  # Which makes its data with this module.

    result = call(dataset_tool, *args)
    return result.code, result.output + result.error


def convert(source, dest, *args):
    return run_tool("convert", f"--source={source}", f"--dest={dest}", "--workers=1", *args)


def read_target(path):
    """Return (names, images as arrays, parsed dataset.json) of a converted zip or folder."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*.png"))
        files = {name: (path / name).read_bytes() for name in [*names, "dataset.json"]}
    else:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                assert info.compress_type == zipfile.ZIP_STORED
                assert info.date_time == (1980, 1, 1, 0, 0, 0)
            files = {name: archive.read(name) for name in archive.namelist()}
        names = sorted(name for name in files if name.endswith(".png"))
    images = [np.asarray(Image.open(io.BytesIO(files[name]))) for name in names]
    return names, images, json.loads(files["dataset.json"])


def random_image(seed, width=8, height=8, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels, mode=mode) if channels in (1, 3, 4) else None


def make_folder(root, names, **kwargs):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(seed, **kwargs).save(root / name)
    return root


def make_zip(path, folder):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path
