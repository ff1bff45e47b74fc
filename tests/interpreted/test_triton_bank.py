"""Triton bank update against the loop that it replaces."""

from __future__ import annotations

import pytest
import torch
from sadcl.kernels import _launch

from sadcl import reference
from sadcl.bank import MemoryBank
from sadcl.functional.bank import bank_update
from sadcl.testing import RAGGED, layouts, make_labels

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("slot_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_the_loop(dtype: torch.dtype, slot_dtype: torch.dtype) -> None:
    slots = torch.randn(4, 5, 100).to(slot_dtype)
    features, labels = torch.randn(3, 5, 100).to(dtype), make_labels(3, 5, "ignored")
    kind = {torch.float32: torch.float64, torch.float64: torch.bfloat16}.get(dtype, torch.float32)
    for scores, probabilities in ((4 * torch.randn(3, 5), False), (torch.rand(3, 5), True)):
        scores[0, 0] = torch.nan
        want = reference.bank_update(slots, features, scores.to(kind), labels, 0.6, probabilities)
        got = slots.clone()
        bank_update(got, features, scores.to(kind), labels, 0.6, probabilities, "triton")
        assert torch.equal(got, want)


@pytest.mark.parametrize("pattern", RAGGED)
def test_ragged_labels_and_layouts(pattern: str) -> None:
    slots, features, scores = torch.randn(5, 6, 20), torch.randn(4, 6, 20), 4 * torch.randn(4, 6)
    labels = make_labels(4, 6, pattern)
    want = reference.bank_update(slots, features, scores, labels, 0.5, False)
    for name, layout in layouts(features):
        got = torch.stack([slots, slots], -1)[..., 0]  # rows with gaps
        bank_update(got, layout, scores.t().contiguous().t(), labels.t().contiguous().t(), 0.5, False, "triton")
        assert torch.equal(got, want), name
    got = slots.clone()
    bank_update(got, features, scores, labels == 1, 0.5, False, "triton")
    assert torch.equal(got, want)


def test_the_threshold_is_strict_and_the_module_runs_it() -> None:
    bank = MemoryBank(2, 4, 3)
    labels, scores = torch.tensor([[1, -1, 0, 1]]), torch.tensor([[0.8, 0.9, 0.9, 0.81]])
    weight = torch.ones(3, requires_grad=True)
    loss = (bank.slots * weight).sum()
    with pytest.MonkeyPatch.context() as patch, _launch.recording() as recorded:
        patch.setenv("SADCL_BACKEND", "triton")
        bank.update(torch.ones(1, 4, 3), scores, labels, probabilities=True)
    assert [launch.name for launch in recorded] == ["_update_kernel"]
    assert not bank.slots[0, :3].any() and not bank.slots[1].any() and bank.slots[0, 3].eq(1).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
