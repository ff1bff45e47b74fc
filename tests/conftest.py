"""Fixtures that every test file uses."""

from __future__ import annotations

import importlib

import pytest
import torch

import sadcl


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def backends_here(op: str, *also: str) -> list[object]:
    """Parameters for the CPU backends of ``op`` and for ``also``: those that cannot run here are skipped, and say why."""
    known = sadcl.backends()
    wanted = [name for name in importlib.import_module(f"sadcl.ops.{op}").IMPLEMENTED if name != "triton"]
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not known[name].available, reason=f"{name}: {known[name].reason}"),
        )
        for name in (*also, *wanted)
    ]
