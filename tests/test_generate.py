"""generate.py: one image per seed, whatever the batch size, the ranks, or what is there already."""

import json
import os
import shutil

import helpers
import numpy as np
import PIL.Image
import pytest
import torch
from state_files import as_file

import generate
from sampling import images as generated
from sampling import outputs
from training.checkpoint import find_states, load_snapshot


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def network(base):
    return helpers.trained_snapshot(base)


def images(folder):
    """Return {file name: pixels} of all pictures below a folder."""
    paths = sorted(folder.rglob("*.png"))
    return {str(path.relative_to(folder)): helpers.read_pixels(path) for path in paths}


def make(network, outdir, *args):
    helpers.succeed(generate, f"--network={network}", f"--outdir={outdir}", *args)
    return images(outdir)


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(np.abs(first[name] - second[name]).max() for name in first)


def share_equal(first, second):
    return np.mean([np.mean(first[name] == second[name]) for name in first])


SAMPLERS = {
    "snapshot's own": "",
    "churn": "--s-churn=20",
    "ddpm": "--sampler=ddpm",
    "ddim": "--sampler=ddim --eta=0.7",
    "guided": "--cfg-scale=2",
}


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_an_image_does_not_depend_on_the_batch(options, network, tmp_path):
    args = ["--seeds=3-10", *options.split()]
    one = make(network, tmp_path / "1", *args, "--batch=1")
    assert len(one) == 8
    for batch in (3, 8):
        many = make(network, tmp_path / str(batch), *args, f"--batch={batch}")
        assert largest_difference(one, many) <= 1
        assert share_equal(one, many) > 0.99
    # The images are images, and not all alike.
    assert min(image.std() for image in one.values()) > 5
    assert len({image.tobytes() for image in one.values()}) == 8


def test_an_image_does_not_depend_on_the_other_seeds(network, tmp_path):
    together = make(network, tmp_path / "a", "--seeds=0-5")
    alone = make(network, tmp_path / "b", "--seeds=4,2")
    assert largest_difference({name: together[name] for name in alone}, alone) <= 1


def test_two_ranks_make_the_same_images_and_one_grid(network, tmp_path):
    args = [f"--network={network}", "--seeds=0-6", "--sampler=ddpm", "--batch=2"]
    output = helpers.on_ranks(
        2, "generate.py", *args, f"--outdir={tmp_path / 'two'}", f"--grid={tmp_path / 'grid.png'}"
    )
    assert output.count("7 images in") == 1
    two, one = images(tmp_path / "two"), make(network, tmp_path / "one", *args[1:])
    assert largest_difference(one, two) <= 1
    assert share_equal(one, two) > 0.99
    assert (tmp_path / "grid.png").is_file()


def test_progress_of_several_ranks_ends_at_the_number_of_images(tmp_path, monkeypatch):
    class Black:
        num_classes = 0

        def generate(self, seeds, labels):
            return [torch.zeros(1, 8, 8, dtype=torch.uint8) for _ in seeds]

    for module in (outputs, generated):
        monkeypatch.setattr(module, "share", lambda items: items[::3])  # Four of ten.
    shown = helpers.positions_of_bars(monkeypatch)
    list(generated.generate_for_rank(Black(), range(10), batch=3))
    wanted = [outputs.Place(tmp_path / f"{seed}.png", seed, None) for seed in range(10)]
    outputs.make_images(Black(), wanted, batch=3)
    assert shown == 2 * [8, 10, 10]


def test_images_that_exist_are_kept_and_missing_ones_are_made(network, tmp_path):
    outdir = tmp_path / "out"
    first = make(network, outdir, "--seeds=0-3")
    for name in first:
        os.utime(outdir / name, ns=(10**18, 10**18))
    (outdir / "000002.png").unlink()
    result = helpers.succeed(
        generate, f"--network={network}", f"--outdir={outdir}", "--seeds=0-4", "--batch=3"
    )
    assert "3 of 5 images exist already" in result.output
    times = {path.name: path.stat().st_mtime_ns for path in outdir.glob("*.png")}
    assert [name for name in sorted(times) if times[name] != 10**18] == ["000002.png", "000004.png"]
    again = images(outdir)
    assert largest_difference(first, {name: again[name] for name in first}) <= 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--steps=5", "sampling"),
        ("--cfg-scale=2", "guidance"),
        ("--class=bar", "classes"),
        ("--precision=bf16", "precision"),
    ],
)
def test_a_folder_of_images_of_another_making_is_refused(options, named, network, tmp_path):
    make(network, tmp_path, "--seeds=0")
    before = images(tmp_path)
    message = helpers.fail(
        generate, f"--network={network}", f"--outdir={tmp_path}", "--seeds=0-1", options
    )
    assert "--outdir: " in message
    assert f"holds images made with another {named}" in message
    assert images(tmp_path).keys() == before.keys()


