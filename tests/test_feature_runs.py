"""The whole chain of features: shards, training over buckets, resuming, and images."""

import dataclasses
import shutil
import signal

import numpy as np
import PIL.Image
import pytest
import torch
from feature_files import photographs, sample_arrays, tiny_encoders, tiny_features
from helpers import TINY_FEATURES, fail, succeed, train_tiny
from state_files import edit_manifest
from training_runs import (
    TrainProcess,
    assert_same_run,
    environment,
    final_state,
    num_rows,
    only_run,
    per_tick,
)

import families
import generate as generate_script
import train as train_script
from data.features.buckets import Bucket
from data.features.codec import FeatureStatistics
from data.features.dataset import FeatureDataset
from data.features.manifests import read_manifest
from diffusion.config import DualGuidanceConfig
from diffusion.flow import flow_times
from encoders.autoencoder import load_autoencoder
from evaluation.in_loop.features import seed_of_item
from sampling.requests import RequestGenerator, encode_requests, stored_requests
from torch_utils.pictures import read_image
from training.asked import Asked, GeneratorOptions
from training.checkpoint import load_snapshot
from training.feature_objective import FeatureObjective

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

# Four steps, a record and a state of each.
STEPS = [
    *(word for word in TINY_FEATURES if not word.startswith(("--iters", "--batch="))),
    *("--batch=8", "--iters=6", "--tick=0", "--snap=3", "--dump=1"),
]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "features"


@pytest.fixture(scope="session")
def data(base):
    return tiny_features(base)


@pytest.fixture(scope="session")
def snapshot_file(base, data):
    runs = base / "trained"
    if not runs.is_dir():
        train_tiny(runs, data, "--iters=30", "--steps=3", tiny=TINY_FEATURES)
    return max(runs.glob("*/network-snapshot-*.pkl"))


@pytest.fixture
def generator(snapshot_file):
    snapshot, device = load_snapshot(snapshot_file), torch.device("cpu")
    return families.of(snapshot.config).load(snapshot, device, GeneratorOptions())


def test_a_batch_is_what_the_shards_hold(data):
    for split in ("train", "validation"):
        dataset = FeatureDataset(data, split, text_lengths=(4, 32))
        assert len(dataset) == sum(dataset.counts) == len(dataset.ids)
        for number, bucket in enumerate(dataset.buckets):
            manifest = read_manifest(data, split, bucket.name)
            rows = range(int(dataset.firsts[number]), int(dataset.firsts[number + 1]))
            latents, cond = dataset.__getitems__(rows)
            assert latents.shape[1:] == dataset.latent_shape(number)
            assert cond["size"].tolist() == [bucket.width, bucket.height]
            for row in range(len(rows)):
                arrays = sample_arrays(data, manifest, row)
                np.testing.assert_array_equal(latents[row].numpy(), arrays["vae.npy"])
                np.testing.assert_array_equal(cond["cls"][row].numpy(), arrays["dinov3.npy"])
                np.testing.assert_array_equal(
                    cond["patches"][row].numpy(), arrays["dinov3_patches.npy"]
                )
                text = cond["text"][row][cond["text_mask"][row]].numpy()
                np.testing.assert_array_equal(text, arrays["t5h.npy"])
                assert dataset.caption(rows[row])


def test_a_batch_of_several_sizes_is_a_mistake(data):
    dataset = FeatureDataset(data)
    with pytest.raises(AssertionError, match="images of one size"):
        dataset.__getitems__([0, len(dataset) - 1])


def test_a_preview_has_raw_latents_of_every_size_in_rows(data):
    dataset = FeatureDataset(data)
    rows = dataset.preview(10_000).rows
    latents = [latent for row in rows for latent in row]
    assert len(latents) == dataset.num_images
    assert {len(row) for row in rows[:-1]} == {8}
    for index in (0, len(latents) - 1):
        assert torch.equal(latents[index], dataset.latents(index))


