"""fid.py: reference statistics, scores and comparisons at the command line."""

import json
import pickle
import shutil
import sys
import zipfile

import helpers
import numpy as np
import pytest
from PIL import Image

import fid
import generate
from metrics.detectors import DetectorOutput
from metrics.frechet import frechet_distance
from metrics.reference import read_references
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


@pytest.fixture
def inception(base, small_inception):
    return helpers.random_inception(base)


@pytest.fixture(scope="session")
def rings(base, data):
    """A folder of 14 of the images, for networks that take a tenth of a second for one."""
    return base / "toy" / "ring"


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


def rows_of(tmp_path, *args):
    """Return the rows that ``fid.py calc`` writes, and what it prints."""
    path = tmp_path / "score.json"
    output = helpers.succeed(fid, "calc", *args, f"--json={path}").output
    return json.loads(path.read_text())["rows"], output


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
        fid, "ref", f"--data={data}", f"--dest={statistics}", "--metrics=fd_pixels"
    ).output
    assert f"42 images: pixels/features written to {statistics}" in output
    assert read_references(statistics)[DetectorOutput("pixels")].count == 42
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
    output = helpers.on_ranks(2, "fid.py", "calc", *args, "--metrics=fd_pixels", f"--json={path}")
    assert output.count("(24 images)") == 1
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
    assert (row["metric"], row["num_images"], row["seeds"]) == ("fd_pixels", 12, "5-16")
    assert (row["sampling"]["sampler"], row["sampling"]["steps"], row["nfe"]) == ("ddpm", 3, 3)
    assert row["guidance"]["cfg_scale"] == 2
    assert row["precision"] == "bfloat16"
    assert row["detector"] == "pixels/features"
    assert row["preprocessing"] == "x / 255 of 3x8x8 [C, H, W], flattened"
    assert row["detector_precision"] == "float32"
    assert row["ema"] == {"halflife_kimg": 0.2, "rampup": 0.05}
    assert "clip(127.5 x + 128)" in row["rounding"]
    assert row["labels"] == "as in the training data"
    assert len(row["detector_hash"]) == len(row["reference_hash"]) == 64
    assert row["snapshot_hash"] == load_snapshot(network).sha256
    assert row["network"] == str(network)
    assert row["reference"] == "toy"
    assert row["packages"]["torch"]
    assert any("low count: 12 images for 192 dimensions" in text for text in row["warnings"])


def test_sampling_options_and_seeds_change_the_score(network, data, tmp_path):
    common = [f"--network={network}", f"--ref={data}", "--num-images=12"]
    options = ["", "--seed=1", "--steps=2", "--sampler=euler", "--cfg-scale=3"]
    values = [score(tmp_path, *common, *text.split())["value"] for text in options]
    assert len(set(values)) == len(values)


def test_fewer_images_than_there_are_can_be_scored(data, generated, base, tmp_path):
    row = score(tmp_path, f"--images={generated}", f"--ref={data}", "--num-images=20")
    real = pixels_of(sorted((base / "toy").rglob("*.png")))
    # The names of files may be sorted by class: a fixed random choice is scored.
    files = sorted(generated.glob("*.png"))
    chosen = [files[index] for index in np.random.default_rng(0).permutation(42)[:20]]
    assert row["value"] == pytest.approx(distance(pixels_of(chosen), real), rel=1e-6)
    assert row["image_order"] == "shuffled"
    archive = tmp_path / "samples.npz"  # So may those of an archive.
    np.savez(archive, np.stack([helpers.read_pixels(path) for path in files]).astype(np.uint8))
    again = score(tmp_path, f"--images={archive}", f"--ref={data}", "--num-images=20")
    assert (again["value"], again["image_order"]) == (pytest.approx(row["value"]), "shuffled")


