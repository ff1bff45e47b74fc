"""bfloat16 features in C++, on every instruction set: with AVX512_BF16 scores are products of bfloat16 pairs.

SSCL and the image-level losses.

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


def image_level(features: Tensor, labels: Tensor, weighting: str, backend: str) -> tuple[Tensor, ...]:
    """Loss of every anchor and the features' gradient. Columns: the batch, the last two thirds of it as keys again."""
    third, still = len(labels) // 3, features.detach()

    def run(x: Tensor) -> Tensor:
        rest = {"prototypes": still[: labels.shape[1], 0]} if weighting == "msc" else {}
        return F.multilabel_supcon_loss(
            x, labels, keys=still[third:, 0], key_labels=labels[third:].flip(1), weighting=weighting,
            temperature=TEMPERATURE, reduction="none", backend=backend, **rest,
        )  # fmt: skip

    return value_and_grads(run, features, upstream=torch.ones(features.shape[:-1]))


@pytest.mark.budget
@pytest.mark.parametrize("weighting", ["any", "mulsupcon", "jaccard", "simdis", "msc"])
@pytest.mark.parametrize("shape", [(9, 2, 2), (12, 1, 33), (52, 1, 40)])
def test_image_level(shape: tuple[int, ...], weighting: str, every_isa: str) -> None:
    features, labels = image_level_case(shape)
    budgets = image_level_budgets(shape, weighting)
    for name, got, budget in zip(
        ("loss", "gradient"), image_level(features, labels, weighting, "cpp"), budgets, strict=True
    ):
        assert_within_budget(name, got, budget)


@functools.cache
def image_level_case(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Lengths from the smallest to nearly the largest: what a row is multiplied by takes no digit from it."""
    features = make_features(*shape)
    features[::3] *= 2.0**-100
    features[1::3] *= 2.0**90
    return features.bfloat16(), make_labels(shape[0], 8, "ignored", labels_per_image=2)


@functools.cache
def image_level_budgets(shape: tuple[int, ...], weighting: str) -> tuple[Budget, ...]:
    features, labels = image_level_case(shape)
    return error_budgets(lambda: image_level(features.double(), labels, weighting, "reference"), draws=4)


@pytest.mark.parametrize("weighting", ["any", "mulsupcon"])
def test_image_level_zero_and_nan(weighting: str, every_isa: str) -> None:
    features, labels = (t.clone() for t in image_level_case((21, 2, 65)))
    features[4] = 0
    loss, grad = image_level(features, labels, weighting, "cpp")
    want, _ = image_level(features.double(), labels, weighting, "reference")
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-5)
    assert (grad[4] == 0).all()
    features[5, 0, 3] = float("nan")
    assert image_level(features, labels, weighting, "cpp")[0].isnan().any()
