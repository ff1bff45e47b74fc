"""Triton PSCL against the oracle and the golden numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sadcl.kernels import _launch

from sadcl import functional as F
from sadcl import reference
from sadcl.testing import (
    RAGGED,
    assert_within_budget,
    error_budgets,
    layouts,
    make_features,
    make_labels,
    poisoned_allocations,
    value_and_grads,
)

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("pscl_*.npz"))[::2]
OP = torch.ops.sadcl


@pytest.mark.budget
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize(
    "dtype, released",
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float16, False),
        (torch.float64, True),
    ],
)
def test_within_the_error_budget(dtype: torch.dtype, pattern: str, released: bool) -> None:
    features, prototypes = make_features(7, 9, 63, dtype=dtype), make_features(9, 63, dtype=dtype, seed=5)
    target = make_labels(7, 9, pattern).to(torch.int8)
    tau = torch.tensor(0.1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.randn(9, dtype=tau.dtype)
    wide = [x.double() for x in (features, prototypes, tau)]
    oracle = lambda x, p, t: reference.pscl(x, p, target, t, released)  # noqa: E731
    budgets = error_budgets(lambda: value_and_grads(oracle, *wide, upstream=upstream.double()), tau.dtype)
    with poisoned_allocations():
        run = lambda x, p, t: OP.pscl(x, p, target, t, released, "triton")[0]  # noqa: E731
        got = value_and_grads(run, features, prototypes, tau, upstream=upstream)
    for name, ours, want in zip(("loss", "features", "prototypes", "tau"), got, budgets, strict=True):
        assert_within_budget(name, ours, want)


def test_extreme_rows_and_launches() -> None:
    features, prototypes = make_features(6, 5, 40), make_features(5, 40, seed=5)
    scale = torch.tensor([1e30, 1e-30, 0.0, 1.0, 1e-38, 3.0])[:, None, None]
    labels = make_labels(6, 5, labels_per_image=2.0)
    plain = F.prototype_contrastive_loss(
        features[[0, 1, 3, 4, 5]], prototypes, labels[[0, 1, 3, 4, 5]], backend="triton"
    )
    labels[2] = -1
    with _launch.recording() as recorded:
        loss, grad, *_ = value_and_grads(
            lambda x, p: F.prototype_contrastive_loss(x, p, labels, backend="triton"),
            features * scale,
            prototypes * 1e20,
        )
    torch.testing.assert_close(loss, plain)
    assert grad.isfinite().all() and not grad[2].any()
    names = ["_compact_small_kernel", "_score_kernel", "_class_kernel", "_gradient_kernel", "_temperature_kernel"]
    assert [launch.name for launch in recorded] == names


def test_layouts_and_determinism() -> None:
    features, prototypes, labels = make_features(5, 4, 20), make_features(4, 20, seed=5), make_labels(5, 4)
    run = lambda x: F.prototype_contrastive_loss(x, prototypes, labels, backend="triton")  # noqa: E731
    want = value_and_grads(run, features)
    for name, layout in layouts(features):
        got = value_and_grads(run, layout)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


@pytest.mark.parametrize("formulation", F.FORMULATIONS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path, formulation: str) -> None:
    golden = np.load(path)
    features, prototypes, labels = (torch.tensor(golden[name]) for name in ("features", "prototypes", "labels"))
    tau = float(golden["temperature"])
    got = value_and_grads(
        lambda x, p: F.prototype_contrastive_loss(
            x, p, labels, temperature=tau, formulation=formulation, backend="triton"
        ),
        features,
        prototypes,
    )
    if f"{formulation}_loss" not in golden:
        assert all(value.isfinite().all() for value in got)
        return
    for name, ours in zip(("loss", "grad_features", "grad_prototypes"), got, strict=True):
        want = golden[f"{formulation}_{name}"]
        assert np.linalg.norm(ours.double().numpy() - want) <= 1e-5 * max(np.linalg.norm(want), 0.3), name
