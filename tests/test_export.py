"""Weights out and in again: safetensors, the hub, torch.export, and the model card."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch

import export
import families
import generate
from configs import PRESETS
from diffusion.denoiser import Denoiser
from diffusion.precond import make_precond
from evaluation.model_card import model_card, write_export
from models import build_network
from sampling.traced import TraceableDenoiser, example_inputs, is_program, trace_denoiser
from training import checkpoint
from training.checkpoint import Snapshot, load_snapshot
from training.feature_objective import patch_bias
from training.portable import find_snapshot, open_header, open_snapshot, split_hub_name

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[1]
SMALL = dict(base_dim=16, hidden_dim=48, num_heads=4, time_dim=32, hdim=32, encoder_heads=2)
SMALL["encoder_depth"] = 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def exported(base):
    run_dir = helpers.trained_run(base)
    helpers.succeed(export, f"--network={run_dir}", f"--dest={base / 'out'}")
    return base / "out"


def same(first, second):
    """Whether two snapshots are of the same network, data and training."""
    for name in ("sha256", "config", "data", "progress", "packages"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.state_dict.keys() == second.state_dict.keys()
    return all(torch.equal(first.state_dict[n], second.state_dict[n]) for n in first.state_dict)


def test_an_export_is_the_snapshot_and_back(base, exported, tmp_path, monkeypatch):
    original = load_snapshot(helpers.trained_snapshot(base))
    assert same(open_snapshot(exported), original)
    assert same(open_snapshot(exported / "model.safetensors"), original)
    assert open_header(exported) == (original.config, original.progress)
    back = tmp_path / "back.pkl"
    # The versions that trained it stay, whichever export it.
    monkeypatch.setattr(checkpoint, "package_versions", lambda: dict(torch="another"))
    helpers.succeed(export, f"--network={exported}", f"--dest={back}", "--format=snapshot")
    assert same(load_snapshot(back), original)


def test_every_program_takes_an_export_and_a_run_folder(base, exported, tmp_path):
    run_dir = helpers.trained_run(base)
    assert find_snapshot(run_dir) == helpers.trained_snapshot(base)
    for name, network in (("a", exported), ("b", run_dir), ("c", exported / "model.safetensors")):
        helpers.succeed(
            generate, f"--network={network}", "--seeds=0-1", f"--outdir={tmp_path / name}"
        )
    files = [sorted((tmp_path / name).glob("*.png")) for name in "abc"]
    assert len(files[0]) == 2
    for others in files[1:]:
        pairs = zip(files[0], others, strict=True)
        assert all(first.read_bytes() == other.read_bytes() for first, other in pairs)
    data = helpers.toy_data(base)
    start = f"--transfer={exported}"
    run_dir = helpers.train_tiny(tmp_path / "runs", data, "--cond", start).run_dir
    assert json.loads((run_dir / "warm-start.json").read_text())["missing"] == []


def test_what_is_damaged_or_of_two_exports_gets_a_sentence(exported, tmp_path):
    def of(change):
        folder = tmp_path / change.__name__
        folder.mkdir()
        for path in exported.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder)
        with pytest.raises(ValueError) as error:
            open_snapshot(folder)
        return str(error.value)

    def cut(folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])

    def other_weights(folder):
        weights = folder / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    def no_config(folder):
        (folder / "config.json").unlink()

    def no_json(folder):
        (folder / "config.json").write_text("{")

    def another_kind(folder):
        (folder / "config.json").write_text(json.dumps({"format": "x"}))

    def unknown_setting(folder):
        about = json.loads((folder / "config.json").read_text())
        about["config"]["model"]["surprise"] = 1
        (folder / "config.json").write_text(json.dumps(about))

    assert "model.safetensors" in of(cut)
    assert "its weights do not belong to config.json" in of(other_weights)
    assert "no config.json beside it" in of(no_config)
    assert "not valid JSON" in of(no_json)
    assert "not written by export.py" in of(another_kind)
    assert "surprise" in of(unknown_setting)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="a folder without a snapshot"):
        find_snapshot(empty)


def test_options_that_do_not_go_together_are_refused(exported, tmp_path):
    given = f"--network={exported}"
    for args, text in (
        (["--dest=a.pkl", "--format=torch-export"], "ends in .pt2"),
        (["--dest=a.pt2", "--format=torch-export", "--push=me/it"], "--push: applies to"),
        ([f"--dest={tmp_path}", "--private"], "has no effect without --push"),
        ([f"--dest={tmp_path}", "--size=8x8"], "--size: applies to --format=torch-export"),
        (["--dest=a.pt2", "--format=torch-export", "--size=9x9"], "accepted: 8x8"),
        ([f"--dest={tmp_path}", "--push=nothing"], "accepted: ORG/NAME"),
    ):
        assert text in helpers.fail(export, given, *args)
    assert split_hub_name("hf://a/b@v1") == ("a/b", "v1")


# The model card.


def test_the_card_has_the_scores_of_these_weights_and_their_protocol(base, exported):
    snapshot = load_snapshot(helpers.trained_snapshot(base))
    row = dict(
        metric="fid|2k <b>",
        value=1.25,
        values={"fid|2k <b>": 1.25},
        num_images=2000,
        nfe=7,
        snapshot_hash=snapshot.sha256,
        sampling={"sampler": "heun"},
    )
    other = dict(metric="validation_text", value=0.5, num=31, snapshot_hash=snapshot.sha256, nfe=9)
    card = model_card(snapshot, [row, other], location="hf://me/tiny", picture="samples.png")
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    about = {
        key: json.loads(value)
        for key, _, value in (line.partition(": ") for line in header.splitlines())
    }
    assert about["library_name"] == "setdiffit"
    assert about["model-index"][0]["name"] == "tiny"
    assert about["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.25
    assert "| fid\\|2k &lt;b> | 1.25 | 2,000 |" in body
    assert "| validation_text | 0.5 | 31 |" in body
    for text in ("| nfe | 7 |", "| sampler | heun |", "# tiny", "![Samples](samples.png)"):
        assert text in body
    first, second = body.index("fid\\|2k &lt;b>:\n"), body.index("validation_text:\n")
    assert first < body.index("| nfe | 7 |") < second < body.index("| nfe | 9 |")
    assert 'setdiffit.load("hf://me/tiny")' in body
    assert snapshot.data.name in body
    written = (exported / "README.md").read_text()
    assert "No scores of these weights are known." in written
    assert (exported / "samples.png").is_file()
    assert str(base) not in written.partition("## Use")[0]


def test_scores_beside_the_snapshot_are_in_the_card_if_they_are_of_it(base, tmp_path):
    path = helpers.trained_snapshot(base)
    snapshot = load_snapshot(path)
    for name, digest in (("own", snapshot.sha256), ("foreign", "0" * 64)):
        row = dict(metric=name, value=2.5, snapshot_hash=digest)
        (path.parent / f"metric-{name}.jsonl").write_text(json.dumps(row) + "\n")
    (path.parent / "metric-broken.jsonl").write_text("{")
    try:
        helpers.succeed(export, f"--network={path}", f"--dest={tmp_path / 'out'}")
    finally:
        for left in path.parent.glob("metric-*.jsonl"):
            left.unlink()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| own | 2.5 |" in card
    assert "foreign" not in card.partition("## Use")[0]


# The hub.

_PUSH_AND_LOAD = """
import sys
import export, setdiffit
from dnnlib.program import run
sys.argv = ["export.py", "--network=" + sys.argv[1], "--dest=" + sys.argv[2], "--push=me/tiny"]
try:
    run(export.main)
