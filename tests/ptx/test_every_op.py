"""Every kernel of every op, compiled for sm_80 and executed at every edge of its tiles, beside the oracle."""

from __future__ import annotations

import pytest
import torch
from sadcl.kernels import _launch, _tiles
from torch.nn.functional import one_hot

import sadcl.functional as F
from tests.ops.test_large_scores import assert_as_good, sscl_case, sscl_grad, supcon_case, supcon_grad
from tests.ptx.cases import KINDS, OFTEN, PRODUCTS, TRITON, Case, cases_of, check, ours, precise
from tests.ptx.launching import ARCH, Executor, executing


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
        pytest.param(case, marks=() if kind in OFTEN[: 1 if op == "mlc" else None] else pytest.mark.slow, id=str(case))
        for op in TRITON
        for kind in kinds_of(op)
        for case in cases_of(op, kind)
    ],
)
def test_at_the_edges_of_its_tiles(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("op", TRITON)
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_bits_do_not_depend_on_the_order_of_warps_and_blocks(op: str, kind: str) -> None:
    """Nor on which lane of a warp is first, where no barrier of the warp stands between two of them.

    But for MLC's radial sums: Triton fuses a product into the first step of a reduction, so that two lanes that store
    the same sum differ in its last bit, and PTX does not say which of them stays.
    """
    orders = [{}, {"order": 1}, {"order": 5}, *([] if op == "mlc" else [{"strict_warps": True}])]
    for case in (case for case in cases_of(op, kind) if case.processors):
        x, found = case.inputs(), list[list[torch.Tensor]]()
        for options in orders:
            with precise(case), executing(Executor(options), case.processors) as executor:
                found.append(ours(op, x, executor)[0])
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", other_tiles(), ids=str)
def test_with_every_tile_of_the_table(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("norm", [5.0, 640.0])
def test_long_features(norm: float) -> None:
    """Where scores are large the softmax hangs on the backward's making the forward's very bits again."""
    x, labels, truth, allowed = supcon_case(norm, 20)
    with executing():
        assert_as_good(supcon_grad(x, labels, "triton"), truth, allowed)
    rows = x.clone().requires_grad_()
    options = {"weighting": "any", "temperature": 0.07, "base_temperature": None, "normalize": False}
    with executing():
        loss = F.multilabel_supcon_loss(rows, one_hot(labels), **options, reduction="sum", backend="triton")
        (grad,) = torch.autograd.grad(loss, rows)
    assert_as_good(grad.flatten(0, 1), truth, allowed)


@pytest.mark.parametrize("formulation", ["paper", "released"])
def test_small_temperatures(formulation: str) -> None:
    x, labels, truth, allowed = sscl_case(0.001, formulation, 8)
    with executing():
        assert_as_good(sscl_grad(x, labels, 0.001, formulation, "triton"), truth, allowed)
