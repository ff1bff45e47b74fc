"""The error budget itself: wide enough for any order of summation, too narrow for a fault, the same on every host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sadcl import reference
from sadcl.reference.label_attention import label_attention
from sadcl.testing import (
    BUDGET,
    Budget,
    Rounded,
    assert_within_budget,
    error_budgets,
    largest_of_rows,
    make_features,
    make_labels,
    value_and_grads,
)

UNIT = 2.0**-24
pytestmark = pytest.mark.budget
Narrow = Callable[[Tensor], Tensor]
Results = Callable[
    [Narrow], Sequence[Tensor]
]  # values and gradients; Narrow is what a careless kernel does to an operand


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def products() -> Results:
    """Rows of a matrix product, one of which cancels."""
    a, b, upstream = normal(7, 257), normal(257, 33), normal(7, 33)
    a[5, 1::2] = -a[5, 0:-1:2]
    b[1::2] = b[0:-1:2] + 1e-4 * b[1::2]
    return lambda narrow: value_and_grads(lambda a, b: narrow(a) @ b, a, b, upstream=upstream)


def attention() -> Results:
    tensors, upstream = (
        [normal(3, 24), normal(2, 9, 24), normal(72, 24) / 5, normal(72), normal(24, 24) / 5],
        normal(2, 3, 24),
    )
    return lambda narrow: value_and_grads(
        lambda query, *rest: label_attention(narrow(query), *rest, None, 2)[0], *tensors, upstream=upstream
    )


def sscl() -> Results:
    x, labels, upstream = make_features(6, 2, 5, 37, dtype=torch.float64), make_labels(6, 5), normal(6, 2, 5)
    return lambda narrow: value_and_grads(lambda x: reference.sscl(narrow(x), labels, 0.1), x, upstream=upstream)


def pscl() -> Results:
    x, p, labels, upstream = normal(7, 5, 33), normal(5, 33), make_labels(7, 5), normal(5)
    return lambda narrow: value_and_grads(
        lambda x, p: reference.pscl(narrow(x), p, labels, 0.1), x, p, upstream=upstream
    )


def asl() -> Results:
    logits, labels, upstream = 3 * normal(5, 40), make_labels(5, 40), normal(5, 40)
    return lambda narrow: value_and_grads(
        lambda x: reference.asl(narrow(x), labels, 4, 1, 0.05, 1e-8, False), logits, upstream=upstream
    )


PROBLEMS = [products, attention, sscl, pscl, asl]


def exact(x: Tensor) -> Tensor:
    return x


def over(got: Sequence[Tensor], budgets: Sequence[Budget]) -> list[int]:
    """Which of the results the budget refuses."""
    refused = []
    for index, (ours, want) in enumerate(zip(got, budgets, strict=True)):
        try:
            assert_within_budget("x", ours, want)
        except AssertionError:
            refused.append(index)
    return refused


@pytest.mark.parametrize("problem", PROBLEMS)
def test_takes_other_roundings_of_the_same_arithmetic_and_no_wider_one(problem: Callable[[], Results]) -> None:
    results = problem()
    budgets = error_budgets(lambda: results(exact))
    assert not over([want.truth.float() for want in budgets], budgets)
    for seed in range(100, 104):
        with Rounded(torch.float32, seed):
            drawn = results(exact)
        assert not over(drawn, budgets)
    with Rounded(torch.float16, 100):  # three decimal digits fewer
        drawn = results(exact)
    assert over(drawn, budgets) == list(range(len(budgets)))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("digits", [10, 15])
def test_catches_an_operand_that_is_rounded_too_far(digits: int, problem: Callable[[], Results]) -> None:
    """One of the steps alone: 10 binary digits are a tensor core's, 15 are half way to float32's."""

    def narrow(x: Tensor) -> Tensor:
        return x + (x.detach() * 2.0**digits).round() / 2.0**digits - x.detach()

    results = problem()
    refused = over(results(narrow), error_budgets(lambda: results(exact)))
    assert refused == ([0, 2] if problem is products else list(range(len(results(exact)))))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_catches_one_number_of_one_row_three_budgets_off(problem: Callable[[], Results]) -> None:
    results = problem()
    for want in error_budgets(lambda: results(exact)):
        rows = largest_of_rows(want.spread)
        row = int(rows.argmin())
        if not rows[row]:
            continue
        wrong = want.truth.clone()
        wrong.reshape(len(rows), -1)[row, -1] += 3 * BUDGET * rows[row]
        with pytest.raises(AssertionError, match=rf"x: row {row} is off by .*1 of {len(rows)} rows over"):
            assert_within_budget("x", wrong, want)
        wrong.reshape(len(rows), -1)[row, -1] = torch.nan
        assert over([wrong], [want]) == [0]


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_follows_the_terms_that_cancel(size: float) -> None:
    """Sums of ten numbers: the budget is a few roundings of their sizes, whatever is left of them."""
    terms = torch.randn(50, 10, dtype=torch.float64) * size
    terms[:, 9] = 1e-3 - terms[:, :9].sum(1)
    (want,) = error_budgets(lambda: [terms.sum(1, keepdim=True)])
    allowed = BUDGET * want.spread[:, 0] / (UNIT * terms.abs().sum(1))
    assert ((allowed > 1.5) & (allowed < BUDGET)).all()


def test_is_the_size_of_float32_errors() -> None:
    """Of products that torch makes in float32, in whatever order: neither far below the spread nor above it."""
    a, b = torch.randn(40, 300), torch.randn(300, 50)
    (want,) = error_budgets(lambda: [a.double() @ b.double()])
    ratio = ((a @ b).double() - want.truth).square().mean().sqrt() / want.spread.square().mean().sqrt()
    assert 1 / 30 < ratio < 2


def test_is_the_same_for_any_number_of_threads() -> None:
    before, seen, results = torch.get_num_threads(), [], attention()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            seen.append(error_budgets(lambda: results(exact)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*seen, strict=True):
        rows = largest_of_rows(one.spread)
        torch.testing.assert_close(largest_of_rows(three.spread), rows, rtol=1e-6, atol=1e-6 * rows.max().item())


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(NotImplementedError, match=r"linalg_qr.*how it rounds is not known here"):
        error_budgets(lambda: torch.linalg.qr(torch.eye(3, dtype=torch.float64)))


def test_rounding_to_the_results_dtype_is_half_a_unit_of_what_was_stored() -> None:
    """Beside nothing else: a value that is off by a whole unit is refused, its summands' roundings are not."""
    truth = torch.linspace(1, 2, 8, dtype=torch.float64)
    want = Budget(truth, torch.zeros_like(truth), torch.float32)
    assert not over([truth.bfloat16()], [want])
    off = (truth + 2.0**-7).bfloat16()
    assert over([off], [want])
    assert_within_budget("x", off, want, stored=2 * truth)
    assert over([off.double()], [replace(want, truth=truth.bfloat16().double())])
