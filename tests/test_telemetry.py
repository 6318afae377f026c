"""What a run writes and says: stats.jsonl, log.txt, event files, Weights & Biases, tick lines."""

import errno
import io
import json
import math
import sys
import types
from unittest import mock

import helpers
import pytest
import torch
from PIL import Image

from configs import get_preset
from evaluation.in_loop.images import is_recorded, record
from torch_utils.stop_signal import StopSignal
from training.boards import import_board
from training.config import LoggingConfig, TrainingConfig
from training.report import forward_flops
from training.runs import read_start
from training.telemetry import (
    Telemetry,
    memory_stats,
    metric_is_recorded,
    scalar,
    tick_line,
    trim_rows,
    utilisation_stats,
)

# Fifths of the noise levels of EDM's training, exp(N(-1.2, 1.2)).
LEVELS = [
    f"Loss/sigma_{ends}" for ends in ("0-0.11", "0.11-0.22", "0.22-0.4", "0.4-0.81", "0.81-inf")
]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def run(base, tmp_path_factory):
    """A run of three ticks of one step, eight images each."""
    outdir = tmp_path_factory.mktemp("telemetry")
    return helpers.train_tiny(outdir, helpers.toy_data(base), "--tick=0", "--iters=3")


def metric_row(value, kimg):
    return dict(metric="fd_pixels", value=value, values=dict(fd_pixels=value), kimg=kimg)