def test_normalised_data_have_no_mean_and_unit_variance_and_come_back(data):
    dataset = FeatureDataset(data)
    statistics = FeatureStatistics.of(dataset.record.statistics)
    latents, features = [], []
    for number, count in enumerate(dataset.counts):
        first = int(dataset.firsts[number])
        raw, cond = dataset.__getitems__(range(first, first + count))
        torch.testing.assert_close(
            statistics.denormalise(statistics.normalise(raw)), raw.float(), rtol=1e-3, atol=1e-3
        )
        latents.append(statistics.normalise(raw).movedim(1, 0).flatten(1))
        features.append(statistics.normalise_features(cond))
    latents = torch.cat(latents, dim=1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(1), torch.ones(16), rtol=1e-2, atol=1e-2)
    for name in ("cls", "patches"):
        values = torch.cat([cond[name].flatten(0, -2) for cond in features])
        torch.testing.assert_close(values.mean(0), torch.zeros(32), rtol=0, atol=1e-2)
        assert values.std(0, correction=0).mean() == pytest.approx(1, abs=0.02)


def test_losses_depend_on_neither_ranks_nor_accumulation(data, tmp_path):
    def train(name, *options, ranks=None):
        args = (f"--outdir={tmp_path / name}", f"--data={data}", *STEPS, *options)
        env = environment(tmp_path / "cache")
        return TrainProcess(args, env, tmp_path / f"{name}.log", ranks=ranks, warm=True)

    two = train("two", "--batch-gpu=2", "--workers=1", ranks=2)
    succeed(train_script, f"--outdir={tmp_path / 'one'}", f"--data={data}", *STEPS)
    output = two.finish()
    assert "2 per pass x 2 pass(es) x 2 rank(s)" in output
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    torch.testing.assert_close(
        per_tick(two, "Loss/loss"), per_tick(one, "Loss/loss"), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        per_tick(two, "Flow/velocity_rms"), per_tick(one, "Flow/velocity_rms"), rtol=1e-4, atol=0
    )
    # Steps of several buckets.
    assert len(set(per_tick(one, "Flow/share_both"))) > 1


def test_gradients_are_of_the_mean_over_latents_so_that_sizes_count_alike(
    data, tmp_path, monkeypatch
):
    """NanoDiT clips the gradient of that mean at 1."""

    def first_norm(name):
        options = ("--iters=1", "--batch=8", "--clip-grad=1e9")
        return per_tick(
            train_tiny(tmp_path / name, data, *options, tiny=TINY_FEATURES).run_dir,
            "Loss/grad_norm",
        )[0]

    mean = first_norm("mean")
    seen = []

    def summed(self, loss):
        seen.append(loss[0].numel())
        return loss.sum()

    monkeypatch.setattr(FeatureObjective, "total", summed)
    assert first_norm("sum") == pytest.approx(mean * seen[0], rel=1e-3)
    assert mean < 5


def test_runs_that_began_with_the_sum_over_latents_go_on_with_it(data, tmp_path):
    """They are told by what their states lack, also where the command line says what to train."""
    command = (f"--outdir={tmp_path}", f"--data={data}", *STEPS, "--clip-grad=1e9")
    succeed(train_script, *command)
    run_dir = only_run(tmp_path)
    averaged = per_tick(run_dir, "Loss/grad_norm")
    state, last = sorted(run_dir.glob("training-state-*"))
    shutil.rmtree(last)
    edit_manifest(state, lambda content: content["config"].pop("summed_loss"))
    succeed(train_script, *command, "--resume=auto")
    summed = per_tick(only_run(tmp_path), "Loss/grad_norm")
    assert summed[:-1] == averaged[:-1]
    assert summed[-1] > 100 * averaged[-1]


