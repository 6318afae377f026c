"""Scripts run in this process, toy images, and one tiny trained snapshot for command-line tests."""

import contextlib
import functools
import io
import json
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import tqdm
from image_files import convert
from PIL import Image
from sharing import place_copy
from warm_start import ROOT, WarmProcess, WarmRanks, quiet_environment

import dnnlib.program

torch.set_num_threads(1)  # Test processes run side by side, and the networks are tiny.

CLASS_NAMES = ["bar", "dot", "ring"]

# The CIFAR-10 preset made small enough for one optimizer step to take milliseconds.
TINY = [
    "--preset=cifar10",
    "--resolution=8",
    "--num-stages=2",
    "--num-blocks=1",
    "--base-dim=16",
    "--hidden-dim=16",
    "--num-heads=2",
    "--time-dim=32",
    "--dropout=0",
    "--augment=0",
    "--batch=8",
    "--iters=2",
    "--lr=0.01",
    "--lr-rampup=0",
    "--workers=0",
    "--steps=2",
]


# The same of latent models, on 4x4 latents of 8x8 images.
TINY_LATENT = [
    "--preset=digits-latent",
    "--num-blocks=1",
    "--hidden-dim=16",
    "--num-heads=2",
    "--base-dim=4",
    "--batch=8",
    "--iters=2",
    "--lr=0.01",
    "--lr-rampup=0",
    "--workers=0",
    "--steps=2",
]


# The same of feature-conditioned models, on the photographs of feature_files.py.
TINY_FEATURES = [
    "--preset=nanodit-tiny",
    "--text-lengths=8,32",
    "--hidden-dim=16",
    "--num-blocks=1",
    "--num-heads=2",
    "--batch=4",
    "--iters=2",
    "--lr=0.01",
    "--lr-rampup=0",
    "--workers=0",
    "--steps=2",
]

# The same of set-conditioned models: sets of three of the bars and dots; rings are unseen.
TINY_SETS = [
    "--preset=fsdm-digits",
    "--train-classes=bar,dot",
    "--test-classes=ring",
    "--held-out=4",
    "--class-transforms=none",
    "--hybrids=0",
    "--context-drop=0",
    "--sample-size=3",
    "--patch-size=2",
    "--encoder-depth=1",
    "--num-blocks=1",
    "--hidden-dim=16",
    "--num-heads=2",
    "--encoder-heads=2",
    "--encoder-dim-head=4",
    "--batch=4",
    "--iters=2",
    "--lr=0.01",
    "--lr-rampup=0",
    "--workers=0",
    "--steps=2",
]


def call(script, *args):
    """Run a script's ``main`` as ``python script.py ARGS`` would; return code, output, error."""
    out, err = io.StringIO(), io.StringIO()
    argv = [script.__file__, *map(str, args)]
    code = None
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("torch.cuda.is_available", return_value=False),
    ):
        try:
            dnnlib.program.run(script.main)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, output=out.getvalue(), error=err.getvalue())


def succeed(script, *args):
    """Like :func:`call`, for arguments that must work."""
    result = call(script, *args)
    assert result.code == 0, result.output + result.error
    return result


def fail(script, *args):
    """Run a script that must refuse its arguments; return its message on one line."""
    result = call(script, *args)
    assert result.code in (1, 2), result.output + result.error
    assert "Traceback" not in result.error
    return " ".join(result.error.split())


def forget_frames(caught):
    """Free the loader whose worker failed; garbage collection takes 5 seconds to end a worker."""
    traceback.clear_frames(caught.tb)


def positions_of_bars(monkeypatch):
    """Return a list to which every update of a progress bar adds the bar's position."""
    positions, update = [], tqdm.tqdm.update

    def note(bar, *args):
        update(bar, *args)
        positions.append(bar.n)

    monkeypatch.setattr(tqdm.tqdm, "update", note)
    return positions


def train_tiny(outdir, data, *args, tiny=TINY):
    """Train in this process; return the run folder as ``run_dir`` beside code and output."""
    import train

    before = set(outdir.iterdir()) if outdir.is_dir() else set()
    result = succeed(train, f"--outdir={outdir}", f"--data={data}", *tiny, *args)
    (result.run_dir,) = set(outdir.iterdir()) - before
    return result


def dry_run(*args):
    """Return the configuration and the description that ``train.py --dry-run`` prints.

    Memory and disk are left out: to foresee them takes seconds for a large model.
    """
    import train

    with mock.patch("training.resources.memory.forecast", return_value={}):
        output = succeed(train, *args, "--dry-run").output
    end = output.index("\n}\n") + 2
    return json.loads(output[:end]), output[end:]


def run_warm(script, *args, ranks=None):
    """Run a script in a process of its own, or in several; return what subprocess.run does."""
    start = WarmProcess if ranks is None else functools.partial(WarmRanks, ranks)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("output", "error")]
        process = start([ROOT / script, *args], quiet_environment(), *files)
        try:
            code = process.wait(240)
        finally:
            process.send_signal(signal.SIGKILL)
        texts = [file.read_text(errors="replace") for file in files]
    return subprocess.CompletedProcess([str(script), *args], code, *texts)


