"""The order of the house, checked from its sources: no circles, no broken layer, no attribute born outside
``__init__``, no file that outgrew its limit.

``python -m tests.house`` prints what is wrong and exits with 1 if anything is. An import counts wherever it stands: at
the top, in a function, under ``TYPE_CHECKING``, or through ``importlib.import_module`` with a name that can be read.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"sadcl": "sadcl", "sadcl.kernels": "kernels"}  # package -> folder
MAX_LINES = 400
SOURCES = (
    ("sadcl", "kernels", "tests", "benchmarks", "csrc"),
    (".py", ".cpp", ".h", ".cu", ".cuh"),
)

# From top to bottom. A name stands for the module and all that is in it; the longest one that fits decides. A layer
# imports itself and what is below it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("sadcl.cli",),
    ("sadcl.commands",),
    ("sadcl.study",),
    ("sadcl.report",),
    ("sadcl.train",),
    ("sadcl.data",),
    ("sadcl.compat", "sadcl.compat_checkpoints", "sadcl.checkpoint", "sadcl.testing"),
    ("sadcl",),  # the public names
    ("sadcl.prototypes",),
    ("sadcl.model",),
    ("sadcl.backbones", "sadcl.head"),
    ("sadcl.transformer", "sadcl.bank", "sadcl.classes", "sadcl.backbone_networks"),
    ("sadcl.backbone_weights",),
    ("sadcl.attention", "sadcl.losses", "sadcl.metrics"),
    ("sadcl.linear",),
    ("sadcl.functional",),
    ("sadcl.reference",),  # beside the ops, not above them: see NEVER
    ("sadcl.ops",),
    ("sadcl._backends",),
    ("sadcl._C", "sadcl.kernels", "sadcl.cuda", "sadcl.portable"),
    ("sadcl._checks",),
    ("sadcl._groups",),
    ("sadcl._dtypes", "sadcl._files", "sadcl._json", "sadcl._own", "sadcl._collectives"),
)

# (importer, imported): what the order alone does not forbid. The oracles are for the tests and the backend "reference".
NEVER = (
    ("sadcl.reference", "sadcl.ops"),
    ("sadcl.kernels", "sadcl.portable"),
    ("sadcl.portable", "sadcl.kernels"),
    *(
        (name, "sadcl.reference")
        for layer in LAYERS[: LAYERS.index(("sadcl.functional",))]
        for name in layer
        if name not in ("sadcl", "sadcl.testing")
    ),
)
# torchrun starts modules, so `python -m sadcl.train` has to be the command.
ALLOWED = (("sadcl.train.__main__", "sadcl.cli"),)


class Import(NamedTuple):
    """One module imports another.

    Attributes:
        importer: its dotted name.
        imported: the other's.
        line: where.
    """

    importer: str
    imported: str
    line: int


def modules(root: Path = ROOT, packages: Mapping[str, str] = PACKAGES) -> dict[str, Path]:
    """Dotted name -> file of every module of the packages (name -> folder)."""
    found = {}
    for package, folder in packages.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[Import]:
    """What a module imports of the known ones, and of their extension, wherever it says so."""
    parts = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]

    def named(*candidates: str) -> Iterator[str]:
        """The first candidate that is a module."""
        yield from [one for one in candidates if one in known or one == "sadcl._C"][:1]

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [one for alias in node.names for one in named(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module or ""
            targets = [one for alias in node.names for one in named(f"{base}.{alias.name}", base)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            said = node.args[0]
            if isinstance(said, ast.Constant):
                targets = list(named(str(said.value)))
            elif isinstance(said, ast.JoinedStr) and isinstance(said.values[0], ast.Constant):
                targets = [one for one in known if one.startswith(str(said.values[0].value))]
        for target in dict.fromkeys(targets):
            yield Import(name, target, node.lineno)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """For every group of modules that reach each other, the shortest way from its first one back to itself."""
    found, done = [], set()
    for start in sorted(graph):
        if start in done:
            continue
        came: dict[str, str] = {}
        queue = [start]
        for module in queue:
            for target in sorted(graph.get(module, ())):
                if target not in came:
                    came[target] = module
                    queue.append(target)
        if start in came:
            way = [start, came[start]]
            while way[-1] != start:
                way.append(came[way[-1]])
            found.append(way[::-1])
            done |= {module for module in came if start in _reached(graph, module)}
    return found


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    queue = [start]
    for module in queue:
        new = graph.get(module, set()) - reached
        reached |= new
        queue.extend(new)
    return reached


def within(module: str, name: str) -> bool:
    """Whether a module is this one or in it."""
    return module == name or module.startswith(f"{name}.")


def layer_of(module: str) -> tuple[int, str] | None:
    """(how far from the top, name in the table) of a module."""
    fitting = [(level, name) for level, names in enumerate(LAYERS) for name in names if within(module, name)]
    fitting = [one for one in fitting if one[1] != "sadcl" or module == "sadcl"]  # the root is no room for others
    return max(fitting, key=lambda one: len(one[1]), default=None)


def layer_faults(found: list[Import], known: Mapping[str, Path]) -> list[str]:
    """Imports that go up, or where the table of exceptions forbids it."""
    faults = [f"{module}: in no layer of the table" for module in sorted(known) if layer_of(module) is None]
    for one in found:
        if any(within(one.importer, a) and within(one.imported, b) for a, b in ALLOWED):
            continue
        above, below = layer_of(one.importer), layer_of(one.imported)
        if above is None or below is None:
            continue
        if above[0] > below[0]:
            faults.append(f"{one.importer}:{one.line}: imports {one.imported}, a layer above it")
        elif any(above[1] == a and within(one.imported, b) for a, b in NEVER):
            faults.append(f"{one.importer}:{one.line}: imports {one.imported}, which is not for it")
    return faults


def size_faults(root: Path = ROOT) -> list[str]:
    """Source files of more than MAX_LINES lines."""
    folders, suffixes = SOURCES
    files = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in suffixes]
    counts = {path: path.read_text(encoding="utf-8").count("\n") for path in [*files, *root.glob("*.py")]}
    return [
        f"{path.relative_to(root)}: {count} lines, at most {MAX_LINES} are allowed"
        for path, count in sorted(counts.items())
        if count > MAX_LINES
    ]


def birth_faults(name: str, path: Path) -> list[str]:
    """Attributes that a method gives an object, and neither the class body, ``__init__`` nor what that calls."""
    found = []
    for kind in (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)
    ):
        methods = {node.name: node for node in kind.body if isinstance(node, ast.FunctionDef)}
        if "__init__" not in methods:
            continue
        own = {method: _of_self(node) for method, node in methods.items()}
        starts = ["__init__", *(own["__init__"].keys() & methods.keys())]
        born = {
            node.target.id
            for node in kind.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        born |= {attribute for start in starts for attribute, stored in own[start].items() if stored}
        for method in own.keys() - set(starts):
            late = sorted(
                (line, attribute) for attribute, line in own[method].items() if line and attribute not in born
            )
            found += [f"{name}:{line}: {kind.name}.{attribute} is not born in __init__" for line, attribute in late]
    return found


def _of_self(method: ast.FunctionDef) -> dict[str, int]:
    """Attribute of self that a method names -> the line where it is assigned, 0 if it is only read."""
    found: dict[str, int] = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            found[node.attr] = found.get(node.attr, 0) or (node.lineno if isinstance(node.ctx, ast.Store) else 0)
    return found


def faults(root: Path = ROOT, packages: Mapping[str, str] = PACKAGES) -> list[str]:
    """Everything that is wrong, a line each."""
    known = modules(root, packages)
    found = [one for name, path in known.items() for one in imports(name, path, known)]
    graph: dict[str, set[str]] = {name: set() for name in known}
    for one in found:
        if (one.importer, one.imported) not in ALLOWED:
            graph[one.importer].add(one.imported)
    round_about = [f"circle: {' -> '.join(way)}" for way in circles(graph)]
    born = [fault for name, path in known.items() for fault in birth_faults(name, path)]
    return round_about + layer_faults(found, known) + born + size_faults(root)


if __name__ == "__main__":
    wrong = faults()
    print("\n".join(wrong) or "nothing is wrong")
    sys.exit(bool(wrong))