@pytest.mark.usefixtures("few_features")
def test_published_statistics_are_read_with_a_warning(inception, rings, generated, tmp_path):
    own, published = tmp_path / "own.npz", tmp_path / "cifar10-32x32.npz"
    options = [f"--inception={inception}"]
    metrics = "--metrics=fid10k_full,sfid10k_full"
    helpers.succeed(fid, "ref", f"--data={rings}", f"--dest={own}", metrics, *options)
    with np.load(own) as file:
        arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
        np.savez(published, **arrays)
    args = [f"--images={generated}", "--num-images=12", metrics, *options]
    with_own, _ = rows_of(tmp_path, f"--ref={own}", *args)
    with_published, _ = rows_of(tmp_path, f"--ref={published}", *args)
    for mine, theirs in zip(with_own, with_published, strict=True):
        assert theirs["value"] == pytest.approx(mine["value"], rel=1e-9)
        assert theirs["value"] > 0
        assert (mine["reference_count"], theirs["reference_count"]) == (14, None)
        assert any("does not record which detector" in text for text in theirs["warnings"])
        assert not any("does not record" in text for text in mine["warnings"])
    # EDM2's files hold the same numbers in a pickle.
    pickled = tmp_path / "edm2.pkl"
    moments = dict(mu=arrays["mu"], sigma=arrays["sigma"])
    pickled.write_bytes(pickle.dumps(dict(num_images=14, fid=moments)))
    args[2] = "--metrics=fid10k_full"
    (row,), _ = rows_of(tmp_path, f"--ref={pickled}", *args)
    assert row["value"] == pytest.approx(with_own[0]["value"], rel=1e-9)
    assert row["reference_count"] == 14


@pytest.mark.usefixtures("few_features")
def test_an_adm_reference_serves_metrics_of_moments_and_of_vectors(
    inception, rings, generated, base, tmp_path
):
    """Its moments are of all images, its sample images are what neighbours are sought among."""
    own, virtual = tmp_path / "own.npz", tmp_path / "VIRTUAL_toy.npz"
    options = [f"--inception={inception}", "--num-images=12"]
    helpers.succeed(fid, "ref", f"--data={rings}", f"--dest={own}", f"--inception={inception}")
    paths = sorted((base / "toy").rglob("*.png"))[9:19]
    samples = np.stack([helpers.read_pixels(path) for path in paths]).astype(np.uint8)
    with np.load(own) as file:
        np.savez(virtual, arr_0=samples, mu=file["mu"], sigma=file["sigma"])
    args = [f"--images={generated}", f"--ref={virtual}", *options]
    (fid_row, pr_row), _ = rows_of(tmp_path, *args, "--metrics=fid10k_full,pr10k3_full")
    (expected,), _ = rows_of(
        tmp_path, f"--images={generated}", f"--ref={own}", *options, "--metrics=fid10k_full"
    )
    assert fid_row["value"] == pytest.approx(expected["value"], rel=1e-9)
    assert pr_row["reference_vectors"] == pr_row["reference_count"] == 10
    assert pr_row["warnings"] == []
    (alone,), _ = rows_of(tmp_path, *args, "--metrics=fid10k_full")
    assert alone["reference_hash"] == fid_row["reference_hash"]
    folder = tmp_path / "samples"
    folder.mkdir()
    for path in paths:
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    (expected,), _ = rows_of(
        tmp_path, f"--images={generated}", f"--ref={folder}", *options, "--metrics=pr10k3_full"
    )
    assert pr_row["values"] == pytest.approx(expected["values"])


@pytest.mark.usefixtures("few_features")
def test_every_inception_metric_comes_from_one_pass(inception, rings, generated, tmp_path):
    names = "fid10k_full,sfid10k_full,kid10k_full,is10k,pr10k3_full,dc10k5_full"
    args = [f"--images={generated}", f"--ref={rings}", "--num-images=12"]
    args += [f"--inception={inception}", f"--metrics={names}"]
    rows, output = rows_of(tmp_path, *args)
    assert [row["metric"] for row in rows] == names.split(",")
    assert len({row["detector_hash"] for row in rows}) == 1
    assert all(np.isfinite(list(row["values"].values())).all() for row in rows)
    assert "kid" in output
    assert "precision" in output
    assert "TensorFlow-style" in rows[0]["preprocessing"]
    changed, _ = rows_of(tmp_path, *args, "--inception-input=pytorch-fid")
    assert changed[0]["detector_hash"] != rows[0]["detector_hash"]
    assert changed[0]["value"] != rows[0]["value"]
    lower, _ = rows_of(tmp_path, *args, "--detector-precision=bf16")
    assert lower[0]["detector_precision"] == "bfloat16"
    assert lower[0]["detector_hash"] != rows[0]["detector_hash"]
    assert lower[0]["value"] != rows[0]["value"]


