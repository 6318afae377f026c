"""What a report reads from the files of a run, whatever state they are in, and how it says it."""

import html.parser
import itertools
import json
import math
import re
import shutil
from unittest import mock

import numpy as np
import pytest
from helpers import TINY_FEATURES, TINY_SETS, call, fail, succeed, toy_data, train_tiny
from PIL import Image
from report_runs import (
    LEVELS,
    condition_rows,
    make_run,
    options_of,
    score_row,
    stat,
    tick_row,
    write_picture,
    write_rows,
)

import families
import fid
import generate
import training.boards
import training.telemetry
from configs import get_preset
from training.config import LoggingConfig
from training.report import changes_from
from training.run_report import pictures as pictures_module
from training.run_report.compare import with_short_names
from training.run_report.curves import level_charts, score_charts, topic_charts
from training.run_report.files import read_run
from training.run_report.history import History, thin
from training.run_report.pictures import Album, Source, choose, find_pictures
from training.run_report.scores import best
from training.run_report.setup import next_steps
from training.run_report.write import MAX_BYTES, RunReport, write_report
from training.telemetry import Telemetry
from training.watching import set_context

EVIL = "</script></style>--><img src=x onerror=alert(1)>\"'&\u2028\ud800\x00"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


class Reader(html.parser.HTMLParser):
    """The elements of a page, and its text without scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._hidden = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._hidden = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        if tag == self._hidden:
            self._hidden = None

    def handle_data(self, data):
        if self._hidden is None:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(run_dir, *others):
    """Return the page about runs, and the data of its charts."""
    path = run_dir.parent / "page.html"
    write_report([run_dir, *others], path)
    text = path.read_text(encoding="utf-8")
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    return Reader(text), json.loads(content)


# Curves.


def test_a_history_that_is_read_on_equals_one_that_is_read_at_once(tmp_path):
    path = tmp_path / "stats.jsonl"
    rows = [tick_row(tick, tick + 1.0) for tick in range(6)]
    rows[3]["Loss/late"] = stat(7.0)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    history = History(path)
    history.read()
    for end in (10, len(lines) // 3, len(lines) // 2, len(lines)):
        path.write_bytes(lines[:end])
        history.read()
    assert list(history.kimg) == [1, 2, 3, 4, 5, 6]
    assert history.num_damaged == 0
    whole = History(path)
    whole.read()
    for name in (*rows[0], "Loss/late"):
        np.testing.assert_array_equal(history.values(name), whole.values(name))
    late = history.values("Loss/late")
    assert late[3] == 7
    assert np.isnan(np.delete(late, 3)).all()


def test_rows_that_a_kill_damaged_are_left_out_and_counted(tmp_path):
    path = tmp_path / "stats.jsonl"
    whole = json.dumps(tick_row(0, 1.0))
    bad = [whole[:50], "null", "[]", '{"Progress/kimg": 3}', "\xff\xfe", '{"Progress/kimg": {}}']
    bad += ['{"Progress/kimg": {"mean": NaN}}', '{"Progress/kimg": {"mean": "4"}}', "[" * 5000]
    path.write_text("\n".join([*bad, whole, "", json.dumps(tick_row(1, 2.0)), whole[:70]]))
    history = History(path)
    history.read()
    assert list(history.kimg) == [1, 2]
    assert history.num_damaged == len(bad)


def test_where_kimg_goes_back_later_rows_replace_earlier_ones(tmp_path):
    path = tmp_path / "stats.jsonl"
    kimg = (1.0, 2.0, 3.0, 4.0, 2.0, 2.5)
    write_rows(path, [tick_row(i, k, loss=float(i)) for i, k in enumerate(kimg)])
    history = History(path)
    history.read()
    assert list(history.kimg) == [1, 2, 2.5]
    assert history.values("Loss/loss").tolist() == [0, 4, 5]
    # A new start of the run has dropped rows, and written others.
    write_rows(path, [tick_row(0, 1.0)])
    history.read()
    assert list(history.kimg) == [1]


def test_long_curves_are_thinned_to_means_and_ranges():
    rng = np.random.default_rng(0)
    x, y = np.arange(50_000.0), rng.normal(size=50_000)
    y[::7] = np.nan
    y[1000:1400] = np.nan
    y[30_000] = np.inf
    curve = thin(x, y)
    assert len(curve.x) <= 2000 / 3
    assert (curve.x[0], curve.x[-1]) == (0, 49_999)
    assert curve.y[-1] == pytest.approx(y[-1], rel=1e-5)
    finite = y[np.isfinite(y)]
    found = [[v for v in values if v is not None] for values in curve[1:]]
    assert min(found[1]) == pytest.approx(finite.min(), rel=1e-5)
    assert max(found[2]) == pytest.approx(finite.max(), rel=1e-5)
    assert None in curve.y
    for mean, low, high in zip(*curve[1:], strict=True):
        assert mean is None or low <= mean + 1e-6 <= high + 2e-6
    mean = np.average([v for v in curve.y if v is not None])
    assert mean == pytest.approx(finite.mean(), abs=0.01)
    short = thin(x[:5], y[:5])
    assert short == (list(range(5)), [None, *map(float, (f"{v:.6g}" for v in y[1:5]))], None, None)


def test_the_loss_by_noise_level_is_a_line_a_range(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    over_kimg, over_levels = level_charts([run])
    assert [line.name for line in over_kimg.lines] == [
        *("sigma below 0.11", "sigma 0.11 to 0.22", "sigma 0.22 to 0.4", "sigma 0.4 to 0.81"),
        "sigma above 0.81",
    ]
    assert [line.name for line in over_levels.lines] == ["kimg 2", "kimg 8", "kimg 28", "kimg 80"]
    last = over_levels.lines[-1].curve
    assert last.x == sorted(last.x)
    assert last.y == pytest.approx(
        [run.history.last(f"Loss/sigma_{ends}") for ends in LEVELS], rel=1e-5
    )
    times = {f"Flow/loss_t{i / 4:.2f}-{(i + 1) / 4:.2f}": stat(1.0 + i) for i in range(4)}
    flow = tmp_path / "flow"
    flow.mkdir()
    write_rows(flow / "stats.jsonl", [{"Progress/kimg": stat(1.0), **times}])
    _, over_time = level_charts([read_run(flow)])
    assert over_time.lines[-1].curve[:2] == ([0.125, 0.375, 0.625, 0.875], [1, 2, 3, 4])
    for odd in ("Loss/sigma_0-inf", "Loss/sigma_1e400-2e400", "Loss/sigma_0-0", "a_t1-1e999"):
        write_rows(flow / "stats.jsonl", [{"Progress/kimg": stat(1.0), odd: stat(1.0)}])
        page_of(flow)


def test_a_run_of_any_age_has_a_page(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "training_options.json").write_text("{")
    reader, _ = page_of(empty)
    assert "No tick is recorded yet." in reader.text
    for number, (ticks, snapshots) in enumerate(((0, ()), (1, ()), (1, (0,)), (3, (0, 2)))):
        run_dir = make_run(tmp_path / f"run{number}", num_ticks=ticks, snapshots=snapshots)
        reader, data = page_of(run_dir)
        assert len(reader.all("img")) == len(snapshots) + bool(snapshots)
        assert any(chart["title"] == "Loss" for chart in data["charts"]) == (ticks > 0)
        for name in ("training_options.json", "log.txt"):
            (run_dir / name).unlink()
        page_of(run_dir)


def test_losses_of_nan_and_skipped_steps_are_shown_and_warned_of(tmp_path):
    run_dir = make_run(tmp_path / "run", snapshots=())
    rows = [
        tick_row(tick, tick + 1.0, skipped_steps=max(tick - 5, 0), loss=None if tick > 7 else 1.0)
        for tick in range(10)
    ]
    write_rows(run_dir / "stats.jsonl", rows)
    reader, data = page_of(run_dir)
    assert "4 steps were skipped, because their gradients were not finite." in reader.text
    assert "The loss was not finite in 2 of 10 ticks." in reader.text
    assert "--clip-grad=1" in reader.text
    (loss,) = (chart for chart in data["charts"] if chart["title"] == "Loss")
    assert loss["lines"][0]["y"] == [1.0] * 8 + [None] * 2
    worst = [attributes.get("class") for attributes in reader.all("li")]
    assert worst.index("error") < worst.index("warning")


# Warnings.


def test_warnings_are_those_of_the_watch_the_log_and_the_scores(tmp_path):
    run_dir = make_run(tmp_path / "run")
    watch = [
        dict(kimg=8, name="loss", message="It rises.", remedy="Lower --lr.", level="ERROR"),
        dict(kimg="x", message="No more.", level=3, remedy=None),
        dict(name="only a name"),
        dict(other=1),
        dict(message=["no text"]),
    ]
    write_rows(run_dir / "watch.jsonl", watch)
    with open(run_dir / "watch.jsonl", "a") as file:
        file.write('{"message": "half')
    with open(run_dir / "log.txt", "a") as file:
        file.write("Warning: the context is not used: raise --lr, or train longer.\n")
        file.write("tick 4     kimg 10.0      loss 0.4\nWarning: the context is not used: x.\n")
        file.write("No pictures at kimg 8.0. Decoding gave values that are not finite.\n")
        file.write("Stopped by SIGTERM at kimg 9.0; continue with --resume=runs/x\n")
    back = dict(number=1, from_nimg=9000, to_nimg=4000, reason="the loss rose at blocks.2")
    write_rows(run_dir / "rollbacks.jsonl", [back, dict(number=2)])
    low = "low count: 5 images for 64 dimensions"
    write_rows(run_dir / "metric-b.jsonl", [score_row(8, 1, warnings=[low, 3]), score_row(9, 1)])
    found = read_run(run_dir).notices
    shown = {n.message: (n.level, n.remedy, n.kimg, n.name, num) for n, num in found}
    assert shown["It rises."] == ("error", "Lower --lr.", 8, "loss", 1)
    assert shown["No more."] == ("warning", "", None, "", 1)
    assert shown["only a name"] == ("warning", "", None, "", 1)
    assert shown["The context is not used."] == ("warning", "X.", 10.0, "", 2)
    assert shown["Stopped by SIGTERM at kimg 9.0; continue with --resume=runs/x"][0] == "info"
    level, remedy, kimg, *_ = shown[
        "Went back from kimg 9.0 to kimg 4.0: the loss rose at blocks.2."
    ]
    assert (level, kimg, "--lr" in remedy) == ("warning", 9.0, True)
    level, remedy, *_ = shown["Low count: 5 images for 64 dimensions."]
    assert level == "warning"
    assert "Score more images" in remedy
    assert "1 lines of the run's files cannot be read" in " ".join(shown)
    assert len(shown) == 9
    assert found[0][0].level == "error"


def test_what_the_watch_of_a_run_says_is_shown_once_with_its_remedy(tmp_path):
    run_dir = make_run(tmp_path / "run", snapshots=())
    found = [set_context.CONTEXT, set_context.ENCODER, set_context.LAYERS]
    telemetry = Telemetry(run_dir, LoggingConfig(board=()), None, 1_000_000)
    for finding in found:
        telemetry.tell(finding, 8_000)
    telemetry.close()
    notices = read_run(run_dir).notices
    assert {(n.name, n.level, n.kimg, num) for n, num in notices} == {
        (finding.name, "warning", 8.0, 1) for finding in found
    }
    assert all(notice.remedy for notice, _ in notices)


# Scores.


def scores_of(run_dir, *rows):
    write_rows(run_dir / "metric-fd_pixels.jsonl", rows)
    return read_run(run_dir).scores


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", snapshots=())


def test_a_score_has_the_noise_band_of_its_row(run_dir):
    band = dict(fid=dict(std=0.25, values=[1, 2, 3]), seeds=["0-9"])
    row = score_row(8, 5.0, metric="fid", values=dict(fid=5.0), noise_band=band)
    (score,) = scores_of(run_dir, row)["fid", "fid"]
    assert (score.error, score.error_from) == (0.25, "over 3 blocks of seeds")
    (score,) = scores_of(run_dir, dict(row, values=dict(kid=5.0, kid_std=0.5)))["fid", "kid"]
    assert score.error == 0.5
    row = score_row(8, 0.2, metric="pr", values=dict(precision=0.2), noise_band="odd")
    (score,) = scores_of(run_dir, row)["pr", "precision"]
    assert score.error == pytest.approx(math.sqrt(0.2 * 0.8 / 400))
    items = [dict(id=str(i), lpips=v) for i, v in enumerate((0.1, 0.2, 0.6))]
    values = dict(mean=0.3, p50=0.2, other=0.25)
    found = scores_of(run_dir, score_row(8, 0.3, metric="v", values=values, per_item=items))
    error = np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)
    assert found["v", "mean"][0].error == pytest.approx(error)
    assert found["v", "p50"][0].error == pytest.approx(error * math.sqrt(math.pi / 2))
    assert found["v", "other"][0].error is None


def test_a_band_that_was_measured_stands_in_for_others_by_value_and_count(run_dir):
    band = dict(fd_pixels=dict(std=0.1, values=[1, 2]), seeds=[])
    measured = score_row(16, 2.0, num_images=100, noise_band=band)
    (run_dir / "score.json").write_text(json.dumps(dict(rows=[measured])))
    inside, *_, outside = scores_of(run_dir, score_row(8, 4.0))["fd_pixels", "fd_pixels"]
    assert inside.error == pytest.approx(0.1 * 2 / 2)  # Twice the value, four times the images.
    assert inside.is_in_run
    assert (outside.error, outside.source) == (0.1, "score.json")
    (chart,) = score_charts([read_run(run_dir)])
    assert [line.name for line in chart.lines] == ["fd_pixels", "fd_pixels, score.json"]
    assert chart.lines[0].curve.low == [pytest.approx(3.9)]


def test_scores_without_any_band_say_how_to_measure_one(run_dir):
    scores_of(run_dir, score_row(8, 4.0), score_row(16, 3.0), score_row(8, 3.5), {"metric": 3})
    run = read_run(run_dir)
    (own,) = run.scores.values()
    assert [(s.kimg, s.value) for s in own] == [(8, 3.5), (16, 3.0)]  # The later row counts.
    assert best(own).kimg == 16
    reader, _ = page_of(run_dir)
    assert "Score a snapshot with --noise-band=3 and --json" in reader.text
    (run_dir / "metric-c.jsonl").write_text(
        '{"metric": "c", "value": null, "values": {"a": NaN, "b": "x", "d": 1e999}}\n'
        '{"metric": "c", "value": 1, "values": [2]}\n{"metric": "c"'
    )
    assert [s.value for s in read_run(run_dir).scores["c", "c"]] == [1]


@pytest.mark.parametrize(("name", "wanted"), [("recall", 3), ("fid", 1), ("unheard_of", None)])
def test_the_best_score_is_the_highest_or_the_lowest(run_dir, name, wanted):
    rows = [score_row(k, v, metric="m", values={name: v}) for k, v in ((1, 1), (2, 3), (3, 2))]
    found = best(scores_of(run_dir, *rows)["m", name])
    assert (None if found is None else found.value) == wanted


# Conditions.


def test_the_newest_report_on_conditions_is_shown_with_the_attention_split(run_dir):
    old, new = (condition_rows(f"{run_dir}/network-snapshot-{k:06d}.pkl") for k in (8, 64))
    new[-1]["values"] = dict(text=0.25, cls=0.25, patches=0.5)
    write_rows(run_dir / "conditions.jsonl", [*new, *old])
    newest, older = read_run(run_dir).conditions
    assert (newest.kimg, older.kimg) == (64, 8)
    assert newest.attention[-1] == dict(text=0.25, cls=0.25, patches=0.5)
    reader, data = page_of(run_dir)
    (attention,) = (c for c in data["charts"] if c["title"] == "Attention split by layer")
    assert [line["name"] for line in attention["lines"]] == ["text", "cls", "patches"]
    assert [line["y"][-1] for line in attention["lines"]] == [0.25, 0.25, 0.5]
    (output,) = (c for c in data["charts"] if c["title"] == "Change of the output")
    assert output["names"] == ["text", "patches"]
    assert output["lines"][0]["low"] == pytest.approx([0.28, 0.28])
    assert "0.300 ± 0.020" in reader.text
    assert "network-snapshot-000008.pkl" in reader.text
    absent = dict(new[0], values={}, value=None, reason="never dropped in training")
    write_rows(run_dir / "conditions.jsonl", [absent])
    assert "never dropped in training" in page_of(run_dir)[0].text


def test_the_command_writes_what_the_report_reads(base, tmp_path):
    from helpers import trained_snapshot

    run_dir = make_run(tmp_path / "run", snapshots=())
    out = run_dir / "conditions.jsonl"
    succeed(fid, "conditions", f"--network={trained_snapshot(base)}", "--num=6", f"--jsonl={out}")
    (report,) = read_run(run_dir).conditions
    assert {effect.condition for effect in report.overall()} == {"class"}
    assert all("output_change" in effect.values for effect in report.overall())


# Pictures.


def sources(kimg):
    return [Source(path, float(path)) for path in kimg]


def test_pictures_are_kept_evenly_by_log_kimg_with_both_ends():
    every = sources(range(1, 1001))
    for most in (48, 24, 8, 3, 2):
        chosen = choose(every, most)
        assert len(chosen) <= most
        assert (chosen[0], chosen[-1]) == (every[0], every[-1])
        assert chosen == sorted(chosen, key=lambda s: s.kimg)
    chosen = [s.kimg for s in choose(every, 24)]
    steps = np.diff(np.log2(chosen))[:-1]
    assert len(chosen) >= 12
    assert max(steps) < 1.01
    assert choose(every[:10], 24) == every[:10]
    # What is kept stays kept while a run goes on, but for its end.
    before = choose(sources(range(1, 700)), 48)[:-1]
    assert set(before) <= set(choose(sources(range(1, 720)), 48))
    assert len(choose(sources([0, 0, 0, 0]), 2)) == 2


def noise_pictures(run_dir, num, size):
    for index in range(num):
        pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(run_dir / f"fakes-{index + 1:06d}.png", compress_level=0)


def test_a_page_stays_below_20_mb_however_large_the_grids_are(tmp_path):
    run_dir = make_run(tmp_path / "run", snapshots=())
    noise_pictures(run_dir, 12, 1500)
    write_report([run_dir], run_dir / "report.html")
    size = (run_dir / "report.html").stat().st_size
    assert 10_000_000 < size <= MAX_BYTES
    reader = Reader((run_dir / "report.html").read_text())
    names = [attributes["data-source"] for attributes in reader.all("img")]
    assert 3 < len(names) < 12
    assert (names[0], names[-1]) == ("fakes-000001.png", "fakes-000012.png")
    assert f"{len(names)} of 12 pictures, evenly by log(kimg)." in reader.text


def test_pictures_that_do_not_fit_are_reduced_or_left_out(tmp_path):
    run_dir = make_run(tmp_path / "run", snapshots=())
    noise_pictures(run_dir, 5, 1500)
    series = find_pictures(run_dir)
    whole = Album().fit(series, 10**8)["fakes"]
    assert len(whole) == 5
    for limit in (3_000_000, 900_000, 200_000, 1000):
        found = Album().fit(series, limit)["fakes"]
        assert sum(picture.num_bytes for picture in found) <= limit
        assert bool(found) == (limit > 1000)
        if found:
            assert found[-1].name == "fakes-000005.png"


def test_a_small_last_picture_does_not_mislead_about_the_others(tmp_path):
    run_dir = make_run(tmp_path / "run", snapshots=())
    noise_pictures(run_dir, 8, 1500)
    Image.new("RGB", (16, 16)).save(run_dir / "fakes-000009.png")
    found = Album().fit(find_pictures(run_dir), 5_000_000)["fakes"]
    assert sum(picture.num_bytes for picture in found) <= 5_000_000
    assert (found[0].name, found[-1].name) == ("fakes-000001.png", "fakes-000009.png")


def test_pictures_are_encoded_once(tmp_path, monkeypatch):
    run_dir, made = make_run(tmp_path / "run"), []
    encode = pictures_module.encode

    def counted(path, longest):
        made.append(path.name)
        return encode(path, longest)

    monkeypatch.setattr(pictures_module, "encode", counted)
    report = RunReport(run_dir)
    # A run waits for two at a time: the newest ones first.
    report.write()
    assert made == ["fakes-000064.png", "reals.png"]
    for _ in range(3):
        report.write()
    assert len(made) == 6
    first = (run_dir / "report.html").read_text()
    write_report([run_dir], run_dir / "report.html")
    assert len(made) == 6  # They were in the old page.
    images = [Reader(text).all("img") for text in (first, (run_dir / "report.html").read_text())]
    assert images[0] == images[1]
    write_picture(run_dir / "fakes-000064.png", 3)
    write_report([run_dir], run_dir / "report.html")
    assert made[6:] == ["fakes-000064.png"]


def test_files_that_hold_no_picture_are_left_out(tmp_path):
    run_dir = make_run(tmp_path / "run")
    for name, content in (("fakes-000008.png", b"no picture"), ("fakes-000032.png", b"")):
        (run_dir / name).write_bytes(content)
    whole = (run_dir / "fakes-000016.png").read_bytes()
    (run_dir / "fakes-000016.png").write_bytes(whole[:-200])
    (run_dir / "reals.png").unlink()
    (run_dir / "reals.png").mkdir()
    reader, _ = page_of(run_dir)
    names = [attributes["data-source"] for attributes in reader.all("img")]
    assert names == ["fakes-000000.png", "fakes-000064.png"]


# The page.


def hostile_run(run_dir):
    """Write a run whose files hold hostile texts wherever they can."""
    make_run(run_dir)
    options = options_of(preset=EVIL)
    options["config"][EVIL] = {EVIL: [EVIL]}
    options["config"]["data"] = dict(class_names=[EVIL])
    options.update(command=[EVIL], packages={EVIL: EVIL}, device=EVIL, world_size=EVIL)
    options.update(description={EVIL: EVIL}, data=dict(name=EVIL, num_images=EVIL))
    options["changes"] = [dict(setting=EVIL, option=EVIL, preset=EVIL, run={EVIL: EVIL}), EVIL]
    options["next_steps"] = {EVIL: f"python {EVIL} {{network}}", "b": None}
    (run_dir / "training_options.json").write_text(json.dumps(options))
    rows = [tick_row(tick, tick + 1.0) | {EVIL: stat(1.0)} for tick in range(3)]
    write_rows(run_dir / "stats.jsonl", rows)
    write_rows(run_dir / "watch.jsonl", [dict(message=EVIL, remedy=EVIL, name=EVIL, level=EVIL)])
    (run_dir / "log.txt").write_text(f"Warning: {EVIL}: {EVIL}\n", errors="replace")
    values = {EVIL: 1.0}
    band = {EVIL: dict(std=0.1, values=[1])}
    row = score_row(8, 1.0, metric=EVIL, values=values, noise_band=band, warnings=[EVIL])
    write_rows(run_dir / "metric-x.jsonl", [row])
    (run_dir / "score.json").write_text(json.dumps(dict(rows=[row])))
    rows = [
        dict(row, condition=EVIL, change=EVIL, panel=EVIL, network=EVIL, reason=EVIL)
        for row in condition_rows(EVIL)
    ]
    rows[-1]["values"] = {EVIL: 0.5}
    write_rows(run_dir / "conditions.jsonl", rows)
    (run_dir / "warm-start.json").write_text(json.dumps({EVIL: EVIL}))
    return run_dir


def test_every_text_of_a_file_is_escaped(tmp_path):
    run_dir = hostile_run(tmp_path / "<img src=x onerror=alert(1)>&")
    for others in ((), (hostile_run(tmp_path / "other"),)):
        reader, data = page_of(run_dir, *others)
        assert len(reader.all("script")) == 2
        assert len(reader.all("style")) == 1
        assert reader.text.count("onerror=alert(1)") > 10
        for tag, attributes in reader.elements:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            assert tag not in ("iframe", "object", "embed", "link", "base", "form")
        assert all(image["src"].startswith("data:image/") for image in reader.all("img"))
        assert any("onerror" in chart["title"] for chart in data["charts"])


def test_a_page_may_load_nothing_and_run_no_other_script(tmp_path):
    reader, _ = page_of(make_run(tmp_path / "run"))
    (policy,) = (
        meta["content"]
        for meta in reader.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    text = (tmp_path / "page.html").read_text()
    assert (
        re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"http://www.w3.org/2000/svg", "", text))
        == []
    )


def test_a_page_has_headings_labels_and_texts_for_what_it_draws(tmp_path):
    reader, data = page_of(make_run(tmp_path / "run"))
    headings = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(headings))
    assert all(image["alt"] for image in reader.all("img"))
    assert all(
        field.get("aria-label") or field.get("id") == "smoothing" for field in reader.all("input")
    )
    figures = [figure for figure in reader.all("figure") if "data-chart" in figure]
    assert len(figures) == len(data["charts"])
    assert [figure["aria-label"] for figure in figures] == [c["title"] for c in data["charts"]]
    tables = {
        region["aria-label"] for region in reader.all("div") if region.get("role") == "region"
    }
    assert {f"Values of: {chart['title']}" for chart in data["charts"]} <= tables
    targets = {attributes.get("id") for _, attributes in reader.elements}
    assert {link["href"].lstrip("#") for link in reader.all("a")} <= targets


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_the_contrast_of_wcag_aa_by_day_and_in_the_dark():
    style = (pictures_module.Path(pictures_module.__file__).with_name("page.css")).read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for ground in ("page", "card", "faint", "soft", "error-soft", "warning-soft"):
            for ink in ("ink", "dim") if ground in ("page", "card", "faint") else ("ink",):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        assert contrast(colours["accent"], colours["card"]) >= 4.5
        assert contrast(colours["accent"], colours["soft"]) >= 4.5
        assert contrast(colours["error"], colours["error-soft"]) >= 4.5
        assert contrast(colours["warning"], colours["warning-soft"]) >= 4.5
        for name in (*(f"c{i}" for i in range(8)), "focus"):
            assert contrast(colours[name], colours["card"]) >= 3, name


def test_the_configuration_and_its_difference_from_the_preset_are_shown(tmp_path):
    reader, _ = page_of(make_run(tmp_path / "run"))
    assert "training.kimg--kimg15480" in reader.text
    assert "407,783" in reader.text
    assert "training.batch128" in reader.text
    (tmp_path / "run/training_options.json").write_text(json.dumps(dict(options_of(), changes=[])))
    assert "None: the run uses preset digits unchanged." in page_of(tmp_path / "run")[0].text
    (tmp_path / "run/training_options.json").write_text(
        json.dumps(dict(options_of(), changes=None))
    )
    assert "do not say how the run differs" in page_of(tmp_path / "run")[0].text


def test_changes_name_options_and_what_the_data_decide():
    import dataclasses

    preset = get_preset("digits").run
    assert changes_from(preset, preset) == []
    run = preset.changed("training", batch=64).changed("model", num_classes=3)
    run = dataclasses.replace(run.changed("data", data="a.zip"), preset="other")
    assert changes_from(preset, run) == [
        dict(setting="model.num_classes", preset=10, run=3, option=None),
        dict(setting="training.batch", preset=128, run=64, option="--batch"),
        dict(setting="data.data", preset=None, run="a.zip", option="--data"),
    ]
    other = {
        change["setting"]: change for change in changes_from(get_preset("fsdm-digits").run, run)
    }
    assert other["sets.held_out"]["run"] is None


def test_next_steps_are_commands_of_this_run(tmp_path):
    run_dir = make_run(tmp_path / "a run")
    steps = dict(next_steps(read_run(run_dir)))
    quoted = f"'{run_dir}'"
    assert steps["Train for longer"] == f"python train.py --resume={quoted} --kimg=160"
    network = f"'{run_dir}/network-snapshot-000064.pkl'"
    assert (
        steps["Generate 64 images"] == f"python generate.py --network={network} --outdir={quoted}"
    )
    options = dict(options_of(kimg=500), world_size=4)
    options["config"]["training"]["ema_stds"] = [0.05, 0.1]
    (run_dir / "training_options.json").write_text(json.dumps(options))
    steps = dict(next_steps(read_run(run_dir)))
    launcher = "torchrun --standalone --nproc_per_node=4"
    assert steps["Resume"] == f"{launcher} train.py --resume={quoted}"
    assert "posthoc_ema" in steps["Make averages of other lengths"]
    for path in run_dir.glob("network-*"):
        path.unlink()
    assert list(dict(next_steps(read_run(run_dir)))) == ["Resume", "Compare it with another run"]


@pytest.mark.parametrize("preset", ["digits", "digits-latent", "fsdm-digits", "nanodit-tiny"])
def test_next_steps_of_every_family_have_options_that_exist(preset):
    run = get_preset(preset).run
    steps = families.of(run).next_steps(run)
    assert len(steps) >= 3
    for command in steps.values():
        assert "{network}" in command
        words = command.split()
        assert words[0] == "python"
        script, name = words[1], words[2] if words[1] == "fid.py" else None
        texts = call(
            {"generate.py": generate, "fid.py": fid}[script], *filter(None, [name]), "--help"
        )
        for option in re.findall(r"(?<= )--[a-z-]+", command):
            assert re.search(rf"{option}\b", texts.output), (command, option)


# Several runs.


def test_several_runs_are_drawn_over_one_another_with_what_differs(tmp_path):
    first = make_run(tmp_path / "00000-digits-cond-batch128", num_ticks=5, snapshots=(0, 8))
    second = make_run(tmp_path / "00001-digits-cond-batch64", num_ticks=9, snapshots=(8,))
    options = options_of()
    options["config"]["training"].update(batch=64, new=True)
    (second / "training_options.json").write_text(json.dumps(options))
    reader, data = page_of(first, second)
    assert data["shared"]
    names = ["00000-batch128", "00001-batch64"]
    charts = {chart["title"]: chart for chart in data["charts"]}
    for title in ("Loss", "Gradient norm", "Memory: main memory", "Skipped steps"):
        assert [line["name"] for line in charts[title]["lines"]] == names
        assert [len(line["y"]) for line in charts[title]["lines"]] == [5, 9]
    assert [line["name"] for line in charts["Loss over noise level sigma"]["lines"]] == names
    assert "Loss, sigma 0.11 to 0.22" in charts
    scores = charts["fd_pixels (lower is better)"]["lines"]
    assert [line["colour"] for line in scores] == [0, 0, 1, 1]
    assert "training.batch12864" in reader.text
    assert "training.new-yes" in reader.text
    assert "training.lr0.002" not in reader.text
    assert len(reader.all("img")) == 5


def test_short_names_tell_runs_apart(tmp_path):
    def names(*folders):
        runs = [read_run(make_run(tmp_path / folder, 1, ())) for folder in folders]
        return [run.name for run in with_short_names(runs)]

    assert names("0-digits-a", "1-digits-b") == ["0-a", "1-b"]
    assert names("x-digits", "x-digits-more") == ["x-digits", "x-digits-more"]
    same = names("p/same", "q/same")
    assert same == [str(tmp_path / "p/same"), str(tmp_path / "q/same")]


# The command.


def test_the_command_writes_a_page_a_run_and_a_comparison(tmp_path):
    for name in ("00000-a", "00001-b"):
        make_run(tmp_path / "runs" / name, 2, (0,))
    (tmp_path / "runs" / "notes").mkdir()
    output = succeed(fid, "report", tmp_path / "runs").output
    pages = ["runs/00000-a/report.html", "runs/00001-b/report.html", "runs/comparison.html"]
    assert [(tmp_path / page).is_file() for page in pages] == [True] * 3
    assert output.count(" MB\n") == 3
    before = (tmp_path / pages[0]).read_text()
    out = tmp_path / "out.html"
    for number in (1, 2):  # Its own file may be replaced.
        runs = [tmp_path / "runs/00000-a", tmp_path / "runs/00001-b"][:number]
        succeed(fid, "report", *runs, f"--out={out}")
    assert "Comparison of 2 runs" in out.read_text()
    assert (tmp_path / pages[0]).read_text() == before


def test_the_command_refuses_what_is_no_run_and_files_of_others(tmp_path):
    run_dir = make_run(tmp_path / "run", 1, ())
    message = fail(fid, "report", tmp_path / "x")
    assert "is not a folder; give the folder of a training run" in message
    (tmp_path / "empty").mkdir()
    message = fail(fid, "report", tmp_path / "empty")
    assert "neither training_options.json nor stats.jsonl" in message
    assert "RUN" in fail(fid, "report", "--out=x.html")
    other = tmp_path / "other.html"
    other.write_text("<!doctype html>mine")
    assert "was not made by this command" in fail(fid, "report", run_dir, f"--out={other}")
    assert other.read_text() == "<!doctype html>mine"
    succeed(fid, "report", run_dir, f"--out={other}", "--overwrite")
    (run_dir / "report.html").write_text("mine")
    assert "was not made by this command" in fail(fid, "report", run_dir)


# Runs.


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    outdir = tmp_path_factory.mktemp("reported")
    options = ("--cond", "--tick=0", "--snap=2", "--iters=5", "--metrics=fd_pixels")
    return train_tiny(outdir, toy_data(base), *options)


def test_a_run_writes_its_report_with_every_snapshot(base, trained, tmp_path, monkeypatch):
    reader = Reader((trained.run_dir / "report.html").read_text())
    assert "Complete at kimg 0.04." in reader.text
    assert "fakes-000000.040.png" in [image["data-source"] for image in reader.all("img")]
    assert "training.batch--batch5128" in reader.text
    assert "python fid.py calc" in reader.text
    assert "fd_pixels" in reader.text
    written = []
    original = RunReport.write
    monkeypatch.setattr(RunReport, "write", lambda self: written.append(original(self)))
    run_dir = train_tiny(tmp_path, toy_data(base), "--tick=0", "--snap=2", "--iters=5").run_dir
    # After the steps 1, 3 and 5, of which the last is the end.
    assert written == [run_dir / "report.html"] * 3
    assert not list(run_dir.glob(".report.html.*"))


@pytest.mark.parametrize("tiny", [TINY_SETS, TINY_FEATURES], ids=["sets", "features"])
def test_runs_of_other_families_have_reports(base, tmp_path, tiny):
    if tiny is TINY_FEATURES:
        from feature_files import tiny_features

        data = tiny_features(base / "features")
    else:
        data = toy_data(base)
    run_dir = train_tiny(tmp_path, data, "--tick=0", tiny=tiny).run_dir
    reader = Reader((run_dir / "report.html").read_text())
    assert reader.all("img")
    for command in ("fid.py validate",) if tiny is TINY_FEATURES else ("fid.py fewshot",):
        assert command in reader.text
    # Of the training loss, and of that on the images that these runs hold out.
    assert [c.title.partition(" ")[0] for c in level_charts([read_run(run_dir)])] == [
        *("Loss", "Loss", "Validation", "Validation"),
    ]
    titles = [chart.title for chart in topic_charts([read_run(run_dir)])]
    assert titles[:2] == ["Loss", "Loss of the averaged weights"]


def test_a_report_that_fails_is_one_warning_and_ends_nothing(base, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunReport, "write", full)
    result = train_tiny(tmp_path, toy_data(base), "--tick=0", "--snap=1", "--iters=4")
    text = "Warning: the report cannot be written ([Errno 28] No space left on device)"
    assert result.output.count(text) == 1
    assert len(list(result.run_dir.glob("network-snapshot-*.pkl"))) == 4
    (notice,) = (n for n, _ in read_run(result.run_dir).notices if "The report" in n.message)
    assert "fid.py report" in notice.remedy


def test_a_report_of_a_resumed_run_goes_on(trained, tmp_path, monkeypatch):
    import train

    run_dir = tmp_path / trained.run_dir.name
    shutil.copytree(trained.run_dir, run_dir)
    monkeypatch.setattr(training.boards, "_TensorBoard", mock.MagicMock())
    succeed(train, f"--resume={run_dir}", "--iters=7")
    reader = Reader((run_dir / "report.html").read_text())
    assert "Complete at kimg 0.06." in reader.text
    assert "training.batch--batch5128" in reader.text  # The preset is known to a resumed run too.
