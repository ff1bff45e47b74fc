"""SSCL by CUDA C++, compiled by NVRTC for sm_80 and executed by several blocks that meet, beside the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sadcl.cuda import _nvrtc
from sadcl.cuda import sscl as launcher
from sadcl.ops import compact, sscl
from sadcl.ops._library import OPS
from sadcl.testing import error_budgets, make_features, make_labels
from sadcl.testing.examples import Size
from tests.ptx.budgets import OnGpu, check, hold, ours, truth
from tests.ptx.cases import KINDS, Case
from tests.ptx.cuda_cases import (
    SMALL,
    check_missing_order_is_a_race,
    check_most_faults_are_seen,
    gaps,
    results,
    same,
)
from tests.ptx.launching_cuda import CudaExecutor, executing_cuda

pytestmark = pytest.mark.skipif(_nvrtc.path() is None, reason="NVRTC is not installed")
# Rows of a tile (32), of a load of the second product (64); width of a step (32), of a slice (64), of 8 warps (256).
EDGES = [replace(SMALL, b=b, d=d) for b, d in ((31, 63), (32, 64), (33, 65), (63, 255), (64, 256), (65, 257))]
EDGES += [replace(SMALL, b=b, d=d, v=2) for b, d in ((8, 31), (16, 32), (17, 33))]
MANY = [replace(SMALL, b=100, v=2, d=130), replace(SMALL, b=130, d=70), replace(SMALL, b=5, v=2, d=1100)]
PAPER, RELEASED = 0, 1


def case_of(kind: str, size: Size, number: int, processors: int = 3) -> Case:
    return Case("sscl", kind, size, number, processors=processors)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case_of(kind, size, number), marks=pytest.mark.slow if slow else (), id=f"{kind}-{size.b * size.v}"
                     f"x{size.d}-{'released' if number else 'paper'}")
        for kind in ("bf16", "fp32", "fp16")
        for number in (PAPER, RELEASED)
        for size in (*EDGES, *MANY)
        for slow in [size in MANY or (kind == "fp16") != (size == EDGES[5]) or (number == RELEASED and size.b > 33)]
    ],
)  # fmt: skip
def test_at_the_edges_of_its_tiles(case: Case) -> None:
    executor = check(case, backend="cuda")
    assert [name for name, _ in executor.results] == ["sscl_forward", "sscl_backward"]  # one launch each way


def inputs(labels: Tensor, v: int = 1, d: int = 40, kind: str = "bf16", **others: Any) -> sscl.Inputs:
    """Features of labels ``[B, C]``."""
    pairs, class_ptr, _ = compact.compact(labels, None, "torch")
    features = make_features(*labels.shape[:1], v, labels.shape[1], d, dtype=KINDS[kind][0])
    x = sscl.Inputs(features, pairs, class_ptr, torch.tensor(0.3), normalize=True, released=False, keep=0)
    return x._replace(**others)


LABELS = {
    "none active": torch.zeros(5, 3),
    "one active": torch.eye(3)[:, :2] * torch.tensor([1.0, 0.0]),
    "all of one class": torch.ones(40, 1),
    "each class a row": torch.eye(35),
    "all active": torch.ones(12, 3),
    "many classes": make_labels(3, 300, "random"),
}


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_ragged_labels(name: str, released: bool) -> None:
    x = inputs(LABELS[name], released=released, kind="fp32")
    with executing_cuda(processors=3) as executor:
        got, names, upstream = ours("sscl", x, executor, "cuda")
    function = lambda: truth("sscl", x, [u.double() for u in upstream])  # noqa: E731
    hold(case_of("fp32", SMALL, 0), got, names, error_budgets(function, torch.float32, rounding=OnGpu))
    if name == "none active":
        assert not any(value.any() for value in got)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_bits_do_not_depend_on_blocks_nor_on_the_order_of_warps_and_blocks(kind: str) -> None:
    x = inputs(make_labels(30, 3, "random"), v=2, kind=kind)
    want = results("sscl", x)
    for processors, options in ((1, {}), (2, {"order": 1}), (4, {"order": 5}), (7, {"order": 11}),
                                (3, {"strict_warps": True}), (5, {"order": 2, "strict_warps": True})):  # fmt: skip
        assert same(want, results("sscl", x, processors, **options)), (processors, options)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_several_rounds_of_weights_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(make_labels(50, 3, "random"), v=2, kind=kind)
    want = results("sscl", x)
    monkeypatch.setattr(launcher, "WEIGHTS", 0)  # 32 rows a round
    assert same(want, results("sscl", x, 3, order=3))


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_strides_and_what_stands_in_inactive_places_change_no_bit(kind: str) -> None:
    labels = make_labels(14, 5, "ignored")
    x = inputs(labels, v=2, kind=kind)
    hidden = torch.where((labels == 1)[:, None, :, None], x.features, float("nan"))
    want = results("sscl", x)
    for features in (gaps(hidden), hidden.transpose(1, 2).contiguous().transpose(1, 2)):
        assert same(want, results("sscl", x._replace(features=features)))


def test_an_expanded_upstream_gradient_and_a_tiny_one() -> None:
    x, op = inputs(make_labels(12, 3, "random"), kind="fp16"), OPS["sscl"]
    assert op.derivative is not None
    found = []
    with executing_cuda(processors=2):
        saved = op.derivative.saved_of(op.derivative.tensors_of(x, op.run(x, "cuda")))
        for factor in (1.0, 2.0**-14):  # whose weights float16 has no numbers for
            grad = torch.tensor(factor).expand(12, 1, 3)
            grads = op.derivative.grads(op.derivative.upstream(grad), x, saved, ("features", "temperature"), "cuda")
            found.append([g.float() / factor for g in grads])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_lengths_that_float32_cannot_square(length: float) -> None:
    x = inputs(make_labels(12, 3, "random"), kind="fp32")
    plain, scaled = results("sscl", x), results("sscl", x._replace(features=x.features * length))
    torch.testing.assert_close(plain[0], scaled[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain[1], scaled[1] * length, rtol=1e-4, atol=1e-6)


def test_a_zero_row_has_no_gradient_and_a_nan_spreads() -> None:
    x = inputs(torch.ones(6, 2), kind="fp32")
    features = x.features.clone()
    features[2] = 0
    loss, grad, _ = results("sscl", x._replace(features=features))
    assert loss.isfinite().all() and (grad[2] == 0).all() and grad[1].any()
    features[3, 0, 1, 4] = float("nan")
    assert results("sscl", x._replace(features=features))[0].isnan().all()


def fused(x: sscl.Inputs, labels: Tensor, capacity: int | None = None, **options: Any) -> tuple[Any, Any]:
    """Compaction and forward in one launch, into new buffers."""
    with executing_cuda(CudaExecutor(options), 3) as executor:
        active = compact.allocate(compact.Inputs(labels, capacity))
        x = x._replace(pairs=active.pairs, class_ptr=active.class_ptr)
        out = sscl.allocate(x)
        launcher.fused(labels, x, active.target, out)
        executor.require_written([*active, *out])
        assert len(executor.results) == 1
    return active, out


@pytest.mark.parametrize(
    "b, c, dtype",
    [
        (30, 3, torch.float32),
        (9, 33, torch.int64),
        (3, 257, torch.bool),
        (40, 1, torch.bfloat16),
        (255, 2, torch.int8),
        (0, 3, torch.int8),
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_compaction_in_the_same_launch(b: int, c: int, dtype: torch.dtype, released: bool) -> None:
    labels = make_labels(b, c, "random" if dtype == torch.bool else "ignored").to(dtype)
    labels[12:] = 0  # few rows
    x = inputs(labels.double(), v=2, d=20, released=released)
    wide = torch.zeros(b, 3, c, dtype=dtype)
    wide[:, 1] = labels
    active, out = fused(x, wide[:, 1], order=3)
    assert same(list(active), list(compact.compact(labels.double(), None, "torch")))
    with executing_cuda(processors=2):
        want = OPS["sscl"].run(x, "cuda")
    assert same(list(out), list(want))


def test_more_rows_than_there_is_room_for_are_nan() -> None:
    labels = torch.ones(6, 3)
    active, out = fused(inputs(labels), labels, capacity=7)
    assert active.overflowed and out.row_loss.isnan().sum() == 7 and out.lse[1].isnan().all()
    few = inputs(labels)._replace(pairs=active.pairs, class_ptr=active.class_ptr)
    loss, grad, _ = results("sscl", few)
    assert loss.isnan().sum() == 7 and grad.isnan().any()
    with pytest.raises(ValueError, match="labels: a fused launch takes at most 8192 pairs of 2048 classes"):
        fused(inputs(torch.zeros(1, 2049)), torch.zeros(1, 2049))


def test_float64_is_refused() -> None:
    with executing_cuda(), pytest.raises(ValueError, match=r"features: backend='cuda' takes float32.*float64"):
        OPS["sscl"].run(inputs(torch.ones(2, 2), kind="fp64"), "cuda")


def test_the_barrier_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the next launch, and a replayed graph, need nothing to be zeroed."""
    state = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launcher, "counters", lambda _: state)
    x = inputs(make_labels(30, 3, "random"))
    want = results("sscl", x, 5)
    for processors, weights in ((2, 1 << 20), (4, 0)):
        monkeypatch.setattr(launcher, "WEIGHTS", weights)
        assert same(want, results("sscl", x, processors))
        assert not state.any()


@pytest.mark.parametrize("order", [0, 1])  # a drawn one may have block 0 come last, which then misses nothing
def test_a_missing_barrier_of_the_grid_is_found(order: int) -> None:
    x = inputs(make_labels(40, 3, "random"), v=2, d=20)
    check_missing_order_is_a_race("sscl", x, order, barriers=5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("number", [PAPER, RELEASED])
def test_most_planted_faults_are_seen(kind: str, number: int) -> None:
    cases = [case_of(kind, size, number) for size in (*EDGES[2:9:2], MANY[1])]
    check_most_faults_are_seen(cases, per_class=4, unseen=0.05, lost=0.35)
