"""The measures of the project's structure, and the walk that docs/architecture.md gives."""

import json

from measure_structure import (
    ARCHITECTURE,
    ROOT,
    TRACER,
    describe_walk,
    find_functions,
    measure_sources,
    read_walk,
    run_python,
    trace_step,
)
from structure import read_sources

TOY_TRAIN = """
import torch
from models.net import build
from models.unused import Unused

class Main:
    def begin(self):
        import models.late
        build()
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.ones(1)
        torch.optim.SGD([weight], lr=1.0).step()
        models.late.after()

def main():
    Main().begin()
"""
TOY = {
    "train.py": TOY_TRAIN,
    "dnnlib/program.py": "def run(main):\n    print('noise')\n    main()\n",
    "models/net.py": "def build():\n    return [helper() for _ in range(2)]\ndef helper(): ...\n",
    "models/unused.py": "class Unused:\n    value = 1\n",
    # What defining a module calls is not entered.
    "models/late.py": "from models.table import rows\nROWS = rows()\ndef after(): ...\n",
    "models/table.py": "def rows(): ...\n",
    "models/never.py": "def rows(): ...\n",
}


def plant(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_row_of_the_walk_has_a_space_after_the_longest_path():
    rows = describe_walk({"a.py": "run", "a/very/long/folder/of/a/package/module.py": "f"})
    assert rows.splitlines()[2].split() == ["2", "a/very/long/folder/of/a/package/module.py", "f"]


def test_the_walk_in_the_documentation_is_the_measured_one(digits_zip, tmp_path):
    files = trace_step(ROOT, tmp_path, "image", digits_zip)
    walk = read_walk((ROOT / ARCHITECTURE).read_text(encoding="utf-8"))
    assert walk == describe_walk(files), "Run: python tests/measure_structure.py --write"


def test_a_trace_ends_with_the_first_step_and_leaves_out_definitions(tmp_path):
    plant(tmp_path / "tree", TOY)
    found = json.loads(run_python(tmp_path / "tree", tmp_path, TRACER, tmp_path / "tree"))
    assert list(found["files"].items()) == [
        ("dnnlib/program.py", "run"),
        ("train.py", "main"),
        ("models/net.py", "build"),
    ]
    modules = [
        "dnnlib.program",
        "models.late",
        "models.net",
        "models.table",
        "models.unused",
        "train",
    ]
    assert found["modules"] == modules


def test_measures_name_what_is_too_large(tmp_path):
    long = "def long(a, b):\n" + "    a += b\n" * 60
    wide = "class A:\n    def wide(self, a, b, c, d, e, /, f, *args, g, h, **kwargs): ...\n"
    fits = "def fits(a, b, c, d, e, f, g, h):\n" + "    a += b\n" * 59
    loop = "def training_loop():\n" + "    x = 1\n" * 200
    plant(
        tmp_path,
        {
            "train.py": long + "\n" * 139 + "x = 1\n",
            "fid.py": fits + "\n" * 140,
            "training/loop.py": loop + wide + "\n" * 197 + "x = 1\n",
            "tests/test_all.py": "x = 1\n" * 7,
            **{f"models/m{number}.py": "x = 1\n" for number in range(21)},
        },
    )
    found = measure_sources(tmp_path)
    assert found["scripts above 200 lines"] == "1<br>train.py 201"
    assert found["longest script"] == "201 (train.py)"
    assert found["longest function but the loop"] == "61 (long in train.py)"
    assert found["functions above 60 lines"] == "1<br>train.py long 61"
    assert found["functions above 8 parameters"] == "1<br>training/loop.py wide 10"
    assert found["folders above 20 files"] == "1<br>models 21"
    assert found["modules above 400 lines"] == "1<br>training/loop.py 401"
    assert found["lines, files in training/"] == "401, 1"
    assert found["lines of tests"] == "7"
    assert found["lines without tests"] == f"{201 + 200 + 401 + 21}"


def test_functions_are_found_wherever_they_are(tmp_path):
    plant(tmp_path, {"a.py": "class A:\n    def f(self):\n        async def g(x): ...\n"})
    found = [
        (f.name, f.num_lines, f.num_parameters) for f in find_functions(read_sources(tmp_path))
    ]
    assert found == [("f", 2, 0), ("g", 1, 1)]
