"""Fixtures shared by tests that start training processes."""

import gc
import itertools
import os
import signal

import pytest
import torch
from sharing import SHARED_VARIABLE, made_once
from training_runs import FULL, TrainProcess, environment, only_run

from data.convert.convert import convert_images
from data.convert.sources import open_source
from evaluation.in_loop import images, sets
from metrics import frechet, inception
from metrics.frechet import frechet_distance
from torch_utils.stop_signal import StopSignal


def pytest_collection_finish(session):
    """Let collections of garbage pass over what all tests have imported, and come seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def one_cpu_thread(monkeypatch):
    """Let a run in this process compute what a process of its own computes, to the last bit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def restored_handlers():
    """Signals are left ignored by a run that one has stopped."""
    handlers = {number: signal.getsignal(number) for number in StopSignal.signals}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def few_features(monkeypatch):
    """Fréchet distances are of the first 128 features; those of 2,048 take seconds each."""

    def of_some(mu1, sigma1, mu2, sigma2):
        first = slice(128)
        moments = mu1[first], sigma1[first, first], mu2[first], sigma2[first, first]
        return frechet_distance(*moments)

    monkeypatch.setattr(frechet, "frechet_distance", of_some)


@pytest.fixture
def small_inception(monkeypatch):
    """Inception sees 107x107 pixels instead of 299x299, which takes a tenth of the time."""
    monkeypatch.setattr(inception, "IMAGE_SIZE", 107)
    smaller = dict(inception.InceptionDetector.outputs, spatial=5 * 5 * 7)
    monkeypatch.setattr(inception.InceptionDetector, "outputs", smaller)


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """A folder that all processes of this test session share."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(shared_dir):
    """Downloads and derived data of the tests stay out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SETDIFFIT_CACHE", str(shared_dir / "cache"))
        patch.setenv(SHARED_VARIABLE, str(shared_dir))
        yield


@pytest.fixture(scope="session", autouse=True)
def small_pictures():
    """Runs in the test process show 16 samples instead of 64."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (images, sets):
            patch.setattr(module, "GRID_SEEDS", 16)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Nothing that the test process writes is forced onto the disk: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def products_by_mkl():
    """Tests compute alike on all CPUs; test_cpu_matmul has the other backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SETDIFFIT_CPU_MATMUL", "mkl")
        yield


@pytest.fixture(scope="session")
def digits_zip(shared_dir):
    """200 handwritten digits, 8x8, in the layout that training reads."""
    path = shared_dir / "digits.zip"
    with made_once(path) as missing:
        if missing:
            convert_images(open_source("digits"), path, max_images=200, num_workers=1)
    return path


@pytest.fixture(scope="session")
def start_process(digits_zip, shared_dir, tmp_path_factory):
    """Start ``train.py`` with options; whatever still runs at the end is killed."""
    logs = tmp_path_factory.mktemp("logs")
    counter = itertools.count()
    started = []

    def start(*args, **kwargs):
        log = logs / f"{next(counter)}.txt"
        env = environment(shared_dir / "cache")
        process = TrainProcess((f"--data={digits_zip}", *args), env, log, **kwargs)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def train(start_process):
    """``train(*options, **settings of TrainProcess)`` starts a process, ended with the test."""
    started = []

    def start(*args, **kwargs):
        started.append(start_process(*args, **kwargs))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def uninterrupted(start_process, shared_dir):
    """``uninterrupted(ranks)`` returns the folder of a run with the options FULL."""

    def make(ranks):
        outdir = shared_dir / f"uninterrupted-{ranks}"
        with made_once(outdir) as missing:
            if missing:
                start_process(f"--outdir={outdir}", *FULL, ranks=ranks, warm=True).finish()
        return only_run(outdir)

    return make


@pytest.fixture(scope="session")
def feature_base(shared_dir):
    """A folder with pictures, vae, visual, text and features, see ``tiny_features``."""
    from feature_files import tiny_features  # Needs transformers and diffusers.

    base = shared_dir / "features"
    with made_once(base) as missing:
        if missing:
            base.mkdir()
            tiny_features(base, "--batch=1")
    return base
