"""Images held out by their contents, the loss on them, what it says, and runs that it ends."""

import dataclasses
import json
import math
import re
import shutil
import zipfile
from unittest import mock

import helpers
import numpy as np
import pytest
import torch
from feature_files import tiny_features
from latent_files import encode, tiny_autoencoder
from streamed_files import write_features

import train
from configs import get_preset
from data.features.dataset import FeatureDataset
from data.fewshot.config import SetConfig
from data.fewshot.sets import SetDataset
from data.images.dataset import ImageDataset
from data.latents.dataset import LatentDataset
from data.split import is_held_out
from diffusion.losses import denoising_loss
from diffusion.precond import make_precond
from evaluation.held_out import HeldOutScores, nearness
from families.image import FAMILY
from metrics.detectors import PixelDetector
from metrics.metric import get_metrics
from models import build_network
from torch_utils import distributed
from training.checkpoint import find_snapshots, find_states, load_snapshot, load_state
from training.validation.examples import examples_of_images
from training.validation.losses import LossMeter
from training.validation.trend import Trend, is_beyond_chance

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def rows_of(run_dir):
    rows = map(json.loads, (run_dir / "stats.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in row.items() if not name.startswith(("Timing", "Resources"))}
        for row in rows
    ]


def names_of(dataset):
    return {dataset.archive.names[index] for index in dataset._indices}


class TestSplit:
    def test_a_share_of_contents_is_held_out_whatever_else_there_is(self):
        rng = np.random.default_rng(0)
        lengths, crcs = rng.integers(1, 10**6, 20_000), rng.integers(0, 2**32, 20_000)
        for share in (0.01, 0.1, 0.5):
            held_out = is_held_out(lengths, crcs, share)
            assert held_out.mean() == pytest.approx(share, abs=4 * (share / 20_000) ** 0.5)
            order = rng.permutation(20_000)[:700]
            assert (is_held_out(lengths[order], crcs[order], share) == held_out[order]).all()
        # Also of contents that differ little.
        assert is_held_out(np.full(20_000, 64), np.arange(20_000), 0.1).mean() == pytest.approx(
            0.1, abs=0.01
        )

    def test_a_zip_its_folder_and_other_names_are_split_alike_and_copies_stay_together(
        self, base, tmp_path
    ):
        whole = ImageDataset(helpers.toy_data(base))
        folder = tmp_path / "folder"
        with zipfile.ZipFile(whole.path) as file:
            file.extractall(folder)
        part = whole.hold_out(0.3)
        assert part.num_images + part.validation_part.num_images == 42
        assert names_of(part).isdisjoint(names_of(part.validation_part))
        unpacked = ImageDataset(folder).hold_out(0.3)
        assert names_of(unpacked.validation_part) == names_of(part.validation_part)
        assert unpacked.content_hash == part.content_hash != whole.content_hash

        # A copy under a name that comes first, in another folder, and the others gone.
        (name, *_), (trained, *_) = (sorted(names_of(it)) for it in (part.validation_part, part))
        for number, source in enumerate((name, trained)):
            (tmp_path / "copies").mkdir(exist_ok=True)
            shutil.copy(folder / source, tmp_path / "copies" / f"a{number}.png")
            shutil.copy(folder / source, tmp_path / "copies" / f"z{number}.png")
        copies = ImageDataset(tmp_path / "copies").hold_out(0.3)
        assert names_of(copies.validation_part) == {"a0.png", "z0.png"}

    def test_samples_in_an_array_are_split_by_their_pixels(self, base, tmp_path):
        images, _ = ImageDataset(helpers.toy_data(base)).__getitems__(range(42))
        pixels = images.permute(0, 2, 3, 1).numpy()
        found = []
        for name, order in (("a", np.arange(42)), ("b", np.arange(42)[::-1])):
            np.savez(tmp_path / f"{name}.npz", arr_0=pixels[order])
            part = ImageDataset(tmp_path / f"{name}.npz").hold_out(0.3).validation_part
            found.append(
                {images.numpy().tobytes() for images in part.__getitems__(range(len(part)))[0]}
            )
        assert found[0] == found[1]

    def test_latents_are_split_by_their_checksums_and_mirror_images_train_alone(
        self, base, tmp_path
    ):
        vae = tiny_autoencoder(tmp_path / "vae")
        encode(helpers.toy_data(base), tmp_path / "latents", vae, "--hflip")
        whole = LatentDataset(tmp_path / "latents", hflip=True)
        part = whole.hold_out(0.3)
        held_out = part.validation_part
        assert len(part) == 2 * part.num_images
        assert 0 < len(held_out) == held_out.num_images < 42
        assert set(held_out._indices).isdisjoint(part._indices)
        kept = is_held_out(np.zeros(42, int), whole._crcs[:, 0], 0.3)
        assert set(held_out._indices) == set(np.flatnonzero(kept))

    def test_features_without_a_validation_split_get_one(self, base):
        folder = tiny_features(base / "features", "--validation-share=0", name="whole")
        whole = FeatureDataset(folder)
        parts = [FeatureDataset(folder, s, validation_share=0.3) for s in ("train", "validation")]
        assert sorted(parts[0].ids + parts[1].ids) == sorted(whole.ids)
        assert parts[1].num_images
        assert parts[0].of_split("validation").ids == parts[1].ids
        assert len({part.content_hash for part in (whole, parts[0])}) == 2
        for part in parts:
            for index, name in enumerate(part.ids):
                assert part.caption(index) == whole.caption(whole.ids.index(name))

    def test_an_error_in_features_names_the_folder_that_holds_them(self, tmp_path):
        features = write_features(tmp_path, shards={(64, 64): (8,)}, num_held_out=0)
        file = features / "features.json"
        file.write_text(file.read_text().replace("[4, 8, 8]", "[4, 9, 9]"))
        part = FeatureDataset(features, "validation", validation_share=0.3)
        where = re.escape(f"{features}/train/bucket_64x64: {part.ids[0]}: vae.npy is float16")
        with pytest.raises(ValueError, match=where):
            part[0]

    def test_sets_are_of_images_of_one_side(self, base):
        images = ImageDataset(helpers.toy_data(base), use_labels=True)
        config = SetConfig(train_classes=("bar", "dot"), test_classes=("ring",))
        sets = SetDataset(images, config, sample_size=3, seed=0, validation_share=0.3)
        held_out = set(np.concatenate(list(sets.held_out.values())).tolist())
        mine = set(np.flatnonzero(images.held_out_rows(0.3) & (images.labels < 2)).tolist())
        assert held_out == mine
        sides = [sets.plain(held_out=side, seed=0) for side in (True, False)]
        for place in range(30):
            own, other = (side.draw(place) for side in sides)
            assert own.labels == other.labels
            assert set(own.rows.flatten()) <= held_out
            assert not set(other.rows.flatten()) & held_out
            assert not set(sets.draw(place).rows.flatten()) & held_out


@pytest.fixture(scope="module")
def meter_parts(tmp_path_factory):
    """A run on the toy images with a network of random weights, and its examples."""
    run = dataclasses.replace(
        get_preset("cifar10").run,
        model=dataclasses.replace(
            get_preset("cifar10").run.model,
            **dict(resolution=8, num_stages=2, num_blocks=(1, 1), base_dim=16, hidden_dim=16),
            **dict(num_heads=2, time_dim=32, dropout=0.0),
        ),
    )
    data = helpers.toy_data(tmp_path_factory.getbasetemp())
    run = run.changed("data", data=str(data), validation_share=0.3, cond=True)
    opened = FAMILY.open_data(run)
    run = FAMILY.fit(run, opened)
    torch.manual_seed(0)
    network = build_network(run.model).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    objective = FAMILY.objective(run, network, FAMILY.encoder_codec(run, opened, CPU))
    return run, objective, FAMILY.validation(run, opened)


class TestLosses:
    def test_each_is_that_of_its_image_at_its_level_under_its_noise(self, meter_parts):
        run, objective, examples = meter_parts
        found = LossMeter(objective, examples, 5, CPU).measure(0)
        precond, num = make_precond(run.precond), len(examples.rows)
        levels = []
        for row in (0, 1, num - 1):
            meter = LossMeter(objective, examples, 5, CPU)
            draws = meter._draws(range(row, row + 1), 0)
            levels.append(float(draws.sigma))
            item = examples.rows[row]
            for data, key, losses in (
                (examples.held_out, item.held_out, found.held_out),
                (examples.trained, item.trained, found.trained),
            ):
                images, cond = data.__getitems__([key])
                context = objective.network.context(cond, None, num=1)
                x = images.float() / 127.5 - 1
                loss = denoising_loss(
                    objective._denoise, x, draws.sigma, draws.noise, context, precond.weight
                )
                assert losses[row] == pytest.approx(loss.mean().item(), rel=1e-4)
        assert len(set(levels)) == 3
        # Without the class, as label dropout trains it.
        assert set(found.reduced) == {"without_class"}
        assert not np.allclose(found.reduced["without_class"], found.held_out)

    def test_levels_are_spread_as_in_training(self, meter_parts):
        run, objective, examples = meter_parts
        sigma = LossMeter(objective, examples, 5, CPU)._sigma
        # ln(sigma) is normal in EDM's training.
        z = np.sort((sigma.log().numpy() - run.precond.P_mean) / run.precond.P_std)
        share = [0.5 * (1 + math.erf(value / 2**0.5)) for value in z]
        middles = (np.arange(len(z)) + 0.5) / len(z)
        np.testing.assert_allclose(share, middles, atol=0.02)

    def test_ranks_and_passes_change_nothing(self, meter_parts):
        _, objective, examples = meter_parts
        whole = LossMeter(objective, examples, 64, CPU).measure(0)
        parts = []
        for rank in range(2):
            with (
                mock.patch.object(distributed, "rank", return_value=rank),
                mock.patch.object(distributed, "world_size", return_value=2),
                mock.patch.object(distributed, "all_reduce_sum", lambda tensor: tensor),
            ):
                parts.append(LossMeter(objective, examples, 5, CPU).measure(0))
        assert all((part.held_out == 0).any() for part in parts)
        np.testing.assert_allclose(parts[0].held_out + parts[1].held_out, whole.held_out, rtol=1e-4)

    def test_few_images_are_seen_at_several_levels_and_many_once(self, base):
        data = ImageDataset(helpers.toy_data(base), use_labels=True)
        few = examples_of_images(data.subset(range(5)), data, (3, 8, 8), 42)
        assert [row.held_out for row in few.rows] == [0, 1, 2, 3, 4] * 4
        np.testing.assert_allclose(few.by_item(np.arange(20.0)), np.arange(5) + 7.5)
        assert {name: int(rows.sum()) for name, rows in few.groups.items()} == {"bar": 20}
        many = mock.Mock(num_images=1000, labels=None)
        rows = examples_of_images(many, data, (3, 8, 8), 42).rows
        assert len({row.held_out for row in rows}) == len(rows) == 256


class TestTrend:
    def test_a_fall_counts_if_it_is_beyond_chance(self):
        rng = np.random.default_rng(0)
        images, chance = rng.normal(1, 0.5, 200), rng.normal(0, 0.01, 200)
        assert is_beyond_chance(chance - chance.mean() - 0.002)
        assert not is_beyond_chance(chance - chance.mean() - 0.001)
        trend = Trend("a")
        for number, step in enumerate((0.0, -0.1, -0.1, -0.1005, -0.2)):
            trend.add(
                1000 * (number + 1),
                images + step + (chance - chance.mean()) * (0, 1, 0, 2, 0)[number],
                1,
            )
            assert trend.num_since == [0, 0, 1, 2, 0][number]
        assert trend.best_nimg == 5000
        assert not trend.overfits(images + 1, 1.5)  # The loss on training images has risen, too.
        assert trend.overfits(images + 1, 0.5)
        assert not trend.overfits(images - 0.2, 0.5)

    def test_losses_that_are_not_finite_are_no_best(self):
        trend = Trend("a")
        for losses in (np.full(4, np.nan), np.arange(4.0), np.full(4, np.nan)):
            trend.add(1000, losses, 1.0)
        assert (trend.best_loss, trend.num_since) == (1.5, 1)

    def test_the_slope_is_that_of_a_line_over_doublings(self):
        trend = Trend("a")
        for number in range(1, 9):
            trend.add(1000 * number, np.full(3, 10 - 2 * math.log2(number)), 1.0)
        middle = np.mean([10 - 2 * math.log2(number) for number in range(4, 9)])
        slope, error = trend.slope()
        assert slope == pytest.approx(-2 / middle)
        assert error == pytest.approx(0, abs=1e-6)

    def test_a_state_holds_all_of_it_and_is_of_the_same_images_alone(self):
        trend, other, foreign = Trend("a"), Trend("a"), Trend("b")
        for number in range(5):
            trend.add(1000 * number, np.arange(4.0) + number % 2, 0.5)
        other.load_state_dict(trend.state_dict())
        foreign.load_state_dict(trend.state_dict())
        assert other.slope() == trend.slope()
        assert (other.num_since, other.best_nimg, other.best_trained) == (4, 0, 0.5)
        assert (other.best == trend.best).all()
        assert foreign.points == []


NEVER_FALLS = ("--validation-share=0.3", "--tick=0", "--snap=1", "--lr=1e-12", "--cond")


class TestRuns:
    def test_a_run_ends_when_the_loss_falls_no_more_and_goes_on_if_it_is_told_to(
        self, base, tmp_path
    ):
        data = helpers.toy_data(base)
        options = (*NEVER_FALLS, "--early-stop=2", "--dump=2")
        run_dir = helpers.train_tiny(tmp_path / "a", data, *options, "--iters=9").run_dir
        log = (run_dir / "log.txt").read_text()
        assert "Stopped early at kimg 0.02 (--early-stop=2)" in log
        assert [row["Progress/tick"]["mean"] for row in rows_of(run_dir)] == [0, 1, 2]
        # As complete as any run: it ends with a snapshot and a state.
        assert load_state(find_states(run_dir)[0])["progress"]["cur_nimg"] == 24
        assert load_snapshot(find_snapshots(run_dir)[0]).progress["cur_nimg"] == 24
        report = (run_dir / "report.html").read_text()
        for text in ("Loss of the averaged weights", "Validation loss over noise level"):
            assert f"<h3>{text}" in report
        assert "Stopped early at kimg" in report

        again = helpers.succeed(train, f"--resume={run_dir}")
        assert "A larger --early-stop, or 0, would go on." in again.output
        assert len(rows_of(run_dir)) == 3
        helpers.succeed(train, f"--resume={run_dir}", "--early-stop=0", "--iters=5")
        assert len(rows_of(run_dir)) == 5

    def test_a_resumed_run_counts_on_and_equals_an_uninterrupted_one(self, base, tmp_path):
        data = helpers.toy_data(base)
        options = (*NEVER_FALLS, "--early-stop=3", "--hflip", "--label-drop=0.2")
        whole = helpers.train_tiny(tmp_path / "a", data, *options, "--iters=9").run_dir
        part = helpers.train_tiny(tmp_path / "b", data, *options, "--iters=2").run_dir
        helpers.succeed(train, f"--resume={part}", "--iters=9")
        drop = [{k: v for k, v in row.items() if k != "timestamp"} for row in rows_of(whole)]
        assert drop == [{k: v for k, v in r.items() if k != "timestamp"} for r in rows_of(part)]
        assert len(drop) == 4
        states = [load_state(find_states(path)[0])["validation"] for path in (whole, part)]
        assert states[0]["num_since"] == states[1]["num_since"] == 3
        assert torch.equal(states[0]["best"], states[1]["best"])

    def test_another_share_is_told_on_resume(self, base, tmp_path):
        run_dir = helpers.train_tiny(tmp_path, helpers.toy_data(base), "--iters=1").run_dir
        found = helpers.succeed(train, f"--resume={run_dir}", "--iters=2", "--validation-share=0.3")
        assert "data.validation_share 0.0 there, 0.3 here" in found.output
        assert "The training data are not those that the run began with" in found.output

    def test_sets_and_features_are_validated_on_what_they_hold_out_anyway(self, base, tmp_path):
        sets = helpers.train_tiny(
            tmp_path / "sets",
            helpers.toy_data(base),
            "--context-drop=0.2",
            tiny=helpers.TINY_SETS,
        ).run_dir
        assert {"Validation/class_bar", "Validation/without_set"} <= rows_of(sets)[-1].keys()
        features = helpers.train_tiny(
            tmp_path / "features", tiny_features(base / "features"), tiny=helpers.TINY_FEATURES
        ).run_dir
        names = {name for name in rows_of(features)[-1] if name.startswith("Validation/")}
        assert {f"Validation/without_{name}" for name in ("both", "image", "text")} <= names
        assert any(name.startswith("Validation/loss_t0") for name in names)

    def test_scores_against_held_out_images_come_with_those_against_training_images(
        self, base, tmp_path
    ):
        options = ("--validation-share=0.3", "--metrics=fd_pixels,kid_pixels", "--iters=1")
        run_dir = helpers.train_tiny(tmp_path / "runs", helpers.toy_data(base), *options).run_dir
        (row,) = map(
            json.loads, (run_dir / "metric-fd_pixels_held_out.jsonl").read_text().split("\n")[:1]
        )
        num = len(ImageDataset(helpers.toy_data(base)).hold_out(0.3).validation_part)
        assert set(row["values"]) == {"fd_pixels_held_out", "fd_pixels_trained"}
        assert (row["num_images"], row["num_held_out"], row["num_trained"]) == (num, num, 42 - num)
        assert row["kimg"] == 0.008
        (row,) = map(
            json.loads, (run_dir / "metric-copies_pixels.jsonl").read_text().split("\n")[:1]
        )
        assert set(row["values"]) == {"nearer", "nearest"}
        assert (run_dir / "metric-kid_pixels_held_out.jsonl").is_file()


class TestCopies:
    def test_nearness_compares_every_pair(self):
        rng = np.random.default_rng(0)
        made, held_out = rng.integers(0, 9, 30), rng.integers(0, 9, 20)
        pairs = (made[:, None] < held_out) + 0.5 * (made[:, None] == held_out)
        assert nearness(made, held_out)["nearer"] == pytest.approx(pairs.mean())
        same = np.arange(100.0)
        assert nearness(same, same) == dict(nearer=0.5, nearest=0.01)
        assert nearness(np.zeros(5), same + 1) == dict(nearer=1.0, nearest=1.0)

    def test_copies_are_told_from_images_of_the_same_kind(self, base):
        data = ImageDataset(helpers.toy_data(base)).hold_out(0.3)
        detectors = {"pixels": PixelDetector((3, 8, 8))}
        parts = (data, data.validation_part)
        scores = HeldOutScores(get_metrics(["fd_pixels"]), *parts, detectors, CPU)
        found = {}
        for name, source in zip(("copies", "unseen"), parts, strict=True):
            images, _ = source.__getitems__(range(scores.num))
            batch = (torch.arange(scores.num), images)
            distances, copies = scores.rows(["fd_pixels"], lambda indices, batch=batch: [batch])
            found[name] = distances["values"] | copies["values"]
        assert found["copies"]["nearer"] == found["copies"]["nearest"] == 1.0
        assert found["unseen"]["nearer"] == 0.5
        assert found["unseen"]["fd_pixels_held_out"] == pytest.approx(0, abs=1e-4)
        assert found["copies"]["fd_pixels_held_out"] > found["copies"]["fd_pixels_trained"]