def test_the_inception_score_needs_no_reference(inception, generated, tmp_path):
    args = [f"--images={generated}", "--num-images=10", f"--inception={inception}"]
    (row,), _ = rows_of(tmp_path, *args, "--metrics=is10k")
    assert row["values"]["is"] == pytest.approx(1)  # A split of one image has one distribution.
    assert "reference_hash" not in row
    message = helpers.fail(fid, "calc", *args, "--metrics=is10k,fid10k_full")
    assert "--ref: fid10k_full compares with real images" in message


def test_an_error_of_one_rank_ends_all_with_one_sentence(data, generated, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(generated, broken)
    # In the second rank's share alone.
    chosen = np.sort(np.random.default_rng(0).permutation(42))[-1]
    (broken / f"{chosen:06d}.png").write_bytes(b"no picture")
    args = ["calc", f"--images={broken}", f"--ref={data}", "--metrics=pr_pixels"]
    done = helpers.run_warm("fid.py", *args, "--num-images=42", ranks=2)
    assert done.returncode != 0
    assert f"{chosen:06d}.png: cannot be read" in done.stderr
    assert "Connection closed" not in done.stderr


def test_dinov2_and_clip_score_from_local_folders(data, generated, tmp_path):
    dinov2, clip = helpers.tiny_dinov2(tmp_path / "dino"), helpers.tiny_clip(tmp_path / "clip")
    rows, _ = rows_of(
        tmp_path,
        f"--images={generated}",
        f"--ref={data}",
        "--num-images=30",
        "--metrics=fd_dinov2_10k_full,cmmd10k_full",
        f"--dinov2={dinov2}",
        f"--clip={clip}",
    )
    assert [row["detector"] for row in rows] == ["dinov2/features", "clip/features"]
    assert all(row["value"] > 0 for row in rows)
    assert all("antialiased bicubic" in row["preprocessing"] for row in rows)


def test_numbers_of_each_class_are_given_where_labels_are_known(data, network, tmp_path):
    args = [f"--network={network}", f"--ref={data}", "--metrics=fd_pixels,pr_pixels"]
    rows, output = rows_of(tmp_path, *args, "--num-images=30")
    for row in rows:
        assert list(row["per_class"]) == helpers.CLASS_NAMES
        for values in row["per_class"].values():
            assert (values["num_images"], values["reference_count"]) == (10, 14)
    assert "class ring: fd_pixels" in output
    # The data against themselves, class by class.
    (row,), _ = rows_of(tmp_path, f"--images={data}", f"--ref={data}", "--metrics=fd_pixels")
    for values in row["per_class"].values():
        assert values["fd_pixels"] == pytest.approx(0, abs=1e-9)
    (row, _), output = rows_of(tmp_path, *args, "--no-per-class")
    assert "per_class" not in row
    assert "class ring" not in output


def test_the_noise_band_spans_disjoint_blocks_of_seeds(data, network, tmp_path):
    args = [f"--network={network}", f"--ref={data}", "--num-images=12"]
    alone = [score(tmp_path, *args, f"--seed={seed}")["value"] for seed in (3, 15, 27)]
    (row,), output = rows_of(tmp_path, *args, "--metrics=fd_pixels", "--seed=3", "--noise-band=3")
    assert row["noise_band"]["seeds"] == ["3-14", "15-26", "27-38"]
    band = row["noise_band"]["fd_pixels"]
    assert band["values"] == pytest.approx(alone, rel=1e-9)
    assert row["value"] == band["values"][0]
    assert band["std"] == pytest.approx(np.std(alone, ddof=1))
    assert (band["min"], band["max"]) == (min(band["values"]), max(band["values"]))
    assert "noise band of fd_pixels over 3 disjoint blocks" in output


def test_an_npz_sample_archive_scores_as_the_folder_it_was_made_of(
    data, generated, expected, tmp_path
):
    path = tmp_path / "samples.npz"
    files = sorted(generated.glob("*.png"))
    np.savez(path, arr_0=np.stack([helpers.read_pixels(file) for file in files]).astype(np.uint8))
    row = score(tmp_path, f"--images={path}", f"--ref={data}")
    assert row["value"] == pytest.approx(expected, rel=1e-6)


def test_neighbours_finds_copies_of_training_images(base, data, generated, tmp_path):
    folder, report = tmp_path / "mixed", tmp_path / "report"
    shutil.copytree(generated, folder)
    copied = sorted((base / "toy").rglob("*.png"))[5]
    shutil.copy(copied, folder / "000003.png")
    args = ["neighbours", f"--images={folder}", f"--data={data}", "--detector=pixels"]
    args += [f"--outdir={report}", "--neighbours=2", "--rows=4"]
    output = helpers.succeed(fid, *args).output
    assert "1 are copies" in output
    found = json.loads((report / "neighbours.json").read_text())
    real = pixels_of(sorted((base / "toy").rglob("*.png")))
    fake = pixels_of(sorted(folder.glob("*.png")))
    expected = np.sort(np.linalg.norm(fake[:, None] - real[None], axis=2), axis=1)[:, :2]
    np.testing.assert_allclose(found["distances"], expected, atol=1e-6)
    assert found["num_copies"] == 1
    assert found["distances"][3][0] == 0
    # Training images, each against all other ones, stand for held-out ones.
    among = np.linalg.norm(real[:, None] - real[None], axis=2)
    np.fill_diagonal(among, np.inf)
    quantiles = np.quantile(among.min(1), found["quantiles"])
    np.testing.assert_allclose(found["held_out"], quantiles, atol=1e-6)
    with Image.open(report / "neighbours.png") as picture:
        pixels = np.asarray(picture)
    # The copy comes first, beside the image it copies.
    copy, original = pixels[17:105, 2:90], pixels[17:105, 92:180]
    assert (copy == original).all()
    assert copy.std() > 1
    distances = helpers.read_pixels(report / "distances.png")
    assert distances.shape == (400, 640, 3)
    for colour in ((235, 120, 60), (63, 127, 196)):  # Of both histograms.
        assert (distances == colour).all(2).sum() > 100


def test_neighbours_says_what_its_charts_need(data, generated, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = [f"--images={generated}", f"--data={data}", "--detector=pixels", f"--outdir={tmp_path}"]
    message = helpers.fail(fid, "neighbours", *args)
    assert "--outdir: charts need the package matplotlib, which is not installed: pip" in message
    assert not any(tmp_path.iterdir())


def test_neighbours_takes_snapshots_and_held_out_images(data, network, generated, tmp_path):
    args = [f"--network={network}", f"--data={data}", "--detector=pixels", "--num-images=5"]
    helpers.succeed(
        fid, "neighbours", *args, f"--held-out={generated}", f"--outdir={tmp_path}", "--rows=2"
    )
    found = json.loads((tmp_path / "neighbours.json").read_text())
    assert (found["num_images"], found["num_held_out"], found["seeds"]) == (5, 42, "0-4")
    assert found["held_out_source"].startswith("generated: 42 images")
    assert found["snapshot_hash"] == load_snapshot(network).sha256


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("--images=GEN --num-images=43", ["--num-images: got 43", "42 images"]),
        ("--images=GEN --neighbours=42", ["toy has 42 images, too few for 42 neighbours"]),
        ("--images=LARGE", ["3x8x8 (ch", "3x16x16 (ch"]),
        ("--images=GEN --held-out=LARGE", ["--held-out: toy16", "3x16x16 (ch", "3x8x8 (ch"]),
        ("--images=GEN --steps=2", ["--steps describes sampling"]),
        ("--images=GEN --clip=a", ["--clip has no effect with --detector=pixels"]),
        ("--detector=pixels", ["either --network or --images"]),
    ],
)
def test_what_neighbours_cannot_do_is_refused(args, parts, base, data, generated, tmp_path):
    text = args.replace("GEN", str(generated)).replace("LARGE", str(helpers.toy_data(base, 16)))
    options = [f"--data={data}", "--detector=pixels", f"--outdir={tmp_path / 'report'}"]
    message = helpers.fail(fid, "neighbours", *text.split(), *options)
    for part in parts:
        assert part in message
    assert not (tmp_path / "report").exists()


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
        (
            "--images=GEN --metrics=fd_pixels --num-images=100",
            ["needs 100 images, but there are 42", "--num-images=42"],
        ),
        ("--images=GEN --metrics=fid10k_full", ["needs 10,000 images, but there are 42"]),
        (
            "--images=GEN --metrics=fd_pixels --num-images=20 --noise-band=3",
            ["needs 20 images in each of 3 blocks", "--num-images=14"],
        ),
        ("--images=GEN --metrics=fd_pixels --per-class", ["--per-class", "no class labels"]),
        ("--images=NET --metrics=fd_pixels", ["give a snapshot with --network"]),
        ("--images=GEN --metrics=is10k --num-images=20", ["--ref has no effect"]),
        ("--images=GEN --metrics=fd_pixels --noise-band=1", ["--noise-band", "1"]),
        ("--images=GEN --metrics=fd_pixels --dinov2=a", ["--dinov2 has no effect with"]),
        ("--images=GEN --metrics=fd_pixels --num-images=1", ["--num-images", "1"]),
        ("--images=absent --metrics=fd_pixels", ["absent"]),
        ("--network=absent.pkl --metrics=fd_pixels", ["absent.pkl: no such file"]),
        ("--network=NET --metrics=fd_pixels --stepz=3", ["No such option '--stepz'", "--steps"]),
        ("--network=NET --metrics=fd_pixels --eta=1", ["--eta", "only with --sampler=ddim"]),
        ("--network=NET --metrics=fd_pixels --inception=a", ["--inception has no effect"]),
        (
            "--network=NET --metrics=fid10k_full --inception=absent.pth",
            ["absent.pth: no such file"],
        ),
        ("--network=NET --metrics=fd_dinov2_10k_full --dinov2=absent", ["absent", "--dinov2"]),
        ("--network=NET --metrics=cmmd10k_full --clip=absent", ["absent", "--clip"]),
    ],
)
def test_what_calc_cannot_do_is_refused(args, parts, network, data, generated, tmp_path):
    text = args.replace("GEN", str(generated)).replace("NET", str(network))
    path = tmp_path / "score.json"
    message = helpers.fail(fid, "calc", *text.split(), f"--ref={data}", f"--json={path}")
    for part in parts:
        assert part in message
    assert not path.exists()


