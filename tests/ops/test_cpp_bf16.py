"""bfloat16 features in C++, on every instruction set: with AVX512_BF16 scores are products of bfloat16 pairs.

SSCL and the image-level losses. Where no backend is named SSCL's and SupCon's gradient is such a product, too.

The same path for other processors, out of shifts and FMAs: ``CFLAGS=-DSADCL_BF16_PAIRS CXXFLAGS=-DSADCL_BF16_PAIRS``.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.ops.sscl import Inputs, scores_to_keep, sscl
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


def weights_of(features: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """What the gradient is made of, in float64: rows, their lengths, ``dL/ds`` both ways, who is a positive of whom."""
    cls, image = (labels == 1).t().nonzero(as_tuple=True)
    v, d = features.shape[1], features.shape[3]
    x, m = features.double()[image, :, cls].reshape(-1, d), upstream.double()[image, :, cls].reshape(-1)
    length = x.norm(dim=1, keepdim=True)
    z, of_row = (x / length).nan_to_num(), cls.repeat_interleave(v)
    itself = torch.eye(len(z), dtype=torch.bool)
    positive = (of_row[:, None] == of_row) & ~itself
    count = positive.sum(1)
    e = (z @ z.t() / TEMPERATURE).masked_fill(itself, -torch.inf).softmax(1) * (m * (count > 0))[:, None]
    pull = positive * (m / count.clamp(min=1))[:, None]
    return z, length, (e - pull) + (e - pull).t(), positive


def count_rounded_weights(
    budgets: tuple[Budget, ...], features: Tensor, labels: Tensor, upstream: Tensor
) -> tuple[Budget, ...]:
    """The budgets of the gradients of features and temperature, and what rounding weights to bfloat16 adds to them.

    Weights of positives come in two parts, 16 bits.
    """
    z, length, w, positive = weights_of(features, labels, upstream)
    unit = torch.finfo(torch.bfloat16).eps / 2
    moved = w.abs() * torch.where(positive, unit * unit, unit) / 3**0.5
    rows = (moved.square() @ z.square()).sqrt() / TEMPERATURE / length
    cls, image = (labels == 1).t().nonzero(as_tuple=True)
    of_features = torch.zeros(features.shape, dtype=torch.float64)
    of_features[image, :, cls] = rows.nan_to_num().reshape(len(cls), *features.shape[1::2])
    of_temperature = (moved * (z @ z.t())).norm() / (2 * TEMPERATURE**2)
    return tuple(
        replace(budget, spread=budget.spread.hypot(more))
        for budget, more in zip(budgets, (of_features, of_temperature), strict=True)
    )


def all_gradients(features: Tensor, labels: Tensor, upstream: Tensor, backend: str | None) -> tuple[Tensor, ...]:
    """Loss, gradient of the features and of the temperature."""
    tau = torch.tensor(TEMPERATURE, dtype=upstream.dtype)
    run = functools.partial(F.sample_contrastive_loss, labels=labels, reduction="none", backend=backend)
    return value_and_grads(lambda x, t: run(x, temperature=t), features, tau, upstream=upstream)


@functools.cache
def rounded_case(*shape: int, pattern: str, labels_per_image: float) -> tuple[Any, ...]:
    features = make_features(*shape).bfloat16()
    labels = make_labels(shape[0], shape[2], pattern, labels_per_image=labels_per_image)
    upstream = torch.randn(shape[:3], generator=torch.Generator().manual_seed(3))
    budgets = error_budgets(lambda: all_gradients(features.double(), labels, upstream.double(), "reference"), draws=4)
    return features, labels, upstream, budgets


@pytest.mark.budget
@pytest.mark.parametrize(
    "shape, pattern, labels_per_image",
    [
        ((3, 1, 4, 1), "random", 2),
        ((5, 3, 6, 63), "random", 2),
        ((30, 2, 9, 130), "random", 2),
        ((6, 2, 5, 520), "empty_images", 2),
        ((47, 1, 2, 9), "one_huge_class", 1),  # a lane short of a panel, a panel, a lane more
        ((48, 1, 2, 16), "one_huge_class", 1),
        ((49, 1, 2, 17), "one_huge_class", 1),
        ((50, 2, 8, 33), "random", 6),  # by blocks
        ((260, 2, 1, 8), "one_huge_class", 1),
        ((24, 1, 24, 20), "all_active", 24),
    ],
)
def test_rounded_weights(shape: tuple[int, ...], pattern: str, labels_per_image: int, every_isa: str) -> None:
    """With no backend named a processor that multiplies bfloat16 does; the budget counts what that rounds, no more."""
    features, labels, upstream, budgets = rounded_case(*shape, pattern=pattern, labels_per_image=labels_per_image)
    ours = all_gradients(features, labels, upstream, None)
    counted = count_rounded_weights(budgets[1:], features, labels, upstream)
    for name, got, want in zip(("loss", "features", "temperature"), ours, (budgets[0], *counted), strict=True):
        assert_within_budget(name, got, want)
    named = all_gradients(features, labels, upstream, "cpp")
    assert torch.equal(ours[0], named[0])
    if shape[3] > 100:
        assert torch.equal(ours[1], named[1]) == (every_isa != "avx512_bf16")


@pytest.mark.parametrize("by_blocks", [False, True])
def test_rounded_weights_whatever_is_kept(by_blocks: bool, every_isa: str, threads: int) -> None:
    """By blocks the same bits of scores that were kept and of those made again."""
    shape = (64, 2, 8, 33) if by_blocks else (40, 2, 9, 57)
    features, labels = make_features(*shape).bfloat16(), make_labels(shape[0], shape[2], labels_per_image=5)
    pairs, class_ptr, _ = F.compact_labels(labels, "cpp")
    x = Inputs(features.requires_grad_(), pairs, class_ptr, torch.tensor(0.2), True, False, 0, rounded=True)
    most = scores_to_keep(x.features, pairs, class_ptr, x.temperature, "cpp")
    kept, again, anew = (
        torch.autograd.grad(sscl(x._replace(keep=keep), "cpp").row_loss.sum(), features)[0] for keep in (most, most, 0)
    )
    assert torch.equal(kept, again)
    if by_blocks:
        assert torch.equal(kept, anew)
    torch.testing.assert_close(kept, anew, rtol=2**-7, atol=2**-9 * kept.abs().max().item())


@pytest.mark.budget
def test_rounded_weights_of_zero_nan_and_any_length(every_isa: str) -> None:
    features, labels, upstream, _ = rounded_case(8, 2, 6, 31, pattern="random", labels_per_image=4)
    features = features.clone()
    features[1:3] *= torch.tensor([2.0**-100, 2.0**100])[:, None, None, None]
    features[3] = 0
    budgets = error_budgets(lambda: all_gradients(features.double(), labels, upstream.double(), "reference"), draws=4)
    counted = count_rounded_weights(budgets[1:], features, labels, upstream)
    ours = all_gradients(features, labels, upstream, None)
    for name, got, want in zip(("loss", "features", "temperature"), ours, (budgets[0], *counted), strict=True):
        assert_within_budget(name, got, want)
    assert not ours[1][3].any()
    image, cls = (labels == 1).nonzero()[0].tolist()
    features[image, 0, cls, 4] = torch.nan
    active = (labels == 1)[:, None, :, None].expand_as(features)
    assert all_gradients(features, labels, upstream, None)[1][active].isnan().all()


def test_rounded_weights_of_supcon(every_isa: str) -> None:
    """Rows as they are, of any length; the same block of code, so a coarse measure is enough."""
    features = make_features(200, 3, 40).bfloat16() / 4
    labels = torch.arange(200) % 7
    (loss, grad), (_, want) = (
        value_and_grads(lambda x, n=name: F.supcon_loss(x, labels, temperature=0.5, backend=n), x)
        for name, x in ((None, features), ("reference", features.double()))
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(grad.double(), want, rtol=2**-7, atol=2**-9 * want.abs().max().item())


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
