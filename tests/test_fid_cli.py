"""fid.py: reference statistics, scores and comparisons at the command line."""

import json
import shutil
import zipfile

import helpers
import numpy as np
import pytest

import fid
import generate
from metrics.frechet import frechet_distance
from metrics.reference import read_reference
from training.checkpoint import load_snapshot


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def data(base):
    return helpers.toy_data(base)


@pytest.fixture(scope="session")
def network(base):
    return helpers.trained_snapshot(base)


@pytest.fixture(scope="session")
def generated(base, network):
    """42 images of the snapshot, seeds 0 to 41, in a folder."""
    folder = base / "generated"
    if not folder.is_dir():
        args = ["--seeds=0-41", "--class=0,1,2"]
        helpers.succeed(generate, f"--network={network}", f"--outdir={folder}", *args)
    return folder


def score(tmp_path, *args, metrics="fd_pixels"):
    """Return the only row that ``fid.py calc`` writes, beside what it prints."""
    path = tmp_path / "score.json"
    result = helpers.succeed(fid, "calc", *args, f"--metrics={metrics}", f"--json={path}")
    (row,) = json.loads(path.read_text())["rows"]
    assert f"{row['metric']} {row['value']:.6g} ({row['num_images']} images)" in result.output
    return row


def pixels_of(paths):
    return np.stack([helpers.read_pixels(path).transpose(2, 0, 1).ravel() for path in paths]) / 255


def distance(first, second):
    stats = [(x.mean(0), np.cov(x, rowvar=False)) for x in (first, second)]
    return frechet_distance(*stats[0], *stats[1])


@pytest.fixture(scope="session")
def expected(base, data, generated):
    """The distance between the folder of generated images and the data, from its definition."""
    real = pixels_of(sorted((base / "toy").rglob("*.png")))
    return distance(pixels_of(sorted(generated.glob("*.png"))), real)


def test_a_folder_a_zip_and_written_statistics_give_the_distance_of_its_definition(
    data, generated, expected, tmp_path
):
    archive = tmp_path / "generated.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in generated.glob("*.png"):
            file.write(path, path.name)
    statistics = tmp_path / "ref.npz"
    output = helpers.succeed(
        fid, "ref", f"--data={data}", f"--dest={statistics}", "--detector=pixels"
    ).output
    assert f"Statistics of 42 images (pixels) written to {statistics}" in output
    assert read_reference(statistics).count == 42
    for images in (generated, archive):
        for real in (data, statistics):
            row = score(tmp_path, f"--images={images}", f"--ref={real}")
            assert row["value"] == pytest.approx(expected, rel=1e-6)
            assert (row["num_images"], row["reference_count"]) == (42, 42)
            assert row["images"] == str(images)
            assert "sampling" not in row


def test_data_against_themselves_score_zero(data, tmp_path):
    row = score(tmp_path, f"--images={data}", f"--ref={data}")
    assert row["value"] == pytest.approx(0, abs=1e-9)


def test_a_score_does_not_depend_on_the_batch_size(network, data, generated, tmp_path):
    common = [f"--ref={data}", "--num-images=20"]
    for source in (f"--images={generated}", f"--network={network}"):
        values = [
            score(tmp_path, source, *common, f"--batch={batch}")["value"] for batch in (1, 7, 64)
        ]
        # Images may differ by a rounding of single pixels; statistics may not.
        tolerance = 1e-6 if "images" in source else 1e-4
        assert values == pytest.approx([values[0]] * 3, rel=tolerance)


def test_two_ranks_give_the_same_score_as_one(data, network, tmp_path, monkeypatch):
    # One image at a time, so that every pixel is the same and only the statistics are shared.
    args = [f"--network={network}", f"--ref={data}", "--num-images=24", "--batch=1"]
    path = tmp_path / "two.json"
    output = helpers.torchrun(2, "fid.py", "calc", *args, "--metrics=fd_pixels", f"--json={path}")
    assert output.count("fd_pixels") == 1
    (two,) = json.loads(path.read_text())["rows"]
    monkeypatch.setenv("SETDIFFIT_CACHE", str(tmp_path / "another"))  # The reference made anew.
    one = score(tmp_path, *args)
    assert two["value"] == pytest.approx(one["value"], rel=1e-6)
    assert two["num_images"] == one["num_images"] == 24
    assert two["reference_count"] == one["reference_count"] == 42
    assert two["reference_hash"] == one["reference_hash"]


