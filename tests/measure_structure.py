"""Measure how the project is built: its sizes, and what a run loads and enters.

  python tests/measure_structure.py [ROOT ...]     # A Markdown table, one column a root.
  python tests/measure_structure.py --write        # Update the walk in docs/architecture.md.

Runs are those of ROOT/train.py on data that ROOT/tests/ knows how to make, on one CPU thread.
"""

import argparse
import ast
import collections
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from structure import Source, family_questions, read_sources

ROOT = Path(__file__).resolve().parent.parent
TRACER = Path(__file__).resolve().with_name("trace_run.py")
ARCHITECTURE = "docs/architecture.md"
WALK_BEGINS, WALK_ENDS = "<!-- walk: begin -->", "<!-- walk: end -->"

MAX_FILES, MAX_SCRIPT_LINES, MAX_MODULE_LINES = 20, 200, 400
MAX_FUNCTION_LINES, MAX_PARAMETERS = 60, 8
# What digits must not load.
FOREIGN = re.compile(
    r"prepar|streaming|captions|encoders\.text"
    r"|feature_(encoders|inventory|making|manifests|plan|staging|work)"
)
ONE_STEP = ("--batch=4", "--iters=1", "--workers=0", "--hidden-dim=16")
RUNS = {
    "image": ("--preset=digits", "--num-stages=1", "--base-dim=16", "--time-dim=32", *ONE_STEP),
    "sets": (
        "--preset=fsdm-digits",
        "--num-blocks=1",
        "--num-heads=2",
        "--encoder-depth=1",
        "--encoder-heads=2",
        *ONE_STEP,
    ),
    "features": ("--preset=nanodit-tiny", "--num-blocks=1", "--num-heads=2", *ONE_STEP),
}
_MAKE_FEATURES = """
import sys
from pathlib import Path
from feature_files import tiny_features
tiny_features(Path(sys.argv[1]), "--batch=1")
"""


class Function(NamedTuple):
    path: str
    name: str
    num_lines: int
    num_parameters: int

    @property
    def is_whole(self) -> bool:
        """Whether it reads best in one piece: the training loop, an initialisation of weights."""
        return self.name in ("training_loop", "initialize")


def find_functions(sources: list[Source]) -> Iterator[Function]:
    """Yield all functions, nested ones too; ``self`` and ``cls`` are no parameters of theirs."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                every = node.args
                names = [a.arg for a in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
                names += [a.arg for a in (every.vararg, every.kwarg) if a is not None]
                num_parameters = len(set(names) - {"self", "cls"})
                num_lines = node.end_lineno - node.lineno + 1
                yield Function(source.path, node.name, num_lines, num_parameters)


def environment(root: Path, base: Path) -> dict[str, str]:
    """Return the environment of a process of ``root`` that leaves its files in ``base``."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        **{name: value for name, value in os.environ.items() if name not in launcher},
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SETDIFFIT_CACHE": str(base / "cache"),
    }


def run_python(root: Path, base: Path, *arguments: str | Path) -> str:
    """Run Python on ``root`` and return its standard output; raise RuntimeError if it fails."""
    done = subprocess.run(
        [sys.executable, "-P", *map(str, arguments)],
        cwd=base,
        env=environment(root, base),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def trace(root: Path, base: Path, *arguments: str) -> dict:
    """Return what a run of ``root`` enters and loads, see trace_run.py."""
    return json.loads(run_python(root, base, TRACER, root, *arguments))


def trace_step(root: Path, base: Path, kind: str, data: Path) -> dict[str, str]:
    """Return the files that a run of a kind enters to its first step, and the first function."""
    outputs = (f"--outdir={base / 'runs'}", f"--data={data}")
    return trace(root, base, *RUNS[kind], *outputs)["files"]


def make_digits(root: Path, base: Path) -> Path:
    path = base / "digits.zip"
    tool = root / "dataset_tool.py"
    run_python(root, base, tool, "convert", "--source=digits", f"--dest={path}")
    return path


def make_features(root: Path, base: Path) -> Path:
    run_python(root, base, "-c", _MAKE_FEATURES, base)
    return base / "features"


def time_help(root: Path, base: Path) -> str:
    """Return the medians of ``train.py --help`` of five, after one that compiles the sources."""
    walls, processors = [], []
    for _ in range(6):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python(root, base, root / "train.py", "--help")
        walls.append(time.perf_counter() - start)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors.append(now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime)
    wall, processor = (statistics.median(seconds[1:]) for seconds in (walls, processors))
    return f"{wall:.2f} s ({processor:.2f} s of processor time)"


def copy_sources(root: Path, target: Path) -> None:
    """Copy the Python files of ``root``, which then stays without compiled ones."""
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if not any(part.startswith(".") for part in inner.parts):
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inner)


def listed(items: list[str]) -> str:
    return str(len(items)) + "".join(f"<br>{item}" for item in items)


