"""Own rows against all columns by kernels: they are taken, on every instruction set, over several blocks and parts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ranks
from torch import Tensor

from sadcl import functional as F
from sadcl.portable import group_fused
from sadcl.testing import Budget, assert_within_budget, error_budgets, make_features, make_labels

_C = pytest.importorskip("sadcl._C")

# Blocks are of 192 rows and columns at most, here parts of 130 columns, and the first rank's 60 rows make one or are
# part of one; the second rank has most of the batch.
SIZES, C, D, PART = (60, 200), 9, 37, 130
LOSSES = ("sscl", "supcon", "jaccard", "simdis", "mulsupcon", "msc")
# Scores up to 10: exponentials of a fixed shift; up to 100: with a running maximum.
TEMPERATURES = (0.1, 0.01)


def loss_of(name: str, x: Tensor, labels: Tensor, tau: float, others: Any, **more: Any) -> Tensor:
    """What takes ids, counted labels, tables; f that is the same from both sides, or not; keys and prototypes."""
    if name == "sscl":  # a row an image: the class of its number
        only = torch.nn.functional.one_hot(labels[:, 0].long() % C, C)
        views = x[:, None, None].expand(-1, 1, C, -1)
        return F.sample_contrastive_loss(views, only, temperature=tau, reduction="sum", **more)
    if name == "supcon":
        return F.supcon_loss(x[:, None], labels[:, 0] * 7 - 3, temperature=tau, base_temperature=None, **more)
    keys, key_labels, prototypes = others
    given = {"keys": keys, "key_labels": key_labels, "prototypes": prototypes if name == "msc" else None}
    return F.multilabel_supcon_loss(x, labels, weighting=name, temperature=tau, **given, **more)


def value_and_gradient(
    name: str, x: Tensor, labels: Tensor, tau: float, others: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = loss_of(name, leaf, labels, tau, others, **more)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@functools.cache
def replicated(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, their labels, prototypes."""
    keys, prototypes = make_features(33, D, seed=6), make_features(C, D, seed=4)
    return keys.to(dtype), make_labels(33, C, "ignored", seed=9), prototypes.to(dtype)


@functools.cache
def batch(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features, of unit length where the loss takes them as they are, and labels."""
    x = make_features(sum(SIZES), D)
    x = torch.nn.functional.normalize(x, dim=-1) if name == "supcon" else x
    return x.to(dtype), make_labels(sum(SIZES), C, "ignored")


def on_rank(
    rank: int, isas: list[str], dtype: torch.dtype, ring: bool, names: tuple[str, ...] = LOSSES
) -> dict[Any, Any]:
    """Loss and gradient of every loss, temperature and instruction set."""
    before, constants, forward, calls = _C.isa(), (group_fused._PART, group_fused._FEW), _C.group_rows_forward, []

    def counting(*parts: Any, **others: Any) -> Any:
        calls.append(parts[0].columns.shape[0])
        return forward(*parts, **others)

    group_fused._PART, group_fused._FEW, _C.group_rows_forward = PART, 100 if rank else 512, counting
    found = {}
    try:
        for isa in isas:
            _C.set_isa(isa)
            for name in names:
                x, labels = (t.split(SIZES)[rank] for t in batch(name, dtype))
                for tau in TEMPERATURES:
                    calls.clear()
                    more = {"group": "world", "backend": "cpp", "ring": ring}
                    both = value_and_gradient(name, x, labels, tau, replicated(dtype), **more)
                    assert sum(calls) >= sum(SIZES) and max(calls) == PART, calls
                    found[isa, name, tau] = [t.double().numpy() for t in both]
    finally:
        _C.set_isa(before)
        group_fused._PART, group_fused._FEW = constants
        _C.group_rows_forward = forward
    return found


def oracle(name: str, dtype: torch.dtype, tau: float) -> tuple[Tensor, Tensor]:
    """Of the concatenated batch in ``dtype``, in float64."""
    x, labels = batch(name, dtype)
    keys, key_labels, prototypes = replicated(dtype)
    given = (x.double(), labels, tau, (keys.double(), key_labels, prototypes.double()))
    return value_and_gradient(name, *given, backend="reference")


def budget(name: str, tau: float) -> tuple[Budget, ...]:
    batch(name, torch.float32)  # made here, not within
    replicated(torch.float32)
    return error_budgets(lambda: oracle(name, torch.float32, tau), draws=4)


def put_together(first: list[Any], second: list[Any]) -> list[Tensor]:
    loss = (first[0] + second[0]) / 2
    return [torch.as_tensor(loss), torch.as_tensor(np.concatenate([first[1], second[1]]) / 2)]


@pytest.mark.parametrize("ring", [False, True])
def test_float64_is_the_oracle(ring: bool) -> None:
    first, second = ranks(2).run(on_rank, [_C.isa()], torch.float64, ring)
    for key in first:
        _, name, tau = key
        want = oracle(name, torch.float64, tau)
        for got, truth in zip(put_together(first[key], second[key]), want, strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.budget
@pytest.mark.parametrize(
    ("name", "tau"),
    # The oracle of labels with drawn rounding takes ten seconds; test_exact.py has small ones.
    [("sscl", 0.01), ("supcon", 0.1), *(pytest.param(one, 0.1, marks=pytest.mark.slow) for one in ("simdis", "msc"))],
)
def test_every_instruction_set_is_within_the_budget(name: str, tau: float) -> None:
    first, second = ranks(2).run(on_rank, _C.supported_isas(), torch.float32, False, (name,))
    allowed = budget(name, tau)
    for isa in _C.supported_isas():
        both = put_together(first[isa, name, tau], second[isa, name, tau])
        for got, one in zip(both, allowed, strict=True):
            assert_within_budget(f"{name} on {isa}", got.float(), one)


def nothing_shared(rank: int, ring: bool) -> list[np.ndarray]:
    x, labels = (t.split((3, 5))[rank] for t in (make_features(8, D), torch.eye(8)))
    leaf = x.detach().requires_grad_()
    more = {"weighting": "jaccard", "threshold": 0.0, "group": "world", "backend": "cpp", "ring": ring}
    loss = F.multilabel_supcon_loss(leaf, labels, **more)
    return [loss.detach().numpy(), torch.autograd.grad(loss, leaf)[0].numpy()]


@pytest.mark.parametrize("ring", [False, True])
def test_positives_that_weigh_nothing(ring: bool) -> None:
    assert not any(value.any() for of_rank in ranks(2).run(nothing_shared, ring) for value in of_rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_vectors_are_rounded_once(dtype: torch.dtype) -> None:
    """The gradient, to its dtype: loss and sums are float32's."""
    first, second = ranks(2).run(on_rank, [_C.isa()], dtype, False)
    for key in first:
        _, name, tau = key
        loss, grad = put_together(first[key], second[key])
        want, wide = oracle(name, dtype, tau)
        torch.testing.assert_close(loss, want, rtol=2e-5, atol=0, msg=str(key))
        assert (grad - wide).abs().amax() <= 2 * torch.finfo(dtype).eps * wide.abs().amax(), key