def test_a_run_that_was_killed_and_resumed_equals_the_uninterrupted_one(data, tmp_path):
    args = [f"--data={data}", *STEPS, "--iters=14", "--snap=6"]
    killed = TrainProcess(
        (f"--outdir={tmp_path / 'killed'}", *args, "--workers=1"),
        environment(tmp_path / "cache"),
        tmp_path / "log",
        warm=True,
    )
    # The sixth step is followed by pictures, which leaves time for the kill.
    killed.wait_until(lambda: num_rows(tmp_path / "killed") >= 4)
    killed.send(signal.SIGKILL)
    killed.kill()
    run_dir = only_run(tmp_path / "killed")
    assert 0 < final_state(run_dir)["progress"]["cur_nimg"] < 112
    succeed(train_script, f"--resume={run_dir}")
    succeed(train_script, f"--outdir={tmp_path / 'whole'}", *args)
    assert_same_run(run_dir, only_run(tmp_path / "whole"))


def test_a_snapshot_brings_all_that_is_needed_to_sample(data, snapshot_file):
    snapshot = load_snapshot(snapshot_file)
    model, record = snapshot.config.model, FeatureDataset(data).record
    assert (model.text_dim, model.visual_dim, model.latent_channels) == (32, 32, 16)
    assert model.buckets == tuple(b.name for b in record.buckets if b.num["train"])
    assert (model.vae_hash, model.text_hash) == (record.vae["hash"], record.text["hash"])
    assert snapshot.data.features["statistics"]["vae"] == record.statistics["vae"]


def rows_of(data, number=0, count=2):
    dataset = FeatureDataset(data, "train", text_lengths=(8, 32))
    first = int(dataset.firsts[number])
    return dataset.__getitems__(range(first, first + count))[1], dataset.buckets[number]


def test_an_image_depends_on_its_seed_and_conditions_alone(data, generator):
    cond, bucket = rows_of(data)
    together = generator.generate([5, 6], cond, bucket)
    assert together.shape == (2, 3, bucket.height, bucket.width)
    for row in range(2):
        own = {k: v if k == "size" else v[row : row + 1] for k, v in cond.items()}
        alone = generator.generate([5 + row], own, bucket)
        assert (alone[0].int() - together[row].int()).abs().max() <= 1
    assert not torch.equal(together, generator.generate([7, 8], cond, bucket))


def test_every_form_of_guidance_is_that_combination_of_its_branches(data, generator):
    """One Euler step from noise is linear in the velocity, and so in the branches."""
    cond, bucket = rows_of(data)
    generator = dataclasses.replace(
        generator, sampling=dataclasses.replace(generator.sampling, sampler="euler", steps=1)
    )
    assert flow_times(1) == [1.0, 0.0]

    def sample(form="seed", text=0.0, visual=0.0, joint=1.0, given=cond):
        guidance = DualGuidanceConfig(
            guidance_form=form, text_scale=text, visual_scale=visual, joint_scale=joint
        )
        return generator.sample_latents([1, 2], given, bucket, guidance=guidance)

    u, t, d = sample(), sample(text=1.0), sample(visual=1.0)
    f = sample("nested", 1.0, 1.0)
    tolerance = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sample("nested", 3, 2.5), u + 2.5 * (d - u) + 3 * (f - d), **tolerance
    )
    torch.testing.assert_close(sample("seed", 3, 2.5), u + 3 * (t - u) + 2.5 * (d - u), **tolerance)
    torch.testing.assert_close(
        sample("joint", 3, 2.5, 1.5),
        u + 3 * (t - u) + 2.5 * (d - u) + 1.5 * (f - t - d + u),
        **tolerance,
    )
    text_alone = {k: v for k, v in cond.items() if k.startswith("text")}
    torch.testing.assert_close(
        sample("nested", 3, 2.5, given=text_alone), u + 3 * (t - u), **tolerance
    )
    image_alone = {k: v for k, v in cond.items() if k in ("cls", "patches")}
    torch.testing.assert_close(
        sample("nested", 3, 2.5, given=image_alone), u + 2.5 * (d - u), **tolerance
    )
    assert not torch.allclose(f, t + d - u, **tolerance)


def test_a_text_alone_makes_images_of_every_size_of_the_data(data, generator):
    cond, _ = rows_of(data)
    text = {k: v for k, v in cond.items() if k.startswith("text")}
    for name in generator.model.buckets:
        bucket = Bucket(*map(int, name.split("x")))
        images = generator.generate([0, 1], text, bucket)
        assert images.shape == (2, 3, bucket.height, bucket.width)


