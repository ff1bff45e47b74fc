"""Fixtures that every test file uses."""

from __future__ import annotations

import pytest
import torch

import sadcl


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def backends_here(*wanted: str) -> list[object]:
    """Parameters for the backends of ``wanted``: those that cannot run here are skipped with their reason."""
    known = sadcl.backends()
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not known[name].available, reason=f"{name}: {known[name].reason}"),
        )
        for name in wanted
    ]
