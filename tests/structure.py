"""What the sources under a folder import, and where they ask for the kind of a model, by AST.

Nothing here imports the product, so that a tree of files can be examined that cannot run.
"""

import ast
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Packages from the lowest to the highest; each may import those of the rows below its own.
LAYERS = (
    ("dnnlib",),
    ("torch_utils",),
    ("diffusion", "models"),
    ("encoders",),
    ("data", "metrics"),
    ("training",),
    ("sampling",),
    ("evaluation",),
    ("families",),
    ("configs",),
    ("commands",),
)
ALLOWED = {
    name: {below for row in LAYERS[:index] for below in row}
    for index, row in enumerate(LAYERS)
    for name in row
}
# Scripts alone import these, as they do the highest row.
ALLOWED |= {name: set(ALLOWED) for name in ("benchmarks", "demos")}
# Folders of Python files that are no part of the product.
OUTSIDE = {"tests", "docs", "examples"}
DISTRIBUTED = {f"torch_utils/{name}.py" for name in ("distributed", "sharding", "states")}

# Configurations that runs of every kind have.
SHARED_CONFIGS = {
    "Config",
    "DatasetConfig",
    "DetectorConfig",
    "LoggingConfig",
    "ModelConfig",
    "PrecondConfig",
    "RunConfig",
    "SamplingConfig",
    "TrainingConfig",
}
# Classes whose subclasses are each of one kind of model.
BASES = {"Conditioner", "Context", "Dataset", "Draws", "ModelConfig", "Objective", "RunConfig"}
KIND_NAME = re.compile(
    r"\w+(Config|Dataset|Run|Conditioner|Snapshot|Objective|Codec|Generator|Evaluator|Family)"
)
# Sections of a run that not every kind has, names of options as typed, which may be called the
# same, and names of things that are of one kind.
SECTIONS = {"sets", "features", "dual_guidance", "validation"}
TYPED = {"args", "asked", "options"}
OWNERS = {"codec", "config", "data", "dataset", "model", "network", "run", "snapshot"}


class Finding(NamedTuple):
    path: str  # Relative to the root, with forward slashes.
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Source(NamedTuple):
    path: str
    tree: ast.Module

    @property
    def package(self) -> str | None:
        """Name of the folder at the top; None of a script."""
        return self.path.partition("/")[0] if "/" in self.path else None


def read_sources(root: Path) -> list[Source]:
    """Return the product's Python files under ``root``: scripts and packages, however deep."""
    packages = (path for path in root.iterdir() if path.name not in OUTSIDE and path.name[0] != ".")
    files = [*root.glob("*.py"), *(file for path in packages for file in path.rglob("*.py"))]
    return [_read_source(root, path) for path in sorted(files)]


def _read_source(root: Path, path: Path) -> Source:
    return Source(path.relative_to(root).as_posix(), _parse(path.read_text(encoding="utf-8")))


@functools.lru_cache(1000)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


# Imports.


def find_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each module (or name in one) that code imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name, argument = _last_name(node.func), node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)
        elif (
            isinstance(node, ast.Attribute)
            and node.attr == "distributed"  # Asked first: to unparse all takes long.
            and ast.unparse(node) == "torch.distributed"
        ):
            yield node.lineno, "torch.distributed"


def wrong_imports(root: Path) -> list[Finding]:
    """Return the imports under ``root`` that the direction of the packages forbids."""
    sources = read_sources(root)
    scripts = {source.path.removesuffix(".py") for source in sources if source.package is None}
    ours = set(ALLOWED) | scripts | {source.package for source in sources if source.package}
    found = set()
    for source in sources:
        package = source.package
        allowed = set(ALLOWED) if package is None else ALLOWED.get(package, set()) | {package}
        if package is not None and package not in ALLOWED:
            found.add(Finding(source.path, 1, f"the direction of package {package} is not set"))
        for line, name in find_imports(source.tree):
            top = name.partition(".")[0]
            if name.startswith("."):
                found.add(Finding(source.path, line, "a relative import"))
            elif top in ours and top not in allowed:
                found.add(Finding(source.path, line, f"{package or 'a script'} imports {top}"))
            elif top == "torch" and package == "dnnlib":
                found.add(Finding(source.path, line, "dnnlib imports torch"))
            elif f"{name}.".startswith("torch.distributed.") and source.path not in DISTRIBUTED:
                found.add(Finding(source.path, line, "imports torch.distributed"))
    return sorted(found)


# Questions for the kind of a model, a dataset or a snapshot.


