"""Marks: ``op`` on the tests of ops on a CPU, which the sanitizers and the wheel's tests take.

A file is an op's if it is named after one: ``test_sscl.py``, ``test_cpp_sscl.py``.
"""

from __future__ import annotations

import pytest

from sadcl.ops._library import OPS

NAMES = {*OPS, "bank", "average_precision", "supcon", "bf16", "golden", "empty", "registry"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "ops" and item.path.stem.removeprefix("test_").removeprefix("cpp_") in NAMES:
            item.add_marker("op")
