"""ASL's gradients of soft labels, class weights and sample weights: every backend against the oracle's autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sadcl import AsymmetricLoss
from sadcl import functional as F
from sadcl.testing import make_labels, value_and_grads
from tests.here import backends_here

BACKENDS = backends_here("asl")
B, C = 7, 5
CONSTANTS = [
    {},
    {"gamma_neg": 4, "gamma_pos": 0, "clip": 0.0, "eps": 1e-5},
    {"gamma_neg": 0, "gamma_pos": 0, "clip": 0.0, "eps": 1e-5},
    {"gamma_neg": 0.5, "gamma_pos": 0.25, "clip": 0.2, "eps": 1e-8},  # powers whose own derivative is infinite at 0
    {"gamma_neg": 0.5, "gamma_pos": 2.5, "clip": 0.0, "eps": 0.2},  # a floor that many elements are under
]


def inputs(ignored: bool, dtype: torch.dtype) -> list[Tensor]:
    """Logits, soft labels, class weights and sample weights."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(B, C, generator=generator, dtype=torch.float64)
    labels = torch.rand(B, C, generator=generator, dtype=torch.float64)
    labels[0, :2] = torch.tensor([0.0, 1.0])
    if ignored:
        labels[make_labels(B, C) == 1] = -1
        labels[1, 1] = -1
    weights = torch.linspace(0.5, 2, C), torch.linspace(1, 3, B)
    return [x.to(dtype) for x in (logits, labels, *weights)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "released", "none"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_every_gradient(ignored: bool, detach: bool, reduction: str, constants: dict[str, float], backend: str) -> None:
    def run(backend: str, x: Tensor, y: Tensor, of_class: Tensor, of_sample: Tensor) -> Tensor:
        return F.asymmetric_loss(
            x, y, class_weight=of_class, sample_weight=of_sample, detach_focal_weight=detach, reduction=reduction,
            backend=backend, **constants,
        )  # fmt: skip

    upstream = torch.linspace(-1, 2, B * C, dtype=torch.float64).view(B, C) if reduction == "none" else None
    given = inputs(ignored, torch.float64)
    want = value_and_grads(lambda *x: run("reference", *x), *given, upstream=upstream)
    got = value_and_grads(lambda *x: run(backend, *x), *given, upstream=upstream)
    for name, ours, theirs in zip(("loss", "logits", "labels", "class", "sample"), got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=f"{name}: {ours} {theirs}")
    assert (got[2][given[1] == -1] == 0).all()
    narrow = value_and_grads(
        lambda *x: run(backend, *x),
        *inputs(ignored, torch.float32),
        upstream=None if upstream is None else upstream.float(),
    )
    for ours, theirs in zip(narrow, want, strict=True):
        largest = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6 * largest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone(backend: str) -> None:
    """The loss has a graph whichever of them requires a gradient, and the others get none."""
    given = inputs(True, torch.float64)
    full = value_and_grads(lambda x, y, c, s: F.asymmetric_loss(x, y, class_weight=c, sample_weight=s), *given)[1:]
    for wanted in itertools.product([False, True], repeat=4):
        leaves = [x.clone().requires_grad_(w) for x, w in zip(given, wanted, strict=True)]
        x, y, of_class, of_sample = leaves
        loss = F.asymmetric_loss(x, y, class_weight=of_class, sample_weight=of_sample, backend=backend)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for leaf, grad, asked in zip(leaves, full, wanted, strict=True):
            if asked:
                torch.testing.assert_close(leaf.grad, grad)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_all(backend: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(False, torch.float64)]
    leaves[1].data.clamp_(0.05, 0.95)  # differences must stay in [0, 1]
    assert torch.autograd.gradcheck(
        lambda x, y, c, s: F.asymmetric_loss(x, y, class_weight=c, sample_weight=s, backend=backend), leaves
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_trained_class_weights_of_the_module(backend: str) -> None:
    logits, labels, weight, _ = inputs(True, torch.float32)
    module = AsymmetricLoss(class_weight=torch.nn.Parameter(weight), backend=backend)
    assert [name for name, _ in module.named_parameters()] == ["class_weight"]
    module(logits, labels).backward()
    want = value_and_grads(lambda w: F.asymmetric_loss(logits, labels, class_weight=w, backend="reference"), weight)
    torch.testing.assert_close(module.class_weight.grad, want[1])