except SystemExit as stop:
    assert not stop.code, stop.code
print("sha", setdiffit.load("hf://me/tiny").snapshot.sha256)
for name in ("hf://me/nothing", "hf://me/empty"):
    try:
        setdiffit.load(name)
    except ValueError as error:
        print("refused", error)
"""


def test_a_model_that_was_pushed_is_loaded_from_the_hub(base, tmp_path):
    pytest.importorskip("huggingface_hub")
    (tmp_path / "hub" / "me" / "empty").mkdir(parents=True)
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "hub_server.py", tmp_path / "hub"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline().strip()
        own = dict(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"), HF_TOKEN="hf_made_up")
        own.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", NO_PROXY="*")
        path = helpers.trained_snapshot(base)
        found = subprocess.run(
            [sys.executable, "-c", _PUSH_AND_LOAD, path, tmp_path / "out"],
            env={**os.environ, **own},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.kill()
        server.wait()
    assert found.returncode == 0, found.stderr
    assert f"sha {load_snapshot(path).sha256}" in found.stdout
    assert "hf://me/nothing: cannot be fetched from the hub (404" in found.stdout
    assert "hf://me/empty: holds no model.safetensors" in found.stdout
    there = {path.name for path in (tmp_path / "hub" / "me" / "tiny").iterdir()}
    assert there == {"README.md", "config.json", "model.safetensors", "samples.png"}


# Programs of torch.export.


def small_config(preset):
    """A run of a preset's architecture, narrow and shallow."""
    chosen = PRESETS[preset]
    run = families.of(chosen.run).fit(chosen.run, None, chosen.num_classes or 10)
    names = {field.name for field in dataclasses.fields(run.model)}
    changes = {name: value for name, value in SMALL.items() if name in names}
    is_staged = isinstance(run.model.num_blocks, tuple)
    changes["num_blocks"] = (1,) if is_staged else 2
    if "cross_attn_layers" in names:
        changes["cross_attn_layers"] = ()
    if "buckets" in names:
        changes["buckets"] = ("256x128", "128x128")
    return run.changed("model", **changes)