def test_what_could_not_be_written_is_refused_before_the_work(data, generated, tmp_path):
    calc = ["calc", f"--images={generated}", f"--ref={data}", "--metrics=fd_pixels"]
    assert "is a folder" in helpers.fail(fid, *calc, f"--json={generated}")
    assert "toy.zip is a file" in helpers.fail(fid, *calc, f"--json={data}/score.json")
    ref = ["ref", f"--data={data}", "--metrics=fd_pixels"]
    assert "must end with .npz" in helpers.fail(fid, *ref, f"--dest={tmp_path / 'reference'}")
    assert "toy.zip is a file" in helpers.fail(fid, *ref, f"--dest={data}/ref.npz")
    neighbours = ["neighbours", f"--images={generated}", f"--data={data}", "--detector=pixels"]
    assert "toy.zip is a file" in helpers.fail(fid, *neighbours, f"--outdir={data}")


def test_images_of_another_size_or_kind_are_refused(base, data, generated, tmp_path):
    larger = helpers.toy_data(base, 16)
    args = ["--metrics=fd_pixels", "--num-images=12"]
    message = helpers.fail(fid, "calc", f"--images={larger}", f"--ref={data}", *args)
    assert "fd_pixels: the images are 16x16 and the reference is 8x8" in message
    message = helpers.fail(fid, "ref", f"--data={tmp_path}", f"--dest={tmp_path / 'a.npz'}")
    assert str(tmp_path) in message
    broken = tmp_path / "broken"
    shutil.copytree(generated, broken)
    (broken / "000007.png").write_bytes(b"no picture")
    whole = ["--metrics=fd_pixels", "--num-images=42"]
    message = helpers.fail(fid, "calc", f"--images={broken}", f"--ref={data}", *whole)
    assert "000007.png" in message
    gray = tmp_path / "gray"
    gray.mkdir()
    for path in generated.glob("*.png"):
        Image.open(path).convert("L").save(gray / path.name)
    message = helpers.fail(fid, "calc", f"--images={gray}", f"--ref={data}", *args)
    assert "1 channel(s) and the reference has 3" in message