def measure_sources(root: Path) -> dict[str, str]:
    """Return the measures that need nothing but the text of the files."""
    sources = read_sources(root)
    num_lines = {
        source.path: len((root / source.path).read_text(encoding="utf-8").splitlines())
        for source in sources
    }
    training = [path for path in num_lines if path.startswith("training/")]
    num_tests = sum(
        len(path.read_text(encoding="utf-8").splitlines()) for path in root.glob("tests/**/*.py")
    )
    questions = family_questions(root)
    num_asking = len({question.path for question in questions})
    scripts = {path: num for path, num in num_lines.items() if "/" not in path}
    longest = max(scripts, key=scripts.__getitem__)
    folders = collections.Counter(path.rpartition("/")[0] for path in num_lines)
    functions = list(find_functions(sources))
    split = [function for function in functions if not function.is_whole]
    longest_function = max(split, key=lambda function: function.num_lines)
    by_length = sorted(split, key=lambda function: -function.num_lines)
    by_parameters = sorted(functions, key=lambda function: -function.num_parameters)
    return {
        "lines without tests": f"{sum(num_lines.values()):,}",
        "lines of tests": f"{num_tests:,}",
        "Python files without tests": str(len(num_lines)),
        "lines, files in training/": (
            f"{sum(num_lines[path] for path in training):,}, "
            f"{sum(not path.endswith('/__init__.py') for path in training)}"
        ),
        "questions for a family outside families/": f"{len(questions)} in {num_asking} files",
        "longest script": f"{scripts[longest]} ({longest})",
        f"scripts above {MAX_SCRIPT_LINES} lines": listed(
            [f"{path} {num}" for path, num in scripts.items() if num > MAX_SCRIPT_LINES]
        ),
        "longest function but the loop": (
            f"{longest_function.num_lines} ({longest_function.name} in {longest_function.path})"
        ),
        f"functions above {MAX_FUNCTION_LINES} lines": listed(
            [f"{f.path} {f.name} {f.num_lines}" for f in by_length if f.num_lines > 60]
        ),
        f"functions above {MAX_PARAMETERS} parameters": listed(
            [
                f"{f.path} {f.name} {f.num_parameters}"
                for f in by_parameters
                if f.num_parameters > MAX_PARAMETERS
            ]
        ),
        f"folders above {MAX_FILES} files": listed(
            [f"{name or 'top'} {num}" for name, num in folders.items() if num > MAX_FILES]
        ),
        f"modules above {MAX_MODULE_LINES} lines": listed(
            [f"{path} {num}" for path, num in num_lines.items() if num > MAX_MODULE_LINES]
        ),
    }


def measure_runs(root: Path, base: Path) -> dict[str, str]:
    """Return the measures that start processes, all of whose files are in ``base``."""
    copy_sources(root, base / "tree")
    root = base / "tree"
    modules = trace(root, base, "--preset=digits", "--dry-run")["modules"]
    foreign = [name for name in modules if FOREIGN.search(name)]
    digits = make_digits(root, base)
    data = dict(image=digits, sets=digits, features=make_features(root, base))
    entered = [len(trace_step(root, base, kind, data[kind])) for kind in RUNS]
    return {
        "modules loaded by `train.py --preset=digits --dry-run`": str(len(modules)),
        "among them of preparation, streaming, text encoders": listed(foreign),
        f"files entered up to the first step ({', '.join(RUNS)})": ", ".join(map(str, entered)),
        "`train.py --help`": time_help(root, base),
    }


def describe_walk(files: dict[str, str]) -> str:
    """Return the walk of an image model's run as the text of docs/architecture.md."""
    width, column = len(str(len(files))), max(map(len, files))
    rows = [
        f"{number:{width}}  {path:<{column}}  {function}"
        for number, (path, function) in enumerate(files.items(), 1)
    ]
    return "\n".join(["```", *rows, "```"])


def read_walk(text: str) -> str:
    """Return the walk that the text of docs/architecture.md holds between its marks."""
    return text.partition(WALK_BEGINS)[2].partition(WALK_ENDS)[0].strip()


def write_walk(root: Path, base: Path) -> None:
    """Update the walk in docs/architecture.md."""
    walk = describe_walk(trace_step(root, base, "image", make_digits(root, base)))
    path = root / ARCHITECTURE
    before, _, rest = path.read_text(encoding="utf-8").partition(WALK_BEGINS)
    after = rest.partition(WALK_ENDS)[2]
    text = f"{before}{WALK_BEGINS}\n{walk}\n{WALK_ENDS}{after}"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("roots", nargs="*", type=Path, help="Folders with the sources to measure.")
    parser.add_argument("--static", action="store_true", help="Start no runs.")
    parser.add_argument(
        "--write", action="store_true", help=f"Only update the walk in {ARCHITECTURE}."
    )
    options = parser.parse_args()
    if options.write:
        with tempfile.TemporaryDirectory() as folder:
            write_walk(ROOT, Path(folder))
        return
    columns = []
    for root in options.roots or [ROOT]:
        found = measure_sources(root.resolve())
        if not options.static:
            with tempfile.TemporaryDirectory() as folder:
                found |= measure_runs(root.resolve(), Path(folder))
        columns.append(found)
    names = [str(root) for root in options.roots or ["this tree"]]
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for measure in columns[0]:
        print(f"| {measure} | {' | '.join(column[measure] for column in columns)} |")


if __name__ == "__main__":
    main()
