"""The order of the house, and that what checks it notices when it is broken."""

from __future__ import annotations

from pathlib import Path

import house
import pytest

CLEAN = {
    "sadcl/__init__.py": "from .losses import Loss\n",
    "sadcl/losses.py": "from . import functional\nclass Loss:\n    def __init__(self):\n        self.x = 1\n",
    "sadcl/functional/__init__.py": "from ..ops import op\nfrom .. import reference\n",
    "sadcl/reference/__init__.py": "import torch\n",
    "sadcl/ops/__init__.py": "",
    "sadcl/ops/op.py": "def kernel():\n    from sadcl.kernels import op\n    return op\n",
    "sadcl/portable/__init__.py": "",
    "sadcl/train/__init__.py": "",
    "sadcl/train/__main__.py": "from sadcl.cli import main\n",
    "sadcl/cli.py": "def main():\n    import sadcl.train\n",
    "kernels/__init__.py": "",
    "kernels/op.py": "",
    "csrc/op.cpp": "int x;\n" * 400,
}


def complaints(root: Path, changed: dict[str, str]) -> list[str]:
    for name, text in {**CLEAN, **changed}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return house.faults(root)


def test_house_is_in_order() -> None:
    if not (house.ROOT / "sadcl").is_dir():
        pytest.skip("away from the sources")
    assert house.faults() == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"csrc/op.cpp": "int x;\n" * 401}, ["csrc/op.cpp: 401 lines, at most 400 are allowed"]),
        ({"tests/test_op.py": "x = 1\n" * 401}, ["tests/test_op.py: 401 lines, at most 400 are allowed"]),
        (
            {"kernels/op.py": "def launch():\n    from sadcl.ops.op import kernel\n"},
            [
                "circle: sadcl.kernels.op -> sadcl.ops.op -> sadcl.kernels.op",
                "sadcl.kernels.op:2: imports sadcl.ops.op, a layer above it",
            ],
        ),
        (
            {"sadcl/ops/op.py": 'import importlib\nrun = importlib.import_module(f"sadcl.kernels.{1}").run\n'}
            | {"kernels/op.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sadcl.ops.op\n"},
            [
                "circle: sadcl.kernels.op -> sadcl.ops.op -> sadcl.kernels.op",
                "sadcl.kernels.op:3: imports sadcl.ops.op, a layer above it",
            ],
        ),
        (
            {"sadcl/train/a.py": "from . import b\n", "sadcl/train/b.py": "def f():\n    from .a import x\n"},
            ["circle: sadcl.train.a -> sadcl.train.b -> sadcl.train.a"],
        ),
        (
            {"sadcl/ops/op.py": "from ..reference import x\nfrom .. import functional\n"},
            [
                "circle: sadcl.functional -> sadcl.ops.op -> sadcl.functional",
                "sadcl.ops.op:1: imports sadcl.reference, a layer above it",
                "sadcl.ops.op:2: imports sadcl.functional, a layer above it",
            ],
        ),
        (
            {"sadcl/train/a.py": "from sadcl import reference\n"},
            ["sadcl.train.a:1: imports sadcl.reference, which is not for it"],
        ),
        (
            {"sadcl/reference/a.py": "import sadcl.ops.op\n"},
            ["sadcl.reference.a:1: imports sadcl.ops.op, which is not for it"],
        ),
        (
            {"sadcl/train/a.py": "from sadcl.cli import main\n"},
            ["sadcl.train.a:1: imports sadcl.cli, a layer above it"],
        ),
        ({"sadcl/garden.py": ""}, ["sadcl.garden: in no layer of the table"]),
        (
            {"sadcl/losses.py": "class A:\n def __init__(self): self.a = 1\n def f(self): self.a, self.b = 2, 3\n"},
            ["sadcl.losses:3: A.b is not born in __init__"],
        ),
    ],
)
def test_what_is_out_of_order_is_named(tmp_path: Path, changed: dict[str, str], expected: list[str]) -> None:
    assert complaints(tmp_path, changed) == expected
