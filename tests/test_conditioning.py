"""What conditions do, as the report of them tells it, against networks of which that is known."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from feature_files import tiny_features
from helpers import (
    TINY,
    TINY_FEATURES,
    TINY_LATENT,
    fail,
    set_snapshot,
    succeed,
    toy_data,
    train_tiny,
    trained_snapshot,
    unconditional_snapshot,
)
from latent_files import tiny_autoencoder
from test_feature_dit import features as tiny_conditions
from test_feature_dit import network_of
from training_runs import assert_same_run

import families
import fid
import sampling.images
import train
from diffusion.precond import EDMPrecond, FlowPrecond, TablePrecond
from diffusion.schedules import linear_sigmas
from evaluation.conditioning.panel import derangement
from evaluation.conditioning.picture import COLOURS, report_picture
from evaluation.conditioning.report import (
    ALL_LEVELS,
    CHANGES,
    QUANTILES,
    describe_report,
    report_conditions,
    signed_percent,
)
from models.attention_probe import attention_shares, record_attention
from torch_utils.pictures import read_image
from training.checkpoint import load_snapshot
from training.config import RunConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def feature_snapshot(base):
    data, runs = tiny_features(base / "features"), base / "conditioning"
    if not runs.is_dir():
        train_tiny(runs, data, "--iters=8", tiny=TINY_FEATURES)
    return max(runs.glob("*/network-snapshot-*.pkl"))


def panel_of(snapshot, num, data=None):
    return families.of(snapshot.config).panel(snapshot.config, data, num, CPU)


def report_on(snapshot, panel, **options):
    source = dict(snapshot_hash=snapshot.sha256, network=str(snapshot.path))
    network = snapshot.build(CPU)
    run = (network, snapshot.config, panel, CPU, source)
    return report_conditions(*run, trained_nimg=snapshot.trained_nimg, **options)


def report_of(path, num=8, change=None, data=None, **options):
    """Return the report on a snapshot, whose weights ``change`` may have changed."""
    snapshot = load_snapshot(path)
    if change is not None:
        change(snapshot.state_dict)
    return report_on(snapshot, panel_of(snapshot, num, data), **options)


def overall(report):
    return {(r["condition"], r["change"]): r for r in report.rows if r["sigma"] == ALL_LEVELS}


@pytest.mark.parametrize("change", ["shuffled", "swapped"])
def test_no_image_gets_a_condition_of_its_own_kind_where_that_can_be(change):
    for kinds in ([0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 2], [5, 5, 5, 1, 2, 3], list(range(9))):
        source, rows = derangement(kinds, change)
        kinds = np.array(kinds)
        assert (kinds[source][rows] != kinds[rows]).all()
        assert rows.sum() >= len(kinds) - 1 if change == "swapped" else rows.all()
        if change == "shuffled":
            assert sorted(source) == list(range(len(kinds)))
        else:
            assert (source[source] == np.arange(len(kinds))).all()
    assert not derangement([3, 3, 3], change)[1].any()


@pytest.mark.parametrize(
    "precond", [EDMPrecond(), FlowPrecond(), TablePrecond(linear_sigmas(100))], ids=type
)
def test_noise_levels_are_quantiles_of_those_in_training(precond):
    drawn = precond.draw_sigma(10_000, torch.Generator().manual_seed(5), "cpu")
    for quantile, level in zip(QUANTILES, precond.training_levels(QUANTILES), strict=True):
        assert (drawn <= level).float().mean() == pytest.approx(quantile, abs=0.03)


def test_a_class_that_a_network_does_not_see_changes_nothing(base):
    def disconnect(state):
        state["conditioner.label_weight"].zero_()
        state["conditioner.null"].zero_()

    path = trained_snapshot(base)
    for row in report_of(path, change=disconnect).rows:
        assert row["values"]["output_change"] == 0
        assert row["values"]["loss_change"] == 0
        assert row["values"]["worse_share"] == 0
    for row in overall(report_of(path)).values():
        assert row["values"]["output_change"] > 0
        assert row["num"] == 8


def test_changes_are_those_of_a_computation_by_hand(base):
    from diffusion.denoiser import Denoiser
    from diffusion.precond import make_precond
    from torch_utils.rng import SeededNoise

    snapshot = load_snapshot(trained_snapshot(base))
    panel = panel_of(snapshot, 6)
    (group,) = panel.groups
    report = report_on(snapshot, panel)
    precond, network = make_precond(snapshot.config.precond), snapshot.build()
    sigma = precond.training_levels(QUANTILES)[2]
    noise = SeededNoise(range(6)).randn(group.inputs.shape[1:])
    denoise = Denoiser(network, precond)
    labels, source = group.cond["label"], derangement(group.kinds, "shuffled")[0]
    assert (labels[source] != labels).all()
    with torch.no_grad():
        own, other, null = (
            denoise(group.inputs + sigma * noise, sigma, network.context({"label": label}, drop))
            for label, drop in (
                (labels, None),
                (labels[source], None),
                (labels, torch.ones(6, dtype=torch.bool)),
            )
        )
    spread = (own - own.mean(0)).square().mean().sqrt()
    losses = [(x - group.inputs).square().mean((1, 2, 3)) for x in (own, other, null)]
    rows = {row["change"]: row["values"] for row in report.rows if row["sigma"] == sigma}
    for name, varied, loss in (("shuffled", other, losses[1]), ("dropped", null, losses[2])):
        change = (varied - own).square().mean((1, 2, 3)).sqrt() / spread
        assert rows[name]["output_change"] == pytest.approx(change.mean().item(), rel=1e-4)
        rise = (loss - losses[0]) / losses[0].mean()
        assert rows[name]["loss_change"] == pytest.approx(rise.mean().item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", ["class", "sets", "features"])
def test_a_report_does_not_depend_on_the_batch(base, feature_snapshot, family):
    path = dict(
        zip(
            ("class", "sets", "features"),
            (trained_snapshot(base), set_snapshot(base), feature_snapshot),
            strict=True,
        )
    )[family]
    whole, parts = (overall(report_of(path, batch=batch)) for batch in (16, 1))
    assert whole.keys() == parts.keys()
    for key, row in whole.items():
        for name, value in row["values"].items():
            assert parts[key]["values"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_a_null_that_was_never_trained_is_absent_with_a_reason(base):
    snapshot = load_snapshot(trained_snapshot(base))
    untrained = train_tiny(
        base / "no-drop", toy_data(base), "--cond", "--label-drop=0", "--iters=1"
    ).run_dir
    report = report_of(max(untrained.glob("*.pkl")))
    row = overall(report)["class", "dropped"]
    assert (row["value"], row["num"]) == (None, 0)
    assert row["reason"] == "trained without --label-drop"
    assert "absent: trained without --label-drop" in describe_report(report)
    assert overall(report)["class", "shuffled"]["value"] > 0
    assert snapshot.config.training.label_drop > 0


def test_images_of_a_latent_model_are_encoded_for_the_panel(base, tmp_path):
    vae = tiny_autoencoder(tmp_path / "vae")
    run_dir = train_tiny(
        tmp_path / "runs",
        toy_data(base),
        *("--cond", "--iters=4"),
        tiny=[*TINY_LATENT, f"--vae={vae}"],
    ).run_dir
    snapshot = load_snapshot(max(run_dir.glob("*.pkl")))
    panel = panel_of(snapshot, 6)
    assert panel.groups[0].inputs.shape[1:] == snapshot.config.model.input_shape
    assert overall(report_on(snapshot, panel))["class", "shuffled"]["value"] > 0


def test_sets_are_varied_as_a_whole(base):
    report = report_of(set_snapshot(base), num=6)
    rows = overall(report)
    assert set(rows) == {("support", change) for change in CHANGES}
    assert rows["support", "dropped"]["value"] > 0
    # Of a single unseen class, no set is of another.
    assert rows["support", "shuffled"]["reason"] == "no two images of the panel differ in it"
    assert report.attention == []
    assert "attention" not in describe_report(report)


def test_changes_of_an_image_alone_in_its_size_are_measured_by_its_own_deviation(feature_snapshot):
    snapshot = load_snapshot(feature_snapshot)
    panel = panel_of(snapshot, 3)
    assert [len(group.inputs) for group in panel.groups] == [1, 1, 1]
    changes = [row["value"] for row in report_on(snapshot, panel).overall()]
    assert changes
    assert max(changes) < 10


def test_features_are_varied_one_by_one_over_all_buckets(base, feature_snapshot):
    report = report_of(feature_snapshot, num=12)
    rows = overall(report)
    names = ("text", "CLS", "patches", "CLS + patches")
    assert set(rows) == {(name, change) for name in names for change in CHANGES}
    assert all(row["value"] > 0 for row in rows.values() if row["num"])
    assert "never dropped without the other" in rows["CLS", "dropped"]["note"]
    assert "note" not in rows["CLS + patches", "dropped"]
    assert "3 bucket(s)" in rows["text", "dropped"]["panel"]
    for layer in report.attention:
        assert list(layer) == ["text", "CLS", "patches"]
        assert sum(layer.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("kimg_so_far", "is_in"), [(0, False), (8, True)])
def test_patches_that_are_not_let_in_yet_show_no_effect(feature_snapshot, kimg_so_far, is_in):
    snapshot = load_snapshot(feature_snapshot)
    snapshot = dataclasses.replace(
        snapshot,
        config=snapshot.config.changed("features", patch_bias_kimg=8.0),
        progress=dict(snapshot.progress, cur_nimg=1000 * kimg_so_far),
    )
    report = report_on(snapshot, panel_of(snapshot, 12))
    for layer in report.attention:
        assert (layer["patches"] > 0.3) == is_in
        assert (layer["patches"] < 0.01) != is_in
    rows = overall(report)
    small = rows["patches", "dropped"]["value"] < 0.05 * rows["text", "dropped"]["value"]
    assert small != is_in


@pytest.mark.parametrize("progress", [dict(cur_nimg=3000), {}])
def test_a_report_on_a_file_is_of_as_far_as_it_was_trained(
    feature_snapshot, tmp_path, monkeypatch, progress
):
    snapshot, counts = load_snapshot(feature_snapshot), []
    snapshot = dataclasses.replace(snapshot, progress=progress)
    monkeypatch.setattr(sampling.images, "cached_snapshot", lambda _: snapshot)
    monkeypatch.setattr(
        type(snapshot.config), "cond_after", lambda self, nimg, shape: counts.append(nimg) or {}
    )
    succeed(fid, "conditions", f"--network={feature_snapshot}", "--num=4")
    assert set(counts) == {progress.get("cur_nimg", 0)}


def test_features_are_normalised_as_in_training_not_by_the_data_s_statistics(
    feature_snapshot, monkeypatch
):
    snapshot, seen = load_snapshot(feature_snapshot), []
    known = snapshot.data.features
    other = {n: dict(s, std=[2 * d for d in s["std"]]) for n, s in known["statistics"].items()}
    data = dataclasses.replace(snapshot.data, features=dict(known, statistics=other))
    monkeypatch.setattr(
        sampling.images, "cached_snapshot", lambda _: dataclasses.replace(snapshot, data=data)
    )
    make = type(families.of(snapshot.config)).panel
    monkeypatch.setattr(
        type(families.of(snapshot.config)),
        "panel",
        lambda *args: seen.append(make(*args)) or seen[-1],
    )
    succeed(fid, "conditions", f"--network={feature_snapshot}", "--num=4")
    for plain, group in zip(panel_of(snapshot, 4).groups, seen[0].groups, strict=True):
        torch.testing.assert_close(2 * group.inputs, plain.inputs)
        torch.testing.assert_close(2 * group.cond["patches"], plain.cond["patches"])


def test_a_model_that_does_not_look_at_patches_shows_no_effect_of_them(feature_snapshot):
    def blind(state):
        for name in state:
            if name.startswith("conditioner.dino_patch_proj"):
                state[name].zero_()

    rows = overall(report_of(feature_snapshot, num=12, change=blind))
    assert all(rows["patches", change]["values"].get("output_change", 0) == 0 for change in CHANGES)
    assert rows["text", "dropped"]["value"] > 0


def test_shares_of_attention_are_those_of_a_softmax_by_hand():
    network = network_of()
    cond = tiny_conditions()
    context = network.context(cond)
    module = network.backbone.blocks[0].cross
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    shares = attention_shares(module, x, context.tokens, context.mask, lengths=[5, 1, 16])
    expected = torch.zeros(3, 3)
    with torch.no_grad():
        q = module.q(x).unflatten(2, (4, 8))
        k = module.kv(context.tokens)[..., :32].unflatten(2, (4, 8))
        for image in range(3):
            for head in range(4):
                scores = q[image, :, head] @ k[image, :, head].T / 8**0.5
                scores[:, ~context.mask[image]] = -torch.inf
                weights = scores.softmax(1)
                for part, rows in enumerate((slice(0, 5), slice(5, 6), slice(6, 22))):
                    expected[image, part] += weights[:, rows].sum() / (4 * 7)
    torch.testing.assert_close(shares, expected, rtol=1e-4, atol=1e-5)
    # An added bias counts too: patches out of reach get nothing.
    hidden = network.context({**cond, "patch_bias": torch.full([3], -torch.inf)})
    shares = attention_shares(module, x, hidden.tokens, hidden.mask, lengths=[5, 1, 16])
    assert not shares[:, 2].any()


def test_recording_changes_nothing_and_ends_with_its_block():
    network = network_of()
    cond = tiny_conditions()
    x, t = torch.randn(3, 4, 8, 8), torch.full([3], 0.5)
    expected = network(x, t, network.context(cond))
    with record_attention(network.backbone, dict(text=5, CLS=1, patches=16)) as mass:
        torch.testing.assert_close(network(x, t, network.context(cond)), expected, rtol=0, atol=0)
    before = mass.by_layer()
    assert len(before) == 2
    network(x, t, network.context(cond))
    assert mass.by_layer() == before
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_the_command_prints_a_table_and_writes_rows_and_a_picture(base, feature_snapshot, tmp_path):
    out, rows = tmp_path / "report.png", tmp_path / "rows.jsonl"
    output = succeed(
        fid,
        *("conditions", f"--network={feature_snapshot}", "--num=12"),
        *(f"--out={out}", f"--jsonl={rows}"),
    ).output
    assert "text           dropped" in output
    assert "attention of layer 0" in output
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["metric"] for row in found} == {"conditioning", "conditioning_attention"}
    picture = read_image(out)
    assert picture.shape[0] == 3
    assert len(picture.flatten(1).unique(dim=1).T) > 50

    data = toy_data(base)
    arguments = ("conditions", f"--network={trained_snapshot(base)}", f"--data={data}", "--num=6")
    output = succeed(fid, *arguments).output
    assert "class          swapped" in output
    assert "no condition to vary" in fail(
        fid, "conditions", f"--network={unconditional_snapshot(base)}"
    )


def test_the_picture_says_what_is_absent(base):
    report = report_of(set_snapshot(base), num=4)
    picture = report_picture(report, "title")
    assert picture.width == 1200
    assert picture.height > 200
    pixels = np.asarray(picture)
    rows = overall(report)
    for change, colour in COLOURS.items():
        shown = (pixels[80:] == tuple(bytes.fromhex(colour[1:]))).all(2).sum()
        assert (shown > 50) == any(row["values"] for key, row in rows.items() if key[1] == change)
    assert np.array_equal(pixels, report_picture(report, "title"))


@pytest.mark.parametrize(
    ("share", "text"), [(0.0151, "+1.5%"), (-0.2, "-20.0%"), (-1e-5, "0.0%"), (1e-5, "0.0%")]
)
def test_what_rounds_to_nothing_has_no_sign(share, text):
    assert signed_percent(share) == text


def test_a_run_reports_on_conditions_as_the_command_does_and_trains_as_without(
    base, tmp_path, monkeypatch
):
    data, counts = toy_data(base), []
    monkeypatch.setattr(
        RunConfig, "cond_after", lambda self, nimg, shape: counts.append(nimg) or {}
    )
    options = ("--cond", "--iters=8", "--batch=8", "--log-interval=4", "--snap=1", "--board=none")
    run = train_tiny(tmp_path / "with", data, *options, "--report-conditions=8")
    snapshots = sorted(run.run_dir.glob("network-snapshot-*.pkl"))
    assert counts == [load_snapshot(path).trained_nimg for path in snapshots]
    plain = train_tiny(tmp_path / "plain", data, *options)
    assert_same_run(run.run_dir, plain.run_dir)
    assert len(snapshots) == 3
    for path in snapshots:
        name = path.stem.replace("network-snapshot", "conditioning")
        lines = (run.run_dir / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        expected = report_of(path, num=8).rows
        assert [row["value"] for row in rows] == [row["value"] for row in expected]
        assert {row["network"] for row in rows} == {str(path)}
        assert read_image(run.run_dir / f"{name}.png").float().std() > 1
    assert "changes the output by" in run.output
    assert "Change of the output" in (run.run_dir / "report.html").read_text()
    assert "conditioning" not in plain.output


def test_a_panel_of_one_image_from_which_nothing_can_be_measured_ends_no_run(base, tmp_path):
    options = ("--cond", "--label-drop=0", "--iters=1", "--batch=8", "--snap=1", "--board=none")
    run = train_tiny(tmp_path, toy_data(base), *options, "--report-conditions=1")
    assert "no change of a condition whose effect could be measured" in run.output
    assert list(run.run_dir.glob("conditioning-*.jsonl"))


def test_a_report_that_would_be_empty_is_refused_before_training(base, tmp_path):
    data = toy_data(base)
    arguments = (f"--data={data}", f"--outdir={tmp_path / 'runs'}", *TINY)
    message = fail(train, *arguments, "--report-conditions=8", "--no-cond", "--label-drop=0")
    assert "no condition to vary" in message
    assert not (tmp_path / "runs").exists()
