"""Inputs that no address tells: on another device (a ValueError that names it), lazily negated, lazily zero.

The meta device stands in for an accelerator; a kernel that took such a tensor would read from no address at all.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sadcl
from sadcl.bank import MemoryBank
from sadcl.head import GroupClassifier
from sadcl.testing import make_features, make_labels
from tests.here import backends_here

B, C, D, L = 3, 4, 8, 6


def move(module: nn.Module, name: str) -> nn.Module:
    """``module`` with one parameter on meta."""
    owner, _, last = name.rpartition(".")
    part = module.get_submodule(owner)
    setattr(part, last, nn.Parameter(getattr(part, last).detach().to("meta")))
    return module


@pytest.mark.parametrize("backend", backends_here("label_attention", "reference"))
@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_label_attention_with_a_parameter_elsewhere(name: str, backend: str) -> None:
    module = move(sadcl.LabelAttention(D, 2, backend=backend), name)
    with pytest.raises(ValueError, match=f"{name.replace('.', '_')} is on meta but memory is on cpu"):
        module(make_features(C, D), make_features(B, L, D))


@pytest.mark.parametrize("backend", backends_here("label_attention", "reference"))
def test_label_attention_with_an_input_elsewhere(backend: str) -> None:
    module = sadcl.LabelAttention(D, 2, backend=backend)
    given = {
        "query": make_features(C, D),
        "memory": make_features(B, L, D),
        "memory_pos": make_features(L, D),
        "key_padding_mask": torch.zeros(B, L, dtype=torch.bool),
    }
    for name in given:
        with pytest.raises(ValueError, match=rf"{name} is on meta but \w+ is on cpu|is on cpu but {name} is on meta"):
            module(**{**given, name: given[name].to("meta")})
    elsewhere = sadcl.LabelAttention(D, 2, backend=backend).to("meta")
    with pytest.raises(ValueError, match="in_proj_weight is on meta but memory is on cpu"):
        elsewhere(**given)


@pytest.mark.parametrize("backend", backends_here("group_classifier", "reference"))
def test_group_classifier(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_BACKEND", backend)
    for name in ("weight", "bias"):
        module = move(GroupClassifier(C, D), name)
        with pytest.raises(ValueError, match=f"{name} is on meta but features is on cpu"):
            module(make_features(B, C, D))
    module = GroupClassifier(C, D)
    for wrong in (make_features(B, C + 1, D), make_features(B, C, D + 1)):
        with pytest.raises(ValueError, match="features: expected [CE]="):
            module(wrong)
    with pytest.raises(ValueError, match=r"features: expected shape \[B, C, E\]"):
        module(make_features(C, D))
    with pytest.raises(TypeError, match="features: expected a floating point"):
        module(torch.zeros(B, C, D, dtype=torch.int64))
    monkeypatch.delenv("SADCL_BACKEND")
    assert GroupClassifier(C, D).to("meta")(make_features(B, C, D).to("meta")).is_meta


@pytest.mark.parametrize("backend", backends_here("bank"))
def test_memory_bank(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_BACKEND", backend)
    given = {
        "label_features": make_features(B, C, D),
        "scores": make_features(B, C, 1)[..., 0],
        "labels": make_labels(B, C),
    }
    bank = MemoryBank(B, C, D)
    for name in given:
        with pytest.raises(ValueError, match=f"{name} is on meta but slots is on cpu"):
            bank.update(**{**given, name: given[name].to("meta")})
    with pytest.raises(ValueError, match="label_features is on cpu but slots is on meta"):
        MemoryBank(B, C, D).to("meta").update(**given)
    assert not bank.slots.any()


def test_head() -> None:
    head = sadcl.SADCLHead(D, C, D, 2, 8, 1, 1, 4, (2, 3))
    with pytest.raises(ValueError, match="queries is on cpu but feature_map is on meta"):
        head(torch.empty(B, D, 2, 3, device="meta"))
    with pytest.raises(ValueError, match="queries is on meta but feature_map is on cpu"):
        head.to("meta")(torch.zeros(B, D, 2, 3))


def lazy(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a view that negates when it is read."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


def zero(x: torch.Tensor) -> torch.Tensor:
    """Zeros that are nowhere."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


@pytest.mark.parametrize("make", [lazy, zero])
@pytest.mark.parametrize("backend", backends_here("label_attention", "reference"))
@pytest.mark.parametrize("form", ["plain", "folded"])
def test_lazy_inputs_of_label_attention(form: str, backend: str, make) -> None:
    module = sadcl.LabelAttention(D, 2, form=form, backend=backend)
    given = [make_features(C, D), make_features(B, L, D), make_features(L, D)]
    for place in range(3):
        mixed = [*given]
        mixed[place] = make(given[place])
        solid = [x.clone() if place == i else x for i, x in enumerate(mixed)]
        assert torch.equal(module(*mixed)[0], module(*solid)[0])
        upstream = make_features(B, C, D)
        grads = [torch.autograd.grad(module(*x)[0], module.parameters(), make(upstream)) for x in (mixed, solid)]
        wanted = torch.autograd.grad(module(*solid)[0], module.parameters(), make(upstream).clone())
        for a, b, c in zip(*grads, wanted, strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)


@pytest.mark.parametrize("make", [lazy, zero])
@pytest.mark.parametrize("backend", backends_here("group_classifier", "reference"))
def test_lazy_inputs_of_classifier_and_bank(backend: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_BACKEND", backend)
    module, features = GroupClassifier(C, D), make_features(B, C, D)
    assert torch.equal(module(make(features)), module(make(features).clone()))
    given = {"label_features": features, "scores": make_features(B, C, 1)[..., 0], "labels": make_labels(B, C)}
    for name in given:
        banks = [MemoryBank(B, C, D), MemoryBank(B, C, D)]
        for bank, x in zip(banks, (make(given[name]), make(given[name]).clone()), strict=True):
            bank.slots.fill_(3.0)
            bank.update(**{**given, name: x}, threshold=0.4)
        assert torch.equal(banks[0].slots, banks[1].slots)
        assert bool((banks[0].slots != 3.0).any()) != (name == "labels" and make is zero)
