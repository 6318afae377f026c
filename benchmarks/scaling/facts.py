"""Facts about presets for the cost model, computed without training and stored in a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import families
from benchmarks.scaling.cost import Facts
from benchmarks.scaling.hardware import GPUS, GPUS_PER_NODE
from configs.presets import PRESETS, get_preset
from models import ModelConfig, build_network
from training.config import RunConfig, fit_to_device
from training.report import forward_flops, num_parameters
from training.resources.batch import largest_batch
from training.resources.memory import predict_disk, predict_memory

FACTS_FILE = Path(__file__).with_name("presets.json")
# All presets but those made for CPUs.
_SMALL = ("digits", "glyphs", "photos", "tiny")
LARGE = [name for name in PRESETS if not any(part in name for part in _SMALL)]
_SHARDS = ("none", "full")  # Memory is predicted for these, on the GPUs of one node.


def read_facts() -> dict[str, Facts]:
    """Return the stored facts of all large presets, by name."""
    found = json.loads(FACTS_FILE.read_text(encoding="utf-8"))
    return {name: Facts(**values) for name, values in found.items()}


def facts_of(name: str) -> Facts:
    """Return the facts of a preset that trains in bf16; this takes a few seconds."""
    run, batch = _run(name), get_preset(name).run.training.batch
    share = run.changed("training", batch=batch // GPUS_PER_NODE)
    batch_gpu, _ = largest_batch(share, 1, "cuda", round(GPUS["h100"].memory))
    run = run.changed("training", batch_gpu=batch_gpu)
    with torch.device("meta"):
        parts = list(run.model.sharded_parts(build_network(run.model).backbone))
    memory = {}
    for shard in _SHARDS:
        there = run.changed("training", shard=shard, batch=batch_gpu * GPUS_PER_NODE)
        memory[shard] = predict_memory(there, GPUS_PER_NODE, "cuda").total
    return Facts(
        preset=name,
        parameters=num_parameters(run),
        flops=forward_flops(run),
        operators=count_operators(run.model),
        parts=len(parts),
        averages=1 + len(run.training.ema_stds),
        batch=batch,
        images_per_row=run.model.images_per_row,
        batch_gpu=batch_gpu,
        memory=memory,
        state_bytes=predict_disk(run).state,
    )


def count_operators(model: ModelConfig) -> int:
    """Return the number of operators, without views, that evaluate a network on one image."""
    model = dataclasses.replace(model, attention="sdpa")
    with torch.device("meta"), torch.no_grad(), _Operators() as operators:
        network = build_network(model).eval()
        operators.number = 0  # Discard those that initialised the weights.
        x, c_noise = torch.empty(1, *model.input_shape), torch.zeros(1)
        network(x, c_noise, network.context(model.example_cond(), num=1))
    return operators.number


def _run(name: str) -> RunConfig:
    preset = get_preset(name)
    num_classes = preset.num_classes if preset.run.data.cond else 0
    run = families.of(preset.run).fit(preset.run, None, num_classes)
    return fit_to_device(run.changed("training", precision="bf16"), "cuda")


class _Operators(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        self.number += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))