def test_images_of_another_size_are_scored_by_a_network_with_a_warning(
    inception, base, rings, tmp_path
):
    args = [f"--ref={rings}", f"--inception={inception}", "--num-images=4"]
    larger = helpers.toy_data(base, 16)
    (row,), _ = rows_of(tmp_path, f"--images={larger}", *args, "--metrics=fid10k_full")
    assert "the images are 16x16 and the reference is 8x8" in row["warnings"]


def test_statistics_of_another_detector_are_refused(inception, rings, generated, tmp_path):
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    args = ["calc", f"--images={generated}", "--metrics=fd_pixels", f"--ref={path}"]
    message = helpers.fail(fid, *args, "--num-images=12")
    assert "holds no moments of pixels/features" in message
    options = ("--metrics=fid10k_full", f"--inception={inception}")
    other = "--inception-input=pytorch-fid"
    path.unlink()
    helpers.succeed(fid, "ref", f"--data={rings}", f"--dest={path}", *options, other)
    args = ["calc", f"--images={generated}", f"--ref={path}", *options, "--num-images=12"]
    message = helpers.fail(fid, *args)
    assert "were made by another detector 'inception'" in message
    assert "compute them again with `fid.py ref`" in message
    ref = ["ref", f"--data={rings}", f"--dest={path}"]
    assert "Did you mean 'fd_pixels'?" in helpers.fail(fid, *ref, "--metrics=fd_pixel")
    assert "does not compare with real images" in helpers.fail(fid, *ref, "--metrics=is50k")
    message = helpers.fail(fid, *ref, "--metrics=fd_pixels", "--inception=a")
    assert "--inception has no effect with --metrics=fd_pixels" in message


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
    message = helpers.fail(fid, "compare", *paths)
    assert "differ in" in message
    assert "sampling.steps (2 | 3)" in message
    assert "seeds (0-11 | 50-61)" in message
    output = helpers.succeed(fid, "compare", *paths, "--anyway").output
    for value in values:
        assert f"{value:.6g}" in output
    heading = output.splitlines()[1]
    assert "*sampling.steps" in heading
    assert "*seeds" in heading
    assert "*num_images" not in heading
    assert "num_images=12" in output
    assert "not comparable: the rows differ in" in output
    same = helpers.succeed(fid, "compare", paths[0], paths[0]).output
    assert "not comparable" not in same


