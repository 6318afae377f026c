"""The direction of imports between packages, and who may ask for the kind of a model."""

from pathlib import Path

import pytest
from structure import ALLOWED, DISTRIBUTED, family_questions, read_sources, wrong_imports

ROOT = Path(__file__).resolve().parent.parent

# A file in a nested folder of every package, each with an import that its package may have.
NESTED = {
    "dnnlib/files/deep/names.py": "import os",
    "torch_utils/ranks/deep/names.py": "import dnnlib.files",
    "diffusion/parts/deep/names.py": "from torch_utils import rng",
    "models/parts/deep/names.py": "from torch_utils.rng import mix",
    "encoders/parts/deep/names.py": "import models, diffusion.flow",
    "data/images/deep/names.py": "from encoders.text import TextEncoder",
    "metrics/parts/deep/names.py": "from encoders import loading",
    "training/parts/deep/names.py": "import data.loader, metrics.rows",
    "sampling/parts/deep/names.py": "from training.checkpoint import load_snapshot",
    "evaluation/in_loop/deep/names.py": "from sampling import images",
    "families/parts/deep/names.py": "import evaluation.scoring",
    "configs/parts/deep/names.py": "from families import image",
    "commands/parts/deep/names.py": "import families.image, configs",
    "benchmarks/parts/deep/names.py": "import families.image, configs, commands",
    "demos/parts/deep/names.py": "import families.image, configs, commands",
    "train.py": "import commands.options, demos.digits, benchmarks, families, configs",
    "generate.py": "import sampling",
    "tests/test_all.py": "import train, generate",
    ".venv/lib/site.py": "import train, torch.distributed",
}