def test_a_snapshot_is_scored_by_images_with_the_classes_of_the_data(
    network, data, expected, tmp_path
):
    before = set(network.parent.iterdir())
    row = score(tmp_path, f"--network={network}", f"--ref={data}")
    # The data have their classes in equal parts, as the folder of generated images has.
    assert row["value"] == pytest.approx(expected, rel=1e-4)
    assert set(network.parent.iterdir()) == before
    assert not list(tmp_path.rglob("*.png"))


def test_a_row_tells_the_whole_protocol(network, data, tmp_path):
    row = score(
        tmp_path,
        f"--network={network}",
        f"--ref={data}",
        *[
            "--num-images=12",
            "--seed=5",
            "--sampler=ddpm",
            "--steps=3",
            "--cfg-scale=2",
            "--precision=bf16",
        ],
    )
    assert (row["metric"], row["num_images"], row["first_seed"]) == ("fd_pixels", 12, 5)
    assert (row["sampling"]["sampler"], row["sampling"]["steps"], row["nfe"]) == ("ddpm", 3, 3)
    assert row["guidance"]["cfg_scale"] == 2
    assert row["precision"] == "bfloat16"
    assert row["detector"] == "pixels"
    assert len(row["detector_hash"]) == len(row["reference_hash"]) == 64
    assert row["snapshot_hash"] == load_snapshot(network).sha256
    assert row["network"] == str(network)
    assert row["reference"] == "toy"
    assert row["packages"]["torch"]
    assert any("low count: 12 images for 192 features" in text for text in row["warnings"])


def test_sampling_options_and_seeds_change_the_score(network, data, tmp_path):
    common = [f"--network={network}", f"--ref={data}", "--num-images=12"]
    options = ["", "--seed=1", "--steps=2", "--sampler=euler", "--cfg-scale=3"]
    values = [score(tmp_path, *common, *text.split())["value"] for text in options]
    assert len(set(values)) == len(values)


def test_fewer_images_than_there_are_can_be_scored(data, generated, base, tmp_path):
    row = score(tmp_path, f"--images={generated}", f"--ref={data}", "--num-images=20")
    real = pixels_of(sorted((base / "toy").rglob("*.png")))
    first = pixels_of(sorted(generated.glob("*.png"))[:20])
    assert row["value"] == pytest.approx(distance(first, real), rel=1e-6)


def test_published_statistics_are_read_with_a_warning(data, generated, expected, tmp_path):
    own = tmp_path / "own.npz"
    helpers.succeed(fid, "ref", f"--data={data}", f"--dest={own}", "--detector=pixels")
    published = tmp_path / "cifar10-32x32.npz"
    np.savez(published, mu=read_reference(own).mu, sigma=read_reference(own).sigma)
    row = score(tmp_path, f"--images={generated}", f"--ref={published}")
    assert row["value"] == pytest.approx(expected, rel=1e-6)
    assert row["reference_count"] is None
    assert any("does not tell which detector" in text for text in row["warnings"])


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("--metrics=fd_pixels", ["either --network or --images"]),
        ("--images=GEN --network=NET --metrics=fd_pixels", ["either --network or --images"]),
        ("--images=GEN --metrics=fd_pixel", ["'fd_pixel'", "Did you mean 'fd_pixels'?"]),
        ("--images=GEN --metrics=fd_pixels,fid", ["'fid'"]),
        ("--images=GEN", ["--metrics"]),
        ("--images=GEN --metrics=fd_pixels --steps=3", ["--steps describes sampling", "--network"]),
        ("--images=GEN --metrics=fd_pixels --seed=3", ["--seed describes sampling", "--network"]),
        ("--images=GEN --metrics=fd_pixels --precision=bf16", ["--precision describes sampling"]),
        ("--images=GEN --metrics=fd_pixels --num-images=100", ["needs 100 images, but got 42"]),
        ("--images=GEN --metrics=fd_pixels --num-images=1", ["--num-images", "1"]),
        ("--images=absent --metrics=fd_pixels", ["absent"]),
        ("--network=absent.pkl --metrics=fd_pixels", ["absent.pkl: no such file"]),
        ("--network=NET --metrics=fd_pixels --stepz=3", ["No such option '--stepz'", "--steps"]),
        ("--network=NET --metrics=fd_pixels --eta=1", ["--eta", "only with --sampler=ddim"]),
        ("--network=NET --metrics=fd_pixels --weights=a", ["--weights has no effect"]),
        ("--network=NET --metrics=fid10k_full --weights=absent.pth", ["absent.pth: no such file"]),
    ],
)
def test_what_calc_cannot_do_is_refused(args, parts, network, data, generated, tmp_path):
    text = args.replace("GEN", str(generated)).replace("NET", str(network))
    path = tmp_path / "score.json"
    message = helpers.fail(fid, "calc", *text.split(), f"--ref={data}", f"--json={path}")
    for part in parts:
        assert part in message
    assert not path.exists()