def strict_rows(path):
    """Parse JSON lines as the standard has them, without NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_every_tick_has_a_row_of_nested_statistics(run):
    rows = strict_rows(run.run_dir / "stats.jsonl")
    assert [row["Progress/tick"]["mean"] for row in rows] == [0, 1, 2]
    assert [row["Progress/kimg"]["mean"] for row in rows] == pytest.approx([0.008, 0.016, 0.024])
    names = {
        "Loss/loss",
        "Loss/grad_norm",
        "Loss/learning_rate",
        "Loss/skipped_steps",
        *LEVELS,
        "Progress/tick",
        "Progress/kimg",
        "Timing/total_sec",
        "Timing/sec_per_tick",
        "Timing/sec_per_kimg",
        "Timing/images_per_sec",
        "Timing/tflops_per_sec",
        "Timing/maintenance_sec",
        "Resources/cpu_mem_gb",
    }
    config, _ = read_start(run.run_dir, print)
    for row in rows:
        assert names | {"timestamp"} == set(row)
        assert all(set(row[name]) == {"num", "mean", "std"} for name in names)
        assert row["Loss/loss"]["num"] == 8 * 3 * 8 * 8
        assert row["Loss/loss"]["std"] > 0
        assert row["Loss/learning_rate"]["mean"] == pytest.approx(0.01)
        assert row["Loss/skipped_steps"]["mean"] == 0
        seconds = row["Timing/sec_per_tick"]["mean"]
        assert row["Timing/sec_per_kimg"]["mean"] == pytest.approx(seconds / 0.008)
        assert row["Timing/images_per_sec"]["mean"] == pytest.approx(8 / seconds)
        flops = (
            3 * forward_flops(config) * 8 / seconds
        )  # The backward pass costs twice the forward.
        assert row["Timing/tflops_per_sec"]["mean"] == pytest.approx(flops / 1e12)
        assert 0.05 < row["Resources/cpu_mem_gb"]["mean"] < 100
    totals = [row["Timing/total_sec"]["mean"] for row in rows]
    assert totals == sorted(totals)


def test_the_loss_is_told_by_noise_level(run):
    for row in strict_rows(run.run_dir / "stats.jsonl"):
        found = [row[name] for name in LEVELS]
        assert sum(level["num"] for level in found) == 8
        total = sum(level["num"] * (level["mean"] or 0) for level in found)
        assert total / 8 == pytest.approx(row["Loss/loss"]["mean"])


def test_losses_are_told_by_the_noise_levels_that_they_are_of(base):
    from diffusion.precond import EDMPrecond
    from torch_utils.stats import StatsCollector
    from training.objective import Draws, Objective

    objective, stats = Objective(torch.nn.Identity(), EDMPrecond(), None), StatsCollector()
    sigma = torch.tensor([0.05, 0.15, 0.1, 5.0])
    losses = torch.tensor([1.0, 2.0, 3.0, math.nan])[:, None, None, None].expand(4, 1, 2, 2)
    # The same levels for two images each, as of sets.
    draws = Draws(sigma=sigma[:2], noise=None, drop=None, codec=None)
    objective.report(stats, losses[[0, 2, 1, 1]], draws)
    objective.report(stats, losses, Draws(sigma=sigma, noise=None, drop=None, codec=None))
    found = {name: stat for name, stat in stats.collect().items() if "sigma" in name}
    assert list(found) == sorted(LEVELS)
    assert [found[name]["num"] for name in LEVELS] == [4, 3, 0, 0, 0]
    assert [found[name]["mean"] for name in LEVELS[:2]] == pytest.approx([2.0, 2.0])
    assert found[LEVELS[0]]["std"] == pytest.approx(1.0)
    assert math.isnan(found[LEVELS[4]]["mean"])


def test_the_console_shows_a_line_a_tick_and_the_log_keeps_it(run):
    lines = [line for line in run.output.splitlines() if line.startswith("tick ")]
    assert len(lines) == 3
    for tick, line in enumerate(lines):
        words = line.split()
        assert words[:4] == ["tick", str(tick), "kimg", f"{(tick + 1) * 8 / 1000:.2f}"]
        for name in ("loss", "sec/kimg", "time", "left", "maintenance", "cpumem"):
            assert name in words
    log = (run.run_dir / "log.txt").read_text()
    assert all(line in log for line in lines)


def test_a_run_leaves_pictures_options_and_event_files(run):
    names = {path.name for path in run.run_dir.iterdir()}
    assert {"reals.png", "fakes-000000.024.png", "training_options.json", "log.txt"} <= names
    options = json.loads((run.run_dir / "training_options.json").read_text())
    assert set(options) >= {"config", "command", "world_size", "device", "packages"}
    assert options["world_size"] == 1
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_event_files_hold_the_scalars_by_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = get_preset("digits").run
    telemetry = Telemetry(tmp_path, LoggingConfig(), config, 0)
    telemetry.record({"Loss/loss": dict(num=2, mean=0.5, std=0.1)}, 3000)
    telemetry.record_metric(
        dict(metric="fd_pixels", value=0.25, values=dict(fd=0.25), kimg=3.0), 3000
    )
    telemetry.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, value in (("Loss/loss", 0.5), ("Metrics/fd_pixels", 0.25)):
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (3000, value)


def test_a_full_disk_is_told_with_the_file_that_is_not_written(telemetry, tmp_path):
    class Full(io.StringIO):
        name = "stats.jsonl"

        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        mock.patch.object(telemetry, "_stats", Full()),
        pytest.raises(OSError, match=r"No space left on device: 'stats\.jsonl'"),
    ):
        telemetry.record({"Loss/loss": scalar(1.0)}, 8)


def test_without_tensorboard_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    telemetry = Telemetry(tmp_path, LoggingConfig(), get_preset("digits").run, 0)
    telemetry.record({"Loss/loss": scalar(1)}, 0)
    telemetry.close()
    assert "pip install tensorboard" in capsys.readouterr().out
    assert not list(tmp_path.glob("events*"))


@pytest.fixture
def telemetry(tmp_path, monkeypatch):
    made = Telemetry(tmp_path, LoggingConfig(board=()), get_preset("digits").run, 0)
    yield made
    made.close()


def test_numbers_that_are_not_finite_are_written_as_null(telemetry, tmp_path):
    telemetry.record({"Loss/loss": dict(num=3, mean=math.nan, std=math.inf)}, 0)
    (row,) = strict_rows(tmp_path / "stats.jsonl")
    assert row["Loss/loss"] == dict(num=3, mean=None, std=None)


def test_a_run_with_a_loss_of_nan_writes_valid_rows(base, tmp_path, monkeypatch):
    from training.objective import Objective

    original = Objective.forward
    monkeypatch.setattr(
        Objective, "forward", lambda self, *args: original(self, *args) * float("nan")
    )
    result = helpers.train_tiny(tmp_path, helpers.toy_data(base), "--tick=0", "--iters=2")
    rows = strict_rows(result.run_dir / "stats.jsonl")
    assert [row["Loss/skipped_steps"]["mean"] for row in rows] == [1, 2]
    assert rows[0]["Loss/loss"]["mean"] is None
    assert "loss nan" in result.output
    assert "skipped 2 non-finite" in result.output


def test_every_value_of_a_metric_becomes_a_scalar(telemetry, monkeypatch):
    recorded = {}
    monkeypatch.setattr(telemetry, "_scalars", lambda values, cur_nimg: recorded.update(values))
    row = dict(metric="pr50k3_full", value=0.5, values=dict(precision=0.5, recall=0.25), kimg=1.0)
    telemetry.record_metric(row, 1000)
    assert recorded == {
        "Metrics/pr50k3_full/precision": 0.5,
        "Metrics/pr50k3_full/recall": 0.25,
    }


def test_scores_go_to_a_file_a_metric_of_their_own(telemetry, tmp_path):
    telemetry.record_metric(
        dict(metric="fd_pixels", value=0.5, values=dict(fd=0.5), kimg=1.0), 1000
    )
    telemetry.record_metric(
        dict(metric="fd_pixels", value=0.4, values=dict(fd=0.4), kimg=2.5), 2500
    )
    rows = strict_rows(tmp_path / "metric-fd_pixels.jsonl")
    assert [row["value"] for row in rows] == [0.5, 0.4]
    assert metric_is_recorded(tmp_path, "fd_pixels", 1000)
    assert metric_is_recorded(tmp_path, "fd_pixels", 2500)
    assert not metric_is_recorded(tmp_path, "fd_pixels", 2000)
    assert not metric_is_recorded(tmp_path, "fid10k_full", 1000)


def test_rows_after_the_last_state_are_dropped_before_they_are_written_again(tmp_path):
    stats, scores = tmp_path / "stats.jsonl", tmp_path / "metric-fd_pixels.jsonl"
    rows = [json.dumps({"Progress/kimg": scalar(kimg)}) for kimg in (0.5, 1.0, 1.5)]
    # The last line was cut off by the kill.
    stats.write_text("\n".join(rows) + '\n{"Progress/kimg": {"num": 1, "me')
    scores.write_text('{"kimg": 1.0, "value": 3}\n{"kimg": 1.5, "value": 2}\n')
    trim_rows(tmp_path, 1000)
    assert stats.read_text() == "".join(f"{row}\n" for row in rows[:2])
    assert scores.read_text() == '{"kimg": 1.0, "value": 3}\n'
    before = stats.stat().st_mtime_ns
    trim_rows(tmp_path, 1000)
    assert stats.stat().st_mtime_ns == before
    trim_rows(tmp_path, 0)
    assert stats.read_text() == ""


def test_a_damaged_line_before_the_last_is_named(tmp_path, capsys):
    stats = tmp_path / "stats.jsonl"
    rows = [json.dumps({"Progress/kimg": scalar(kimg)}) for kimg in (0.5, 0.7, 0.9)]
    stats.write_text("\n".join([rows[0], rows[1][:9], rows[2], rows[2][:5]]))
    trim_rows(tmp_path, 1000)
    assert capsys.readouterr().out == f"{stats}: line 2 cannot be read and is left out.\n"
    assert stats.read_text() == f"{rows[0]}\n{rows[2]}\n"


def test_a_cut_off_line_is_dropped_even_if_it_reads_as_a_number(tmp_path):
    stats = tmp_path / "stats.jsonl"
    row = json.dumps({"Progress/kimg": scalar(0.5)})
    stats.write_text(f"{row}\n3")
    trim_rows(tmp_path, 1000)
    assert stats.read_text() == f"{row}\n"


def test_utilisation_is_told_on_known_gpus_alone(monkeypatch):
    training = TrainingConfig(precision="bf16")
    on_cpu = utilisation_stats(2e12, torch.device("cpu"), training)
    assert list(on_cpu) == ["Timing/tflops_per_sec"]
    assert on_cpu["Timing/tflops_per_sec"]["mean"] == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    on_gpu = utilisation_stats(395.6e12, torch.device("cuda"), training)
    assert on_gpu["Timing/mfu"]["mean"] == pytest.approx(0.4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unheard of")
    assert "Timing/mfu" not in utilisation_stats(1e12, torch.device("cuda"), training)


def test_the_tick_line_names_what_a_person_waits_for():
    fields = {
        "Progress/tick": scalar(7),
        "Progress/kimg": scalar(350),
        "Loss/loss": dict(num=9, mean=0.123456, std=0.1),
        "Timing/sec_per_kimg": scalar(2),
        "Timing/total_sec": scalar(700),
        "Timing/maintenance_sec": scalar(3.21),
        "Resources/cpu_mem_gb": scalar(1.5),
    }
    line = tick_line(fields, total_nimg=400_000, num_skipped=0)
    expected = "tick 7 kimg 350.0 loss 0.12346 sec/kimg 2.00 time 11m 40s left 1m 40s"
    assert " ".join(line.split()) == f"{expected} maintenance 3.2 cpumem 1.50"
    fields["Resources/peak_gpu_mem_gb"] = scalar(4)
    assert tick_line(fields, 400_000, 5).endswith("gpumem 4.00   skipped 5 non-finite")
    # Past its end a run has no time left; a run of one line says 0 seconds.
    assert "left 0s" in tick_line(fields, 100_000, 0)
    fields |= {"Timing/mfu": scalar(0.412), "Timing/tflops_per_sec": scalar(407.6)}
    assert "mfu 41.2% (408 TFLOP/s)" in tick_line(fields, 400_000, 0)


def test_memory_is_that_of_this_process(monkeypatch):
    stats = memory_stats(torch.device("cpu"))
    assert list(stats) == ["Resources/cpu_mem_gb"]
    assert 0.05 < stats["Resources/cpu_mem_gb"]["mean"] < 100


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.init, module.Settings, module.Image = (mock.MagicMock() for _ in range(3))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module.init


def test_weights_and_biases_get_the_configuration_and_every_number(wandb, tmp_path):
    run_dir = tmp_path / "00003-toy"
    run_dir.mkdir()
    config = get_preset("digits").run
    logging = LoggingConfig(board=("wandb",), wandb_project="mine")
    ids = []
    for _ in range(2):
        telemetry = Telemetry(run_dir, logging, config, 0)
        telemetry.record({"Loss/loss": scalar(0.5)}, 2500)
        telemetry.record_metric(
            dict(metric="fd_pixels", value=0.25, values=dict(fd=0.25), kimg=2.5), 2500
        )
        telemetry.close()
        options = wandb.call_args.kwargs
        ids.append(options["id"])
        assert (options["project"], options["name"]) == ("mine", "00003-toy")
        assert options["config"]["training"]["batch"] == config.training.batch
        assert options["resume"] == "allow"
        made = wandb.return_value
        assert made.log.call_args_list == [
            mock.call({"Loss/loss": 0.5, "images": 2500, "kimg": 2.5}),
            mock.call({"Metrics/fd_pixels": 0.25, "images": 2500, "kimg": 2.5}),
        ]
        made.finish.assert_called_once()
        made.reset_mock()
    # A continued run goes on with its own record; another folder has another.
    assert ids[0] == ids[1]
    other = tmp_path / "other" / "00003-toy"
    other.mkdir(parents=True)
    Telemetry(other, logging, config, 0).close()
    assert wandb.call_args.kwargs["id"] != ids[0]


def test_a_logging_service_that_fails_does_not_end_the_run(wandb, tmp_path, capsys):
    logging, config = LoggingConfig(board=(), wandb=True), get_preset("digits").run
    wandb.return_value.log.side_effect = ConnectionError("no route to host")
    telemetry = Telemetry(tmp_path, logging, config, 0)
    for _ in range(2):
        telemetry.record({"Loss/loss": scalar(0.5)}, 2500)
    telemetry.close()
    output = capsys.readouterr().out
    assert output.count("cannot be used (no route to host): training continues without it") == 1
    assert "WANDB_MODE=offline" in output
    wandb.side_effect = RuntimeError("api_key not configured (no-tty).")
    telemetry = Telemetry(tmp_path, logging, config, 0)
    telemetry.record({"Loss/loss": scalar(0.5)}, 5000)
    assert "cannot be used (api_key not configured (no-tty)): training" in capsys.readouterr().out


def picture_in(folder, name):
    Image.new("RGB", (6, 4), (255, 128, 0)).save(folder / name)
    return folder / name


def test_pictures_go_to_weights_and_biases_with_their_step(wandb, tmp_path):
    telemetry = Telemetry(tmp_path, LoggingConfig(board=("wandb",)), get_preset("digits").run, 0)
    path = picture_in(tmp_path, "fakes-000003.png")
    telemetry.pictures([path], 3000)
    image = sys.modules["wandb"].Image
    image.assert_called_once_with(str(path))
    wandb.return_value.log.assert_called_once_with(
        {"Pictures/fakes": image.return_value, "images": 3000, "kimg": 3.0}
    )
    telemetry.close()


def test_pictures_are_in_event_files_as_they_are(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry(tmp_path, LoggingConfig(), get_preset("digits").run, 0)
    paths = [picture_in(tmp_path, name) for name in ("reals.png", "validation-swap-000003.png")]
    telemetry.pictures(paths, 3000)
    telemetry.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["images"]) == {"Pictures/reals", "Pictures/validation-swap"}
    (event,) = events.Images("Pictures/validation-swap")
    assert (event.step, event.width, event.height) == (3000, 6, 4)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 128, 0)


def test_trackio_gets_numbers_and_pictures_by_images(tmp_path, monkeypatch):
    module = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "trackio", module)
    logging = LoggingConfig(board=("trackio",), wandb_project="mine")
    names = []
    for _ in range(2):
        telemetry = Telemetry(tmp_path, logging, get_preset("digits").run, 0)
        telemetry.record({"Loss/loss": scalar(0.5)}, 2500)
        telemetry.pictures([picture_in(tmp_path, "fakes-000002.png")], 2500)
        telemetry.close()
        options = module.init.call_args.kwargs
        names.append(options["name"])
        assert (options["project"], options["resume"]) == ("mine", "allow")
        assert options["config"]["preset"] == "digits"
        at = {"images": 2500, "kimg": 2.5}
        assert module.log.call_args_list == [
            mock.call({"Loss/loss": 0.5, **at}, step=2500),
            mock.call({"Pictures/fakes": module.Image.return_value, **at}, step=2500),
        ]
        module.finish.assert_called_once()
        module.reset_mock()
    assert names[0] == names[1]


def test_boards_are_those_that_are_named_and_wandb_has_a_flag_of_its_own():
    assert LoggingConfig().boards == ("tensorboard",)
    assert LoggingConfig(wandb=True).boards == ("tensorboard", "wandb")
    assert LoggingConfig(board=("wandb", "trackio"), wandb=True).boards == ("wandb", "trackio")
    with pytest.raises(ValueError, match="accepted"):
        LoggingConfig(board=("visdom",))


def test_a_run_shows_its_pictures_on_its_boards(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.run_dir)).Reload()
    steps = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps["Pictures/reals"] == [0]
    assert len(steps["Pictures/fakes"]) == len(list(run.run_dir.glob("fakes-*.png")))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_without_its_package_a_board_names_the_command(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    expected = rf"--board={name} needs the package {name}: pip install {name}"
    with pytest.raises(ValueError, match=expected):
        import_board(name)


def test_findings_on_the_data_are_told_once_by_a_run_that_begins_again(tmp_path):
    path = tmp_path / "watch.jsonl"
    rows = [dict(kimg=0.0, name="latents_scale"), dict(kimg=0.008, name="layer_dead")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    trim_rows(tmp_path, 8)
    assert path.read_text() == text
    trim_rows(tmp_path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_a_kill_between_the_rows_of_a_score_loses_none(tmp_path, num_rows):
    names = ["fd_pixels", "fd_pixels_held_out", "copies_pixels"]
    left = num_rows

    class Killed(Exception):  # noqa: N818
        pass

    def record_metric(row, cur_nimg):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        with open(tmp_path / f"metric-{row['metric']}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    telemetry = types.SimpleNamespace(record_metric=record_metric, message=lambda text: None)
    outputs = types.SimpleNamespace(run_dir=tmp_path, telemetry=telemetry, stop_signal=StopSignal())
    rows = [dict(metric=name, value=1.0, values={name: 1.0}) for name in names]
    with pytest.raises(Killed):
        record(rows, outputs, 8)
    assert not is_recorded(outputs, "fd_pixels", 8)  # So that all are made again.
    left = 3
    record(rows, outputs, 8)
    for name in names:
        lines = (tmp_path / f"metric-{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["kimg"] for line in lines] == [0.008]
