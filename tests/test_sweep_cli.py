"""fid.py sweep from the command line: rows, pages, ranks, kills, and what it refuses."""

import json
import re
import shlex
import shutil
import signal
import time

import helpers
import pytest
from warm_start import ROOT, WarmProcess, quiet_environment

import fid
import generate
from evaluation.sweep.store import Store
from metrics.detectors import DetectorOutput
from metrics.rows import compare_rows, read_rows

AXES = ("--cfg-scale=1:3:2", "--cfg-interval=none/0.001,50", "--steps=2,3")
METRICS = ("--metrics=fd_pixels,pr_pixels", "--num-images=60", "--share=0.5", "--confidence=0.999")
OPTIONS = (*AXES, *METRICS, "--sampler=euler", "--batch=20")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def args(base):
    network, data = helpers.trained_snapshot(base), helpers.toy_data(base)
    return (f"--network={network}", f"--ref={data}", *OPTIONS)


@pytest.fixture(scope="module")
def whole(base, args):
    """The folder of an undisturbed sweep, and what it printed."""
    return base / "whole", helpers.succeed(fid, "sweep", *args, f"--outdir={base / 'whole'}").output


def rows_in(folder, name="cells"):
    rows = json.loads((folder / f"{name}.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def outputs_in(folder):
    """Return the files with outputs, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "outputs").rglob("*.npz"))}


def test_a_sweep_writes_rows_with_passports_and_a_page(whole):
    folder, output = whole
    # Without guidance, an interval has no effect: 2 x (1 + 2) cells.
    assert "6 cells: steps 2, 3, cfg-scale 1, 3, cfg-interval none, 0.001,50" in output
    rows = read_rows(folder / "cells.json")
    assert [row["metric"] for row in rows] == ["fd_pixels", "pr_pixels"] * 6
    protocols = {json.dumps([row["sampling"], row["guidance"]]) for row in rows}
    assert len(protocols) == 6
    assert all(row["seeds"] == f"0-{row['num_images'] - 1}" for row in rows)
    assert {row["num_images"] for row in rows} == {40, 60}
    assert compare_rows(rows, anyway=True)
    first = read_rows(folder / "winner.json")[0]
    assert (first["seeds"], first["num_images"]) == ("60-119", 60)
    low, high = map(float, re.search(r"interval (\S+) to (\S+)\)", output).groups())
    assert low < first["value"] < high
    assert f"fd_pixels {first['value']:.6g}" in output
    assert "The best at each steps" in output
    assert "Precision against recall" in output
    page = (folder / "report.html").read_text()
    assert page.count('role="img"') == 3
    assert not re.search(r'(src|href)="(?!#|data:)', page)


def test_the_command_that_is_printed_scores_the_winner_again(whole, tmp_path):
    folder, output = whole
    commands = dict(re.findall(r"To (.+):\n  (.+)", output))
    words = shlex.split(commands["score it again"])
    assert words[:3] == ["python", "fid.py", "calc"]
    path = tmp_path / "score.json"
    helpers.succeed(fid, *words[2:], f"--json={path}", "--no-per-class")
    again = json.loads(path.read_text())["rows"]
    for row, expected in zip(again, rows_in(folder, "winner"), strict=True):
        assert row["value"] == pytest.approx(expected["value"], rel=1e-9)
        del row["seconds"], row["value"], row["values"], expected["value"], expected["values"]
        assert row == expected
    words = shlex.split(commands["make its images"])
    words = [word for word in words[2:] if not word.startswith(("--outdir", "--seeds"))]
    helpers.succeed(generate, *words, f"--outdir={tmp_path / 'out'}", "--num=2")


def test_two_ranks_find_what_one_does(args, whole, tmp_path):
    output = helpers.on_ranks(2, "fid.py", "sweep", *args, f"--outdir={tmp_path}")
    folder, expected = whole
    assert output.replace(str(tmp_path), "X") == expected.replace(str(folder), "X")
    for name in ("cells", "winner"):
        assert rows_in(tmp_path, name) == rows_in(folder, name)


def test_a_killed_sweep_goes_on_with_what_is_missing(args, whole, tmp_path):
    files = [tmp_path / name for name in ("output", "error")]
    command = [ROOT / "fid.py", "sweep", *args, f"--outdir={tmp_path / 'out'}"]
    process = WarmProcess(command, quiet_environment(), *files)
    deadline = time.monotonic() + 60
    while (
        len(kept := outputs_in(tmp_path / "out") if (tmp_path / "out/outputs").is_dir() else {}) < 7
    ):
        assert process.poll() is None, files[1].read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "out" / "winner.json").exists()
    output = helpers.succeed(fid, "sweep", *args, f"--outdir={tmp_path / 'out'}").output
    folder, expected = whole
    assert output.replace(str(tmp_path / "out"), "X") == expected.replace(str(folder), "X")
    assert rows_in(tmp_path / "out") == rows_in(folder)
    found = outputs_in(tmp_path / "out")
    assert kept.items() <= found.items(), "outputs that were there were made again"
    assert len(found) == len(outputs_in(folder))
    assert not list((tmp_path / "out").rglob(".*.tmp"))


def test_a_larger_grid_makes_new_cells_alone(args, whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    before = outputs_in(folder)
    helpers.succeed(fid, "sweep", *args, "--cfg-scale=1:4:1", "--steps=2", f"--outdir={folder}")
    after = outputs_in(folder)
    assert before.items() < after.items()
    assert len(rows_in(folder)) == 2 * (1 + 2 * 3)


def test_outputs_of_another_network_seed_or_reference_are_not_used(args, whole, base):
    folder, _ = whole
    before = outputs_in(folder)
    other = helpers.first_snapshot(base)
    sweep = ("sweep", *args, f"--outdir={folder}")
    for option, what in (
        (f"--network={other}", "network"),
        ("--seed=1", "--seed"),
        ("--precision=bf16", "--precision"),
        (f"--ref={helpers.toy_images(base / 'others', per_class=40)}", "reference"),
    ):
        message = helpers.fail(fid, *sweep, option)
        assert f"holds outputs of a sweep made with another {what};" in message
    assert outputs_in(folder) == before


def test_averages_of_a_run_are_swept(base, tmp_path):
    outdir, data = tmp_path / "runs", helpers.toy_data(base)
    options = ("--cond", "--label-drop=0.2", "--ema-stds=0.05,0.25", "--iters=8", "--snap=1")
    run_dir = helpers.train_tiny(outdir, data, *options, "--tick=0").run_dir
    sweep = ("sweep", f"--ref={data}", "--metrics=kid_pixels", "--num-images=40", "--batch=40")
    args = (*sweep, "--ema-std=0.05:0.25:0.1", "--cfg-scale=1,2", f"--outdir={tmp_path / 'out'}")
    output = helpers.succeed(fid, *args, f"--network={run_dir}").output
    assert "6 cells: ema-std 0.05, 0.15, 0.25, cfg-scale 1, 2" in output
    rows = read_rows(tmp_path / "out" / "cells.json")
    assert sorted({row["ema"]["std"] for row in rows}) == [0.05, 0.15, 0.25]
    assert len({row["snapshot_hash"] for row in rows}) == 3
    message = helpers.fail(fid, *args, f"--network={helpers.trained_snapshot(base)}")
    assert "--ema-std: averages are made from a run's compact snapshots" in message
    message = helpers.fail(fid, *args, f"--network={helpers.trained_run(base)}")
    assert "holds 0 compact snapshots, but two are needed" in message


def test_cells_that_cannot_be_sampled_are_left_out_and_named(args, tmp_path):
    own = ("--cfg-interval=none/70,79", f"--outdir={tmp_path / 'out'}")
    output = helpers.succeed(fid, "sweep", *args, *own, "--sigma-max=60").output
    assert "2 cells are left out, as steps=2 cfg-scale=3 cfg-interval=70,79" in output
    assert "4 cells: steps 2, 3, cfg-scale 1, 3" in output


def test_a_metric_of_which_more_is_better_is_searched_upwards(args, tmp_path):
    folder = tmp_path / "out"
    options = ("--metrics=dc_pixels,fd_pixels", "--steps=3", "--cfg-scale=1,5", "--share=1")
    helpers.succeed(fid, "sweep", *args, *options, "--cfg-interval=none", f"--outdir={folder}")
    rows = {row["guidance"]["cfg_scale"]: row for row in rows_in(folder)[::2]}
    (winner, _) = rows_in(folder, "winner")
    assert rows[winner["guidance"]["cfg_scale"]]["value"] == max(
        row["value"] for row in rows.values()
    )


def test_a_damaged_file_of_outputs_is_named(args, base, tmp_path):
    options = (*args, "--steps=2", "--cfg-interval=none", "--share=1", f"--outdir={tmp_path}")
    helpers.succeed(fid, "sweep", *options)
    path = sorted(outputs_in(tmp_path))[0]
    path.write_bytes(path.read_bytes()[:100])
    assert f"{path.name}: damaged" in helpers.fail(fid, "sweep", *options)
    path.unlink()
    helpers.succeed(fid, "sweep", *options)
    key = path.parent.name
    assert len(Store(tmp_path).read(key, DetectorOutput("pixels"), 60)) == 60
