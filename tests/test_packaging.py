"""What an installation brings: dependencies that the code uses, and no module."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Where the name to import differs from that of the package.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
# Programs of this subject need the extra of its name even to be imported.
EXTRAS = {"demos": "demo"}


def names(requirements):
    return {re.match(r"[\w-]+", text)[0] for text in requirements}


def sources():
    own = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"tests", ".venv"}
    yield from ROOT.glob("*.py")
    for folder in own:
        yield from (ROOT / folder).rglob("*.py")


def imported(statements):
    """Return the packages that statements import when a module is loaded, not when called."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from imported(node.body)


def test_modules_load_with_the_dependencies_of_the_base_installation():
    base = names(PROJECT["project"]["dependencies"])
    own = {path.stem for path in ROOT.iterdir()}
    seen = set()
    for path in sources():
        part = path.relative_to(ROOT).parts[0]
        extra = PROJECT["project"]["optional-dependencies"].get(EXTRAS.get(part), ())
        found = set(imported(ast.parse(path.read_text()).body)) - own - sys.stdlib_module_names
        found = {PACKAGES.get(name, name) for name in found}
        assert found <= base | names(extra), path
        seen |= found
    assert {"torch", "click", "numpy", "pillow", "tqdm", "scipy"} <= seen


def test_the_test_environment_pins_every_dependency_exactly():
    project = PROJECT["project"]
    extras = dict(project["optional-dependencies"])
    dev = extras.pop("dev")
    included = re.fullmatch(r"setdiffit\[([\w,]+)\]", dev[0])[1].split(",")
    wanted = names(project["dependencies"]) | names(dev[1:])
    wanted |= {name for extra in included for name in names(extras[extra])}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
    assert names(pins) == wanted


def test_an_installation_puts_no_module_into_site_packages():
    assert PROJECT["tool"]["setuptools"] == {"packages": [], "py-modules": []}
