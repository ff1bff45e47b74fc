"""Every kernel of every op, compiled for sm_80 and executed at every edge of its tiles, beside the oracle."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are not compiled here", allow_module_level=True)

from tests.ptx.cases import KINDS, PRODUCTS, TRITON, Case, check, edges, examples_of

CASES = [
    Case(op, kind, size, number)
    for op in TRITON
    for kind in KINDS
    if not kind.startswith("tf32") or op in PRODUCTS
    for size in edges(op, kind)
    for number in range(examples_of(op))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_the_edges_of_its_tiles(case: Case) -> None:
    check(case)