def test_compare_reads_the_rows_of_a_run_and_names_what_is_none(base, tmp_path):
    outdir = tmp_path / "runs"
    run_dir = helpers.train_tiny(outdir, helpers.toy_data(base), "--metrics=fd_pixels").run_dir
    output = helpers.succeed(fid, "compare", run_dir / "metric-fd_pixels.jsonl").output
    assert "network-snapshot-000000.016.pkl" in output
    message = helpers.fail(fid, "compare", run_dir / "stats.jsonl")
    assert "stats.jsonl:1: not a score row" in message
    assert "absent.json" in helpers.fail(fid, "compare", tmp_path / "absent.json")
    assert "FILES" in helpers.fail(fid, "compare")


def test_help_of_every_subcommand_shows_what_to_type(network):
    output = helpers.succeed(fid, "--help").output
    assert all(name in output for name in ("ref", "calc", "compare"))
    assert "Usage" in output
    for name, parts in {
        "neighbours": ["--held-out", "--detector", "Example", "fid.py neighbours --network="],
        "ref": ["--metrics", "--inception", "Example", "fid.py ref --data="],
        "calc": [
            "Main options:",
            "Sampling:",
            "Guidance:",
            "[default: 18]",
            "fid.py calc --images=",
        ],
        "sweep": ["--ema-std", "Guidance:", "[float,...]", "fid.py sweep --network="],
        "compare": ["FILES", "--anyway", "fid.py compare "],
    }.items():
        text = " ".join(helpers.succeed(fid, name, "--help").output.split())
        for part in parts:
            assert part in text
    own = helpers.succeed(fid, "calc", f"--network={network}", "--help").output
    assert "Number of sampling steps. [default: 4]" in " ".join(own.split())


