"""Every kernel of every op, compiled for sm_80 and executed at every edge of its tiles, beside the oracle."""

from __future__ import annotations

import pytest
from sadcl.kernels import _launch, _tiles

from tests.ptx.cases import KINDS, PRODUCTS, TRITON, Case, cases_of, check
from tests.ptx.launching import ARCH

OFTEN = ("bf16", "fp32", "fp64", "tf32")


def kinds_of(op: str) -> list[str]:
    """Kinds of operands that an op tells apart."""
    return [kind for kind in KINDS if not kind.startswith("tf32") or op in PRODUCTS]


def other_tiles() -> list[Case]:
    """Cases of the tiles that are not taken by default."""
    found = []
    for op, kind in ((op, kind) for op in PRODUCTS for kind in KINDS):
        of = _tiles.kind_of(KINDS[kind][0], KINDS[kind][1])
        tables = [name for name in _tiles.TABLES if name.startswith(op)]
        most = max(len(_tiles.candidates(name, _launch.PARTS[ARCH], of)) for name in tables)
        found += [case for tile in range(1, most) for case in cases_of(op, kind, tile)]
    return found


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if kind in OFTEN else pytest.mark.slow, id=str(case))
        for op in TRITON
        for kind in kinds_of(op)
        for case in cases_of(op, kind)
    ],
)
def test_at_the_edges_of_its_tiles(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", other_tiles(), ids=str)
def test_with_every_tile_of_the_table(case: Case) -> None:
    check(case)