def execute_warm(title, script, *args):
    """Do what ``demos.steps.execute`` does in a process that starts at once."""
    from demos.steps import heading

    heading(title)
    done = run_warm(script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_ranks(num_ranks, script, *args):
    """Run a script on several ranks, as under torchrun; return what it printed."""
    done = run_warm(script, *args, ranks=num_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_on(num_ranks, *args):
    """Train in this process, or on several ranks; return what was printed."""
    import train

    return on_ranks(num_ranks, "train.py", *args) if num_ranks > 1 else succeed(train, *args).output


def toy_images(folder, per_class=14, size=8):
    """Write RGB images of three classes, one folder a class: a bar, a dot, a ring."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    shapes = dict(bar=abs(x) < 1.5, dot=x**2 + y**2 < 6, ring=abs(np.hypot(x, y) - 3) < 0.8)
    for name in CLASS_NAMES:
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            colour = rng.integers(120, 256, 3)
            pixels = np.where(shapes[name][..., None], colour, rng.integers(0, 60))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02d}.png")
    return folder


def toy_data(base, size=8):
    """Return a labelled zip of 42 RGB images in three classes, made once per folder and size."""
    name = "toy" if size == 8 else f"toy{size}"
    path = base / f"{name}.zip"
    if not path.is_file():
        code, output = convert(toy_images(base / name, size=size), path)
        assert code == 0, output
    return path


def trained_run(base):
    """Return the folder of a short class-conditional run with label dropout, made once per folder.

    It has a snapshot of its first step and one of its end.
    """
    runs = base / "trained"
    if not runs.is_dir():
        place_copy(base, "trained-image", _train_image)
    (run_dir,) = runs.iterdir()
    return run_dir


def _train_image(folder):
    options = "--cond --label-drop=0.2 --iters=70 --batch=32 --tick=100 --ema-kimg=0.2"
    train_tiny(folder / "trained", toy_data(folder), *options.split(), "--steps=4")


def trained_snapshot(base):
    """Return the last snapshot of :func:`trained_run`."""
    return max(trained_run(base).glob("network-snapshot-*.pkl"))


def first_snapshot(base):
    """Return the first snapshot of :func:`trained_run`: a worse network."""
    return min(trained_run(base).glob("network-snapshot-*.pkl"))


def unconditional_snapshot(base):
    """Return a snapshot of an unconditional network, made once per folder."""
    runs = base / "unconditional"
    if not runs.is_dir():
        train_tiny(runs, toy_data(base), "--iters=1")
    return next(runs.glob("*/network-snapshot-*.pkl"))


def set_snapshot(base):
    """Return a snapshot of a model of sets that has learned for a moment, made once per folder."""
    runs = base / "sets"
    if not runs.is_dir():
        place_copy(base, "trained-sets", _train_sets)
    return max(runs.glob("*/network-snapshot-*.pkl"))


def _train_sets(folder):
    options = "--context-drop=0.2 --iters=60 --batch=8 --tick=100 --ema-kimg=0.2 --steps=4"
    train_tiny(folder / "sets", toy_data(folder), *options.split(), tiny=TINY_SETS)


def read_pixels(path):
    """Return a picture's pixels as int16, so that differences do not wrap."""
    return np.asarray(Image.open(path)).astype(np.int16)


def random_inception(base):
    """Return a file in the layout of the published Inception weights, with random ones."""
    from metrics.inception import Inception

    path = base / "inception.pth"
    if not path.is_file():
        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            layout = Inception().state_dict()
        state = {}
        for name, value in layout.items():
            if name.endswith(".weight") and value.ndim == 4:
                scale = (2 / value[0].numel()) ** 0.5  # Keeps activations alive.
                state[name] = scale * torch.randn(value.shape, generator=generator)
            elif name.endswith(("bn.weight", "running_var")):
                state[name] = 0.5 + torch.rand(value.shape, generator=generator)
            else:
                state[name] = 0.1 * torch.randn(value.shape, generator=generator)
        # The published file has PyTorch's older format.
        torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def random_lpips(base, net="alex"):
    """Return the files of a random LPIPS: backbone and linear weights, laid out as published."""
    from metrics.lpips import LpipsNetwork

    paths = base / f"lpips-{net}-backbone.pth", base / f"lpips-{net}.pth"
    if not paths[1].is_file():
        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            layout = LpipsNetwork(net).state_dict()
        state = {}
        for name, value in layout.items():
            if name.startswith("lin"):
                state[name] = torch.rand(value.shape, generator=generator)
            elif value.ndim == 4:
                scale = (2 / value[0].numel()) ** 0.5  # Keeps activations alive.
                state[name] = scale * torch.randn(value.shape, generator=generator)
            else:
                state[name] = 0.1 * torch.randn(value.shape, generator=generator)
        backbone = {name: value for name, value in state.items() if name.startswith("features.")}
        backbone["classifier.6.weight"] = torch.zeros(10, 2)
        torch.save(backbone, paths[0])
        torch.save({name: state[name] for name in state if name.startswith("lin")}, paths[1])
    return tuple(map(str, paths))


def tiny_dinov2(folder):
    """Write a DINOv2 of two random blocks, made for 70x70 with patches of 14: a grid of 5x5."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    network = transformers.Dinov2Model(config)
    with torch.no_grad():
        network.embeddings.position_embeddings.normal_()
    network.save_pretrained(folder)
    return folder


def tiny_clip(folder):
    """Write the image half of a CLIP of two random blocks, made for 42x42 with patches of 14."""
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
        projection_dim=10,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder
