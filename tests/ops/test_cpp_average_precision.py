"""Average precision by the CPU extension against the torch ranking (held to loops in tests/model/test_metrics.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sadcl.metrics import average_precision
from sadcl.metrics._average_precision import AP_METHODS

pytest.importorskip("sadcl._C", reason="the CPU extension is not built")


def both(monkeypatch: pytest.MonkeyPatch, scores: Tensor, labels: Tensor, method: str) -> tuple[Tensor, Tensor]:
    ours = average_precision(scores, labels, method)
    with monkeypatch.context() as patch:
        patch.setenv("SADCL_BACKEND", "torch")
        return ours, average_precision(scores, labels, method)


def check(monkeypatch: pytest.MonkeyPatch, scores: Tensor, labels: Tensor) -> None:
    for method in AP_METHODS:
        ours, torchs = both(monkeypatch, scores, labels, method)
        torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (63, 7), (700, 19), (2100, 9)])  # more than a digit's 2,048
@pytest.mark.parametrize("ties", [True, False])
def test_matches_torch(
    monkeypatch: pytest.MonkeyPatch, ties: bool, size: tuple[int, int], dtype: torch.dtype, threads: int
) -> None:
    scores = torch.randn(size, dtype=dtype)
    if ties:
        scores = (2 * scores).round() / 2
    labels = (torch.rand(size) < 0.2).to(torch.int8)
    check(monkeypatch, scores, labels)
    labels[torch.rand(size) < 0.3] = -1
    check(monkeypatch, scores, labels)
    check(monkeypatch, scores.t().contiguous().t(), labels.t().contiguous().t())


def test_infinities_signs_and_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([math.inf, 1e38, 1.0, 1e-45, 0.0, -0.0, -1e-45, -1.0, -1e38, -math.inf])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = values[torch.randint(10, (40, 5), generator=generator)]
        labels = torch.randint(-1, 2, (40, 5), generator=generator)
        check(monkeypatch, scores, labels)
        check(monkeypatch, scores.double(), labels)


def test_absent_classes_and_no_images() -> None:
    scores, labels = torch.rand(9, 3), torch.tensor([[1, 0, -1]]).expand(9, 3)
    assert average_precision(scores, labels).tolist()[0] == 1
    assert average_precision(scores, labels)[1:].isnan().all()
    assert average_precision(torch.rand(0, 3), torch.zeros(0, 3)).isnan().all()