def test_stored_latents_decode_to_the_photograph_as_the_autoencoder_gives_it(data, generator):
    dataset = FeatureDataset(data)
    latents, _ = dataset.__getitems__([0])
    expected = load_autoencoder(generator.model.vae, "cpu").decode_raw(latents)
    pictures = generator.codec.pictures(latents)
    assert torch.equal(pictures, (expected * 127.5 + 128).clip(0, 255).byte())
    normalised, _ = generator.codec.encode(latents, {})
    assert not torch.allclose(normalised, latents.float(), atol=0.1)
    again = generator.codec.decode(normalised)
    assert (again.int() - pictures.int()).abs().max() <= 1


def test_pictures_of_a_run_are_of_its_averaged_weights(data, tmp_path, monkeypatch):
    """Poisoned weights of the step would show."""
    from training.ema import EMA

    pictures = {}
    for poison in (False, True):
        original = EMA.update

        def update(self, beta, skip, original=original, poison=poison):
            original(self, beta, skip)
            if poison:
                for parameter in self._parameters.own:
                    parameter.data.add_(100.0)

        with monkeypatch.context() as patch:
            patch.setattr(EMA, "update", update)
            run_dir = train_tiny(
                tmp_path / str(poison), data, "--iters=1", tiny=TINY_FEATURES
            ).run_dir
        pictures[poison] = max(run_dir.glob("fakes-*.png")).read_bytes()
    assert pictures[False] == pictures[True]


def test_generate_makes_images_of_texts_references_and_stored_features(
    base, data, snapshot_file, tmp_path
):
    tiny_encoders(base)
    reference = tmp_path / "reference.png"
    photographs()[0].crop((0, 0, 640, 400)).save(reference)
    common = (f"--network={snapshot_file}", "--seeds=3-4")
    ids = FeatureDataset(data).ids
    calls = {
        "text": ("--prompt=red flower", "--prompt=wide sky"),
        "image": (f"--reference={reference}",),
        "both": ("--prompt=red flower", f"--reference={reference}", "--guidance-form=joint"),
        "size": ("--prompt=red flower", "--bucket=96x160"),
        "stored": (f"--features={data}", f"--id={ids[0]}, {ids[-1]}", "--sampler=heun"),
    }
    images = {}
    for name, options in calls.items():
        outdir, grid = tmp_path / name, tmp_path / f"{name}.png"
        pictures = (f"--grid={grid}", f"--gif={tmp_path / name}.gif")
        output = succeed(generate_script, *common, f"--outdir={outdir}", *options, *pictures).output
        files = sorted(outdir.rglob("0*.png"))
        assert f"{len(files)} images in {outdir}" in output
        images[name] = [tuple(read_image(file).shape) for file in files]
        with PIL.Image.open(grid) as last, PIL.Image.open(tmp_path / f"{name}.gif") as animation:
            assert animation.n_frames > 2
            assert animation.width <= last.width
    first = load_snapshot(snapshot_file).config.model.buckets[0]
    width, height = map(int, first.split("x"))
    assert images["text"] == [(3, height, width)] * 4
    assert images["image"] == images["both"] == [(3, 96, 160)] * 2
    assert images["size"] == [(3, 160, 96)] * 2
    assert len(images["stored"]) == 4
    # A second call finds everything done; another text is not taken for this one.
    again = (*common, f"--outdir={tmp_path / 'size'}", "--bucket=96x160")
    assert "2 of 2 images exist" in succeed(generate_script, *again, "--prompt=red flower").output
    assert "another requests" in fail(generate_script, *again, "--prompt=blue flower")