def test_a_folder_of_images_of_another_network_or_guide_is_refused(base, network, tmp_path):
    first = helpers.first_snapshot(base)
    make(network, tmp_path / "plain", "--seeds=0")
    message = helpers.fail(
        generate, f"--network={first}", f"--outdir={tmp_path / 'plain'}", "--seeds=0"
    )
    assert "another snapshot" in message
    guided = [f"--network={network}", f"--outdir={tmp_path / 'g'}", "--seeds=0", "--cfg-scale=2"]
    helpers.succeed(generate, *guided, f"--guide={first}")
    assert "another guide" in helpers.fail(generate, *guided, f"--guide={network}")


def test_a_damaged_note_in_the_folder_is_named(network, tmp_path):
    make(network, tmp_path, "--seeds=0")
    (tmp_path / "generation.json").write_text("{")
    message = helpers.fail(generate, f"--network={network}", f"--outdir={tmp_path}", "--seeds=0-1")
    assert "generation.json" in message


def test_classes_are_named_numbered_or_in_ranges_and_taken_in_turn(network, tmp_path):
    by_name = make(network, tmp_path / "name", "--seeds=0-5", "--class=bar,dot,ring")
    for text in ("0-2", "0,1,2", "bar,1-2"):
        same = make(network, tmp_path / text, "--seeds=0-5", f"--class={text}")
        assert largest_difference(by_name, same) == 0
    rings = make(network, tmp_path / "rings", "--seeds=0-5", "--class=ring")
    # Seeds 2 and 5 had that class already; the others have other images now.
    equal = [name for name in rings if np.array_equal(rings[name], by_name[name])]
    assert equal == ["000002.png", "000005.png"]


def test_without_a_class_each_seed_draws_its_own(network, tmp_path):
    drawn = make(network, tmp_path / "drawn", "--seeds=0-7")
    fixed = [make(network, tmp_path / str(c), "--seeds=0-7", f"--class={c}") for c in range(3)]
    classes = []
    for name, image in drawn.items():
        differences = [np.abs(image - of_class[name]).max() for of_class in fixed]
        assert min(differences) <= 1
        classes.append(int(np.argmin(differences)))
    assert set(classes) == {0, 1, 2}


@pytest.fixture(scope="session")
def unconditional(base):
    return helpers.unconditional_snapshot(base)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("--class=3", ["--class: got 3", "indices from 0 to 2"]),
        ("--class=1-7", ["--class: got 1-7", "indices from 0 to 2"]),
        ("--class=2-1", ["--class: got 2-1", "ends before it starts"]),
        ("--class=rin", ["no class 'rin'", "Did you mean 'ring'?"]),
        ("--class=7up", ["no class '7up'. The first are "]),
        ("--seeds=4-2", ["--seeds: got 4-2", "ends before it starts"]),
        ("--seeds=all", ["--seeds: got 'all'", "0-63,100"]),
        ("--batch=0", ["--batch", "0"]),
        ("--columns=3", ["--columns", "--grid"]),
        ("--sampler=heum", ["--sampler: got 'heum'", "Did you mean 'heun'?"]),
        ("--step=3", ["No such option '--step'", "--steps"]),
        ("--eta=0.5", ["--eta has an effect only with --sampler=ddim"]),
        ("--cfg-power=2", ["--cfg-power", "only with --cfg-schedule=power-cosine"]),
        ("--cfg-interval=0,1", ["--cfg-interval has no effect with --cfg-scale=1"]),
        ("--guide=NETWORK", ["--guide has no effect with --cfg-scale=1"]),
        ("--guide=UNCONDITIONAL --cfg-scale=2", ["--guide: ", "another size, class count"]),
        ("--guide=absent.pkl --cfg-scale=2", ["absent.pkl: no such file"]),
        ("--precond=edm", ["--precond: the snapshot decides this"]),
        ("--preset=cifar10", ["--preset: the snapshot decides this"]),
        ("--sigma-min=100", ["--sigma-min: got 100", "below --sigma-max"]),
        ("--precision=fp8", ["--precision", "fp8"]),
        ("--num-heads=2", ["--num-heads: an option of train.py"]),
        ("--dropout=0.1", ["--dropout: an option of train.py"]),
    ],
)
def test_what_a_snapshot_cannot_do_is_refused(args, parts, network, unconditional, tmp_path):
    text = args.replace("NETWORK", str(network)).replace("UNCONDITIONAL", str(unconditional))
    outdir = tmp_path / "out"
    message = helpers.fail(generate, f"--network={network}", f"--outdir={outdir}", *text.split())
    for part in parts:
        assert part in message
    assert not outdir.exists()


