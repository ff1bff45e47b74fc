"""What the fuzz draws: for every public function that computes, a strategy of cases and what a case means.

A case is a mapping of names to plain values (a failure can be written down as a test: ``FOUND`` in ops/test_fuzz.py);
tensors are made from it. Every op has an entry in :data:`GENERATORS` under its own name, or under its name, a dash and
what is special about it; ops/registry.py names the op that has none.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from .drawn import COMMON
from .layers import LAYERS
from .losses import LOSSES
from .problem import Generator, hold

__all__ = ["GENERATORS", "Generator", "cases", "hold"]

GENERATORS: dict[str, Generator] = {**LOSSES, **LAYERS}


def cases(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """What is drawn for a generator."""
    return st.fixed_dictionaries({**COMMON, **GENERATORS[name].drawn})