def find_kinds(sources: list[Source]) -> tuple[set[str], set[str]]:
    """Return the names of the classes that are of one kind, and attributes that only those have."""
    classes = {
        node.name: node
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
    }
    bases = {
        name: {_last_name(base) for base in node.bases} - {None} for name, node in classes.items()
    }

    def descends(name: str) -> bool:
        return any(base in BASES or descends(base) for base in bases.get(name, ()))

    families = {name for name in classes if descends(name)}
    kinds = families | {name for name in classes if KIND_NAME.fullmatch(name)}
    kinds -= BASES | SHARED_CONFIGS
    shared = {name for base in BASES & set(classes) for name in _attributes(classes[base])}
    return kinds, {name for kind in families for name in _attributes(classes[kind])} - shared


def family_questions(root: Path) -> list[Finding]:
    """Return where code under ``root``, but for ``families``, asks for the kind of something.

    Kinds are asked for by ``isinstance`` and its like, by an absent section of a run, by
    ``hasattr`` and by the name of a family.
    """
    sources = read_sources(root)
    kinds, attributes = find_kinds(sources)
    found = set()
    for source in sources:
        if source.package == "families":
            continue
        aliases = {
            alias.asname: alias.name
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.asname
        }

        def is_kind(node: ast.AST, aliases: dict[str, str] = aliases) -> bool:
            names = {_last_name(part) for part in ast.walk(node)} - {None}
            return any(aliases.get(name, name) in kinds for name in names)

        for node in ast.walk(source.tree):
            for part in _questions(node, is_kind, attributes):
                found.add(Finding(source.path, part.lineno, ast.unparse(part)))
    return sorted(found)


def _questions(
    node: ast.AST, is_kind: Callable[[ast.AST], bool], attributes: set[str]
) -> Iterator[ast.AST]:
    """Yield what in one node, without its children, asks for a kind."""
    match node:
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
            if is_kind(kinds):
                yield node
        case (
            ast.Call(func=ast.Name(id="hasattr"), args=[owner, name])
            | ast.Call(func=ast.Name(id="getattr"), args=[owner, name, _])
        ):
            is_foreign = isinstance(name, ast.Constant) and name.value in attributes
            if is_foreign or _last_name(owner) in OWNERS:
                yield node
        case ast.Compare():
            if _compares_kinds(node, is_kind):
                yield node
        case ast.Match(subject=ast.Attribute(attr="family")):
            yield node.subject
        case ast.MatchClass():
            if is_kind(node.cls):
                yield node
        case ast.If() | ast.IfExp() | ast.While() | ast.Assert():
            yield from _tested_sections(node.test)
        case ast.BoolOp():  # The last value may be the result, untested.
            yield from itertools.chain(*map(_tested_sections, node.values[:-1]))
        case ast.UnaryOp(op=ast.Not()):
            yield from _tested_sections(node.operand)
        case ast.comprehension():
            yield from itertools.chain(*map(_tested_sections, node.ifs))
        case ast.Call(func=ast.Name(id="bool"), args=[value]):
            yield from _tested_sections(value)


def _compares_kinds(node: ast.Compare, is_kind: Callable[[ast.AST], bool]) -> bool:
    """Return whether a comparison asks for an absent section, a type or the name of a family."""
    sides = [node.left, *node.comparators]
    if any(isinstance(side, ast.Constant) and side.value is None for side in sides):
        return any(_is_section(side) or _is_section_of_run(side) for side in sides)
    if any(isinstance(side, ast.Attribute) and side.attr == "family" for side in sides):
        return True
    types = [side for side in sides if ast.unparse(side).startswith("type(")]
    if any(isinstance(side, ast.Attribute) and side.attr == "__name__" for side in types):
        return True
    return bool(types) and any(is_kind(side) for side in sides if side not in types)


def _tested_sections(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the sections of a run whose truth decides that of a condition."""
    if isinstance(node, ast.BoolOp):
        yield from itertools.chain(*map(_tested_sections, node.values))
    elif _is_section_of_run(node):
        yield node


def _is_section(node: ast.AST) -> bool:
    """Return whether a node is an attribute called like a section that not every run has."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr in SECTIONS
        and _last_name(node.value) not in TYPED
    )


def _is_section_of_run(node: ast.AST) -> bool:
    """Return whether a node is a section that not every run has: ``config.sets``, say."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr in SECTIONS | {"guidance"}
        and _last_name(node.value) in ("config", "run")
    )


def _last_name(node: ast.AST) -> str | None:
    """Return the last name of ``a.b.c`` or of ``Base[T]``; None of other expressions."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _attributes(node: ast.ClassDef) -> set[str]:
    """Return the names of the fields, methods and properties of a class."""
    fields = {
        part.target.id
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    return fields | {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
