"""dataset_tool.py features on several ranks, killed and continued, in processes of their own."""

import os
import signal

from feature_files import BUCKETS, content, made, prepare, tiny_encoders
from helpers import ROOT, fail, on_ranks, run_warm

import dataset_tool
from data.features.preparation.stage import Stage

OPTIONS = ("--shard-size=2", "--batch=1")  # Of the folder in `feature_base`.

KILLED = """
import os, signal, sys

sys.path.insert(0, sys.argv.pop(1))
import dataset_tool
from data.features import shards as feature_shards

number = 0

def killed_while_writing(path, *args, **kwargs):
    global number
    number += 1
    file = atomic_write(path, *args, **kwargs)
    if number == 4:
        with file as opened:
            opened.write(b"some bytes")
            opened.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return file

atomic_write, feature_shards.atomic_write = feature_shards.atomic_write, killed_while_writing
dataset_tool.main()
"""


def command(base, dest):
    source = base / "pictures"
    options = (f"--source={source}", f"--dest={dest}", f"--buckets={BUCKETS}", "--workers=1")
    return ("features", *options, *OPTIONS, *tiny_encoders(base))


def test_a_killed_preparation_goes_on_and_makes_nothing_twice(feature_base, tmp_path):
    dest = tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED)
    killed = run_warm(tmp_path / "killed.py", ROOT, *command(feature_base, dest))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len([path for path in dest.rglob(".*.tmp") if ".tar" in path.name]) == 1
    assert "is not finished" in fail(dataset_tool, "info", dest)
    assert len(list(dest.glob("*/*/*.tar"))) == 3
    assert len(Stage(dest).keys()) == 3 * (17 - 3 * 2)  # Of two samples a shard.
    found = made(prepare(feature_base / "pictures", dest, tiny_encoders(feature_base), *OPTIONS))
    assert found == (0, 0, 0, 8)
    assert content(dest) == content(feature_base / "features")
    assert not list(dest.rglob(".*.tmp"))


TWICE = """
import sys
from pathlib import Path

sys.path[:0] = sys.argv[1:3]
from feature_files import BUCKETS
from torch_utils import distributed
from data.features.buckets import parse_buckets
from data.features.preparation.prepare import Preparation, prepare

base, dest = map(Path, sys.argv[3:])
settings = Preparation(
    buckets=parse_buckets(BUCKETS), shard_size=2, batch_size=1, num_threads=1
)
locations = {name: str(base / name) for name in ("vae", "visual", "text")}
device = distributed.init()
for expected, num_packed in ((17, 11), (2, 1)):
    outcome = prepare(base / "pictures", dest, locations, settings, device)
    assert outcome.num_made == dict.fromkeys(locations, expected), outcome.num_made
    assert outcome.num_packed == num_packed
    if distributed.is_main() and expected == 17:
        (dest / "train/bucket_128x128/shard-000001.tar").unlink()
    distributed.barrier()
distributed.shutdown()
"""


def test_two_ranks_write_the_bytes_of_one_also_when_only_one_shard_is_missing(
    feature_base, tmp_path
):
    (tmp_path / "twice.py").write_text(TWICE)
    on_ranks(2, tmp_path / "twice.py", ROOT, ROOT / "tests", feature_base, tmp_path / "two")
    assert content(tmp_path / "two") == content(feature_base / "features")
    assert not [path for path in os.listdir(tmp_path / "two") if path in (".staged", ".old")]
