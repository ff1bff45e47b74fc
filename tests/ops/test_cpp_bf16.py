"""SSCL of bfloat16 features in C++, on every instruction set: with AVX512_BF16 scores are products of bfloat16 pairs.

The same path for other processors, out of shifts and FMAs: ``CFLAGS=-DSADCL_BF16_PAIRS CXXFLAGS=-DSADCL_BF16_PAIRS``.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.testing import (
    Budget,
    assert_within_budget,
    error_budgets,
    make_features,
    make_labels,
    value_and_grads,
)

TEMPERATURE = 0.2


def loss_and_gradient(features: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, ...]:
    run = functools.partial(F.sample_contrastive_loss, labels=labels, temperature=TEMPERATURE, reduction="none")
    return value_and_grads(lambda x: run(x, backend=backend), features, upstream=torch.ones(features.shape[:-1]))


@functools.cache
def case(*shape: int, labels_per_image: float, size: float = 1.0) -> tuple[Tensor, Tensor, tuple[Budget, ...]]:
    """Features, every other image of length ``size``, labels, and what the oracle says of loss and gradient."""
    features = make_features(*shape)
    features[::2] *= size
    features = features.bfloat16()
    labels = make_labels(shape[0], shape[2], labels_per_image=labels_per_image)
    draws = 4 if shape[0] > 100 else 16
    return (
        features,
        labels,
        error_budgets(lambda: loss_and_gradient(features.double(), labels, "reference"), draws=draws),
    )


def check(features: Tensor, labels: Tensor, budgets: tuple[Budget, ...]) -> None:
    """Scores are exact products summed in float32: the loss is as good as that of float32 features."""
    loss, grad = loss_and_gradient(features, labels, "cpp")
    assert_within_budget("loss", loss, budgets[0])
    # Gradients go as 1 / length: rows beyond the largest number are left out.
    fits = budgets[1].truth.abs().amax(-1, keepdim=True) <= torch.finfo(torch.bfloat16).max
    assert_within_budget("gradient", grad.where(fits, 0), replace(budgets[1], truth=budgets[1].truth.where(fits, 0)))


@pytest.mark.budget
@pytest.mark.parametrize("shape", [(3, 1, 4, 1), (5, 2, 6, 2), (5, 3, 6, 63), (9, 2, 6, 65), (40, 2, 9, 257)])
def test_few_rows(shape: tuple[int, ...], every_isa: str) -> None:
    check(*case(*shape, labels_per_image=2))


@pytest.mark.budget
@pytest.mark.published
def test_many_rows(every_isa: str) -> None:
    check(*case(300, 2, 8, 40, labels_per_image=2))


@pytest.mark.budget
@pytest.mark.parametrize("size", [1e30, 2.0**-100, 2.0**-133])
def test_lengths_far_from_one(size: float, every_isa: str) -> None:
    check(*case(8, 2, 6, 31, labels_per_image=6, size=size))


@pytest.mark.budget
def test_zero_and_nan(every_isa: str) -> None:
    features, labels, _ = case(6, 1, 5, 33, labels_per_image=5)
    features = features.clone()
    features[2] = 0
    check(features, labels, error_budgets(lambda: loss_and_gradient(features.double(), labels, "reference")))
    features[3, 0, 1, 4] = float("nan")
    loss = F.sample_contrastive_loss(features, labels, reduction="none", backend="cpp")
    assert loss.isnan().all()
