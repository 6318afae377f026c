"""Makes the files in ``golden``: what the code of one commit does, for later code to agree with.

Run it on the commit whose behaviour is to be kept, and on no other: it is evidence, and made anew
from code that changed something it would testify to nothing. ``tests/test_golden.py`` compares the
code that is there with it.

    PYTHONPATH=.:tests python tests/data/make_golden.py

Of every kind of model there is a tiny run, stopped after 20 optimizer steps. In ``golden`` are

    files.tar.xz        what commands read, packed because it is mostly padding:
      images.zip          18 labelled images of 8x8, for models of images, of latents and of sets
      latents, vae        their latents, and the autoencoder that made and decodes them
      features            shards of 6 captioned images of two sizes, made with vae, visual and text
      visual, text        encoders of reference images and of prompts
      runs/KIND           training_options.json, the snapshots and the training state of a run
    samples/NAME        images generated from the snapshots
    golden.json         samples: how images were generated, and the SHA-256 of their pixels;
                        resumed: loss and gradient norm of the four steps that follow a state
    options.json        options of every preset, script and sub-command: names and defaults

All commands run in ``golden`` with relative paths, and the absolute ones that they store are made
relative, so that no file names this machine.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from feature_files import tiny_text, tiny_visual
from golden_files import (
    GOLDEN,
    offered_commands,
    offered_options,
    pixels_hash,
    read_losses,
)
from helpers import ROOT, TINY, TINY_FEATURES, TINY_LATENT, TINY_SETS, quiet_environment, toy_images
from PIL import Image

from configs.presets import PRESETS

SCRIPTS = (
    *("train", "generate", "fid", "dataset_tool", "import_weights", "benchmark", "demo"),
    "training.posthoc_ema",
)
# What is random in a step is on, and every kind has something to be guided away from. Of an option
# that is there twice, the last counts. Every step is a tick, with a row of statistics.
COMMON = ("--iters=20", "--tick=0", "--snap=20", "--dump=20", "--sample-batch=4", "--hidden-dim=8")
RUNS = {
    "image": (
        *(*TINY, *COMMON, "--data=images.zip", "--cond", "--label-drop=0.2", "--hflip"),
        *("--num-stages=1", "--base-dim=8", "--time-dim=8", "--mlp-ratio=1"),
        *("--augment=0.3", "--dropout=0.1", "--ema-stds=0.05", "--batch-gpu=4", "--lr=0.002"),
    ),
    "latent": (
        *(*TINY_LATENT, *COMMON, "--data=latents", "--label-drop=0.2", "--mlp-ratio=1"),
        *("--weight-decay=0.1", "--clip-grad=1"),
    ),
    "sets": (
        *(*TINY_SETS, *COMMON, "--data=images.zip", "--mode-conditioning=lag", "--gate=none"),
        *("--context-drop=0.2", "--held-out=2", "--hybrids=0.3", "--class-transforms=rotations"),
        *("--skip-transforms=dot:2", "--patch-size=4", "--mlp-ratio=1"),
    ),
    "features": (*TINY_FEATURES, *COMMON, "--data=features", "--mlp-ratio=1"),
}


def _id_of(file):
    """Return the name that features have of the image with this file name."""
    return hashlib.sha256(file.encode()).hexdigest()[:16]


RESUMED = ("--iters=24",)
SNAPSHOT = "network-snapshot-000000.pkl"
PROFILE = "network-snapshot-0000000-0.050.pkl"
GUIDED = ("--cfg-scale=4", "--steps=4")
SAMPLES = {
    "image": (
        *(f"--network=runs/image/{SNAPSHOT}", "--seeds=0-3", *GUIDED),
        *("--class=0-2", "--sampler=dpmpp_2m"),
    ),
    "image-profile": (
        *(f"--network=runs/image/{PROFILE}", "--seeds=5,6", "--class=ring", "--sampler=heun"),
        *("--steps=6", "--s-churn=4", "--sigma-min=0.02"),
    ),
    "latent": (f"--network=runs/latent/{SNAPSHOT}", "--seeds=0-3", *GUIDED, "--class=0-2"),
    "sets": (f"--network=runs/sets/{SNAPSHOT}", "--seeds=0,1", *GUIDED, "--episodes=2"),
    "sets-support": (
        *(f"--network=runs/sets/{SNAPSHOT}", "--seeds=0,1", *GUIDED),
        *("--support=samples/image/000000.png", "--support=samples/image/000001.png"),
    ),
    "features-text": (f"--network=runs/features/{SNAPSHOT}", "--seeds=0,1", "--prompt=red flower"),
    "features-stored": (
        *(f"--network=runs/features/{SNAPSHOT}", "--seeds=0"),
        *("--features=features", f"--id={_id_of('0.png')},{_id_of('4.png')}"),
    ),
    "features-both": (
        *(f"--network=runs/features/{SNAPSHOT}", "--seeds=7", "--guidance-form=joint"),
        *("--prompt=the old temple", "--reference=samples/features-text/000000.png"),
    ),
}


def execute(script, *args):
    """Run a script of this project in ``golden``, whose output is shown only if it fails."""
    command = [sys.executable, os.path.relpath(ROOT / script, GOLDEN), *args]
    done = subprocess.run(command, cwd=GOLDEN, env=quiet_environment(), capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout.decode()}{done.stderr.decode()}")


def make_autoencoder(folder):
    """Write an autoencoder of RGB images that halves their sides, as small as one can be."""
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).save_pretrained(folder)


def forget_place(value):
    """Return plain containers, or text, in which paths in ``golden`` are relative to it."""
    if isinstance(value, str):
        return value.replace(f"{GOLDEN}/", "")
    if isinstance(value, list | tuple):
        return type(value)(map(forget_place, value))
    if isinstance(value, dict):
        return type(value)((key, forget_place(child)) for key, child in value.items())
    return value


def forget_place_in_files(folder):
    """Rewrite the JSON, snapshots and states in a folder with relative paths."""
    for path in folder.rglob("*.json"):
        path.write_text(forget_place(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in (*folder.rglob("*.pkl"), *folder.rglob("*.pt")):
        payload = torch.load(path, weights_only=True)
        with open(path, "wb") as file:
            torch.save(forget_place(payload), file)


def make_data(scratch):
    """Write images, their latents and features, and the encoders of these."""
    toy_images(scratch / "images", per_class=6)
    execute("dataset_tool.py", "convert", "--source=scratch/images", "--dest=images.zip")
    make_autoencoder(GOLDEN / "vae")
    tiny_visual(GOLDEN / "visual", patch_size=8, num_registers=1, dim=16)
    tiny_text(GOLDEN / "text", dim=8)
    execute("dataset_tool.py", "encode", "--source=images.zip", "--dest=latents", "--vae=vae")
    pictures = scratch / "pictures"
    pictures.mkdir()
    captions = ("a red flower", "the old temple in the sky", "wide sky")
    for number, size in enumerate([(32, 32)] * 4 + [(48, 16)] * 2):
        file = sorted((scratch / "images").glob("*/*.png"))[2 * number]
        with Image.open(file) as image:
            image.resize(size, Image.Resampling.BICUBIC).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(captions[number % 3])
    execute(
        *("dataset_tool.py", "features", "--source=scratch/pictures", "--dest=features"),
        *("--vae=vae", "--visual=visual", "--text=text", "--buckets=32x32,48x16"),
    )
    for name in ("latents", "features"):
        forget_place_in_files(GOLDEN / name)


def make_runs(scratch):
    """Train every kind of model for 20 steps, and keep what resuming and sampling need."""
    for kind, options in RUNS.items():
        execute("train.py", f"--outdir=scratch/{kind}", *options)
        (run_dir,) = (scratch / kind).iterdir()
        kept = GOLDEN / "runs" / kind
        kept.mkdir(parents=True)
        names = ("training_options.json", "network-snapshot-*.pkl", "training-state-*.pt")
        for path in (path for name in names for path in run_dir.glob(name)):
            shutil.copy(path, kept)
        forget_place_in_files(kept)


def make_resumed(scratch):
    """Return command and losses of the steps that follow each state, of runs that are copies."""
    resumed = {}
    for kind in RUNS:
        run_dir = shutil.copytree(GOLDEN / "runs" / kind, scratch / "resumed" / kind)
        execute("train.py", f"--resume=scratch/resumed/{kind}", *RESUMED)
        resumed[kind] = dict(args=RESUMED, losses=read_losses(run_dir))
    return resumed


def make_samples():
    """Return commands and hashes of the images that are generated into ``samples``."""
    samples = {}
    for name, options in SAMPLES.items():
        outdir = GOLDEN / "samples" / name
        execute("generate.py", *options, f"--outdir=samples/{name}")
        (outdir / "generation.json").unlink()
        images = sorted(outdir.rglob("*.png"))
        hashes = {path.relative_to(outdir).as_posix(): pixels_hash(path) for path in images}
        samples[name] = dict(args=options, pixels=hashes)
    return samples


def make_options():
    """Return the options of every command line that offers its own."""
    lines = [line for script in SCRIPTS for line in offered_commands(script)]
    lines += [f"train --preset={name}" for name in PRESETS]
    for kind in RUNS:
        network = f"--network=runs/{kind}/{SNAPSHOT}"
        lines += [f"train --resume=runs/{kind}", f"generate {network}", f"fid calc {network}"]
    lines += [f"fid fewshot --network=runs/sets/{SNAPSHOT}"]
    lines += [f"fid validate --network=runs/features/{SNAPSHOT}"]
    return {line: offered_options(line) for line in lines}


def pack_files():
    """Put what commands read into one archive, without owners, times and leftovers."""

    def anonymous(info):
        info.mtime, info.mode = 0, 0o755 if info.isdir() else 0o644
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return None if Path(info.name).name.startswith(".") else info

    with tarfile.open(GOLDEN / "files.tar.xz", "w:xz", preset=9) as archive:
        for name in ("features", "images.zip", "latents", "runs", "text", "vae", "visual"):
            path = GOLDEN / name
            archive.add(path, name, filter=anonymous)
            files = path.rglob("*.*") if path.is_dir() else [path]
            assert not any(str(ROOT).encode() in file.read_bytes() for file in files)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    scratch = GOLDEN / "scratch"
    scratch.mkdir(parents=True)
    os.chdir(GOLDEN)
    make_data(scratch)
    make_runs(scratch)
    golden = dict(samples=make_samples(), resumed=make_resumed(scratch))
    for name, values in (("golden.json", golden), ("options.json", make_options())):
        (GOLDEN / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(scratch)
    pack_files()


if __name__ == "__main__":
    main()
