"""--batch-gpu=auto: what memory holds, agreed on by all ranks, kept by a resume."""

import dataclasses
import json

import helpers
import psutil
import pytest
from training_runs import only_run

import train
from dnnlib.memory import available_memory, group_rooms
from training.division import possible_passes
from training.resources import batch as auto_batch
from training.resources.memory import predict_memory
from training.runs import read_start

DIGITS = ("--preset=digits", "--batch=512", "--iters=1", "--steps=1", "--workers=0", "--board=none")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def limit(monkeypatch, rows):
    """Let this process have memory for passes of so many rows, and half as many again."""
    run = train.get_preset("digits").run.changed("training", batch=512, batch_gpu=max(rows, 1))
    run = train.families.of(run).fit(run, None, 10)

    def memory(device):
        needed = predict_memory(run, 1, "cpu")
        free = 0.65 * needed.passes if rows else -50e6  # Fragments count, too.
        return round((needed.total + free) / 0.9)

    monkeypatch.setattr(auto_batch, "memory_of_rank", memory)


def batch_gpu_of(run_dir):
    return read_start(run_dir, print)[0].training.batch_gpu


def test_as_many_rows_as_fit_are_taken_and_a_resume_keeps_them(base, tmp_path, monkeypatch):
    data, auto = helpers.toy_data(base), "--batch-gpu=auto"
    limit(monkeypatch, 256)
    whole = helpers.train_tiny(tmp_path, data, auto, tiny=DIGITS)
    assert batch_gpu_of(whole.run_dir) == 256
    assert "--batch-gpu=auto: 256 per pass, for which a rank needs" in whole.output
    assert "512 images per optimizer step = 256 per pass x 2 pass(es) x 1 rank(s)" in whole.output
    options = json.loads((whole.run_dir / "training_options.json").read_text())
    assert options["config"]["training"]["batch_gpu"] == 256
    # With more memory a new run takes more, and the one that goes on does not.
    limit(monkeypatch, 512)
    arguments = (*DIGITS, f"--data={data}", f"--outdir={tmp_path}", "--resume=auto", auto)
    output = helpers.succeed(train, *arguments, "--iters=2").output
    assert "256 per pass, as in the run so far" in output
    assert batch_gpu_of(whole.run_dir) == 256
    # With less, it goes on with less.
    limit(monkeypatch, 64)
    output = helpers.succeed(train, *arguments, "--iters=3").output
    assert "256 per pass in the run so far do not fit here" in output
    assert batch_gpu_of(whole.run_dir) == 64


def test_a_dry_run_shows_what_auto_takes_and_what_it_needs(monkeypatch):
    limit(monkeypatch, 256)
    output = helpers.succeed(train, *DIGITS, "--batch-gpu=auto", "--dry-run").output
    assert '"batch_gpu": 256' in output
    assert "--batch-gpu=auto: 256 per pass" in output


def test_what_does_not_fit_is_refused_with_what_to_change(base, monkeypatch):
    limit(monkeypatch, 0)
    arguments = (*DIGITS, f"--data={helpers.toy_data(base)}", "--batch-gpu=auto", "--outdir=none")
    message = helpers.fail(train, *arguments)
    assert "--batch-gpu: got auto, but the smallest pass takes" in message
    for remedy in ("on several ranks with --shard=full", "add --checkpointing", "smaller model"):
        assert remedy in message
    monkeypatch.setenv("WORLD_SIZE", "4")
    plan = (*DIGITS, "--batch-gpu=auto", "--dry-run", "--checkpointing", "--shard=full")
    message = helpers.fail(train, *plan)
    assert "train on more ranks or choose a smaller model" in message
    assert "add --checkpointing" not in message


def test_all_ranks_take_what_fits_on_the_smallest(base, tmp_path):
    script = tmp_path / "unequal.py"
    script.write_text(
        "import os, psutil, runpy, sys\n"
        f"sys.path.insert(0, {str(helpers.ROOT)!r})\n"
        "from training.resources import batch\n"
        "room = 10e9 if os.environ['RANK'] == '0' else 250e6\n"
        "rss = psutil.Process().memory_info().rss\n"
        "batch.memory_of_rank = lambda device: round((rss + room) / 0.9)\n"
        f"sys.argv[0] = {str(helpers.ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    where = (f"--data={helpers.toy_data(base)}", f"--outdir={tmp_path / 'runs'}")
    helpers.on_ranks(2, script, *DIGITS, *where, "--batch-gpu=auto")
    assert batch_gpu_of(only_run(tmp_path / "runs")) < 256


def test_uneven_shares_are_not_divided_into_passes_of_one():
    training = train.get_preset("digits").run.training
    thirteen = dataclasses.replace(training, batch=13)
    assert possible_passes(thirteen, 2) == [2, 3, 4, 7]
    assert possible_passes(thirteen, 1) == [1, 13]
    run = train.get_preset("digits").run.changed("training", batch=15, batch_gpu="auto")
    capacity = predict_memory(run.changed("training", batch_gpu=2), 2, "cuda").total / 0.9
    run = train.families.of(run).fit(run, None, 10)
    assert auto_batch.largest_batch(run, 2, "cuda", round(capacity * 1.01))[0] > 1
    with pytest.raises(ValueError, match="smallest pass"):
        auto_batch.largest_batch(run, 2, "cuda", round(capacity / 2))


def write_group(folder, names, limit, used, droppable=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    text = (
        "anon 1\ninactive_file {0}\n" if names[0] == "memory.max" else "total_inactive_file {0}\n"
    )
    (folder / "memory.stat").write_text(text.format(droppable))


def test_limits_of_control_groups_count_at_every_level(tmp_path):
    two, one = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n")
    write_group(tmp_path / "v2/slice/job", two, "max", 5)
    write_group(tmp_path / "v2/slice", two, 100, 70, droppable=20)
    assert list(group_rooms(tmp_path / "v2", own)) == [50]
    own.write_text("9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n")
    write_group(tmp_path / "v1/memory", one, 1000, 900)  # All that a container sees.
    assert list(group_rooms(tmp_path / "v1", own)) == [100]
    assert list(group_rooms(tmp_path, tmp_path / "missing")) == []


def test_the_memory_that_is_left_is_that_of_this_machine():
    assert 0 < available_memory() <= psutil.virtual_memory().total
