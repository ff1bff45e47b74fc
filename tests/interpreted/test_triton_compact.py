"""Triton compaction against the portable one, in the one-program form and in the three-launch form."""

from __future__ import annotations

import pytest
import torch
from sadcl.kernels import _launch
from sadcl.kernels import compact as kernel

from sadcl import _checks
from sadcl.functional import compact_labels, sample_contrastive_loss
from sadcl.testing import RAGGED, layouts, make_features, make_labels, poisoned_allocations, value_and_grads


@pytest.mark.parametrize("launches", [1, 3])
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (63, 100), (3, 257)])
def test_pairs(size: tuple[int, int], pattern: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if launches == 3:
        monkeypatch.setattr(kernel, "_SMALL_IMAGES", 0)
        monkeypatch.setattr(kernel, "_CHUNKS", 2)
    labels = make_labels(*size, pattern)
    with poisoned_allocations(), _launch.recording() as recorded:
        got = compact_labels(labels, "triton")
    assert len(recorded) == launches
    for name, ours, portable in zip(got._fields, got, compact_labels(labels, "torch"), strict=True):
        assert torch.equal(ours, portable), name


def test_dtypes_and_layouts() -> None:
    labels = make_labels(7, 9, "ignored")
    want = compact_labels(labels, "torch")
    inputs = [layout for _, layout in layouts(labels)]
    inputs += [labels.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.int8)]
    for layout in inputs:
        assert all(torch.equal(a, b) for a, b in zip(compact_labels(layout, "triton"), want, strict=True))
    got = compact_labels(labels == 1, "triton")
    assert torch.equal(got.pairs, want.pairs) and torch.equal(got.class_ptr, want.class_ptr)


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"got values 0\.5"):
        compact_labels(torch.tensor([[0.5, 1.0]]), "triton")


def test_overflow_of_a_bound_where_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without ``SADCL_CHECK=1``: the flag is set, the loss is NaN; a bound that holds changes nothing."""
    labels, features = make_labels(4, 3, labels_per_image=1.5), make_features(4, 1, 3, 16)
    count = int(labels.sum())
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)

    def run(capacity: int) -> tuple[bool, tuple[torch.Tensor, ...]]:
        active = compact_labels(labels, "triton", capacity=capacity)
        assert active.pairs.shape == (min(capacity, labels.numel()),)
        loss = lambda x: sample_contrastive_loss(x, labels, active=active, backend="triton")  # noqa: E731
        return bool(active.overflowed), value_and_grads(loss, features)

    full = run(labels.numel())
    overflowed, results = run(count)
    assert not overflowed and all(torch.equal(a, b) for a, b in zip(results, full[1], strict=True))
    overflowed, (loss, _) = run(count - 1)
    assert overflowed and loss.isnan()
