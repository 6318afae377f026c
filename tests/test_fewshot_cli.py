"""Models of sets from the command line: supports, episodes, few-shot scores, ranks and resumes."""

import dataclasses
import json
import re
import shlex

import helpers
import numpy as np
import pytest
import torch
from helpers import dry_run
from image_files import convert
from PIL import Image

import families
import fid
import generate
import train
from evaluation.fewshot import EpisodeImages, support_distances
from families.sets import episodes_of_snapshot, open_data_of
from sampling.supports import SupportGenerator
from training.asked import GeneratorOptions
from training.checkpoint import find_snapshots, find_states, load_snapshot, load_state


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def generator_of(snapshot):
    family = families.of(snapshot.config)
    return family.load(snapshot, torch.device("cpu"), GeneratorOptions())


# The first users' commands, word for word but for the name of their script.
LAG_COMMAND = r"""
  --model vfsddpm_jax \
  --dataset cifar100 \
  --data_dir /kaggle/working/ns_data \
  --sample_size 6 \
  --image_size 32 \
  --patch_size 2 \
  --batch_size 32 \
  --lr 1e-4 \
  --log_interval 300 \
  --save_interval 20000 \
  --num_eval_batches 10 \
  --num_sample_batches 2 \
  --use_wandb True \
  --wandb_project fsdm-jax \
  --max_steps 300000 \
  --diffusion_steps 250 \
  --hidden_size 468 \
  --depth 6 \
  --num_heads 9 \
  --mlp_ratio 3.0 \
  --hdim 256 \
  --context_channels 256 \
  --mode_conditioning lag \
  --encoder_mode vit_set \
  --encoder_depth 3 \
  --encoder_heads 8 \
  --encoder_dim_head 56 \
  --encoder_mlp_ratio 1.0 \
  --compute_fid True \
  --fid_num_samples 1024
"""
DEPTH6_COMMAND = (
    "--model vfsddpm_jax --dataset cifar100 --data_dir /kaggle/working/ns_data --sample_size 6 "
    "--image_size 32 --patch_size 2 --batch_size 32 --lr 1e-4 --log_interval 100 --save_interval "
    "20000 --num_eval_batches 10 --num_sample_batches 2 --use_wandb --wandb_project fsdm-jax "
    "--max_steps 200000 --diffusion_steps 250 --hidden_size 450 --depth 6 --num_heads 9 "
    "--mlp_ratio 4.0 --compute_fid --fid_num_samples 600"
)


@pytest.mark.parametrize("hyphens", [False, True])
def test_the_command_of_lag_mode_works_as_typed(hyphens):
    words = shlex.split(LAG_COMMAND.replace("\\\n", " "))
    if hyphens:
        words = [w.replace("_", "-") if w.startswith("--") else w for w in words]
    config, text = dry_run(*words)
    model = config["model"]
    assert config["preset"] == "fsdm-cifar100-lag"
    assert (model["hidden_dim"], model["num_blocks"], model["num_heads"]) == (468, 6, 9)
    assert (model["hdim"], model["context_channels"], model["mode_conditioning"]) == (
        256,
        256,
        "lag",
    )
    assert (model["encoder_depth"], model["encoder_heads"], model["encoder_dim_head"]) == (3, 8, 56)
    assert config["data"]["data"] == "/kaggle/working/ns_data/cifar100.zip"
    assert config["training"]["batch"] == 32
    assert config["training"]["iters"] == 300_000
    assert config["logging"]["log_interval"] == 300
    assert config["logging"]["save_interval"] == 20_000
    assert config["logging"]["num_sample_batches"] == 2
    assert (config["logging"]["wandb"], config["logging"]["wandb_project"]) == (True, "fsdm-jax")
    assert config["logging"]["metrics"] == ["fewshot_fid"]
    assert config["sets"]["num_eval_batches"] == 10
    assert config["sets"]["fid_num_samples"] == 1024
    assert config["precond"]["diffusion_steps"] == 250
    assert "32 sets of 6 images per optimizer step" in text
    assert "57,600.0 kimg = 300,000 optimizer steps" in text


