"""The extension where OpenMP's library is missing, and built without OpenMP: said, and no slower than torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import sadcl
from tests import forks

# An import of sadcl._C finds ``FILE`` instead of the installed one; ``build_info`` answers as a build without OpenMP.
PLACED = """
import importlib.abc, importlib.machinery, importlib.util, sys

class Loader(importlib.machinery.ExtensionFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        if SERIAL:
            built = {{**module.build_info(), "openmp": False}}
            module.build_info = lambda: built

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "sadcl._C":
            return None
        return importlib.util.spec_from_file_location(name, FILE, loader=Loader(name, FILE))

FILE, SERIAL = {file!r}, {serial}
sys.meta_path.insert(0, Finder())
import torch
torch.set_num_threads({threads})
import sadcl
"""
USE = """
x, y = torch.randn(4, 3, 8, requires_grad=True), torch.ones(4, 3)
loss = sadcl.SampleContrastiveLoss()(x, y)
loss.backward()
assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
from sadcl._backends import resolve
print(resolve(None, "sscl", x.device, ("cpp", "triton", "torch")))
print(resolve("torch", "sscl", x.device, ("cpp", "triton", "torch")))
print(sadcl.backends()["cpp"])
"""


def extension() -> Path:
    if not sadcl.backends()["cpp"].available:
        pytest.skip("the C++ extension is not built")
    spec = importlib.util.find_spec("sadcl._C")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def run(file: Path, code: str, serial: bool = False, threads: int = 1) -> str:
    program = PLACED.format(file=str(file), serial=serial, threads=threads) + code
    done = forks.run(program, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
def test_missing_libgomp_is_said(tmp_path: Path) -> None:
    """A copy that asks for a library of a name that no system has: what a system without libgomp looks like."""
    content = extension().read_bytes()
    if b"libgomp.so.1" not in content:
        pytest.skip("built without libgomp")
    broken = tmp_path / extension().name
    broken.write_bytes(content.replace(b"libgomp.so.1", b"libgomp.so.7"))
    chosen, _, info = run(broken, USE).splitlines()
    assert chosen == "torch"
    assert "available=False" in info and "apt install libgomp1" in info and "libgomp.so.7" in info
    asked = 'try:\n    sadcl.SampleContrastiveLoss(backend="cpp")(torch.ones(2, 3, 4), torch.ones(2, 3))\n'
    said = run(broken, f"{asked}except RuntimeError as error:\n    print(error)\n")
    assert "apt install libgomp1" in said


@pytest.mark.parametrize(
    ("serial", "threads", "chosen"),
    [(False, 1, "cpp"), (False, 2, "cpp"), (True, 1, "cpp"), (True, 2, "torch")],
)
def test_without_openmp_torch_is_taken_where_it_has_more_threads(serial: bool, threads: int, chosen: str) -> None:
    default, named, info = run(extension(), USE, serial, threads).splitlines()
    assert (default, named) == (chosen, "torch")
    assert ("one thread" in info) == serial
