"""ZLPR and the two-way loss: every backend against the float64 oracles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sadcl import functional as F
from sadcl.testing import RAGGED, layouts, make_features, make_labels, poisoned_allocations, value_and_grads
from tests.here import backends_here

LOSSES: dict[str, Callable[..., Any]] = {"zlpr": F.zlpr_loss, "two_way": F.two_way_loss}
CASES = [
    pytest.param(name, *given.values, marks=given.marks, id=f"{name}-{given.values[0]}")
    for name in LOSSES
    for given in backends_here(name)
]
WITH_ORACLE = [*CASES, *(pytest.param(name, "reference", id=f"{name}-reference") for name in LOSSES)]


def each(name: str, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """All elements of ``reduction="none"`` in one vector."""
    got = LOSSES[name](logits, labels, reduction="none", **options)
    return torch.cat(got) if isinstance(got, tuple) else got


@pytest.mark.parametrize("name, backend", CASES)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("size", [(5, 7), (33, 100), (257, 3), (2, 1500), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_the_oracle(size: tuple[int, int], pattern: str, dtype: torch.dtype, name: str, backend: str) -> None:
    x, labels = 3 * make_features(*size, dtype=dtype), make_labels(*size, pattern)
    upstream = torch.rand(size[0] if name == "zlpr" else sum(size), dtype=torch.float64)
    narrow = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
    with poisoned_allocations():
        got = value_and_grads(lambda x: each(name, x, labels, backend=backend), x, upstream=narrow)
    want = value_and_grads(lambda x: each(name, x, labels, backend="reference"), x.double(), upstream=upstream)
    digits = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert got[0].dtype == narrow.dtype and got[1].dtype == dtype
    torch.testing.assert_close(got[0].double(), want[0], rtol=max(1e-13, min(digits, 1e-6)), atol=min(digits, 1e-6))
    torch.testing.assert_close(got[1].double(), want[1], rtol=2 * digits, atol=min(digits, 1e-6))


@pytest.mark.parametrize("name, backend", WITH_ORACLE)
def test_reductions_and_weights(name: str, backend: str) -> None:
    x, labels = make_features(6, 5), make_labels(6, 5, "ignored")
    run = functools.partial(LOSSES[name], x, labels, backend=backend)
    of_sample, of_class = torch.rand(6), torch.rand(5)
    if name == "zlpr":
        rows = run(reduction="none")
        torch.testing.assert_close(run(), rows.mean())
        torch.testing.assert_close(run(reduction="sum"), rows.sum())
        torch.testing.assert_close(run(sample_weight=of_sample), (rows * of_sample).mean())
        return
    rows, columns = run(reduction="none")
    has, present = (labels == 1).any(dim=1), (labels == 1).any(dim=0)
    assert (rows[~has] == 0).all() and (columns[~present] == 0).all()
    torch.testing.assert_close(run(), rows.sum() / has.sum() + columns.sum() / present.sum())
    torch.testing.assert_close(run(reduction="sum"), rows.sum() + columns.sum())
    weighted = (rows * of_sample).sum() / has.sum() + (columns * of_class).sum() / present.sum()
    torch.testing.assert_close(run(sample_weight=of_sample, class_weight=of_class), weighted)


@pytest.mark.parametrize("name, backend", WITH_ORACLE)
def test_equations(name: str, backend: str) -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    labels = torch.tensor([[1, 0, 0], [0, -1, 1]])
    got = each(name, x, labels, backend=backend)
    e = torch.exp
    if name == "zlpr":
        want = [
            (1 + e(x[0, 1]) + e(x[0, 2])).log() + (1 + e(-x[0, 0])).log(),
            (1 + e(x[1, 0])).log() + (1 + e(-x[1, 2])).log(),
        ]
    else:

        def soft(negative: Tensor, positive: Tensor) -> Tensor:
            return torch.nn.functional.softplus(e(negative).sum().log() + 4 * e(-positive / 4).sum().log())

        want = [soft(x[0, 1:], x[0, :1]), soft(x[1, :1], x[1, 2:])]
        want += [soft(x[1:, 0], x[:1, 0]), torch.zeros((), dtype=torch.float64), soft(x[:1, 2], x[1:, 2])]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("name, backend", WITH_ORACLE)
@pytest.mark.parametrize("held", [float("nan"), float("inf"), 1e4])
def test_ignored_places_are_seen_by_nobody(held: float, name: str, backend: str) -> None:
    x, labels = make_features(6, 5), make_labels(6, 5, "ignored")
    run = functools.partial(LOSSES[name], labels=labels, backend=backend)
    want = value_and_grads(run, x)
    got = value_and_grads(run, x.masked_fill(labels == -1, held))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert (got[1][labels == -1] == 0).all()


@pytest.mark.parametrize("name, backend", WITH_ORACLE)
def test_extremes(name: str, backend: str) -> None:
    labels = make_labels(6, 5, "random")
    labels[0, 0] = 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = (1e4 * make_features(6, 5)).to(dtype)
        loss, grad = value_and_grads(lambda x: LOSSES[name](x, labels, backend=backend), x)
        assert loss.isfinite() and grad.isfinite().all()
    x[0, 0] = float("nan")
    rows = each(name, x, labels, backend=backend)
    assert rows[0].isnan() and rows[1:6].isfinite().all()


@pytest.mark.parametrize("name, backend", CASES)
def test_layouts_and_label_dtypes_agree(name: str, backend: str) -> None:
    x, labels = make_features(7, 40), make_labels(7, 40, "ignored")
    want = value_and_grads(lambda x: LOSSES[name](x, labels, backend=backend), x)
    for what, layout in layouts(x):
        got = value_and_grads(lambda x: LOSSES[name](x, labels, backend=backend), layout)
        torch.testing.assert_close(got, want, msg=what)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.float64, torch.bfloat16, torch.float16):
        given = labels.to(dtype).t().contiguous().t()
        got = value_and_grads(lambda x, y=given: LOSSES[name](x, y, backend=backend), x)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name, backend", WITH_ORACLE)
@pytest.mark.parametrize("wrong", [2, 0.5, -2, float("nan")])
def test_other_labels_are_refused(wrong: float, name: str, backend: str) -> None:
    labels = make_labels(6, 5)
    labels[3, 2] = wrong
    for dtype in (torch.float32, torch.float64, *([torch.int64] if wrong in (2, -2) else [])):
        with pytest.raises(ValueError, match=r"labels: expected 0, 1 or -1 \(ignored\), got values"):
            LOSSES[name](make_features(6, 5), labels.to(dtype), backend=backend)
    with pytest.raises(ValueError, match="got values 255"):
        LOSSES[name](make_features(6, 5), torch.full((6, 5), 255, dtype=torch.uint8), backend=backend)


@pytest.mark.parametrize("name", list(LOSSES))
def test_wrong_arguments(name: str) -> None:
    x, labels, run = make_features(6, 5), make_labels(6, 5), LOSSES[name]
    for error, words, args, options in [
        (TypeError, "logits: expected a torch.Tensor", ([1.0], labels), {}),
        (ValueError, "logits: expected shape", (x[0], labels), {}),
        (TypeError, "logits: expected a floating", (x.int(), labels), {}),
        (ValueError, "logits: expected no empty", (x[:0], labels[:0]), {}),
        (ValueError, "labels: expected C=5", (x, labels[:, :4]), {}),
        (TypeError, "labels: expected a real", (x, labels.to(torch.complex64)), {}),
        (ValueError, "reduction: expected one of", (x, labels), {"reduction": "released"}),
        (ValueError, "sample_weight: expected B=6", (x, labels), {"sample_weight": torch.ones(5)}),
        (RuntimeError, "backend='triton'", (x, labels), {"backend": "triton"}),
    ]:
        with pytest.raises(error, match=words):
            run(*args, **options)
    if name == "two_way":
        with pytest.raises(ValueError, match="positive_temperature: expected a finite number > 0, got 0"):
            run(x, labels, positive_temperature=0)
        with pytest.raises(TypeError, match="negative_temperature: expected a number"):
            run(x, labels, negative_temperature="1")


@pytest.mark.parametrize("name, backend", CASES)
@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 40), c=st.integers(1, 90), pattern=st.sampled_from(RAGGED), scale=st.sampled_from([0.1, 3.0, 1e3])
)
def test_any_problem(name: str, backend: str, b: int, c: int, pattern: str, scale: float) -> None:
    x, labels = scale * make_features(b, c, dtype=torch.float64), make_labels(b, c, pattern)
    got, want = (
        value_and_grads(lambda x, w=which: LOSSES[name](x, labels, backend=w), x) for which in (backend, "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_instruction_set_and_number_of_threads(name: str, every_isa: str, threads: int) -> None:
    """Against the oracle; and the same bits for any number of threads."""
    x, labels = 2 * make_features(150, 203), make_labels(150, 203, "ignored")
    got = value_and_grads(lambda x: LOSSES[name](x, labels, backend="cpp"), x)
    want = value_and_grads(lambda x: LOSSES[name](x, labels, backend="reference"), x.double())
    torch.testing.assert_close([t.double() for t in got], list(want), rtol=2e-6, atol=1e-7)
    torch.set_num_threads(1)
    alone = value_and_grads(lambda x: LOSSES[name](x, labels, backend="cpp"), x)
    torch.testing.assert_close(alone, got, rtol=0, atol=0)
