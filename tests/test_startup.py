"""What commands import: help and wrong options need no torch, a dry run only what it describes."""

import json
import subprocess
import sys

from helpers import ROOT, quiet_environment

HEAVY = ("torch", "numpy", "scipy", "PIL", "matplotlib", "sklearn", "transformers", "diffusers")
COMMANDS = [
    *(["train", "--help"], ["generate", "--help"], ["import_weights", "--help"]),
    *(["demo", "--help"], ["commands.posthoc_ema", "--help"]),
    *(["train", f"--preset={name}", "--help"] for name in ("digits", "digits-latent")),
    *(["train", f"--preset={name}", "--help"] for name in ("fsdm-digits", "nanodit")),
    *(["fid", name, "--help"] for name in ("calc", "ref", "neighbours", "fewshot", "validate")),
    *(["fid", name, "--help"] for name in ("conditions", "compare", "report", "sweep")),
    *(["dataset_tool", name, "--help"] for name in ("convert", "encode", "features")),
    *(["dataset_tool", name, "--help"] for name in ("verify", "info")),
    *(["benchmark", name, "--help"] for name in ("train", "sample", "data", "attention")),
    *(["benchmark", name, "--help"] for name in ("metrics", "gpu", "scaling")),
]
# What a dry run has no use for: libraries of images, charts, scores, texts and remote files.
UNUSED = (
    *("scipy", "matplotlib", "sklearn", "pandas", "tensorboard", "transformers", "diffusers"),
    *("tokenizers", "safetensors", "huggingface_hub", "fsspec", "metrics.inception"),
)
FEATURES = ["train", "--preset=nanodit-tiny", "--dry-run"]  # It loads PIL, and so comes last.
DRY_RUNS = [
    *(
        ["train", f"--preset={name}", "--dry-run"]
        for name in ("digits", "digits-latent", "fsdm-digits")
    ),
    FEATURES,
]
WRONG = [["train", "--preset=digits", "--no-such-option=1"], ["train", "--preset=none"]]

# Runs each command in turn, and prints its exit code and which modules of a list are loaded then.
SCRIPT = """
import importlib, json, sys
from click.testing import CliRunner

commands, heavy = json.loads(sys.argv[1])
found = []
for module, *args in commands:
    result = CliRunner().invoke(importlib.import_module(module).main, args)
    found.append([result.exit_code, [name for name in heavy if name in sys.modules]])
print(json.dumps(found))
"""


def loaded(commands, heavy):
    """Return the exit code of each command, and which of ``heavy`` are loaded after it."""
    argument = json.dumps([commands, heavy])
    settings = dict(cwd=ROOT, env=quiet_environment(), capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", SCRIPT, argument], **settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_of_every_command_loads_nothing_that_it_does_not_need():
    for command, (code, modules) in zip(COMMANDS, loaded(COMMANDS, HEAVY), strict=True):
        assert (code, modules) == (0, []), command


def test_wrong_options_are_refused_before_torch_is_loaded():
    for command, (code, modules) in zip(WRONG, loaded(WRONG, HEAVY), strict=True):
        assert code != 0, command
        assert modules == [], command


def test_dry_runs_load_no_library_that_they_have_no_use_for():
    for command, (code, modules) in zip(DRY_RUNS, loaded(DRY_RUNS, ("PIL", *UNUSED)), strict=True):
        allowed = {"PIL"} if command is FEATURES else set()
        assert (code, set(modules) - allowed) == (0, set()), command


def test_a_report_is_written_without_torch(tmp_path):
    from report_runs import make_run

    run_dir = make_run(tmp_path / "run")
    libraries = [name for name in HEAVY if name not in ("numpy", "PIL")]
    assert loaded([["fid", "report", str(run_dir)]], libraries) == [[0, []]]
    assert (run_dir / "report.html").is_file()


def test_modules_that_are_loaded_are_noticed():
    assert loaded([["fid", "compare", "--help"]], ["click"]) == [[0, ["click"]]]