def test_stored_features_give_what_their_encoders_give_now(base, data, snapshot_file, generator):
    """The same text and photograph, by name and by file."""
    snapshot = load_snapshot(snapshot_file)
    dataset = FeatureDataset(data)
    index = next(i for i in range(len(dataset)) if dataset.facts(i)["file"].endswith(".png"))
    facts = dataset.facts(index)
    (stored,) = stored_requests(snapshot, str(data), [dataset.ids[index]])
    asked = Asked(prompt=(facts["caption"],), reference=base / "pictures" / facts["file"])
    (fresh,) = encode_requests(snapshot, torch.device("cpu"), asked)
    assert fresh.bucket == stored.bucket
    for name in ("text", "cls", "patches"):
        torch.testing.assert_close(
            fresh.cond[name].float(), stored.cond[name].float(), rtol=2e-3, atol=2e-3
        )
    images = [
        RequestGenerator(generator, [request]).generate([9], [0])[0] for request in (stored, fresh)
    ]
    assert (images[0].int() - images[1].int()).abs().float().mean() < 1


def test_what_cannot_be_made_is_refused_in_one_sentence(data, snapshot_file, tmp_path):
    common = (f"--network={snapshot_file}", f"--outdir={tmp_path}")
    for options, words in (
        ((), "give --prompt or --reference, or --features and --id"),
        (("--prompt=x", "--id=a"), "give --prompt or --reference, or --features and --id"),
        (("--id=a",), "Give --features and --id together"),
        ((f"--features={data}", "--id=a"), "--id: a is not in"),
        (("--prompt=x", "--bucket=100x100"), "--bucket: got 100x100; the model was trained on"),
        (("--prompt=x", "--visual=y"), "--visual encodes --reference"),
        (("--prompt=x", "--guide=y"), "--guide: this model is guided by --text-scale"),
        (("--reference=absent.png",), "--reference: absent.png cannot be read"),
        (("--prompt=x", "--class=1"), "--class"),
        (("--prompt=" + "flower " * 600,), "more than 512 tokens"),
        (("--prompt=x", "--cfg-scale=2"), "--cfg-scale"),
    ):
        assert words in fail(generate_script, *common, *options), options


def test_what_cannot_be_trained_on_is_refused_in_one_sentence(data, tmp_path):
    common = (f"--outdir={tmp_path}", *TINY_FEATURES)
    for options, words in (
        ((f"--data={tmp_path}",), "trains on a folder made by dataset_tool.py features"),
        ((f"--data={data}", "--hflip"), "--hflip has no effect on features: mirrored latents"),
        ((f"--data={data}", "--cond"), "--cond has no effect on features"),
        ((f"--data={data}", "--max-size=3"), "--max-images"),
        ((f"--data={data}", "--precond=edm"), "give --precond=flow"),
        ((f"--data={data}", "--sigma-grid=karras"), "give --sigma-grid=time"),
        ((f"--data={data}", "--augment=0.1"), "latents cannot be augmented"),
        ((f"--data={data}", "--patch-size=3"), "--patch-size: got 3"),
        ((f"--data={data}", "--cfg-scale=2"), "--cfg-scale: preset nanodit-tiny has no such"),
    ):
        assert words in fail(train_script, *common, *options), options
    message = fail(train_script, f"--outdir={tmp_path}", "--preset=digits", f"--data={data}")
    assert "holds features, but preset digits does not train on them" in message
    assert list(tmp_path.iterdir()) == []


def test_an_item_is_always_shown_with_the_same_noise():
    assert seed_of_item("abc") == seed_of_item("abc") != seed_of_item("abd")


def test_two_processes_make_the_same_images_as_one(data, snapshot_file, tmp_path):
    from helpers import on_ranks

    ids = FeatureDataset(data).ids
    options = (f"--network={snapshot_file}", f"--features={data}", f"--id={ids[0]},{ids[-1]}")
    options = (*options, "--seeds=0-2", "--batch=2")
    on_ranks(2, "generate.py", *options, f"--outdir={tmp_path / 'two'}")
    succeed(generate_script, *options, f"--outdir={tmp_path / 'one'}")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("0*.png"))
    assert len(files) == 6
    found = {
        str(file): [read_image(tmp_path / name / file).int() for name in ("one", "two")]
        for file in files
    }
    assert all((one - two).abs().max() <= 1 for one, two in found.values())