def small_snapshot(preset):
    """A snapshot of :func:`small_config`, with random weights."""
    run = small_config(preset)
    torch.manual_seed(0)
    network = build_network(run.model)
    with torch.no_grad():
        for param in network.parameters():
            param.add_(0.05 * torch.randn_like(param))
    facts = dict(config=run, data=None, progress={}, packages={}, sha256="")
    return Snapshot(path=Path("made.pkl"), state_dict=network.state_dict(), **facts)


def distinct_presets():
    """Return the presets whose small models differ."""
    found = {}
    for preset in PRESETS:
        config = small_config(preset)
        found.setdefault((config.model, config.precond), preset)
    return list(found.values())


@pytest.mark.parametrize("preset", distinct_presets())
@torch.no_grad()
def test_the_program_of_every_preset_computes_its_denoiser(preset):
    snapshot = small_snapshot(preset)
    size = snapshot.config.model.image_sizes[0]
    program = trace_denoiser(snapshot, size).module()
    expected = TraceableDenoiser(snapshot.build(), snapshot, size)
    for num in (1, 3):
        inputs = example_inputs(snapshot, num, size)
        torch.testing.assert_close(program(*inputs), expected(*inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kimg_so_far", [0, 4, 8])
def test_a_program_lets_patches_in_as_far_as_its_snapshot(kimg_so_far):
    snapshot = small_snapshot("nanodit-tiny")
    config = snapshot.config.changed("features", patch_bias_kimg=8.0)
    progress = dict(cur_nimg=1000 * kimg_so_far)
    snapshot = dataclasses.replace(snapshot, config=config, progress=progress)
    size = config.model.image_sizes[0]
    x, sigma, cond = example_inputs(snapshot, 2, size)
    bias = torch.full(
        [2], patch_bias(config.features, config.model, 1000 * kimg_so_far, x[0].shape)
    )
    network = snapshot.build()
    denoise = Denoiser(network, make_precond(config.precond))
    expected = denoise(x, sigma, network.context({**cond, "size": size, "patch_bias": bias}, num=2))
    found = trace_denoiser(snapshot, size).module()(x, sigma, cond)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    without = denoise(x, sigma, network.context({**cond, "size": size}, num=2))
    assert torch.allclose(found, without, rtol=1e-4, atol=1e-4) == (kimg_so_far == 8)


_RUN_ALONE = """
import sys, torch
assert not any(name.startswith(("models", "training")) for name in sys.modules)
about = {"config.json": ""}
program = torch.export.load(sys.argv[1], extra_files=about).module()
inputs, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program(*inputs), expected, rtol=1e-5, atol=1e-5)
assert '"preset"' in about["config.json"]
"""


@torch.no_grad()
def test_a_program_runs_without_this_project(base, tmp_path):
    path = helpers.trained_snapshot(base)
    dest = tmp_path / "denoiser.pt2"
    arguments = (f"--network={path}", f"--dest={dest}", "--format=torch-export")
    dest.write_bytes(b"another's")
    assert "was not made by this command" in helpers.fail(export, *arguments)
    helpers.succeed(export, *arguments, "--overwrite")
    assert is_program(dest)
    snapshot = load_snapshot(path)
    inputs = example_inputs(snapshot, 3, (8, 8))
    expected = TraceableDenoiser(snapshot.build(), snapshot, (8, 8))(*inputs)
    torch.save((inputs, expected), tmp_path / "inputs.pt")
    subprocess.run(
        [sys.executable, "-c", _RUN_ALONE, dest, tmp_path / "inputs.pt"], cwd=tmp_path, check=True
    )


def test_a_model_card_is_written_where_a_name_is_no_text(base, tmp_path):
    snapshot = load_snapshot(helpers.trained_snapshot(base))
    write_export(snapshot, tmp_path, location="q\udcff/name")
    assert "q?/name" in (tmp_path / "README.md").read_text(encoding="utf-8")