def test_no_command_overwrites_an_input_or_a_file_that_it_did_not_make(base, tmp_path):
    data = tmp_path / "samples.npz"
    np.savez(data, np.zeros((8, 4, 4, 3), np.uint8))
    before = data.read_bytes()
    options = (f"--data={data}", "--metrics=fd_pixels")
    for more in ((), ("--overwrite",)):
        message = helpers.fail(fid, "ref", *options, f"--dest={data}", *more)
        assert "is also the file of --data; choose another name" in message
    assert data.read_bytes() == before
    for _ in range(2):  # What the command made it makes again.
        helpers.succeed(fid, "ref", *options, f"--dest={tmp_path / 'ref.npz'}")
    photo = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(photo)
    before = photo.read_bytes()
    network = f"--network={helpers.trained_snapshot(base)}"
    options = (network, f"--outdir={tmp_path / 'out'}", "--num=1", "--steps=1")
    assert "was not made by" in helpers.fail(generate, *options, f"--grid={photo}")
    assert photo.read_bytes() == before
    helpers.succeed(generate, *options, f"--grid={photo}", "--overwrite")
    assert photo.read_bytes() != before
    scores = tmp_path / "scores.json"
    scores.write_text("mine")
    options = (f"--images={data}", f"--ref={data}", "--metrics=fd_pixels", f"--json={scores}")
    assert "replace it with --overwrite" in helpers.fail(fid, "calc", *options)
    assert scores.read_text() == "mine"
    for _ in range(2):
        helpers.succeed(
            generate,
            network,
            f"--outdir={tmp_path / 'out'}",
            "--num=1",
            "--steps=1",
            f"--grid={tmp_path / 'grid.png'}",
        )


def test_an_empty_path_as_of_an_unset_variable_is_refused(base):
    network = f"--network={helpers.trained_snapshot(base)}"
    assert "names nothing" in helpers.fail(generate, network, "--outdir=", "--num=1")


def test_statistics_know_size_channels_and_formats_of_what_they_were_made_of(base, tmp_path):
    """Images of other channels are refused, of other sizes and of JPEGs told, as with images."""
    statistics = tmp_path / "ref.npz"
    options = ("--metrics=kid_pixels",)
    helpers.succeed(
        fid, "ref", f"--data={helpers.toy_data(base)}", f"--dest={statistics}", *options
    )
    (reference,) = read_references(statistics).values()
    assert reference.images == (3, 8, 8, "png")
    rng = np.random.default_rng(0)

    def folder(name, *shape, suffix="png"):
        (tmp_path / name).mkdir()
        for index in range(6):
            pixels = rng.integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.{suffix}")
        return f"--images={tmp_path / name}"

    calc = ("calc", f"--ref={statistics}", "--num-images=6", *options)
    assert "1 channel(s) and the reference has 3" in helpers.fail(fid, *calc, folder("grey", 8, 8))
    assert "equal sizes" in helpers.fail(fid, *calc, folder("large", 16, 16, 3))
    output = helpers.succeed(fid, *calc, folder("jpeg", 8, 8, 3, suffix="jpg")).output
    assert "the images are jpeg and the reference is png" in output
    rows = tmp_path / "rows.json"
    helpers.succeed(fid, *calc, folder("png", 8, 8, 3), f"--json={rows}")
    (row,) = json.loads(rows.read_text())["rows"]
    assert (row["reference_images"], row["image_formats"]) == ("8x8x3, png", "png")
    assert not any("JPEG" in text for text in row["warnings"])
