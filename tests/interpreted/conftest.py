"""These tests run the Triton kernels on CPU tensors; tests/test_triton.py starts them with TRITON_INTERPRET=1 set.

By hand: ``TRITON_INTERPRET=1 python -m pytest tests/interpreted``. Triton reads the variable when it decorates
a kernel, so the main test process, where it is not set, leaves this folder out.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _quiet_numpy() -> object:
    """The interpreter evaluates both sides of a ``where`` in numpy, which warns of what the other side discards."""
    with np.errstate(all="ignore"):
        yield
