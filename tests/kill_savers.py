"""Stop runs whose states take a minute to write, and see that each state is whole afterwards.

    python tests/kill_savers.py --times=20

Each time, torchrun starts two ranks whose savers are held to so many bytes a second that a state
takes --seconds. A SIGTERM asks torchrun for the end, and 30 seconds later it kills its ranks, long
before the state is on disk. The same command is then given again: it has to wait for the state, to
go on from it, and to end with the files of a run that nobody disturbed, bit for bit.
"""

import argparse
import concurrent.futures
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from training_runs import (  # noqa: E402
    FULL,
    TrainProcess,
    assert_same_run,
    environment,
    num_rows,
    only_run,
)

from data.convert.convert import convert_images  # noqa: E402
from data.convert.sources import open_source  # noqa: E402
from dnnlib.saver import MANIFEST  # noqa: E402
from dnnlib.text import format_kimg  # noqa: E402
from training.checkpoint import find_states  # noqa: E402

RANKS = 2


def train(base, place, *options):
    """Start a run of two ranks in a folder of its own."""
    outdir, log = base / place, base / f"{place}-{time.monotonic_ns()}.log"
    command = (*FULL, "--workers=0", "--resume=auto", f"--data={base / 'digits.zip'}")
    arguments = (f"--outdir={outdir}", *command, *options)
    return TrainProcess(arguments, environment(base / "cache"), log, ranks=RANKS)


def disturb(base, reference, number, seconds):
    """Stop a run at random, let it be killed, and go on; return a sentence of what was seen."""
    size = sum(path.stat().st_size for path in find_states(reference)[0].iterdir())
    rate = size / RANKS / seconds / 1e6
    process, outdir = train(base, str(number), f"--save-rate={rate}"), base / str(number)
    process.wait_until(lambda: num_rows(outdir) >= 1)
    time.sleep(random.Random(number).uniform(0, 0.5))
    process.send(signal.SIGTERM)
    stopped = time.monotonic()
    process.finish(code=None)
    killed = time.monotonic() - stopped
    run_dir = only_run(outdir)
    assert not list(run_dir.glob(f"training-state-*/{MANIFEST}")), "a state is on disk already"
    (kimg,) = re.findall(r"Stopped by .* at kimg (\S+);", process.output)
    output = train(base, str(number)).finish()
    assert "Waiting for the state that an earlier process is still writing" in output, output
    (used,) = re.findall(r"Resuming from .*/training-state-(\S+)", output)
    assert format_kimg(float(used)) == kimg, f"{used} is not the state of the stop, {kimg}"
    assert_same_run(run_dir, reference)
    waited = time.monotonic() - stopped
    return f"{number}: ranks gone after {killed:.0f} s, state {used} used, equal ({waited:.0f} s)"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="to write a state")
    parser.add_argument("--parallel", type=int, default=4, help="runs at the same time")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="kill-savers-"))
    convert_images(open_source("digits"), base / "digits.zip", max_images=200, num_workers=1)
    train(base, "reference").finish()
    reference, failed = only_run(base / "reference"), 0
    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
        jobs = [
            pool.submit(disturb, base, reference, number, options.seconds)
            for number in range(options.times)
        ]
        for job in concurrent.futures.as_completed(jobs):
            try:
                print(job.result(), flush=True)
            except AssertionError:
                failed += 1
                print(f"FAILED: {traceback.format_exc()}", flush=True)
    print(f"{options.times - failed} of {options.times} states were whole, their runs equal.")
    if not failed:
        shutil.rmtree(base)
    return failed


if __name__ == "__main__":
    sys.exit(main())
