"""SSCL of bfloat16 features in C++, on every instruction set: with AVX512_BF16 scores are products of bfloat16 pairs.

The same path for other processors, out of shifts and FMAs: ``CFLAGS=-DSADCL_BF16_PAIRS CXXFLAGS=-DSADCL_BF16_PAIRS``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.testing import make_features, make_labels

TEMPERATURE = 0.2


def loss_and_gradient(features: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    leaf = features.clone().requires_grad_()
    loss = F.sample_contrastive_loss(leaf, labels, temperature=TEMPERATURE, reduction="none", backend=backend)
    loss.sum().backward()
    return loss.detach().double(), leaf.grad.double()


def check(features: Tensor, labels: Tensor) -> None:
    """Scores are exact products summed in float32: the loss is as good as that of float32 features."""
    loss, grad = loss_and_gradient(features, labels, "cpp")
    want, want_grad = loss_and_gradient(features.double(), labels, "reference")
    plain, _ = loss_and_gradient(features.float(), labels, "torch")
    allowed = 2 * (plain - want).abs().max() + 1e-6 / TEMPERATURE
    assert (loss - want).abs().max() <= allowed
    # Rows of a gradient differ by many powers of two where the features do.
    error, size = (grad - want_grad).abs().amax(-1), want_grad.abs().amax(-1)
    lengths = features.double().norm(dim=-1)
    floor = 1e-6 * torch.where(lengths > 0, 1 / lengths / TEMPERATURE, 1.0)
    too_large = size > torch.finfo(torch.bfloat16).max  # gradients go as 1 / length
    assert ((error <= 1.01 * 2.0**-8 * size + floor + 2.0**-133) | too_large).all()


@pytest.mark.parametrize("shape", [(3, 1, 4, 1), (5, 2, 6, 2), (5, 3, 6, 63), (9, 2, 6, 65), (40, 2, 9, 257)])
def test_few_rows(shape: tuple[int, ...], every_isa: str) -> None:
    check(make_features(*shape).bfloat16(), make_labels(shape[0], shape[2], labels_per_image=2))


def test_many_rows(every_isa: str) -> None:
    check(make_features(300, 2, 8, 40).bfloat16(), make_labels(300, 8, labels_per_image=2))


@pytest.mark.parametrize("size", [1e30, 2.0**-100, 2.0**-133])
def test_lengths_far_from_one(size: float, every_isa: str) -> None:
    features = make_features(8, 2, 6, 31)
    features[::2] *= size
    check(features.bfloat16(), torch.ones(8, 6))


def test_zero_and_nan(every_isa: str) -> None:
    features = make_features(6, 1, 5, 33).bfloat16()
    features[2] = 0
    check(features, torch.ones(6, 5))
    features[3, 0, 1, 4] = float("nan")
    loss = F.sample_contrastive_loss(features, torch.ones(6, 5), reduction="none", backend="cpp")
    assert loss.isnan().all()
