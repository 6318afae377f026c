"""The direction of imports between packages, as the architecture draws it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
# What each package may import; scripts may import every package and no script.
ALLOWED = {
    "dnnlib": set(),
    "torch_utils": {"dnnlib"},
    "diffusion": {"torch_utils", "dnnlib"},
    "models": {"torch_utils", "dnnlib"},
    "training": {"diffusion", "models", "torch_utils", "dnnlib"},
    "metrics": {"diffusion", "models", "torch_utils", "dnnlib"},
    "evaluation": {"training", "metrics", "diffusion", "models", "torch_utils", "dnnlib"},
    "benchmarks": {"training", "metrics", "diffusion", "models", "torch_utils", "dnnlib"},
    "configs": {"training", "metrics", "diffusion", "models", "torch_utils", "dnnlib"},
}
FILES = sorted(p for p in ROOT.glob("*/*.py") if p.parent.name in ALLOWED)
FILES += sorted(ROOT.glob("*.py"))


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.parent.name if path.parent != ROOT else None
    allowed = set(ALLOWED) if package is None else ALLOWED[package] | {package}
    ours = {name.split(".")[0] for name in imported_modules(path)} & (set(ALLOWED) | SCRIPTS)
    assert ours <= allowed, f"{path.name} must not import {sorted(ours - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_one_module_imports_torch_distributed(path):
    if path == ROOT / "torch_utils" / "distributed.py":
        return
    assert not any(name.startswith("torch.distributed") for name in imported_modules(path))


@pytest.mark.parametrize("path", sorted((ROOT / "dnnlib").glob("*.py")), ids=lambda p: p.name)
def test_dnnlib_is_free_of_torch(path):
    assert not any(name.split(".")[0] == "torch" for name in imported_modules(path))


def test_every_package_has_a_direction():
    packages = {p.parent.name for p in ROOT.glob("*/*.py")} - {"tests"}
    assert {p for p in packages if not p.startswith(".")} <= set(ALLOWED)
