"""Triton ASL against the oracle and the golden numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sadcl.kernels import _launch

from sadcl import functional as F
from sadcl import reference
from sadcl.testing import (
    assert_within_budget,
    error_budgets,
    layouts,
    make_labels,
    poisoned_allocations,
    value_and_grads,
)

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("asl_*.npz"))
FOCUS = [(4, 1, 0.05, False), (4, 0, 0.0, True), (0.5, 2, 0.2, False), (0, 0, 0.0, False)]


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(7, 100) * 6
    logits[0, :4] = torch.tensor([1e4, -1e4, 0.0, 88.0])
    labels = make_labels(7, 100, "ignored")
    labels[1] = torch.rand(100)
    return logits.to(dtype), labels


@pytest.mark.budget
@pytest.mark.parametrize("focus", FOCUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_within_the_error_budget(dtype: torch.dtype, focus: tuple[float, float, float, bool]) -> None:
    gamma_neg, gamma_pos, clip, detach = focus
    logits, labels = inputs(dtype)
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "eps": 1e-5, "detach_focal_weight": detach}
    upstream = torch.randn(7, 100, dtype=torch.float64)
    accumulated = torch.promote_types(dtype, torch.float32)
    oracle = lambda x: reference.asl(x, labels, gamma_neg, gamma_pos, clip, 1e-5, detach)  # noqa: E731
    budgets = error_budgets(lambda: value_and_grads(oracle, logits.double(), upstream=upstream), accumulated)
    with poisoned_allocations():
        got = value_and_grads(
            lambda x: F.asymmetric_loss(x, labels, reduction="none", backend="triton", **options),
            logits,
            upstream=upstream.to(accumulated),
        )
    for name, ours, want in zip(("loss", "grad"), got, budgets, strict=True):
        assert_within_budget(name, ours, want)


@pytest.fixture
def gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 exponentials and quotients as an NVIDIA GPU makes them: ex2.approx of a rounded product, div.full."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def off(x: np.ndarray) -> np.ndarray:
        """Two ulp too large: what PTX allows both."""
        return x * x.dtype.type(1 + 2**-22) if x.dtype == np.float32 else x

    def unary(name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        run = lambda self, arg: TensorHandle(off(function(arg.data)), arg.dtype.scalar)  # noqa: E731
        monkeypatch.setattr(InterpreterBuilder, name, run)

    unary("create_exp2", np.exp2)
    unary("create_exp", lambda x: np.exp2(x * np.float32(math.log2(math.e))) if x.dtype == np.float32 else np.exp(x))
    divide = lambda self, a, b: TensorHandle(off(np.divide(a.data, b.data)), a.dtype.scalar)  # noqa: E731
    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", divide)


@pytest.mark.budget
@pytest.mark.parametrize("gamma_neg, gamma_pos", [(4, 1), (4, 0), (2, 2), (0, 0), (7, 3), (2.5, 0.5)])
@pytest.mark.parametrize("clip, detach", [(0.0, True), (0.05, False), (0.0, False)])
@pytest.mark.usefixtures("gpu_arithmetic")
def test_within_the_error_budget_of_small_values(gamma_neg: float, gamma_pos: float, clip: float, detach: bool) -> None:
    """Rows whose values are all small, and one alike: no large one hides the error of an exponential or a power."""
    levels = torch.tensor([-80.0, -40, -31.3, -24, -15.7, -9, -4.4, -1, 0, 1.3, 4, 8.9, 14, 22, 37])
    logits = (levels[:, None] + torch.rand(len(levels), 20)).repeat(3, 1)
    labels = torch.zeros_like(logits)
    labels[len(levels) :] = 1
    labels[2 * len(levels) :] = torch.rand(len(levels), 1).expand(-1, 20)
    focus = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "eps": 1e-8, "detach_focal_weight": detach}
    upstream = torch.ones_like(logits)
    oracle = lambda x: reference.asl(x, labels.double(), gamma_neg, gamma_pos, clip, 1e-8, detach)  # noqa: E731
    budgets = error_budgets(lambda: value_and_grads(oracle, logits.double(), upstream=upstream.double()))
    got = value_and_grads(
        lambda x: F.asymmetric_loss(x, labels, reduction="none", backend="triton", **focus), logits, upstream=upstream
    )
    for name, ours, want in zip(("loss", "grad"), got, budgets, strict=True):
        assert_within_budget(name, ours, want)


def test_weights_sums_and_layouts() -> None:
    logits, labels = inputs(torch.float32)
    weights = {"class_weight": torch.rand(100), "sample_weight": torch.rand(7)}
    for reduction in ("sum", "mean", "released"):
        options = {"reduction": reduction, **weights}
        want = value_and_grads(lambda x: F.asymmetric_loss(x, labels, backend="torch", **options), logits)
        for _, layout in layouts(logits):
            with _launch.recording() as recorded:
                got = value_and_grads(lambda x: F.asymmetric_loss(x, labels, backend="triton", **options), layout)
            assert [launch.name for launch in recorded] == ["_asl_kernel", "_asl_backward_kernel"]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    golden = np.load(path)
    options = {name: float(golden[name]) for name in ("gamma_neg", "gamma_pos", "clip", "eps")}
    options["detach_focal_weight"] = bool(golden["detach_focal_weight"])
    logits, labels = torch.tensor(golden["logits"]), torch.tensor(golden["labels"])
    loss, grad = value_and_grads(
        lambda x: F.asymmetric_loss(x, labels, reduction="released", backend="triton", **options), logits
    )
    for got, want in ((loss, golden["released_loss"]), (grad, golden["released_grad"])):
        assert np.linalg.norm(got.double().numpy() - want) <= 1e-5 * max(np.linalg.norm(want), 0.3)