def test_images_of_another_size_or_kind_are_refused(base, data, generated, tmp_path):
    larger = helpers.toy_data(base, 16)
    message = helpers.fail(
        fid, "calc", f"--images={larger}", f"--ref={data}", "--metrics=fd_pixels"
    )
    assert "[3, 16, 16]" in message
    assert "[3, 8, 8]" in message
    message = helpers.fail(
        fid, "ref", f"--data={tmp_path}", f"--dest={tmp_path / 'a.npz'}", "--detector=pixels"
    )
    assert str(tmp_path) in message
    broken = tmp_path / "broken"
    shutil.copytree(generated, broken)
    (broken / "000007.png").write_bytes(b"no picture")
    message = helpers.fail(
        fid, "calc", f"--images={broken}", f"--ref={data}", "--metrics=fd_pixels"
    )
    assert "000007.png" in message


def test_statistics_of_another_detector_are_refused(base, data, generated, tmp_path):
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    args = ["calc", f"--images={generated}", "--metrics=fd_pixels", f"--ref={path}"]
    message = helpers.fail(fid, *args)
    assert "2048 features" in message
    assert "192" in message
    larger = helpers.toy_data(base, 16)
    helpers.succeed(fid, "ref", f"--data={larger}", f"--dest={path}", "--detector=pixels")
    message = helpers.fail(fid, *args)
    assert "were made by the detector 'pixels'" in message
    assert "compute them anew with `fid.py ref`" in message
    message = helpers.fail(fid, "ref", f"--data={data}", f"--dest={path}", "--detector=pixel")
    assert "Did you mean 'pixels'?" in message
    message = helpers.fail(
        fid, "ref", f"--data={data}", f"--dest={path}", "--detector=pixels", "--weights=a"
    )
    assert "no weights" in message


def test_compare_prints_scores_side_by_side_and_marks_what_differs(network, data, tmp_path):
    paths = []
    for name, options in (("a", "--steps=2"), ("b", "--steps=3"), ("c", "--steps=3 --seed=50")):
        paths.append(tmp_path / f"{name}.json")
        helpers.succeed(
            fid,
            "calc",
            f"--network={network}",
            f"--ref={data}",
            "--metrics=fd_pixels",
            "--num-images=12",
            *options.split(),
            f"--json={paths[-1]}",
        )
    values = [json.loads(path.read_text())["rows"][0]["value"] for path in paths]
    output = helpers.succeed(fid, "compare", *paths).output
    for value in values:
        assert f"{value:.6g}" in output
    heading = output.splitlines()[1]
    assert "*sampling.steps" in heading
    assert "*first_seed" in heading
    assert "*num_images" not in heading
    assert "num_images=12" in output
    assert "not comparable: the rows differ in" in output
    same = helpers.succeed(fid, "compare", paths[0], paths[0]).output
    assert "not comparable" not in same


def test_compare_reads_the_rows_of_a_run_and_names_what_is_none(base, tmp_path):
    outdir = tmp_path / "runs"
    run_dir = helpers.train_tiny(outdir, helpers.toy_data(base), "--metrics=fd_pixels").run_dir
    output = helpers.succeed(fid, "compare", run_dir / "metric-fd_pixels.jsonl").output
    assert "network-snapshot-000000.pkl" in output
    message = helpers.fail(fid, "compare", run_dir / "stats.jsonl")
    assert "stats.jsonl:1: not a score row" in message
    assert "absent.json" in helpers.fail(fid, "compare", tmp_path / "absent.json")
    assert "FILES" in helpers.fail(fid, "compare")


def test_help_of_every_subcommand_shows_what_to_type(network):
    output = helpers.succeed(fid, "--help").output
    assert all(name in output for name in ("ref", "calc", "compare"))
    assert "Usage" in output
    for name, parts in {
        "ref": ["--detector", "Example", "fid.py ref --data="],
        "calc": [
            "Main options:",
            "Sampling:",
            "Guidance:",
            "[default: 18]",
            "fid.py calc --images=",
        ],
        "compare": ["FILES", "fid.py compare "],
    }.items():
        text = " ".join(helpers.succeed(fid, name, "--help").output.split())
        for part in parts:
            assert part in text
    own = helpers.succeed(fid, "calc", f"--network={network}", "--help").output
    assert "Number of sampling steps. [default: 4]" in " ".join(own.split())
