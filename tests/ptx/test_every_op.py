"""Every kernel of every op, compiled for sm_80 and executed at every edge of its tiles, beside the oracle."""

from __future__ import annotations

import pytest
import torch
from sadcl.kernels import _launch, _tiles
from torch.nn.functional import one_hot

import sadcl.functional as F
from tests.ops.test_large_scores import assert_as_good, sscl_case, sscl_grad, supcon_case, supcon_grad
from tests.ptx.budgets import check, ours
from tests.ptx.cases import KINDS, OFTEN, PRODUCTS, TRITON, Case, cases_of, precise
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


@pytest.mark.parametrize("form", ["plain", "folded"])
def test_label_attention_of_large_scores(form: str) -> None:
    """Where a softmax is certain, rounded scores change nothing: 2 p (1 - p) times what a product may be off."""
    c, length, d = 5, 33, 64
    generator = torch.Generator().manual_seed(0)
    query, pos = 20 * torch.randn(c, d, generator=generator), 20 * torch.randn(length, d, generator=generator)
    memory, upstream = torch.randn(1, length, d, generator=generator), torch.randn(1, c, d, generator=generator)
    eye, leaf = torch.eye(d), memory.clone().requires_grad_()
    with executing():
        projections = eye.repeat(3, 1), None, eye, None
        out, _ = F.label_attention(query, leaf, *projections, 1, memory_pos=pos, form=form, backend="triton")
        (grad,) = torch.autograd.grad(out, leaf, upstream)

    eps, q, v, u = 2.0**-24, query.double(), memory[0].double(), upstream[0].double()
    k = v + pos.double()
    p, a = (q @ k.t() / d**0.5).softmax(dim=1), u @ v.t()
    mean = (p * a).sum(dim=1, keepdim=True)
    long_q, long_k, long_v, long_u = (torch.linalg.vector_norm(t, dim=1) for t in (q, k, v, u))
    moved = 2 * p * (1 - p) * (4 * eps * long_q * long_k.max() / d**0.5)[:, None] + 8 * eps * p
    # Of a slope p_l (a_l - sum_m p_m a_m): what every p and every product may be off.
    slope = moved * (a - mean).abs() + p * (moved * a.abs()).sum(dim=1, keepdim=True)
    slope += 8 * eps * p * (1 - p) * long_u[:, None] * long_v.max()
    assert_as_good(out.detach()[0], p @ v, moved @ long_v)
    truth = p.t() @ u + (p * (a - mean)).t() @ q / d**0.5
    allowed = moved.t() @ long_u + slope.t() @ long_q / d**0.5
    assert_as_good(grad[0], truth, allowed + torch.finfo(torch.float32).tiny)