def test_an_unconditional_snapshot_has_no_classes_and_no_guidance(unconditional, tmp_path):
    args = [f"--network={unconditional}", f"--outdir={tmp_path}"]
    assert "the model is unconditional" in helpers.fail(generate, *args, "--class=0")
    assert "the model is unconditional" in helpers.fail(generate, *args, "--cfg-scale=2")
    assert len(make(unconditional, tmp_path / "out", "--seeds=0-1")) == 2


def test_network_and_outdir_are_needed_and_a_wrong_network_is_named(base, network, tmp_path):
    assert "--network" in helpers.fail(generate, f"--outdir={tmp_path}")
    assert "--outdir" in helpers.fail(generate, f"--network={network}")
    picture = next(network.parent.glob("fakes-*.png"))
    folder = find_states(network.parent)[0]
    state = as_file(shutil.copytree(folder, tmp_path / "training-state-1"))
    for path, part in (
        (tmp_path / "absent.pkl", "no such file"),
        (picture, "not a snapshot"),
        (state, "not a snapshot of this project"),
        (network.parent.parent, "is a folder"),
    ):
        message = helpers.fail(generate, f"--network={path}", f"--outdir={tmp_path}")
        assert f"{path.name}: {part}" in message or f"{path.name} {part}" in message


def test_a_thousand_seeds_share_a_subfolder(network, tmp_path):
    made = make(network, tmp_path, "--seeds=5,1000-1001,12345", "--subdirs")
    assert list(made) == [
        "000000/000005.png",
        "001000/001000.png",
        "001000/001001.png",
        "012000/012345.png",
    ]
    again = make(network, tmp_path, "--seeds=5,999", "--subdirs")
    assert "000000/000999.png" in again
    options = (f"--network={network}", "--steps=2", f"--outdir={tmp_path}")
    message = helpers.fail(generate, *options, "--seeds=0-5")
    assert "000000/000005.png is one of these images already; add --subdirs" in message
    make(network, tmp_path, "--seeds=0-4")
    message = helpers.fail(generate, *options, "--seeds=4", "--subdirs")
    assert "000004.png is one of these images already; leave out --subdirs" in message


def test_seeds_are_those_that_differ(network, tmp_path):
    for seed in (2**32, "9" * 18):
        message = helpers.fail(
            generate, f"--network={network}", f"--outdir={tmp_path}", f"--seeds={seed}"
        )
        assert f"--seeds: got {seed}; accepted: integers from 0 to 4,294,967,295" in message
    assert not list(tmp_path.iterdir())


def test_the_grid_shows_all_seeds_enlarged_with_gaps(network, tmp_path):
    grid = tmp_path / "pictures" / "grid.png"
    made = make(network, tmp_path / "out", "--seeds=0-4", f"--grid={grid}", "--columns=3")
    picture = helpers.read_pixels(grid)
    line = 15  # The first says how they were made.
    assert picture.shape == (line + 2 * (48 + 2) + 2, 3 * (48 + 2) + 2, 3)
    tile = picture[line + 52 : line + 100, 52:100]  # Row 1, column 1: seed 4.
    assert np.array_equal(tile[::6, ::6], made["000004.png"])
    assert (picture[line : line + 2] == picture[0, 0]).all()


