"""Between two ticks the host never waits for the device: no step reads a value back."""

import collections
import gc
from unittest import mock

import pytest
import torch
from feature_files import tiny_features
from helpers import TINY, TINY_FEATURES, TINY_LATENT, TINY_SETS, toy_data, train_tiny
from latent_files import tiny_latents
from torch.utils._python_dispatch import TorchDispatchMode

from training import loop
from training.objective import Objective
from training.optimizer import GuardedAdam
from training.watching import watch as watch_module

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

# What reads a value, or the number of values, back to the host. On a GPU each waits for all before.
READ_BACKS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")
STEPS = 6


class Watch(TorchDispatchMode):
    """Counts operations that read back, in the steps of a tick."""

    def __init__(self):
        super().__init__()
        self.found, self.num_steps = collections.Counter(), 0
        self.armed = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        if self.armed and name.startswith(READ_BACKS):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def always_probed(monkeypatch):
    """Every tick is looked at, however few steps it has."""
    monkeypatch.setattr(watch_module, "_STEPS_BETWEEN", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("waiting")


KINDS = {
    "image": (toy_data, [*TINY, "--cond", "--augment=0.2", "--dropout=0.1", "--ema-stds=0.1"]),
    "latent": (tiny_latents, TINY_LATENT),
    "sets": (toy_data, [*TINY_SETS, "--context-drop=0.2", "--min-sample-size=2"]),
    "features": (tiny_features, TINY_FEATURES),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [(), ("--precision=bf16", "--clip-grad=1", "--batch-gpu=2")])
def test_no_step_of_any_kind_of_model_reads_a_value_back(base, tmp_path, kind, options):
    data, tiny = KINDS[kind]
    watch, draw, read = Watch(), loop.rng.Step, GuardedAdam.read_counters

    def begin(*args):
        # The first step is a tick of its own.
        watch.num_steps += 1
        watch.armed = watch.num_steps > 1
        return draw(*args)

    def end(self):
        watch.armed = False
        return read(self)

    with (
        mock.patch.object(loop.rng, "Step", begin),
        mock.patch.object(GuardedAdam, "read_counters", end),
        watch,
    ):
        steps = (f"--iters={STEPS}", "--tick=100", "--batch=4")
        train_tiny(tmp_path, data(base), *options, *steps, tiny=tiny)
    assert watch.num_steps == STEPS
    assert not watch.found


def bytes_at_ticks(tmp_path, data, tiny):
    """Return how many bytes of tensors live at the end of each tick of a run."""
    sizes, read = [], GuardedAdam.read_counters

    def measure(self):
        gc.collect()
        found = [own for own in gc.get_objects() if type(own) in (torch.Tensor, torch.nn.Parameter)]
        storages = {own.untyped_storage().data_ptr(): own.untyped_storage() for own in found}
        sizes.append(sum(own.nbytes() for own in storages.values()))
        return read(self)

    with mock.patch.object(GuardedAdam, "read_counters", measure):
        options = (f"--iters={STEPS}", "--tick=0", "--snap=100", "--batch=4")
        train_tiny(tmp_path, data, *options, tiny=tiny)
    return sizes


@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_grows_with_ticks(base, tmp_path, kind):
    data, tiny = KINDS[kind]
    sizes = bytes_at_ticks(tmp_path, data(base), tiny)
    assert len(sizes) == STEPS
    # Batches of features differ in size, and are all small beside the network.
    assert max(sizes[2:]) <= 1.1 * sizes[1]


def test_memory_that_grows_is_noticed(base, tmp_path, monkeypatch):
    kept, report = [], Objective.report

    def keep(self, stats, loss, draws):
        kept.append(torch.zeros(10_000))
        report(self, stats, loss, draws)

    monkeypatch.setattr(Objective, "report", keep)
    sizes = bytes_at_ticks(tmp_path, toy_data(base), TINY)
    assert sizes[-1] >= sizes[1] + 3 * 40_000


def test_a_planted_read_back_is_found(base, tmp_path, monkeypatch):
    report = Objective.report

    def reading(self, stats, loss, draws):
        float(loss.mean())
        report(self, stats, loss, draws)

    monkeypatch.setattr(Objective, "report", reading)
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        test_no_step_of_any_kind_of_model_reads_a_value_back(base, tmp_path, "image", ())
