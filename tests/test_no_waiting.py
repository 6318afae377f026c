"""Between two ticks the host never waits for the device: no step reads a value back."""

import collections
from unittest import mock

import pytest
from feature_files import tiny_features
from helpers import TINY, TINY_FEATURES, TINY_LATENT, TINY_SETS, toy_data, train_tiny
from latent_files import tiny_latents
from torch.utils._python_dispatch import TorchDispatchMode

from training import loop
from training.objective import Objective
from training.optimizer import GuardedAdam

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


def test_a_planted_read_back_is_found(base, tmp_path, monkeypatch):
    report = Objective.report

    def reading(self, stats, loss, draws):
        float(loss.mean())
        report(self, stats, loss, draws)

    monkeypatch.setattr(Objective, "report", reading)
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        test_no_step_of_any_kind_of_model_reads_a_value_back(base, tmp_path, "image", ())