def plant(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def shown(findings):
    return "\n".join(map(str, findings))


def test_imports_point_one_way():
    assert len(read_sources(ROOT)) > 100
    found = wrong_imports(ROOT)
    assert not found, shown(found)


def test_only_families_ask_for_the_kind_of_a_model():
    found = family_questions(ROOT)
    assert not found, shown(found)


def test_every_allowed_import_of_nested_folders_passes(tmp_path):
    plant(tmp_path, NESTED)
    assert len(read_sources(tmp_path)) == len(NESTED) - 2
    assert wrong_imports(tmp_path) == []
    assert {path.partition("/")[0] for path in NESTED if "/" in path} >= set(ALLOWED)


@pytest.mark.parametrize(
    ("path", "statement", "reason"),
    [
        ("dnnlib/deep/bad.py", "import torch", "dnnlib imports torch"),
        ("dnnlib/deep/bad.py", "from torch_utils import rng", "dnnlib imports torch_utils"),
        ("torch_utils/deep/bad.py", "from models import layers", "torch_utils imports models"),
        ("models/parts/bad.py", "import training.loop", "models imports training"),
        ("models/parts/bad.py", "import diffusion.precond as p", "models imports diffusion"),
        ("diffusion/parts/bad.py", "from models import layers", "diffusion imports models"),
        ("encoders/parts/bad.py", "import data.features.buckets", "encoders imports data"),
        ("data/images/deep/bad.py", "import metrics", "data imports metrics"),
        ("metrics/deep/bad.py", "from data.images.dataset import open_images", "imports data"),
        ("data/images/deep/bad.py", "from training import config", "data imports training"),
        ("training/deep/bad.py", "from families import image", "training imports families"),
        ("training/deep/bad.py", "from configs.presets import PRESETS", "imports configs"),
        ("training/deep/bad.py", "from sampling import images", "training imports sampling"),
        ("sampling/deep/bad.py", "import evaluation.scoring", "sampling imports evaluation"),
        ("evaluation/in_loop/deep/bad.py", "import families.sets", "evaluation imports families"),
        ("families/deep/bad.py", "import commands.options", "families imports commands"),
        ("families/deep/bad.py", "import benchmarks", "families imports benchmarks"),
        ("families/deep/bad.py", "import configs.presets", "families imports configs"),
        ("configs/deep/bad.py", "from commands import options", "configs imports commands"),
        ("evaluation/deep/bad.py", "import configs", "evaluation imports configs"),
        ("commands/deep/bad.py", "from demos import digits", "commands imports demos"),
        ("commands/deep/bad.py", "import benchmarks", "commands imports benchmarks"),
        ("demos/deep/bad.py", "import benchmarks.train", "demos imports benchmarks"),
        ("commands/deep/bad.py", "import train", "commands imports train"),
        ("benchmarks/deep/bad.py", "from train import main", "benchmarks imports train"),
        ("generate.py", "import train", "a script imports train"),
        ("models/parts/bad.py", "import torch.distributed as dist", "imports torch.distributed"),
        ("models/parts/bad.py", "from torch import distributed", "imports torch.distributed"),
        ("models/parts/bad.py", "from torch.distributed.fsdp import f", "torch.distributed"),
        ("training/deep/bad.py", "import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("models/parts/bad.py", "def late():\n    import training.loop", "models imports training"),
        ("models/parts/bad.py", "import_module('training.loop')", "models imports training"),
        ("models/parts/bad.py", "from ..layers import MLP", "a relative import"),
        ("helpers/bad.py", "import os", "the direction of package helpers is not set"),
    ],
)
def test_a_wrong_import_in_a_nested_folder_is_found(tmp_path, path, statement, reason):
    plant(tmp_path, NESTED)
    plant(tmp_path, {path: statement})
    found = wrong_imports(tmp_path)
    assert {finding.path for finding in found} == {path}
    assert reason in shown(found)


def test_torch_distributed_is_imported_where_processes_meet(tmp_path):
    plant(tmp_path, dict.fromkeys(DISTRIBUTED, "import torch.distributed as dist"))
    assert wrong_imports(tmp_path) == []
    plant(tmp_path, {"torch_utils/stats.py": "import torch.distributed as dist"})
    assert [finding.path for finding in wrong_imports(tmp_path)] == ["torch_utils/stats.py"]


KINDS = """
class ModelConfig(Config):
    resolution: int
class SetDiTConfig(ModelConfig):
    resolution: int
    sample_size: int
class SetRun(RunConfig): ...
class SetConfig(Config): ...
class ImageDataset(Dataset): ...
class OtherFeatures(FeatureDataset): ...
class FeatureDataset(Dataset):
    def summary(self): ...
class LoopConditioner(SetConditioner): ...
class SetConditioner(Conditioner): ...
class LatentSnapshot: ...
class SetCodec: ...
"""


@pytest.mark.parametrize(
    "question",
    [
        "isinstance(config.model, SetDiTConfig)",
        "isinstance(config.model, models.SetDiTConfig)",
        "isinstance(config.guidance, dict | SetConfig)",
        "issubclass(type(run), SetRun)",
        "isinstance(data, (list, ImageDataset))",
        "isinstance(data, OtherFeatures)",
        "isinstance(network.conditioner, LoopConditioner)",
        "isinstance(found, LatentSnapshot)",
        "isinstance(found, SetCodec)",
        "isinstance(config.model, Renamed)",
        "type(config.model) is SetDiTConfig",
        "type(encoder).__name__ == 'TextEncoder'",
        "config.sets is None",
        "snapshot.config.features is not None",
        "snapshot.data.features is None",
        "config.validation is None",
        "config.dual_guidance is not None",
        "config.guidance is None",
        "not config.sets",
        "not (given and config.sets)",
        "1 if given and config.sets else 2",
        "config.sets and config.sets.compute_fid",
        "1 if config.features else 2",
        "[1 for config in runs if config.features]",
        "bool(run.sets)",
        "hasattr(dataset, 'anything')",
        "getattr(self.config.model, 'anything', None)",
        "getattr(c, 'sample_size', 1)",
        "hasattr(images, 'summary')",
        "config.model.family == 'sets'",
        "'sets' != model.family",
        "model.family in ('sets', 'features')",
    ],
)
def test_a_question_for_the_kind_of_a_model_is_found(tmp_path, question):
    code = f"from models.config import SetDiTConfig as Renamed\n\ndef f():\n    return {question}"
    plant(tmp_path, {"models/config.py": KINDS, "training/deep/bad.py": code})
    assert {finding.path for finding in family_questions(tmp_path)} == {"training/deep/bad.py"}
    # In a family, the same is an answer.
    plant(tmp_path, {"training/deep/bad.py": "", "families/deep/good.py": code})
    assert family_questions(tmp_path) == []


@pytest.mark.parametrize(
    "code",
    [
        "match config.model:\n    case SetDiTConfig():\n        pass",
        "match config.model.family:\n    case 'sets':\n        pass",
        "if config.sets:\n    pass",
        "assert run.features",
    ],
)
def test_a_statement_that_asks_for_a_kind_is_found(tmp_path, code):
    plant(tmp_path, {"models/config.py": KINDS, "train.py": code})
    assert {finding.path for finding in family_questions(tmp_path)} == {"train.py"}


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(value, dict)",
        "isinstance(value, Config)",
        "isinstance(config, RunConfig | ModelConfig)",
        "isinstance(generator, torch.Generator)",
        "isinstance(found, Missing)",
        "hasattr(os, 'sched_getaffinity')",
        "hasattr(config_file, 'read')",
        "getattr(p, 'spares_decay', False)",
        "getattr(found, 'resolution', 8)",
        "getattr(config, name)",
        "features is None",
        "args.sets",
        "asked.features is None",
        "[options.guidance or config.guidance]",
        "self.guidance is None",
        "config.model is None",
        "current.family is not None",
        "type(value) is int",
        "f'{model.family}, {model.resolution}'",
        "FAMILIES[type(config)]",
    ],
)
def test_other_questions_are_not_mistaken_for_it(tmp_path, code):
    plant(tmp_path, {"models/config.py": KINDS, "train.py": f"x = {code}\nif {code}:\n    pass"})
    assert family_questions(tmp_path) == []
