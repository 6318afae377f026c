"""Compiled runs have one graph for each shape of input, without breaks, and compile no more."""

import functools
import json
from unittest import mock

import pytest
import torch
from feature_files import tiny_features
from helpers import (
    TINY,
    TINY_FEATURES,
    TINY_LATENT,
    TINY_SETS,
    read_pixels,
    succeed,
    toy_data,
    train_tiny,
    trained_snapshot,
)
from latent_files import tiny_latents

import generate
from configs import get_preset
from models import build_network
from models.network import Network
from training import loop
from training.watching import watch as watch_module

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


@pytest.fixture(autouse=True)
def always_probed(monkeypatch):
    """Every tick is looked at, however few steps it has."""
    monkeypatch.setattr(watch_module, "_STEPS_BETWEEN", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


class Counter:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        self.num_graphs = self.num_dynamic = 0

    def __call__(self, graph, example_inputs):
        self.num_graphs += 1
        self.num_dynamic += any(isinstance(value, torch.SymInt) for value in example_inputs)
        return graph.forward


DEEP = ("--num-blocks=3",)
EVERYTHING = ("--cond", "--label-drop=0.3", "--augment=0.2", "--dropout=0.1")
KINDS = {
    # Data, options, and graphs: of the backbone, or of all its equal blocks together, and of a set
    # encoder, if there is one, whose context is also looked at without gradients at the end of a
    # tick. Blocks of features see two numbers of tokens in three shapes, each with two of texts.
    "image": (toy_data, [*TINY, *EVERYTHING], 1),
    "checkpointing": (toy_data, [*TINY, "--checkpointing"], 1),
    "latent": (tiny_latents, [*TINY_LATENT, *DEEP, "--label-drop=0.3"], 1),
    "sets": (toy_data, [*TINY_SETS, *DEEP, "--context-drop=0.3"], 4),
    "features": (tiny_features, [*TINY_FEATURES, *DEEP], 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_one_graph_for_each_shape_and_compiles_no_more(base, tmp_path, kind):
    data, tiny, num_graphs = KINDS[kind]
    backend, counts = Counter(), []
    compile_parts, read = Network.compile_parts, loop.GuardedAdam.read_counters

    def compile_whole(self, num_shapes=1, is_sharded=False):
        # A break of the graph would be an error.
        make = torch.nn.Module.compile
        whole = functools.partialmethod(make, fullgraph=True)
        with mock.patch.object(torch.nn.Module, "compile", whole):
            compile_parts(self, num_shapes, backend)

    def note(self):
        counts.append(backend.num_graphs)
        return read(self)

    torch._dynamo.reset()
    with (
        mock.patch.object(Network, "compile_parts", compile_whole),
        mock.patch.object(loop.GuardedAdam, "read_counters", note),
        torch._dynamo.config.patch(error_on_recompile=False),
    ):
        # Accumulation rounds, ticks, pictures with snapshots.
        options = (
            "--compile=True",
            "--iters=6",
            "--batch=4",
            "--batch-gpu=2",
            "--tick=0",
            "--snap=2",
        )
        text = train_tiny(tmp_path, data(base), *options, tiny=tiny).output
    assert counts == [num_graphs] * 6
    assert text.count("Compiled in ") == 1


def test_every_size_of_batches_has_a_graph_of_its_own():
    """A run that goes on with scores that it had missed has other batches before its first step."""
    backend = Counter()
    network = build_network(get_preset("digits").run.model)
    torch._dynamo.reset()
    network.compile_parts(backend=backend)
    for batch in (2, 3, 4):
        x, c_noise = torch.zeros(batch, *network.config.input_shape), torch.zeros(batch)
        cond = {name: value.expand(batch) for name, value in network.config.example_cond().items()}
        with torch.no_grad():
            network(x, c_noise, network.context(cond, num=batch))
    assert backend.num_graphs == 3
    assert backend.num_dynamic == 0


def test_scores_on_the_way_are_made_by_a_compiled_network(base, tmp_path):
    backend, compile_parts = Counter(), Network.compile_parts
    data, tiny, num_graphs = KINDS["image"]
    options = ("--iters=2", "--batch=4", "--metrics=fd_pixels")
    torch._dynamo.reset()
    with mock.patch.object(
        Network,
        "compile_parts",
        lambda own, num_shapes, **options: compile_parts(own, num_shapes, backend, **options),
    ):
        compiled = train_tiny(tmp_path / "a", data(base), *options, "--compile=True", tiny=tiny)
    plain = train_tiny(tmp_path / "b", data(base), *options, tiny=tiny)
    rows = []
    for run in (compiled, plain):
        lines = (run.run_dir / "metric-fd_pixels.jsonl").read_text().splitlines()
        rows.append(json.loads(lines[-1]))
    assert backend.num_graphs > num_graphs
    assert (rows[0].get("compiled"), rows[1].get("compiled")) == (True, None)
    assert rows[0]["value"] == pytest.approx(rows[1]["value"], rel=1e-3)


@pytest.mark.parametrize("scale", ["1", "2"])
def test_sampling_has_one_graph_for_all_steps_with_and_without_guidance(base, tmp_path, scale):
    snapshot = trained_snapshot(base)
    options = [f"--network={snapshot}", "--num=3", "--batch=3", "--steps=4", f"--cfg-scale={scale}"]
    backend, compile_parts = Counter(), Network.compile_parts
    torch._dynamo.reset()
    whole = functools.partialmethod(torch.nn.Module.compile, fullgraph=True)
    with (
        mock.patch.object(Network, "compile_parts", lambda own: compile_parts(own, 1, backend)),
        mock.patch.object(torch.nn.Module, "compile", whole),
    ):
        succeed(generate, *options, "--compile", f"--outdir={tmp_path / 'compiled'}")
    assert backend.num_graphs == 1
    succeed(generate, *options, f"--outdir={tmp_path / 'plain'}")
    for path in sorted((tmp_path / "plain").glob("*.png")):
        pixels, plain = (read_pixels(own) for own in (tmp_path / "compiled" / path.name, path))
        assert abs(pixels.astype(int) - plain.astype(int)).max() <= 1
    assert '"compiled": true' in (tmp_path / "compiled" / "generation.json").read_text()
    assert "compiled" not in (tmp_path / "plain" / "generation.json").read_text()
