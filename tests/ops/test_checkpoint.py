"""Activation checkpointing (without reentrant autograd, also selective): gradients equal to the last bit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from calls import CALLS, cases
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sadcl
from sadcl.functional.linear import SWITCH
from sadcl.linear import Linear
from sadcl.testing import make_features, make_labels
from tests.here import backends_here

B, V, C, D, L = 5, 2, 4, 8, 6
LABELS = make_labels(B, C)


def _policy(keep: Callable[[str], bool]) -> object:
    def decide(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keep(str(op)) else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, decide)


HOW = {
    "all recomputed": {},
    "ours kept": {"context_fn": _policy(lambda op: op.startswith("sadcl"))},
    "products kept": {"context_fn": _policy(lambda op: op.startswith(("aten.mm", "aten.addmm", "aten.bmm")))},
}


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], how: dict[str, object] | None) -> list[Tensor]:
    """The value and the gradients of ``function(*inputs)``, whole or checkpointed."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(0)  # dropout
    value = function(*leaves) if how is None else checkpoint(function, *leaves, use_reentrant=False, **how)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros(0) if grad is None else grad for grad in grads)]


def assert_equal_bits(function: Callable[..., Tensor], inputs: list[Tensor], how: str) -> None:
    want, got = gradients(function, inputs, None), gradients(function, inputs, HOW[how])
    assert sum(bool(grad.abs().sum() > 0) for grad in want[1:]) > 0
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name, backend", cases(reference=True))
def test_every_function(name: str, backend: str, how: str) -> None:
    call = CALLS[name]
    tensors = call.make()

    def run(*values: Tensor) -> Tensor:
        return call.run(backend, **{**tensors, **dict(zip(call.derived, values, strict=True))})

    assert_equal_bits(run, [tensors[field] for field in call.derived], how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("backend", backends_here("label_attention"))
@pytest.mark.parametrize("form", ["plain", "folded"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shared", [True, False])
def test_label_attention(form: str, backend: str, dropout: float, shared: bool, how: str) -> None:
    module = sadcl.LabelAttention(D, 2, dropout, form=form, backend=backend)
    padded = make_labels(B, L).bool()

    def attend(query: Tensor, memory: Tensor, pos: Tensor, *parameters: Tensor) -> Tensor:
        names = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        out, weights = torch.func.functional_call(module, names, (query, memory, pos, padded, True))
        return (out * torch.linspace(0, 1, D)).sum() + weights.square().sum()

    query = make_features(C, D) if shared else make_features(B, C, D)
    assert_equal_bits(attend, [query, make_features(B, L, D), make_features(L, D), *module.parameters()], how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("backend", backends_here("group_classifier"))
def test_group_classifier(backend: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_BACKEND", backend)
    module = sadcl.head.GroupClassifier(C, D)

    def classify(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (h,)).square().sum()

    assert_equal_bits(classify, [make_features(B, C, D), *module.parameters()], how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("product", ["cpp", "torch"])
def test_linear(product: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sadcl.backends()["cpp"].available and product == "cpp":
        pytest.skip("the CPU extension is not built")
    monkeypatch.setenv(SWITCH, product)
    module = Linear(D, 3)

    def apply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,)).square().sum()

    assert_equal_bits(apply, [make_features(B, C, D), *module.parameters()], how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_head_and_losses(backend: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole training step, its head checkpointed: the dropout masks are drawn again as they were."""
    if not sadcl.backends()[backend].available:
        pytest.skip(sadcl.backends()[backend].reason)
    monkeypatch.setenv("SADCL_BACKEND", backend)
    head = sadcl.SADCLHead(D, C, 8, 2, 16, 1, 2, 4, (2, 3), dropout=0.3, bank_slots=B)
    loss = sadcl.DualContrastiveLoss()

    def step(how: dict[str, object] | None) -> list[Tensor]:
        torch.manual_seed(0)
        head.zero_grad()
        x = make_features(B, D, 2, 3).requires_grad_()
        out = head(x) if how is None else checkpoint(head, x, use_reentrant=False, **how)
        total = loss(out.embeddings, out.bank_embeddings, out.prototype_embeddings, LABELS, out.logits).total
        total.backward()
        return [total.detach(), x.grad, *(p.grad.clone() for p in head.parameters())]

    for got, want in zip(step(HOW[how]), step(None), strict=True):
        assert torch.equal(got, want)
