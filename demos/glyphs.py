"""Demonstration of set-conditioned DiT: letters of scripts that it was never trained on."""

import collections
import dataclasses
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.convert.glyphs import HELD_OUT_SCRIPTS, script_words
from data.fewshot.episodes import Episodes
from data.images.dataset import ImageDataset, open_images
from demos.letters import Judge, measure_copying, train_judge
from demos.steps import convert, generate, heading, train_model
from families.sets import episodes_of_snapshot, open_data_of
from torch_utils.pictures import Titles, image_grid, read_image, save_image
from training.checkpoint import load_snapshot

GUIDANCE = 3.0
# Without encoder blocks, the context tokens keep what they show, even for unseen scripts. A single
# vector needs a block, to hold where in the image its parts are.
MODES = {"film": (), "lag": ("--encoder-depth=0", "--pretrain-encoder=0")}
NUM_EACH = 8  # Images from each support.
NUM_SHOWN = 12
MIN_SHARES = {"film": 0.30, "lag": 0.70}
MAX_CONTROL, MIN_RATIO = 0.02, 0.80


def demo_glyphs(outdir: Path, train_args: tuple[str, ...]) -> bool:
    """Train on letters of most scripts, generate those of others; return whether checks pass."""
    size = ("--resolution=16",)
    data = convert(outdir, "glyphs", *size)
    others = open_images(convert(outdir, "glyphs", *size, "--split=test", name="glyphs-test"))
    images = open_images(data)
    unseen = images.class_splits["test"]
    heading(f"Train a judge of {len(unseen)} letters in faces that are in no support")
    judge = train_judge(others, unseen)
    real = np.flatnonzero(np.isin(images.labels, unseen))
    found = judge.classify(images.__getitems__(real.tolist())[0])
    accuracy = (found == images.labels[real]).mean()
    made, passed, report = {}, True, []
    for mode, options in MODES.items():
        preset = ("--preset=fsdm-glyphs", f"--mode-conditioning={mode}", *options)
        _, network = train_model(outdir, f"--data={data}", *preset, *train_args)
        made[mode] = _make_images(outdir, data, network)
        lines, is_good = judge_images(mode, made[mode], judge, images, others)
        report += lines
        passed &= is_good
    picture = outdir / "glyphs.png"
    save_image(_picture(made, images, others), picture)
    heading("Result")
    click.echo(
        f"Share of images that a judge takes for the letter of the support, of {len(unseen)} "
        f"letters; it was trained on other faces, and knows {accuracy:.1%} of the real ones. "
        "Control: the same seeds with supports of the other letters, and with none.\n"
        + "\n".join(report)
        + f"\nPicture: {picture} (supports, what was made of them, and real letters in other faces)"
    )
    return passed


@dataclasses.dataclass(frozen=True)
class MadeImages:
    """Images generated from one support of each unseen letter, and without a support."""

    episodes: Episodes
    samples: Tensor  # uint8 [S, m, 1, H, W], m images from each of S supports.
    free: Tensor  # uint8 [m, 1, H, W], with the same seeds and no support.


def _make_images(outdir: Path, data: Path, network: Path) -> MadeImages:
    """Generate images from one support of each unseen letter, and some without a support."""
    snapshot = load_snapshot(network)
    num = len(open_data_of(snapshot, str(data)).split.test)
    episodes = episodes_of_snapshot(snapshot, "unseen", num, data=str(data))
    folder = outdir / network.parent.name
    common = (f"--data={data}", "--split=unseen", f"--num={NUM_EACH}")
    title = f"Make {NUM_EACH} images from a support of each of {num} unseen letters"
    args = (f"--episodes={num}", f"--cfg-scale={GUIDANCE}", "--batch=500")
    generate(title, network, folder, *common, *args)
    free = Path(f"{folder}-free")
    generate("Make some without a support", network, free, *common, "--episodes=1", "--cfg-scale=0")
    samples = torch.stack([_read(folder / f"{episode:04d}") for episode in range(num)])
    return MadeImages(episodes, samples, _read(free / "0000"))


def _read(folder: Path) -> Tensor:
    return torch.stack([read_image(folder / f"{seed:06d}.png") for seed in range(NUM_EACH)])


def judge_images(
    mode: str, made: MadeImages, judge: Judge, images: ImageDataset, others: ImageDataset
) -> tuple[list[str], bool]:
    """Return report lines on classes and copying, and whether both are as expected."""
    classes = made.episodes.classes
    found = judge.classify(made.samples.flatten(0, 1)).reshape(made.samples.shape[:2])
    free = judge.classify(made.free)
    # For each script, the hits and then the numbers of images, made from the letter's own support,
    # from other supports, and without one.
    counts: collections.defaultdict[str, np.ndarray] = collections.defaultdict(
        lambda: np.zeros(6, np.int64)
    )
    for own, letter in zip(found, classes, strict=True):
        rest = found[classes != letter]
        hits = [np.sum(part == letter) for part in (own, rest, free)]
        sizes = [own.size, rest.size, free.size]
        counts[_script(images.class_names[letter])] += np.array(hits + sizes)
    lines = []
    for script, row in {**counts, "all": sum(counts.values())}.items():
        share, control, without = row[:3] / row[3:]
        lines.append(
            f"{mode}: {script} {share:.1%} of {row[3]}, control {control:.2%} with other supports, "
            f"{without:.2%} without one"
        )
    expected = MIN_SHARES[mode]
    lines[-1] += f" (at least {expected:.0%} and at most {MAX_CONTROL:.0%} expected)"
    copying = measure_copying(made.samples, made.episodes, images, others)
    lines.append(f"{mode}: {copying.describe()} (a ratio of at least {MIN_RATIO} expected)")
    is_good = share >= expected and control <= MAX_CONTROL and copying.ratio >= MIN_RATIO
    return lines, bool(is_good)


def _script(letter: str) -> str:
    (script,) = script_words(letter) & set(HELD_OUT_SCRIPTS["test"])
    return script.capitalize()


def _picture(
    made: dict[str, MadeImages], images: ImageDataset, others: ImageDataset
) -> Image.Image:
    """Return a grid with one letter per row: its support, samples, and real ones in other faces."""
    first = next(iter(made.values()))
    num = len(first.samples)
    rows = np.linspace(0, num - 1, min(NUM_SHOWN, num)).round().astype(int)
    size, shown, num_real = first.episodes.supports.shape[1], NUM_EACH // 2, 2
    tiles = []
    for row in rows:
        letter = first.episodes.classes[row]
        real = np.flatnonzero(others.labels == letter)[::2][:num_real]
        tiles += [first.episodes.supports[row]]
        tiles += [it.samples[row, :shown] for it in made.values()]
        tiles += [others.__getitems__(real.tolist())[0]]
    blank = torch.zeros_like(first.episodes.supports[0])
    tiles += [blank, *(it.free[:shown] for it in made.values()), blank[:num_real]]
    columns = ["support", *[""] * (size - 1)]
    for mode in made:
        columns += [mode, *[""] * (shown - 1)]
    columns += ["real", *[""] * (num_real - 1)]
    names = [images.class_names[first.episodes.classes[row]] for row in rows]
    titles = Titles(columns=columns, rows=[*names, "no support"])
    return image_grid(torch.cat(tiles), len(columns), titles)
