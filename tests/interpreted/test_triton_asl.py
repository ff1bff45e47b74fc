"""Triton ASL against the oracle and the golden numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sadcl.kernels import _launch

from sadcl import functional as F
from sadcl import reference
from sadcl.testing import assert_within_budget, layouts, make_labels, poisoned_allocations, value_and_grads

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("asl_*.npz"))
FOCUS = [(4, 1, 0.05, False), (4, 0, 0.0, True), (0.5, 2, 0.2, False), (0, 0, 0.0, False)]


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(7, 100) * 6
    logits[0, :4] = torch.tensor([1e4, -1e4, 0.0, 88.0])
    labels = make_labels(7, 100, "ignored")
    labels[1] = torch.rand(100)
    return logits.to(dtype), labels


@pytest.mark.parametrize("focus", FOCUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_within_the_error_budget(dtype: torch.dtype, focus: tuple[float, float, float, bool]) -> None:
    gamma_neg, gamma_pos, clip, detach = focus
    logits, labels = inputs(dtype)
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "eps": 1e-5, "detach_focal_weight": detach}
    upstream = torch.randn(7, 100, dtype=torch.float64)
    truth = value_and_grads(
        lambda x: reference.asl(x, labels, gamma_neg, gamma_pos, clip, 1e-5, detach), logits.double(), upstream=upstream
    )
    own = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def run(backend: str) -> tuple[torch.Tensor, ...]:
        loss = lambda x: F.asymmetric_loss(x, labels, reduction="none", backend=backend, **options)  # noqa: E731
        return value_and_grads(loss, logits, upstream=own)

    with poisoned_allocations():
        got = run("triton")
    for name, ours, peer, exact in zip(("loss", "grad"), got, run("torch"), truth, strict=True):
        assert_within_budget(name, ours, peer, exact)


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
