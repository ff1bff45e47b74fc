"""Triton SSCL against the oracle and the golden numbers."""

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

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("sscl_*.npz"))[::3]  # one of each shape and mode
FORWARD = ["_stage_forward_kernel", "_sweep_kernel", "_combine_kernel"]
BACKWARD = ["_stage_backward_kernel", "_gradient_kernel", "_combine_kernel", "_temperature_kernel"]


def rows_of(features: torch.Tensor, labels: torch.Tensor, tau: object, backend: str, **options: object) -> torch.Tensor:
    return F.sample_contrastive_loss(features, labels, temperature=tau, reduction="none", backend=backend, **options)


@pytest.mark.budget
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_within_the_error_budget(dtype: torch.dtype, pattern: str) -> None:
    features, labels = make_features(6, 2, 5, 37, dtype=dtype), make_labels(6, 5, pattern)
    upstream = torch.randn(6, 2, 5, dtype=torch.float64)
    own = upstream.to(torch.promote_types(dtype, torch.float32))
    oracle = lambda x: reference.sscl(x, labels, 0.2)  # noqa: E731
    budgets = error_budgets(lambda: value_and_grads(oracle, features.double(), upstream=upstream), dtype)
    with poisoned_allocations(), _launch.recording() as recorded:
        got = value_and_grads(lambda x: rows_of(x, labels, 0.2, "triton"), features, upstream=own)
    assert [launch.name for launch in recorded[1:]] == FORWARD + BACKWARD
    for name, ours, want in zip(("loss", "gradient"), got, budgets, strict=True):
        assert_within_budget(name, ours, want)


@pytest.mark.budget
@pytest.mark.parametrize("pattern", RAGGED)
def test_released(pattern: str) -> None:
    features, labels = make_features(5, 2, 4, 20), make_labels(5, 4, pattern, labels_per_image=2.0)
    upstream = torch.randn(5, 2, 4)
    oracle = lambda x: reference.sscl(x, labels, 0.2, True)  # noqa: E731
    budgets = error_budgets(lambda: value_and_grads(oracle, features.double(), upstream=upstream.double()))
    pairs, class_ptr, _ = F.compact_labels(labels, "torch")
    with poisoned_allocations(), _launch.recording() as recorded:
        got = value_and_grads(
            lambda x: torch.ops.sadcl.sscl(x, pairs, class_ptr, torch.tensor(0.2), True, True, 0, False, "triton")[0],
            features,
            upstream=upstream,
        )
    extra = ["_index_kernel", "_pair_maximum_kernel"]
    assert [launch.name for launch in recorded] == [FORWARD[0], *extra, *FORWARD[1:], *BACKWARD]
    for name, ours, want in zip(("loss", "gradient"), got, budgets, strict=True):
        assert_within_budget(name, ours, want)


def test_layouts_temperature_and_determinism() -> None:
    features, labels, tau = make_features(3, 2, 3, 20), make_labels(3, 3), torch.tensor(0.3)
    upstream = torch.rand(3, 2, 3)
    run = lambda x, t: rows_of(x, labels, t, "triton")  # noqa: E731
    want = value_and_grads(run, features, tau, upstream=upstream)
    peer = value_and_grads(lambda x, t: rows_of(x, labels, t, "torch"), features, tau, upstream=upstream)
    torch.testing.assert_close(want, peer, rtol=2e-5, atol=2e-6)
    for name, layout in layouts(features):
        got = value_and_grads(run, layout, tau, upstream=upstream)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
    expanded = torch.tensor(0.5).expand(3, 2, 3)
    for a, b in zip(
        *(value_and_grads(run, features, tau, upstream=u) for u in (expanded, expanded.clone())), strict=True
    ):
        assert torch.equal(a, b)


def test_strided_half_precision_rows_are_staged_alike() -> None:
    features, labels = make_features(6, 2, 5, 37, dtype=torch.bfloat16), make_labels(6, 5)
    want = rows_of(features, labels, 0.2, "triton")
    for name, layout in layouts(features):
        assert torch.equal(rows_of(layout, labels, 0.2, "triton"), want), name


def test_rows_of_any_scale() -> None:
    features, labels = make_features(5, 1, 4, 20), make_labels(5, 4, "all_active")
    for dtype in (torch.float32, torch.bfloat16):
        x = features.to(dtype)
        want = rows_of(x, labels, 0.2, "triton")
        scaled = x * torch.tensor([2.0**100, 2.0**-90, 1.0, 4.0, 0.5], dtype=dtype)[:, None, None, None]
        assert torch.equal(rows_of(scaled, labels, 0.2, "triton"), want)
    features[2] = 0
    loss, grad = value_and_grads(lambda x: rows_of(x, labels, 0.2, "triton").sum(), features)
    assert loss.isfinite() and grad.isfinite().all() and not grad[2].any()
    features[3, 0, 1, 0] = torch.nan
    assert rows_of(features, labels, 0.2, "triton").isnan().all()


def test_capacity_can_be_bounded_and_overflow_is_seen() -> None:
    features, labels = make_features(6, 2, 5, 16), make_labels(6, 5)
    pairs, class_ptr, _ = F.compact_labels(labels, "triton")
    count = int(class_ptr[-1])

    def run(bound: int) -> torch.Tensor:
        tau = torch.tensor(0.2)
        return torch.ops.sadcl.sscl(features, pairs[:bound], class_ptr, tau, True, False, 0, False, "triton")[0]

    assert torch.equal(run(count), run(len(pairs)))
    assert run(count - 1).isnan().any()


def test_groups_that_are_not_labels() -> None:
    features = torch.nn.functional.normalize(make_features(6, 2, 16), dim=-1)
    labels = torch.tensor([3, 1, 3, 0, 1, 3])
    got, want = (
        value_and_grads(lambda x: F.supcon_loss(x, labels, backend=backend), features)
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [17, 70])
def test_work_split_by_columns_and_by_rows(rows: int) -> None:
    """17 rows on the interpreter's 4 programs split the columns; 70 are five row blocks, several panels each."""
    features, labels = make_features(rows, 1, 1, 20), torch.ones(rows, 1)
    got, want = (
        value_and_grads(lambda x: rows_of(x, labels, 0.2, backend).square().sum(), features)
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("formulation", F.FORMULATIONS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path, formulation: str) -> None:
    golden = np.load(path)
    features, labels = torch.tensor(golden["features"]), torch.tensor(golden["labels"])
    tau, base = float(golden["temperature"]), float(golden["base_temperature"])
    got = value_and_grads(
        lambda x: F.sample_contrastive_loss(
            x, labels, temperature=tau, base_temperature=base, formulation=formulation, backend="triton"
        ),
        features,
    )
    for name, ours in zip(("loss", "grad"), got, strict=True):
        want = golden[f"{formulation}_{name}"]
        assert np.linalg.norm(ours.double().numpy() - want) <= 1e-5 * max(np.linalg.norm(want), 0.3), name