def test_the_start_report_names_conditioning_shapes_and_sizes():
    _, text = dry_run(*shlex.split(LAG_COMMAND.replace("\\\n", " ")))
    rows = dict(
        re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.strip().splitlines()[:-1]
    )
    assert rows["conditioning"].startswith("lag: cross-attention")
    assert rows["context"] == "(b*n, 256, 256); context_channels 256 equals hdim 256"
    assert rows["patch tokens"] == "256 per 32x32 image"
    assert "n = 6, context of 5" in rows["sets"]
    for part in ("vit_set, stack", "width 256", "depth 3", "heads 8 x 56", "dropout 0", "pool cls"):
        assert part in rows["encoder"]
    assert rows["diffusion"] == "ddpm, 250 steps, linear; variance fixed"
    assert rows["context mode"] == "deterministic"
    sizes = [int(n.replace(",", "")) for n in re.findall(r"[\d,]{3,}", rows["modules"])]
    assert sum(sizes) == int(rows["parameters"].replace(",", ""))


def test_the_command_of_depth_6_works_as_typed():
    config, text = dry_run(*shlex.split(DEPTH6_COMMAND))
    model = config["model"]
    assert config["preset"] == "fsdm-depth6"
    assert (model["hidden_dim"], model["mlp_ratio"], model["mode_conditioning"]) == (
        450,
        4.0,
        "film",
    )
    assert (model["hdim"], model["context_channels"]) == (None, None)
    assert "(b*n, 450); context_channels 450 equals hdim 450" in text
    assert (config["logging"]["wandb"], config["sets"]["fid_num_samples"]) == (True, 600)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kimg=1 --max-steps=2", "Give --kimg or --iters, not both"),
        ("--tick=1 --log-interval=2", "Give --tick or --log-interval, not both"),
        ("--snap=1 --save-interval=2", "Give --snap or --save-interval, not both"),
        ("--dataset=x", "Give --data, or --data-dir and --dataset together"),
        ("--dataset=x --data-dir=y --data=z", "Give --data, or --data-dir and --dataset together"),
        ("--cfg-scale=2", "--context-drop=0.1"),
        ("--metrics=fd_pixels", "is trained on sets; accepted: fewshot_fid"),
        ("--augment=0.1", "sets cannot be augmented"),
        ("--context-channels=12", "but the encoder has --hdim 450; make them equal"),
        ("--gate=none", "--gate has an effect only with --mode-conditioning=lag"),
        ("--diffusion-steps=20", "from 25 to"),
        ("--sample-size=1", "leaves nothing to learn from"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, message):
    found = helpers.fail(train, "--preset=fsdm-depth6", *words.split(), "--dry-run")
    assert message in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--held-out=0 --test-classes=none", "There is no support to show"),
        ("--test-classes=none --num-eval-batches=1", "there are no classes to validate on"),
        ("--test-classes=none --metrics=fewshot_fd_pixels", "The run has no unseen classes"),
        ("--resolution=16", "--resolution: this run expects 16x16 images"),
        ("--min-sample-size=4", "--min-sample-size: got 4; accepted: at most --sample-size"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_written(
    words, message, base, tmp_path
):
    args = (*helpers.TINY_SETS, f"--data={helpers.toy_data(base)}", f"--outdir={tmp_path / 'runs'}")
    assert message in helpers.fail(train, *args, *words.split())
    assert not (tmp_path / "runs").exists()


def test_few_shot_metrics_belong_to_models_of_sets():
    message = helpers.fail(train, "--preset=digits", "--metrics=fewshot_fid", "--dry-run")
    assert "preset digits is not trained on sets" in message


# Training.


def test_one_process_and_two_learn_the_same(base, tmp_path):
    data, losses, gaps = helpers.toy_data(base), [], []
    options = [*helpers.TINY_SETS, "--iters=6", "--tick=0", "--context-drop=0.3", "--seed=4"]
    options += ["--num-eval-batches=2", "--min-sample-size=2"]
    for ranks, extra in ((1, []), (2, []), (1, ["--batch-gpu=2"])):
        outdir = tmp_path / f"{len(losses)}"
        helpers.train_on(ranks, f"--outdir={outdir}", f"--data={data}", *options, *extra)
        (run_dir,) = outdir.iterdir()
        rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
        losses.append([row["Loss/loss"]["mean"] for row in rows])
        gaps.append([row["debug/encoder_grad_norm"]["mean"] for row in rows])
        score = json.loads((run_dir / "metric-val_loss.jsonl").read_text().splitlines()[0])
        losses[-1].append(score["value"])
    assert len(losses[0]) == 7
    for found, norms in zip(losses[1:], gaps[1:], strict=True):
        np.testing.assert_allclose(found, losses[0], rtol=2e-5)
        np.testing.assert_allclose(norms, gaps[0], rtol=2e-3, atol=1e-6)


def test_a_resumed_run_equals_one_that_was_never_interrupted(base, tmp_path):
    data = helpers.toy_data(base)
    options = ["--tick=0", "--dump=1", "--context-drop=0.2", "--hybrids=0.5"]
    options += ["--mode-conditioning=lag", "--mode-context=variational", "--encoder-dropout=0.1"]
    whole = helpers.train_tiny(
        tmp_path / "a", data, *options, "--iters=6", tiny=helpers.TINY_SETS
    ).run_dir
    part = helpers.train_tiny(
        tmp_path / "b", data, *options, "--iters=3", tiny=helpers.TINY_SETS
    ).run_dir
    helpers.succeed(train, f"--resume={part}", "--iters=6")
    states = [load_state(find_states(d)[0]) for d in (whole, part)]
    for name, value in states[0]["net"].items():
        assert torch.equal(value, states[1]["net"][name]), name


def test_pictures_show_supports_above_samples_and_the_counters_count_images(base):
    run_dir = helpers.set_snapshot(base).parent
    snapshot = load_snapshot(find_snapshots(run_dir)[0])
    # 60 steps of 8 sets of 3 images.
    assert snapshot.progress["cur_nimg"] == 60 * 8 * 3
    assert Image.open(max(run_dir.glob("fakes-*.png"))).width > 100
    assert Image.open(run_dir / "reals.png").width > 3 * 50 + 2  # A set in a row.


# Sampling.


def support_files(base, folder, names=("ring", "ring")):
    folder.mkdir()
    for number, name in enumerate(names):
        source = base / "toy" / name / f"{number:02d}.png"
        (folder / f"{number}.png").write_bytes(source.read_bytes())
    return folder


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_images_files_folder_and_zip_of_a_support_give_the_same(base, tmp_path):
    network, folder = helpers.set_snapshot(base), support_files(base, tmp_path / "support")
    import zipfile

    with zipfile.ZipFile(tmp_path / "support.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    made = []
    for number, words in enumerate(
        (
            [f"--support={folder}"],
            [f"--support={folder / '0.png'}", f"--support={folder / '1.png'}"],
            [f"--support={tmp_path / 'support.zip'}"],
            [f"--support={folder}", "--batch=2"],
            [f"--support={folder / '0.png'}"],
        )
    ):
        outdir = tmp_path / f"out{number}"
        args = (f"--network={network}", f"--outdir={outdir}", "--num=5", *words)
        helpers.succeed(generate, *args)
        made.append(read_all(outdir))
    assert len(made[0]) == 5
    assert made[0] == made[1] == made[2] == made[3]
    assert made[4] != made[0]


def test_the_support_decides_what_is_made(base, tmp_path):
    network, made = helpers.set_snapshot(base), []
    for names in (("bar", "bar"), ("dot", "dot")):
        support = support_files(base, tmp_path / names[0], names)
        outdir, grid = tmp_path / f"{names[0]}-out", tmp_path / f"{names[0]}.png"
        helpers.succeed(
            generate,
            *(f"--network={network}", f"--outdir={outdir}", f"--support={support}"),
            *("--num=4", f"--grid={grid}", "--cfg-scale=2"),
        )
        made.append(read_all(outdir))
        # The support's row of two above a row of four, a title above each, and the heading.
        width, height = Image.open(grid).size
        assert width == 4 * 50 + 2 + 2 * 10 + 4
        assert height == 15 + 2 * (15 + 50 + 2) + 2 * 10 + 4
    assert made[0] != made[1]


def test_episodes_come_from_the_split_and_have_a_folder_each(base, tmp_path):
    network = helpers.set_snapshot(base)
    snapshot = load_snapshot(network)
    for split, names in (("seen", {"bar", "dot"}), ("unseen", {"ring"})):
        episodes = episodes_of_snapshot(snapshot, split, 2)
        found = {episodes.class_names[index] for index in episodes.classes}
        assert found == names
        outdir = tmp_path / split
        args = (f"--network={network}", f"--outdir={outdir}", "--episodes=2", f"--split={split}")
        helpers.succeed(generate, *args, "--num=3")
        assert sorted(p.name for p in outdir.iterdir() if p.is_dir()) == ["0000", "0001"]
        assert len(read_all(outdir / "0001")) == 3
        assert read_all(outdir / "0000") != read_all(outdir / "0001")  # By their supports.
    data = open_data_of(snapshot)
    held_out = set(np.concatenate(list(data.held_out.values())).tolist())
    assert set(episodes_of_snapshot(snapshot, "seen", 2).indices.flatten().tolist()) <= held_out


def test_episodes_are_equal_on_two_ranks(base, tmp_path):
    network = helpers.set_snapshot(base)
    args = (f"--network={network}", "--episodes=2", "--num-images=3")
    helpers.succeed(generate, *args, f"--outdir={tmp_path / 'one'}")
    helpers.on_ranks(2, "generate.py", *args, f"--outdir={tmp_path / 'two'}")
    for folder in ("0000", "0001"):
        assert read_all(tmp_path / "one" / folder) == read_all(tmp_path / "two" / folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "This model makes images from a support: give --support=IMAGES, or --episodes=N"),
        ("--support=x --episodes=2", "This model makes images from a support"),
        ("--support=missing.png", "--support: missing.png: no such file"),
        ("--class=0 --episodes=1", "--class: this model makes images from a support"),
        ("--support=x --split=seen", "--split: applies to --episodes alone; leave it out"),
        ("--episodes=1 --split=val", "The run has no val classes"),
        ("--episodes=1 --data=missing.zip", "missing.zip does not exist; say where the data are"),
        ("--episodes=40", "too few for 40 support(s) of 2"),
        ("--episodes=1 --num=2 --seeds=1", "Give --seeds or --num, not both"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_a_sentence(words, message, base, tmp_path):
    network = helpers.set_snapshot(base)
    args = (f"--network={network}", f"--outdir={tmp_path / 'out'}", *words.split())
    assert message in helpers.fail(generate, *args)
    assert not (tmp_path / "out").exists()


def test_a_broken_support_is_named(base, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    network = helpers.set_snapshot(base)
    args = (f"--network={network}", f"--outdir={tmp_path / 'out'}", f"--support={tmp_path}/x.png")
    assert "x.png: not a readable image" in helpers.fail(generate, *args)


def test_other_models_take_no_support(base, tmp_path):
    network = helpers.trained_snapshot(base)
    message = helpers.fail(
        generate, f"--network={network}", f"--outdir={tmp_path}", "--support=x.png"
    )
    assert "--support: this model was not trained on sets" in message


def test_other_data_than_those_trained_on_are_refused_for_episodes(base, tmp_path):
    network = helpers.set_snapshot(base)
    other = tmp_path / "other.zip"
    convert(base / "toy", other, "--max-images=30")
    args = (f"--network={network}", f"--outdir={tmp_path / 'out'}", "--episodes=1")
    assert "holds other data" in helpers.fail(generate, *args, f"--data={other}")


def test_a_class_conditional_model_is_told_the_classes_that_it_knows(base, tmp_path):
    run_dir = helpers.train_tiny(
        tmp_path, helpers.toy_data(base), "--cond", tiny=helpers.TINY_SETS
    ).run_dir
    snapshot = load_snapshot(max(run_dir.glob("*.pkl")))
    assert snapshot.data.class_names == ("bar", "dot")
    table = snapshot.state_dict["conditioner.table.embedding_table.weight"]
    generator = generator_of(snapshot)
    for split, rows in (("seen", [0, 1]), ("unseen", [2])):
        episodes = episodes_of_snapshot(snapshot, split, len(rows))
        own = SupportGenerator.of(generator, episodes)
        context = own._context(own.network, torch.arange(len(rows)), len(rows))
        assert torch.equal(context.label, table[rows])


# Scores.


def test_few_shot_scores_are_of_the_right_images(base, tmp_path):
    network = helpers.set_snapshot(base)
    scores = tmp_path / "scores.json"
    (tmp_path / "out").mkdir()
    output = helpers.succeed(
        fid,
        "fewshot",
        *(f"--network={network}", f"--transfer={helpers.toy_data(base)}"),
        *("--metrics=fewshot_fd_pixels,fewshot_kid_pixels", f"--json={scores}"),
        f"--outdir={tmp_path / 'out'}",
    ).output
    rows = json.loads(scores.read_text())["rows"]
    by_protocol = {row["protocol"]: row for row in rows if row["metric"] == "fewshot_fd_pixels"}
    assert list(by_protocol) == ["seen", "unseen", "transfer"]
    # Of 4 held-out images a class 2 are the support; of 14 rings 2; of 14 of each class 2.
    assert [row["num_reals"] for row in by_protocol.values()] == [4, 12, 36]
    assert [row["num_images"] for row in by_protocol.values()] == [4, 12, 36]
    assert [row["num_episodes"] for row in by_protocol.values()] == [2, 1, 3]
    assert set(by_protocol["seen"]["per_class"]) == {"bar", "dot"}
    assert set(by_protocol["unseen"]["per_class"]) == {"ring"}
    assert "2 supports of 2, 4 generated images against 4 real ones" in output
    assert "distance to the nearest support image" in output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "seen.png",
        "unseen.png",
        "transfer.png",
    }


def test_generated_images_have_the_class_mixture_of_the_reals(base):
    snapshot = load_snapshot(helpers.set_snapshot(base))
    episodes = dataclasses.replace(episodes_of_snapshot(snapshot, "seen", 2), counts=(3, 1))
    generator = SupportGenerator.of(generator_of(snapshot), episodes)
    source = EpisodeImages(generator, snapshot, first_seed=0, batch=8)
    labels = source.labels(range(8))
    assert np.bincount(labels, minlength=3).tolist() == [6, 2, 0]
    ((rows, images),) = source.batches(range(8))
    chosen = [int(label) for label in labels]  # Bars and dots are also the episodes' numbers.
    assert torch.equal(images, generator.generate(rows.tolist(), chosen))
    nearest = support_distances(images, episodes, chosen)
    np.testing.assert_allclose(source.distances(), nearest)


def test_few_shot_scores_are_equal_on_two_ranks(base, tmp_path):
    network = helpers.set_snapshot(base)
    args = ("fewshot", f"--network={network}", "--metrics=fewshot_fd_pixels", "--num-images=9")
    helpers.succeed(fid, *args, f"--json={tmp_path / 'one.json'}")
    helpers.on_ranks(2, "fid.py", *args, f"--json={tmp_path / 'two.json'}")
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["rows"] for n in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        assert first["value"] == pytest.approx(second["value"], rel=1e-6)
        assert first["copying"] == pytest.approx(second["copying"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--metrics=fd_pixels", "fd_pixels is not of images made from supports"),
        ("--protocols=foo", "--protocols: got foo; accepted: seen, unseen, val"),
        ("--protocols=seen,val --metrics=fewshot_fd_pixels", "The run has no val classes"),
        (
            "--transfer=GREY --metrics=fewshot_fd_pixels",
            "holds images of 1x8x8 (channels, height, width), but the model makes 3x8x8",
        ),
        (
            "--protocols=unseen --metrics=fewshot_fd_pixels --episodes-per-class=7",
            "all images of its classes are in supports",
        ),
    ],
)
def test_scores_that_cannot_be_had_are_refused(words, message, base):
    network = helpers.set_snapshot(base)
    grey = base / "grey.zip"
    if not grey.exists():
        convert("digits", grey)
    words = words.replace("GREY", str(grey)).split()
    result = helpers.call(fid, "fewshot", f"--network={network}", *words)
    assert result.code != 0
    assert message in " ".join(result.error.split())
    assert result.output == ""  # Before anything is generated.


def test_metrics_of_supports_are_not_for_other_images(base):
    data = helpers.toy_data(base)
    args = ("calc", f"--images={data}", f"--ref={data}", "--metrics=fewshot_fd_pixels")
    assert "fewshot_fd_pixels is for fid.py fewshot" in helpers.fail(fid, *args)


def test_other_scores_say_where_those_of_sets_are(base):
    network = helpers.set_snapshot(base)
    message = helpers.fail(
        fid, "calc", f"--network={network}", f"--ref={base / 'toy.zip'}", "--metrics=fd_pixels"
    )
    assert "score it with fid.py fewshot" in message
