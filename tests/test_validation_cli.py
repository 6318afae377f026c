"""Validation in the loop and by command: the same rows, pictures, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from feature_files import tiny_text
from helpers import (
    TINY_FEATURES,
    fail,
    first_snapshot,
    random_lpips,
    read_pixels,
    succeed,
    train_tiny,
)

import families
import fid as fid_script
import train as train_script
from data.features.dataset import FeatureDataset
from encoders.text import load_text_encoder
from evaluation.validation.config import TESTS, ValidationConfig
from evaluation.validation.networks import (
    EncodedTexts,
    chosen_tests,
    load_networks,
    make_validate,
    texts_of_edits,
)
from evaluation.validation.trials import Missing
from metrics.lpips import WEIGHTS_VARIABLE
from torch_utils.pictures import read_image
from training.asked import GeneratorOptions
from training.checkpoint import load_snapshot

METRICS = "--metrics=" + ",".join(f"validation_{name}" for name in TESTS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return ",".join(random_lpips(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def run_dir(feature_base, weights, tmp_path_factory):
    """A run that was put to all tests at its end."""
    outdir = tmp_path_factory.mktemp("runs")
    options = (METRICS, f"--lpips-weights={weights}", "--num-edits=2")
    train_tiny(outdir, feature_base / "features", *options, tiny=TINY_FEATURES)
    return next(outdir.iterdir())


@pytest.fixture
def snapshot(run_dir):
    return max(run_dir.glob("network-snapshot-*.pkl"))


def last_row_of(run_dir, name):
    return json.loads((run_dir / f"metric-validation_{name}.jsonl").read_text().splitlines()[-1])


def rows_of(path):
    return {row["metric"]: row for row in json.loads(path.read_text())["rows"]}


def test_a_run_records_each_test_at_its_end_with_a_picture(run_dir, feature_base):
    counts = FeatureDataset(feature_base / "features", "validation").counts
    for name in TESTS:
        row = last_row_of(run_dir, name)
        assert (row["kimg"], row["split"]) == (0.008, "validation")
        if name == "swap" and max(counts) == 1:
            assert row["reason"] == "no size has two held-out images"
            continue
        assert np.isfinite(row["value"])
        assert sum(row["buckets"].values()) == row["num"]
        pixels = read_image(run_dir / f"validation_{name}-000000.008.png")
        assert pixels.float().std() > 1
    row = last_row_of(run_dir, "reconstruction")
    assert list(row["buckets"].values()) == counts
    assert -1 < row["values"]["layout"] < 1
    log = (run_dir / "log.txt").read_text()
    assert re.search(r"validation_reconstruction: lpips \d\.\d{4}, .* at kimg 0\.01\n", log)


def test_the_command_finds_what_the_run_found(run_dir, snapshot, weights, tmp_path):
    command = ("validate", f"--network={snapshot}", f"--outdir={tmp_path}")
    output = succeed(fid_script, *command).output
    found = rows_of(tmp_path / "validation.json")
    for name in TESTS:
        row = last_row_of(run_dir, name)
        assert {"snapshot_hash", "ema", "sampling", "guidance", "lpips_hash"} <= row.keys()
        own = found[row["metric"]]
        for key in row.keys() - {"seconds", "snapshot", "kimg", "packages", "values", "per_item"}:
            if key != "value":
                assert own[key] == row[key], key
        # Pixels may differ by one of 255 levels, each of which moves a cosine by about 3e-6.
        for key, value in row["values"].items():
            expected = None if value is None else pytest.approx(value, rel=1e-4, abs=5e-5)
            assert own["values"][key] == expected, key
        assert row["metric"] in output
        picture = run_dir / f"{row['metric']}-000000.008.png"
        if picture.is_file():
            difference = read_pixels(tmp_path / f"{row['metric']}.png") - read_pixels(picture)
            assert abs(difference).max() <= 1


def test_the_protocol_of_the_command_acts(snapshot, tmp_path):
    values = []
    for number, option in enumerate(
        ("--steps=3", "--visual-scale=0.5", "--time-shift=3", "--lpips-net=vgg", "--steps=2")
    ):
        extra = ()
        if "vgg" in option:
            extra = ("--lpips-weights=" + ",".join(random_lpips(tmp_path, "vgg")),)
        outdir = tmp_path / str(number)
        command = ("validate", f"--network={snapshot}", f"--outdir={outdir}", option, *extra)
        succeed(fid_script, *command, "--tests=reconstruction", "--num-reconstructions=1")
        values.append(rows_of(outdir / "validation.json")["validation_reconstruction"]["value"])
    assert len(set(values)) == 5


def test_without_published_weights_the_run_goes_on_and_says_what_is_absent(
    feature_base, tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise ValueError("Could not download the weights.")

    monkeypatch.setattr("metrics.weights.fetch", refuse)
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    outdir = tmp_path / "runs"
    output = train_tiny(
        outdir,
        feature_base / "features",
        "--metrics=validation_divergence,validation_reconstruction",
        tiny=TINY_FEATURES,
    ).output
    run_dir = next(outdir.iterdir())
    row = last_row_of(run_dir, "divergence")
    assert (row["value"], row["values"]["lpips"]) == (None, None)
    assert "Could not download the weights" in row["reason"]
    row = last_row_of(run_dir, "reconstruction")
    assert row["values"]["layout"] is not None
    assert "Validation continues without lpips: LPIPS needs its weights" in output


class TestNetworks:
    @pytest.fixture
    def dataset(self, feature_base):
        return FeatureDataset(feature_base / "features", "validation", text_lengths=(8, 32))

    def load(self, dataset, weights, *tests, **changes):
        config = ValidationConfig(tests=tests, lpips_weights=tuple(weights.split(",")))
        return load_networks(config, dataset, "cpu", **changes)

    def test_are_those_that_the_tests_need_and_that_the_record_names(self, dataset, weights):
        networks = self.load(dataset, weights, *TESTS)
        assert networks.visual.sha256 == dataset.record.visual["hash"]
        assert networks.text.sha256 == dataset.record.text["hash"]
        assert networks.absent() == {}
        networks = self.load(dataset, weights, "swap")
        assert isinstance(networks.visual, Missing)
        assert isinstance(networks.text, Missing)
        assert networks.absent() == {}

    def test_that_are_named_must_be_there_and_others_may_be_missing(
        self, dataset, weights, feature_base, tmp_path
    ):
        dataset.record.visual["location"] = str(tmp_path / "gone")
        networks = self.load(dataset, weights, "reconstruction")
        assert "gone is neither a folder nor a Hugging Face id" in networks.absent()["visual"]
        with pytest.raises(ValueError, match="gone is neither a folder nor a Hugging Face id"):
            self.load(dataset, weights, "reconstruction", visual=str(tmp_path / "gone"))
        with pytest.raises(ValueError, match=r"nothing\.pth: no such file"):
            self.load(dataset, str(tmp_path / "nothing.pth"), "swap")
        with pytest.raises(ValueError, match=r"--text: .* cannot be used"):
            self.load(dataset, weights, "text_edit", text=str(feature_base / "visual"))
        other = tiny_text(tmp_path / "other", seed=1)
        with pytest.raises(ValueError, match="other is another encoder"):
            self.load(dataset, weights, "text_edit", text=str(other))

    def test_of_texts_encode_in_advance_what_the_encoder_would_encode(self, dataset, feature_base):
        encoder = load_text_encoder(str(feature_base / "text"), "cpu")
        texts = texts_of_edits(dataset, 3)
        kept = EncodedTexts(encoder, texts)
        assert kept.sha256 == encoder.sha256
        found, expected = kept.encode(texts[:2]), encoder.encode(texts[:2])
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        with pytest.raises(KeyError):
            kept.encode(["a text that no edit has"])

    def test_the_function_of_the_loop_does_the_tests_of_the_names_it_is_given(
        self, dataset, weights, snapshot
    ):
        loaded, device = load_snapshot(snapshot), torch.device("cpu")
        generator = families.of(loaded.config).load(loaded, device, GeneratorOptions())
        config = ValidationConfig(lpips_weights=tuple(weights.split(",")), num_divergence=1)
        rows, pictures = make_validate(config, dataset, torch.device("cpu"))(
            ("validation_divergence",), generator
        )
        assert [row["metric"] for row in rows] == ["validation_divergence"]
        assert rows[0]["num"] == 1
        assert set(pictures) == {"validation_divergence"}


def test_what_has_no_effect_or_is_unknown_is_refused(feature_base, snapshot, tmp_path, shared_dir):
    train = (f"--outdir={tmp_path}", f"--data={feature_base / 'features'}", *TINY_FEATURES)
    for options, words in (
        (
            ("--metrics=fid10k_full",),
            "got fid10k_full, but the tests of a feature-conditioned model",
        ),
        (("--metrics=validation_swaps",), "Did you mean 'validation_swap'?"),
        (("--num-swaps=3",), "--num-swaps has no effect with --metrics=none"),
        (("--metrics=validation_swap", "--num-edits=3"), "--num-edits has no effect with"),
        (("--metrics=validation_swap", "--metrics-ref=x"), "metrics-ref has no effect on feature"),
        (("--metrics=validation_swap", "--inception=x"), "--inception has no effect with"),
        (("--metrics=validation_swap", "--lpips-weights=absent"), "absent: no such file"),
        (("--num-shown=0",), "--num-shown: got 0"),
    ):
        assert words in fail(train_script, *train, *options), options
    assert list(tmp_path.iterdir()) == []
    command = ("validate", f"--network={snapshot}", f"--outdir={tmp_path / 'report'}")
    for options, words in (
        (("--tests=swaps",), "--tests: got swaps, but the tests of a feature-conditioned model"),
        (("--tests=,",), "--tests: there is nothing to do"),
        (("--tests=swap", "--num-edits=3"), "--num-edits has no effect with --tests=swap"),
        (("--tests=swap", "--visual=x"), "--visual: only the test reconstruction uses"),
        (("--tests=swap", "--cfg-scale=2"), "--cfg-scale"),
        ((f"--data={tmp_path}",), str(tmp_path)),
    ):
        assert words in fail(fid_script, *command, *options), options
    assert not (tmp_path / "report").exists()
    base = shared_dir / "validation"
    base.mkdir(exist_ok=True)
    other = ("validate", f"--network={first_snapshot(base)}", f"--outdir={tmp_path}")
    assert "was not trained on text and visual features" in fail(fid_script, *other)
    assert "--num-swaps: preset cifar10 has no such option" in fail(
        train_script, "--preset=cifar10", "--num-swaps=3", "--dry-run"
    )


def test_features_of_other_encoders_are_refused(snapshot, feature_base, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for path in (feature_base / "features").iterdir():
        (folder / path.name).symlink_to(path)
    record = json.loads((folder / "features.json").read_text())
    record["text"]["hash"] = "0" * 64
    (folder / "features.json").unlink()
    (folder / "features.json").write_text(json.dumps(record))
    command = ("validate", f"--network={snapshot}", f"--outdir={tmp_path}", f"--data={folder}")
    assert "was made with another encoder (--text) than the model's" in fail(fid_script, *command)


def test_tests_have_the_names_of_metrics():
    assert chosen_tests(["validation_swap", "validation_swap"], option="--metrics") == ("swap",)
    assert chosen_tests([], option="--metrics") == ()
