"""Rules of csrc/ that no compiler checks: which headers per-instruction-set files see, and one definition a name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="reads the sources, which an installed wheel leaves out")

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
TOKEN = re.compile(
    r"(?P<begin>SADCL_KERNELS_BEGIN)|(?P<end>SADCL_KERNELS_END)|(?P<open>\{)|(?P<close>\})"
    r"|\bnamespace\b\s*(?P<namespace>[\w:]*)\s*\{"
    r"|\benum\b[^;{]*\{|(?P<kind>\b(?:struct|class|union)\b)\s*(?:__attribute__\(\(.*?\)\)\s*)?"
    r"(?P<name>\w+\s*(?:<[^{;=()]*>)?)\s*(?:final\s*)?(?::[^{;()]*)?\{"
)


def per_isa_sources() -> list[str]:
    """KERNEL_SOURCES of setup.py: what is compiled once per instruction set."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "KERNEL_SOURCES":
            return [Path(name).name for name in ast.literal_eval(node.value)]
    raise AssertionError("setup.py has no list KERNEL_SOURCES")


def forbidden_includes(folder: Path, sources: list[str]) -> list[str]:
    """C++ headers (their names do not end in .h) that a source reaches, each with the way to it."""
    found = []
    for source in sources:
        ways = [[source]]
        seen = {source}
        for way in ways:
            for bracket, name in INCLUDE.findall(code(folder / way[-1])):
                if bracket == "<":
                    if not name.endswith(".h"):
                        found.append(" -> ".join([*way, f"<{name}>"]))
                elif name not in seen:
                    seen.add(name)
                    ways.append([*way, name])
    return found


def code(path: Path) -> str:
    """A file without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def definitions(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Where each struct or class of a named namespace is defined; nested and unnamed ones meet nobody else's."""
    found = defaultdict(list)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        text = re.sub(r'^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|"(?:\\.|[^"\\\n])*"', "", code(path), flags=re.MULTILINE)
        scopes: list[str | None] = []  # a namespace's name; None is any other pair of braces
        for token in TOKEN.finditer(text):
            if token["begin"]:
                scopes += ["sadcl", "SADCL_ISA"]
            elif token["end"]:
                del scopes[-2:]
            elif token["close"]:
                scopes.pop()
            elif token["namespace"] is not None:
                scopes.append(token["namespace"] or "(unnamed)")
            else:
                if token["name"] and None not in scopes and "(unnamed)" not in scopes:
                    name = re.sub(r"\s+", "", token["name"])
                    found["::".join(s for s in scopes if s), name].append(path.name)
                scopes.append(None)
        assert not scopes, f"{path.name}: braces do not match up: {scopes}"
    return found


def twice(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Names with more than one definition."""
    return {name: files for name, files in definitions(folder).items() if len(files) > 1}


def specialised(folder: Path) -> list[str]:
    """Whole specialisations of functions and variables in headers that are not inline: clang defines one a file."""
    whole = re.compile(r"template\s*<>\s*(\w+)([^;{=(]*)")
    return [
        f"{path.name}: {first}{rest.rstrip()}"
        for path in sorted(folder.glob("*.h"))
        for first, rest in whole.findall(code(path))
        if first not in ("inline", "SADCL_INLINE", "struct", "class")
    ]


def test_files_compiled_per_instruction_set_see_no_cpp_header() -> None:
    assert forbidden_includes(CSRC, per_isa_sources()) == []


def test_no_two_definitions_of_one_name() -> None:
    found = definitions(CSRC)
    assert {("sadcl", "Array"), ("sadcl::SADCL_ISA", "Block"), ("sadcl::SADCL_ISA", "Simd<float>")} <= set(found)
    assert twice(CSRC) == {}


def test_specialisations_in_headers_are_inline() -> None:
    assert specialised(CSRC) == []


def test_the_checks_see_what_they_are_for(tmp_path: Path) -> None:
    """The faults that were there once: <chrono> in a per-ISA file, here two files away, and two structs Block."""
    begin, end = "SADCL_KERNELS_BEGIN\n", "SADCL_KERNELS_END\n"
    unnamed = "namespace {\nstruct Own {};\n}\n"
    block = "template <class T>\nstruct Block final : Base {\n  struct Inner { int x{}; };\n};\n"
    files = {
        "a.h": f'#include "b.h"\n// #include <vector>\n{begin}{block}{unnamed}{end}',
        "b.h": "#include <math.h>\n  # include <chrono>\nnamespace sadcl {\nclass Block {};\n}\n",
        "c.h": "template <>\nconstexpr int kTerms<Pair> = 2;\ntemplate <>\nstruct Own<int> {};\n"
        "template <>\ninline constexpr int kTerms<Own> = 3;\n",
        "k.cpp": f'#include "a.h"\n{begin}struct Inner;\n{block}{unnamed}{end}class Inner {{}};\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert forbidden_includes(tmp_path, ["k.cpp"]) == ["k.cpp -> a.h -> b.h -> <chrono>"]
    assert specialised(tmp_path) == ["c.h: constexpr int kTerms<Pair>"]
    assert twice(tmp_path) == {("sadcl::SADCL_ISA", "Block"): ["a.h", "k.cpp"]}
