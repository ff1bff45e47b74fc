"""Image-level multi-label losses by CUDA C++, compiled by NVRTC for sm_80 and executed by several blocks that meet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sadcl import functional
from sadcl.cuda import _nvrtc
from sadcl.cuda import mlc as launcher
from sadcl.ops import mlc
from sadcl.ops._library import OPS
from sadcl.testing import make_features, make_labels
from tests.ptx.budgets import check
from tests.ptx.cases import KINDS, Case
from tests.ptx.cuda_cases import (
    SMALL,
    check_miscounted_bits_are_seen,
    check_missing_barriers_of_blocks_are_seen,
    check_missing_order_is_a_race,
    check_most_faults_are_seen,
    results,
    same,
)
from tests.ptx.launching_cuda import executing_cuda

pytestmark = pytest.mark.skipif(_nvrtc.path() is None, reason="NVRTC is not installed")
# Rows of a tile (32) and a word of labels (64), each with a width at an edge of a step (32) or a slice (64).
EDGES = [replace(SMALL, b=b, c=c, d=d) for b, c, d in ((31, 63, 33), (32, 64, 32), (33, 65, 31))]
EDGES += [replace(SMALL, b=b, v=2, c=c, d=d) for b, c, d in ((8, 127, 63), (16, 128, 64), (17, 129, 65))]
OFTEN = [("all", "fp32", 0), ("jaccard", "bf16", 1), ("simdis", "bf16", 2)]
OFTEN_PLANTED = [("fp32", 3), ("bf16", 5)]
NAMES = list(launcher.TAKEN.values())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case("mlc", kind, size, number, processors=3),
            marks=() if (name, kind, place) in OFTEN else pytest.mark.slow,
            id=f"{name}-{kind}-{size.b * size.v}x{size.d}-{size.c}",
        )
        for number, name in launcher.TAKEN.items()
        for kind in ("fp32", "bf16", "fp16")
        for place, size in enumerate(EDGES)
    ],
)
def test_at_the_edges_of_its_tiles(case: Case) -> None:
    executor = check(case, backend="cuda")
    assert [name for name, _ in executor.results] == ["mlc_forward", "mlc_backward"]  # one launch each way


def inputs(weighting: str, labels: Tensor, kind: str = "fp32", keys: int = 0, v: int = 1, **others: Any) -> mlc.Inputs:
    """Features of labels, and keys with some."""
    b, c = labels.shape
    dtype = KINDS[kind][0]
    x = mlc.Inputs(
        make_features(b, v, 24, dtype=dtype), labels, None, None, None, None, None, torch.tensor(0.3),
        mlc.WEIGHTINGS.index(weighting), threshold=0.3, alpha=1.0, beta=1.0, include_batch=True, normalize=True, keep=0,
    )  # fmt: skip
    if keys:
        x = x._replace(keys=make_features(keys, 24, dtype=dtype, seed=4), key_labels=make_labels(keys, c, "ignored"))
    return x._replace(**others)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_bits_do_not_depend_on_blocks_nor_on_the_order_of_warps_and_blocks(kind: str) -> None:
    x = inputs("simdis", make_labels(25, 9, "ignored"), kind, keys=11, v=2)
    want = results("mlc", x)
    for processors, options in (
        (1, {}),
        (2, {"order": 1}),
        (5, {"order": 11}),
        (3, {"order": 2, "strict_warps": True}),
    ):
        assert same(want, results("mlc", x, processors, **options)), (processors, options)


@pytest.mark.parametrize("weighting", ["jaccard", "simdis"])
def test_several_rounds_of_weights_change_no_bit(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(weighting, make_labels(40, 9), keys=35)
    want = results("mlc", x)
    monkeypatch.setattr(launcher, "WEIGHTS", 0)  # 32 rows a round
    assert same(want, results("mlc", x, 3, order=3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.bfloat16])
def test_labels_of_every_kind_and_gaps_change_no_bit(dtype: torch.dtype) -> None:
    labels = make_labels(9, 5, "random")
    x = inputs("overlap", labels, keys=6, key_labels=make_labels(6, 5, "random"))
    want = results("mlc", x)
    wide = torch.zeros(9, 3, 5, dtype=dtype)
    wide[:, 1] = labels
    features = torch.full((9, 2, 48), float("nan"))
    features[:, :1, ::2] = x.features
    assert same(want, results("mlc", x._replace(labels=wide[:, 1], features=features[:, :1, ::2])))


PATTERNS = {
    "no label": torch.zeros(5, 3),
    "all ignored": -torch.ones(5, 3),
    "one image": torch.ones(1, 3),
    "all alike": torch.ones(34, 2),
    "nobody alike": torch.eye(6),
}


@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("name", PATTERNS)
def test_ragged_labels(name: str, keys: int) -> None:
    labels = PATTERNS[name]
    for weighting in ("all", "jaccard"):
        more = (
            {"keys": make_features(keys, 24, seed=4), "key_labels": make_labels(keys, labels.shape[1])} if keys else {}
        )
        leaves = [
            make_features(labels.shape[0], 24).requires_grad_(),
            *([more["keys"].requires_grad_()] if keys else []),
        ]
        if keys:
            more["keys"] = leaves[1]
        found = []
        for backend in ("cuda", "reference"):
            with executing_cuda(processors=2):
                loss = functional.multilabel_supcon_loss(
                    leaves[0], labels, weighting=weighting, reduction="sum", backend=backend, **more
                )
                found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_positives_that_weigh_nothing() -> None:
    x = inputs("jaccard", torch.eye(9)[:4], keys=5, key_labels=torch.eye(9)[4:], threshold=0.0)
    assert not any(value.any() for value in results("mlc", x))


def test_what_no_loss_sees_is_not_read() -> None:
    """Rows without a positive among the keys, of which one holds NaN; and keys of a batch that has no positive."""
    labels, key_labels = torch.eye(4)[:, :3], torch.eye(3)
    x = inputs("any", labels, keys=3, key_labels=key_labels, include_batch=False)
    features = x.features.clone()
    features[3] = float("nan")
    loss, grad, grad_keys, _ = results("mlc", x._replace(features=features))
    assert loss[3] == 0 and (grad[3] == 0).all() and grad_keys.isfinite().all() and grad_keys.any()
    nobody = inputs("any", torch.zeros(4, 3), keys=3, key_labels=key_labels)
    nan = torch.full_like(nobody.keys, float("nan"))  # type: ignore[arg-type]
    assert not any(value.any() for value in results("mlc", nobody._replace(keys=nan)))


def test_gradients_that_nobody_wants_are_left_out() -> None:
    x, op = inputs("all", make_labels(9, 3), keys=5), OPS["mlc"]
    assert op.derivative is not None
    want = dict(zip(("features", "keys", "temperature"), results("mlc", x)[1:], strict=True))
    with executing_cuda(processors=2):
        saved = op.derivative.saved_of(op.derivative.tensors_of(x, op.run(x, "cuda")))
        generator = torch.Generator().manual_seed(7)
        grad = (torch.rand((9, 1), generator=generator, dtype=torch.float64) + 0.5).float()
        for name in want:
            grads: Any = op.derivative.grads(op.derivative.upstream(grad), x, saved, (name,), "cuda")
            assert torch.equal(getattr(grads, f"grad_{name}"), want[name])


def test_other_weightings_are_refused_and_not_chosen() -> None:
    labels, features = make_labels(4, 3), make_features(4, 24)
    with executing_cuda(), pytest.raises(ValueError, match=r"weighting: backend='cuda' computes all, any, jaccard"):
        functional.multilabel_supcon_loss(features, labels, weighting="mulsupcon", backend="cuda")
    for weighting in mlc.WEIGHTINGS:
        assert bool(mlc.size_of(features[:, None], None, weighting, False)) == (weighting in NAMES)
    assert mlc.size_of(features[:, None].double(), None, "all", False) == ()


@pytest.mark.parametrize("order", [0, 1])
def test_a_missing_barrier_of_the_grid_is_found(order: int) -> None:
    x = inputs("simdis", make_labels(40, 3, "random"), "bf16", keys=5)
    check_missing_order_is_a_race("mlc", x, order, barriers=6)


@pytest.mark.parametrize("kind, number", OFTEN_PLANTED)
def test_a_missing_barrier_of_a_block_is_found(kind: str, number: int) -> None:
    check_missing_barriers_of_blocks_are_seen(Case("mlc", kind, EDGES[5], number, processors=3))


# Of sets that are equal no backward asks how many classes they have: what it counts there is no fault.
@pytest.mark.parametrize("most", [5, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, number", OFTEN_PLANTED)
def test_a_miscounted_overlap_is_seen(kind: str, number: int, most: int | None) -> None:
    check_miscounted_bits_are_seen(Case("mlc", kind, EDGES[5], number, processors=3), most)


@pytest.mark.parametrize("kind, number", OFTEN_PLANTED)
def test_most_planted_faults_are_seen(kind: str, number: int) -> None:
    case = Case("mlc", kind, EDGES[5], number, processors=3)
    check_most_faults_are_seen([case], per_class=1, unseen=0.15, lost=0.35)


@pytest.mark.slow
@pytest.mark.parametrize("kind, number", [*OFTEN_PLANTED, ("fp32", 0)])
def test_most_of_many_planted_faults_are_seen(kind: str, number: int) -> None:
    cases = [Case("mlc", kind, size, number, processors=3) for size in EDGES[1:6:2]]
    check_most_faults_are_seen(cases, per_class=4, unseen=0.05, lost=0.35)
