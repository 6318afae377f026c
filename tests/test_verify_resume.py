"""--verify-resume finds runs that resume exactly, and tells what is wrong with others."""

import itertools
import tempfile
import warnings

import pytest
from helpers import TINY, TINY_SETS, call, fail, toy_data

import train
from data.samplers import PositionSampler
from diffusion.denoiser import Denoiser
from training.ema import EMA
from training.optimizer import GuardedAdam

pytestmark = pytest.mark.usefixtures("one_cpu_thread")
EXACT = "A run that is stopped here resumes exactly."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("verify-resume")


def verify(data, *options, tiny=TINY):
    return call(train, f"--data={data}", *tiny, *options, "--verify-resume")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_runs_resume_exactly_and_leave_nothing_behind(base, temporary):
    random = ("--cond", "--augment=0.2", "--dropout=0.1", "--ema-stds=0.1", "--batch-gpu=4")
    for data, options, tiny in (
        (toy_data(base), random, TINY),
        (toy_data(base), (), TINY_SETS),
    ):
        result = verify(data, *options, tiny=tiny)
        assert result.code == 0, result.output + result.error
        assert result.output.endswith(f"{EXACT}\n")
        assert result.output.count("equal bit for bit") == 4
        assert not list(temporary.glob("verify-resume-*"))


def test_a_resume_that_forgets_something_is_found(base, monkeypatch):
    monkeypatch.setattr(GuardedAdam, "load_state_dict", lambda self, state: None)
    result = verify(toy_data(base))
    assert result.code == 1
    assert "differ; the largest difference is" in result.output
    assert "Two uninterrupted runs are equal, so the resume causes the difference." in result.output


def test_a_resume_that_forgets_the_average_alone_is_found(base, monkeypatch):
    monkeypatch.setattr(EMA, "load_state_dict", lambda self, state: None)
    output = verify(toy_data(base)).output
    assert "weights     equal" in output
    assert "averages    equal" not in output


def test_operations_that_are_not_exact_are_told_from_a_faulty_resume(base, monkeypatch):
    denoise, count = Denoiser.__call__, itertools.count()

    def inexact(self, x, *args, **kwargs):
        warnings.warn("planted_cuda does not have a deterministic implementation. It", stacklevel=1)
        return denoise(self, x * (1 + 1e-5 * next(count)), *args, **kwargs)

    monkeypatch.setattr(Denoiser, "__call__", inexact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = verify(toy_data(base))
    assert result.code == 1
    assert "Two uninterrupted runs differ as well" in result.output
    assert "planted_cuda does not have a deterministic implementation" in result.output


def test_another_order_of_the_data_is_found(base, monkeypatch):
    init = PositionSampler.__init__

    def late(self, *args, start_nimg, **kwargs):
        init(self, *args, start_nimg=start_nimg and start_nimg + 8, **kwargs)

    monkeypatch.setattr(PositionSampler, "__init__", late)
    result = verify(toy_data(base))
    assert result.code == 1
    assert "data order  not equal" in result.output


def test_it_takes_no_run_to_continue(base):
    assert "leave --resume out" in fail(
        train, f"--data={toy_data(base)}", *TINY, "--verify-resume", "--resume=auto"
    )
