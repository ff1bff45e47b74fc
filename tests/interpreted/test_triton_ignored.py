"""What ignored (-1) places hold, NaN and infinities included, changes no bit of a loss or of any gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.testing import make_features, make_labels, value_and_grads

LABELS = make_labels(6, 5, "ignored", labels_per_image=2.0)
LABELS[:, 3] = -1  # a class that nobody knows
IGNORED = LABELS == -1
TAU = torch.tensor(0.2)


def sscl(formulation: str, reduction: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    options = {"formulation": formulation, "reduction": reduction, "backend": "triton"}
    run = lambda x, tau: F.sample_contrastive_loss(x, LABELS, temperature=tau, **options)  # noqa: E731
    return run, (make_features(6, 2, 5, 20).transpose(1, 2).contiguous(), TAU)


def pscl(formulation: str, reduction: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    options = {"formulation": formulation, "reduction": reduction, "backend": "triton"}
    run = lambda x, p, tau: F.prototype_contrastive_loss(x, p, LABELS, temperature=tau, **options)  # noqa: E731
    return run, (make_features(6, 5, 20), make_features(5, 20, seed=5), TAU)


def asl(formulation: str, reduction: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    options = {"clip": 0.05 if formulation == "paper" else 0.0, "reduction": reduction, "backend": "triton"}
    return lambda x: F.asymmetric_loss(x, LABELS, **options), (torch.randn(6, 5),)


@pytest.mark.parametrize("reduction, bad", [("mean", torch.nan), ("none", torch.nan), ("none", -torch.inf)])
@pytest.mark.parametrize("formulation", F.FORMULATIONS)
@pytest.mark.parametrize("loss", [sscl, pscl, asl])
def test_ignored_places_are_not_read(
    loss: Callable[..., tuple[Callable[..., Tensor], tuple[Tensor, ...]]], formulation: str, reduction: str, bad: float
) -> None:
    run, (x, *others) = loss(formulation, reduction)
    if loss is sscl:  # [B, C, V, D] above, so that one mask fits all three
        given = run
        run = lambda x, *others: given(x.transpose(1, 2), *others)  # noqa: E731
    upstream = torch.rand_like(run(x, *others))
    poisoned = x.clone()
    poisoned[IGNORED] = bad
    want, got = (value_and_grads(run, values, *others, upstream=upstream) for values in (x, poisoned))
    assert all(value.isfinite().all() for value in got)
    assert all(torch.equal(ours, finite) for ours, finite in zip(got, want, strict=True))
    assert not got[1][IGNORED].any()
