"""Op bank_update: every backend against the loop; dtypes, strides, threads, what autograd and compile see of it."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from sadcl import reference
from sadcl.bank import MemoryBank
from sadcl.functional.bank import bank_update
from sadcl.testing import layouts, make_labels
from tests.here import backends_here

BACKENDS = backends_here("bank")
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_the_loop(dtype: torch.dtype, slot_dtype: torch.dtype, backend: str, threads: int) -> None:
    slots = torch.randn(7, 9, 1500).to(slot_dtype)
    features, labels = torch.randn(5, 9, 1500).to(dtype), make_labels(5, 9, "ignored")
    for scores, probabilities in ((4 * torch.randn(5, 9), False), (torch.rand(5, 9), True)):
        for kind in (torch.float32, torch.float64, torch.bfloat16):
            want = reference.bank_update(slots, features, scores.to(kind), labels, 0.6, probabilities)
            got = slots.clone()
            bank_update(got, features, scores.to(kind), labels, 0.6, probabilities, backend)
            assert torch.equal(got, want) and not torch.equal(got, slots)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
)
def test_layouts_and_label_dtypes(kind: torch.dtype, backend: str) -> None:
    slots, features, scores = torch.randn(5, 6, 20), torch.randn(5, 6, 20), 4 * torch.randn(5, 6)
    labels = make_labels(5, 6, labels_per_image=4)
    want = reference.bank_update(slots, features, scores, labels, 0.5, False)
    for _, layout in layouts(features):
        for s, y in ((scores, labels.to(kind)), (scores.t().contiguous().t(), labels.to(kind).t().contiguous().t())):
            got = slots.clone()
            bank_update(got, layout, s, y, 0.5, False, backend)
            assert torch.equal(got, want)
    wide = torch.stack([slots, slots], -1)[..., 0]  # rows with gaps
    bank_update(wide, features, scores, labels.to(kind), 0.5, False, backend)
    assert torch.equal(wide, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend: str) -> None:
    arguments = (torch.randn(3, 4, 5), torch.randn(2, 4, 5), torch.randn(2, 4), make_labels(2, 4), 0.5, False, backend)
    opcheck(torch.ops.sadcl.bank_update.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_the_write(backend: str) -> None:
    slots, weight = torch.randn(2, 3, 4), torch.randn(4, requires_grad=True)
    loss = (slots * weight).sum()
    bank_update(slots, torch.randn(2, 3, 4), torch.full((2, 3), 9.0), torch.ones(2, 3), 0.8, False, backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiles() -> None:
    bank = MemoryBank(4, 3, 8)
    arguments = torch.randn(2, 3, 8), torch.full((2, 3), 9.0), torch.ones(2, 3)

    def step(*arguments: torch.Tensor) -> torch.Tensor:
        bank.update(*arguments)
        return bank.read(2) * 2

    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(got, 2 * arguments[0]) and torch.equal(bank.slots[:2], arguments[0])
