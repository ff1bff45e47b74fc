"""Asymmetric loss: every backend against the float64 oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadcl import functional as F
from sadcl.testing import make_labels, poisoned_allocations, value_and_grads
from tests.here import backends_here

BACKENDS = backends_here("asl")
CONSTANTS = [
    {"gamma_neg": 4, "gamma_pos": 1, "clip": 0.05, "eps": 1e-8},
    {"gamma_neg": 4, "gamma_pos": 0, "clip": 0.0, "eps": 1e-5},
    {"gamma_neg": 0, "gamma_pos": 0, "clip": 0.0, "eps": 1e-5},
    {"gamma_neg": 0.5, "gamma_pos": 2.5, "clip": 0.2, "eps": 1e-8},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_matches_the_oracle(soft: bool, detach: bool, constants: dict[str, float], backend: str) -> None:
    labels = make_labels(13, 37, "ignored")
    if soft:
        labels = torch.where(labels == -1, labels, torch.rand(13, 37))
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-11)):
        logits = (4 * torch.randn(13, 37)).to(dtype)
        upstream = torch.randn(13, 37).to(dtype)
        run = functools.partial(F.asymmetric_loss, detach_focal_weight=detach, reduction="none", **constants)
        with poisoned_allocations():
            got = value_and_grads(lambda x: run(x, labels.to(dtype), backend=backend), logits, upstream=upstream)
        want = value_and_grads(
            lambda x: run(x, labels.double(), backend="reference"), logits.double(), upstream=upstream.double()
        )
        for g, w in zip(got, want, strict=True):
            assert (g[labels == -1] == 0).all()
            torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constants", CONSTANTS[:3])
def test_gradcheck(constants: dict[str, float], backend: str) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: F.asymmetric_loss(x, labels, backend=backend, **constants), logits)


@pytest.mark.parametrize("backend", backends_here("asl", "reference"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("constants", CONSTANTS)
def test_finite_at_any_logit(constants: dict[str, float], dtype: torch.dtype, backend: str) -> None:
    logits = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 65.0, 100.0, 1e4], dtype=dtype).repeat(3, 1)
    labels = torch.tensor([[0.0], [1.0], [0.3]]).expand(3, 8)
    run = functools.partial(F.asymmetric_loss, labels=labels, reduction="none", **constants)
    value, grad = value_and_grads(
        lambda x: run(x, backend=backend),
        logits,
        upstream=torch.ones(3, 8).to(torch.float64 if dtype == torch.float64 else torch.float32),
    )
    assert value.isfinite().all() and grad.isfinite().all() and grad.dtype == dtype
    want = run(logits.double(), backend="reference")
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_and_weights(backend: str) -> None:
    logits, labels = torch.randn(6, 5), make_labels(6, 5, "ignored")
    class_weight, sample_weight = torch.rand(5), torch.rand(6)
    run = functools.partial(F.asymmetric_loss, logits, labels, backend=backend)
    elements = run(reduction="none")
    torch.testing.assert_close(run(), elements.sum())
    torch.testing.assert_close(run(reduction="mean"), elements.sum() / (labels != -1).sum())
    torch.testing.assert_close(run(reduction="released"), elements.sum() / 30 * 1000)
    weighted = elements * class_weight * sample_weight[:, None]
    for reduction, want in (("none", weighted), ("sum", weighted.sum())):
        got = run(reduction=reduction, class_weight=class_weight, sample_weight=sample_weight)
        torch.testing.assert_close(got, want)

    def weighted_sum(x: torch.Tensor, backend: str) -> torch.Tensor:
        return F.asymmetric_loss(x, labels, class_weight=class_weight, sample_weight=sample_weight, backend=backend)

    torch.testing.assert_close(
        value_and_grads(lambda x: weighted_sum(x, backend), logits),
        value_and_grads(lambda x: weighted_sum(x, "reference"), logits),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_label_dtypes(backend: str) -> None:
    logits, labels = torch.randn(7, 6), make_labels(7, 6)
    want = value_and_grads(lambda x: F.asymmetric_loss(x, labels, backend=backend), logits)
    for layout in (logits.t().contiguous().t(), torch.stack([logits, logits], -1)[..., 1]):
        got = value_and_grads(lambda x: F.asymmetric_loss(x, labels, backend=backend), layout)
        torch.testing.assert_close(got, want)
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float64):
        assert torch.equal(F.asymmetric_loss(logits, labels.to(dtype), backend=backend), want[0])
    got = value_and_grads(lambda x: F.asymmetric_loss(x.expand(7, 6), labels, backend=backend), logits[:1])
    torch.testing.assert_close(
        got, value_and_grads(lambda x: F.asymmetric_loss(x.repeat(7, 1), labels, backend=backend), logits[:1])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_values_are_named(backend: str) -> None:
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 1\] or -1 \(ignored\), got -0.5, 1.5"):
        F.asymmetric_loss(torch.zeros(2, 3), torch.tensor([[0, 1.5, 1], [-0.5, 0, 1]]), backend=backend)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma_neg": -1}, "gamma_neg: expected a finite number >= 0, got -1"),
        ({"gamma_pos": float("inf")}, "gamma_pos"),
        ({"clip": 1.0}, r"clip: expected a number in \[0, 1\)"),
        ({"eps": 0.0}, r"eps: expected a number in \(0, 1\)"),
        ({"reduction": "average"}, "reduction: expected one of mean, sum, none, released, got 'average'"),
    ],
)
def test_constants_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.asymmetric_loss(torch.zeros(2, 3), torch.zeros(2, 3), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    gamma_neg=st.floats(0, 6),
    gamma_pos=st.floats(0, 6),
    clip=st.sampled_from([0.0, 0.05, 0.5]),
    scale=st.floats(0.1, 12),
    detach=st.booleans(),
)
def test_any_constants(
    backend: str, gamma_neg: float, gamma_pos: float, clip: float, scale: float, detach: bool
) -> None:
    logits, labels = scale * torch.randn(5, 9, dtype=torch.float64), torch.rand(5, 9, dtype=torch.float64)
    run = functools.partial(
        F.asymmetric_loss, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip, detach_focal_weight=detach
    )
    got = value_and_grads(lambda x: run(x, labels, backend=backend), logits)
    want = value_and_grads(lambda x: run(x, labels, backend="reference"), logits)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 15, 16, 17, 47, 64, 1023, 1025])
def test_negatives_under_the_margin_among_others(classes: int, backend: str) -> None:
    """They are 0 and may be left out; those at the margin, ignored ones and NaN may not."""
    clip, generator = 0.05, torch.Generator().manual_seed(classes)
    edge = torch.tensor(clip / (1 - clip)).log()
    logits = edge + torch.randn(5, classes, generator=generator).sign() * 10 ** (
        4 * torch.rand(5, classes, generator=generator) - 4
    )
    logits[0] = -20.0
    logits[1, ::7], logits[1, 3::11] = float("-inf"), 1e4
    labels = (torch.rand(5, classes, generator=generator) < 0.02).float()
    labels[2, ::5] = -1
    logits[2, ::5] = float("nan")
    run = functools.partial(F.asymmetric_loss, labels=labels, clip=clip, reduction="none")
    ones = torch.ones(5, classes)
    got = value_and_grads(lambda x: run(x, backend=backend), logits, upstream=ones)
    want = value_and_grads(lambda x: run(x, backend="reference"), logits.double(), upstream=ones.double())
    for ours, truth in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=2e-5, atol=1e-8)
    total = F.asymmetric_loss(logits, labels, clip=clip, backend=backend)
    torch.testing.assert_close(total.double(), want[0].sum().double(), rtol=1e-6, atol=1e-12)
    logits[3, classes // 2] = float("nan")
    labels[3, classes // 2] = 0
    assert F.asymmetric_loss(logits, labels, clip=clip, backend=backend).isnan()