@pytest.mark.parametrize("sampler", ["heun --s-churn=20 --steps=9", "ddpm --steps=70"])
def test_the_animation_shows_the_way_from_noise_to_the_images(sampler, network, tmp_path):
    path = tmp_path / "out.gif"
    args = ["--seeds=0-19", "--class=1", *f"--sampler={sampler}".split()]
    made = make(network, tmp_path / "out", *args, f"--gif={path}", f"--grid={tmp_path / 'a.png'}")
    with PIL.Image.open(path) as animation:
        frames = []
        for number in range(animation.n_frames):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")).astype(float))
        assert animation.info["loop"] == 0
    steps = int(sampler.split("=")[-1])
    assert len(frames) == min(steps + 1, 60)
    assert frames[0].shape == (15 + 4 * 50 + 2, 4 * 50 + 2, 3)
    tiles = [frame[17:65, 2:50][::6, ::6] for frame in frames]
    assert np.abs(tiles[-1] - made["000000.png"]).mean() < 8  # Of 256 colours.
    far = [np.abs(tile - tiles[-1]).mean() for tile in tiles]
    assert far[0] > 30 > far[-2]
    assert far[len(far) // 4] > far[-3]
    again = helpers.fail(generate, f"--network={network}", "--outdir=x", f"--gif={tmp_path / 'g'}")
    assert "end the name with .gif" in again
    assert make(network, tmp_path / "out", *args, f"--gif={path}").keys() == made.keys()


def test_guidance_changes_the_images_and_a_scale_of_one_does_not(base, network, tmp_path):
    args = ("--seeds=0-3", "--class=ring")
    plain = make(network, tmp_path / "plain", *args)
    assert largest_difference(plain, make(network, tmp_path / "1", *args, "--cfg-scale=1")) == 0
    assert largest_difference(plain, make(network, tmp_path / "3", *args, "--cfg-scale=3")) > 8
    guide = f"--guide={helpers.first_snapshot(base)}"
    guided = make(network, tmp_path / "guide", *args, "--cfg-scale=3", guide)
    assert largest_difference(plain, guided) > 8
    own = make(network, tmp_path / "own", *args, "--cfg-scale=3", f"--guide={network}")
    assert largest_difference(plain, own) <= 1  # Guided away from itself by nothing.


def test_the_folder_says_how_its_images_were_made(network, tmp_path):
    make(network, tmp_path, "--seeds=0", "--class=1", "--steps=3", "--sampler=ddpm")
    note = json.loads((tmp_path / "generation.json").read_text())
    assert note["snapshot"] == load_snapshot(network).sha256
    assert note["classes"] == [1]
    assert (note["sampling"]["sampler"], note["sampling"]["steps"], note["nfe"]) == ("ddpm", 3, 3)
    assert note["guidance"]["cfg_scale"] == 1.0
    assert (note["precision"], note["guide_hash"]) == ("float32", None)


def test_help_shows_the_groups_and_runnable_examples():
    output = helpers.succeed(generate, "--help").output
    for part in ("Sampling:", "Guidance:", "Main options:", "Examples:", "--cfg-scale [float]"):
        assert part in output
    assert "python generate.py --network=" in output
    assert "Number of sampling steps. [default: 18]" in " ".join(output.split())


def test_help_with_a_network_shows_its_own_protocol(network):
    output = helpers.succeed(generate, f"--network={network}", "--help").output
    assert "Number of sampling steps. [default: 4]" in " ".join(output.split())


def test_the_picture_of_all_cannot_take_the_place_of_an_image(base, tmp_path):
    network = helpers.trained_snapshot(base)
    out = tmp_path / "out"
    args = [f"--network={network}", f"--outdir={out}", "--seeds=0-1"]
    message = helpers.fail(generate, *args, f"--grid={out / '000001.png'}")
    assert "000001.png is the file of one of the images" in message
    assert "is a file" in helpers.fail(generate, *args, f"--grid={network}/grid.png")
    assert "is a file" in helpers.fail(generate, args[0], f"--outdir={network}")
    assert not out.exists()
