"""The CPU extension's PSCL: every instruction set and thread count, mixed dtypes, views of a larger tensor."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.testing import RAGGED, layouts, make_features, make_labels, poisoned_allocations, value_and_grads

pytestmark = pytest.mark.usefixtures("every_isa")


def graded(x: Tensor, p: Tensor, labels: Tensor, backend: str = "cpp", **options: object) -> tuple[Tensor, ...]:
    tau = torch.tensor(0.2, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return value_and_grads(
        lambda x, p, t: F.prototype_contrastive_loss(x, p, labels, temperature=t, backend=backend, **options), x, p, tau
    )


@functools.cache
def case(size: tuple[int, ...], pattern: str, formulation: str) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Features, prototypes, labels, and what the oracle says of them."""
    x, p, labels = make_features(*size), make_features(*size[1:], seed=5), make_labels(*size[:2], pattern)
    return x, p, labels, graded(x.double(), p.double(), labels, "reference", formulation=formulation)


@pytest.mark.parametrize("formulation", F.FORMULATIONS)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("size", [(5, 7, 63), (4, 2, 2100), (9, 13, 257)])
def test_matches_the_oracle(size: tuple[int, ...], pattern: str, formulation: str, threads: int) -> None:
    x, p, labels, want = case(size, pattern, formulation)
    with poisoned_allocations():
        got = graded(x, p, labels, formulation=formulation)
    for name, g, w in zip(("loss", "features", "prototypes", "temperature"), got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2e-6, atol=1e-7 * w.abs().max().item() + 1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layouts_dtypes_and_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    views = make_features(6, 2, 9, 300, dtype=dtype)
    x, p, labels = views[:, 1].clone(), make_features(9, 300, seed=3, dtype=dtype), make_labels(6, 9)
    want = graded(x, p, labels)
    assert want[1].dtype == dtype
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for layout in (views[:, 1], *(layout for _, layout in layouts(x))):
            assert all(torch.equal(g, w) for g, w in zip(graded(layout, p, labels), want, strict=True))
        for _, layout in layouts(p):
            assert all(torch.equal(g, w) for g, w in zip(graded(x, layout, labels), want, strict=True))
    torch.set_num_threads(before)


def test_expanded_features() -> None:
    x, p, labels = make_features(1, 5, 40), make_features(5, 40, seed=2), make_labels(4, 5)
    got = graded(x.expand(4, 5, 40), p, labels)
    want = graded(x.repeat(4, 1, 1), p, labels)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_ignored_rows_are_never_read() -> None:
    x, p, labels = make_features(6, 5, 70), make_features(5, 70, seed=2), make_labels(6, 5, "ignored")
    want = graded(x, p, labels)
    x[labels == -1] = torch.nan
    got = graded(x, p, labels)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert (got[1][labels == -1] == 0).all()


def test_a_bad_temperature_is_named() -> None:
    x, p, labels = make_features(2, 3, 4), make_features(3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got -1"):
        F.prototype_contrastive_loss(x, p, labels, temperature=torch.tensor(-1.0), backend="cpp")
