"""The CPU extension's ASL: every instruction set and thread count, its exp and log to the last bits."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.testing import layouts, make_labels, poisoned_allocations, value_and_grads

pytestmark = pytest.mark.usefixtures("every_isa")
DEFAULT = {"gamma_neg": 4, "gamma_pos": 1, "clip": 0.05, "eps": 1e-8}
RELEASED = {"gamma_neg": 4, "gamma_pos": 0, "clip": 0.0, "eps": 1e-5, "detach_focal_weight": True}
OTHER = {"gamma_neg": 1.5, "gamma_pos": 0.5, "clip": 0.3, "eps": 1e-8}


def graded(logits: Tensor, labels: Tensor, backend: str = "cpp", **options: object) -> tuple[Tensor, ...]:
    return value_and_grads(lambda x: F.asymmetric_loss(x, labels, backend=backend, **options), logits)


@pytest.mark.parametrize("constants", [DEFAULT, RELEASED, OTHER])
@pytest.mark.parametrize("size", [(1, 1), (3, 63), (2, 100), (5, 1024), (3, 2600), (70, 257)])
def test_sizes_and_threads(size: tuple[int, int], constants: dict[str, float], threads: int) -> None:
    logits, labels = 3 * torch.randn(size), make_labels(*size, "ignored", labels_per_image=2)
    run = functools.partial(F.asymmetric_loss, reduction="none", **constants)
    with poisoned_allocations():
        loss, grad = graded(logits, labels, **constants)
        elements = run(logits, labels, backend="cpp")
    want, want_grad = graded(logits.double(), labels.double(), "reference", **constants)
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=2e-6, atol=1e-6)
    wanted = run(logits.double(), labels.double(), backend="reference")
    torch.testing.assert_close(elements.double(), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_at_any_thread_count(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(40, 1500, dtype=dtype), make_labels(40, 1500)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(graded(logits, labels))
    torch.set_num_threads(before)
    assert all(torch.equal(g, w) for result in results for g, w in zip(result, results[0], strict=True))


def ulps(got: Tensor, want: Tensor) -> float:
    """Largest error of float32 ``got`` in units of the last place of float64 ``want``."""
    unit = torch.nextafter(want.abs().float(), torch.tensor(math.inf)).double() - want.abs().float().double()
    return ((got.double() - want).abs() / unit).max().item()


def test_exp_and_log_are_good_to_the_last_bits() -> None:
    """Bounds of csrc/vmath.h, through constants that leave one function bare."""
    bare = {"gamma_neg": 0, "gamma_pos": 0, "eps": 1e-300, "reduction": "none", "backend": "cpp"}
    x = torch.cat([torch.linspace(-86, 86, 200_001), torch.randn(100_000)])[None]
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    # log(1 + e^-|x|): relative, however small. exp and the quotient before it count too.
    softplus = torch.nn.functional.softplus(-x.double(), threshold=1e9)
    assert ulps(F.asymmetric_loss(x, ones, clip=0, **bare), softplus) < 5
    # The derivative is the sigmoid itself.
    _, grad = value_and_grads(lambda x: F.asymmetric_loss(x, zeros, clip=0, **bare), x, upstream=torch.ones_like(x))
    assert ulps(grad, x.double().sigmoid()) < 4
    # log(q) against the logarithm of the same rounded q, q from 0.5 to 1.
    loss = F.asymmetric_loss(x, zeros, clip=0.5, **bare)
    q = (1 - x.double().sigmoid() + 0.5).clamp(max=1)
    assert ((loss.double() + q.log()).abs() <= 1.5e-7 + 3e-7 * q.log().abs()).all()


def test_powers_of_any_exponent() -> None:
    x = torch.linspace(-30, 30, 4001)[None]
    for gamma in (0.3, 1, 2.5, 3, 16, 17):
        options = {"gamma_neg": gamma, "clip": 0, "eps": 1e-30, "reduction": "none"}
        got = F.asymmetric_loss(x, torch.zeros_like(x), backend="cpp", **options)
        want = F.asymmetric_loss(x.double(), torch.zeros_like(x), backend="reference", **options)
        torch.testing.assert_close(got.double(), want, rtol=3e-6 * max(1.0, gamma), atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layouts_and_dtypes(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(9, 130).to(dtype), make_labels(9, 130)
    want = graded(logits, labels)
    for _, layout in layouts(logits):
        assert all(torch.equal(g, w) for g, w in zip(graded(layout, labels), want, strict=True))
    kinds = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16)
    for kind in (*kinds, torch.float64):
        for layout in (labels.to(kind), labels.to(kind).t().contiguous().t()):
            assert all(torch.equal(g, w) for g, w in zip(graded(logits, layout), want, strict=True)), kind
    expanded = graded(logits[:1].expand(9, -1), labels)
    assert torch.equal(expanded[0], graded(logits[:1].repeat(9, 1), labels)[0])


def test_nan_and_infinity() -> None:
    logits = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, math.nan]])
    for labels in (torch.zeros(1, 5), torch.ones(1, 5), torch.full((1, 5), 0.5), torch.full((1, 5), -1.0)):
        for constants in (DEFAULT, RELEASED, OTHER):
            run = functools.partial(F.asymmetric_loss, labels=labels, reduction="none", **constants)
            loss, grad = value_and_grads(lambda x, run=run: run(x, backend="cpp"), logits, upstream=torch.ones(1, 5))
            want = run(logits.double(), backend="reference")
            torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
            assert grad[0, 1:4].isfinite().all()
            assert grad.isnan().sum() == (2 if labels[0, 0] != -1 else 0)


@pytest.mark.parametrize("wrong", [1 + 1e-12, -1e-300, 2.0**40, math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 50, 99])
def test_a_wrong_label_anywhere_is_found(place: int, wrong: float) -> None:
    labels = torch.zeros(3, 100, dtype=torch.float64)
    labels[1, place] = wrong
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 1\] or -1 \(ignored\), got"):
        F.asymmetric_loss(torch.zeros(3, 100), labels, backend="cpp")
    for value in (255, 2):
        with pytest.raises(ValueError, match=f"got {value}"):
            F.asymmetric_loss(torch.zeros(1, 2), torch.tensor([[0, value]], dtype=torch.uint8), backend="cpp")
