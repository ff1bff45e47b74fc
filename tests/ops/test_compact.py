"""Op ``compact``: labels to class-major pairs."""

from __future__ import annotations

import pytest
import torch

from sadcl import functional as F
from sadcl.functional import compact_labels
from sadcl.testing import RAGGED, layouts, make_features, make_labels, poisoned_allocations, value_and_grads
from tests.here import backends_here

BACKENDS = backends_here("compact")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]


def expected_pairs(labels: torch.Tensor) -> tuple[list[int], list[int]]:
    b, c = labels.shape
    pairs, pointers = [], [0]
    for k in range(c):
        pairs += [i * c + k for i in range(b) if labels[i, k] == 1]
        pointers.append(len(pairs))
    return pairs, pointers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (63, 100), (3, 257)])
def test_pairs_are_class_major(size: tuple[int, int], pattern: str, backend: str) -> None:
    labels = make_labels(*size, pattern)
    with poisoned_allocations():
        active = compact_labels(labels, backend)
    pairs, pointers = expected_pairs(labels)
    assert active.class_ptr.tolist() == pointers
    assert active.pairs.tolist() == pairs + [0] * (labels.numel() - len(pairs))
    assert torch.equal(active.target, labels.to(torch.int8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_layouts_agree(backend: str) -> None:
    labels = make_labels(7, 9, "ignored")
    want = compact_labels(labels, backend)
    for dtype in DTYPES:
        for name, layout in layouts(labels):
            got = compact_labels(layout.to(dtype) if name == "contiguous" else layout, backend)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (dtype, name)
    positives = labels == 1
    for dtype in (torch.bool, torch.uint8):
        got = compact_labels(positives.to(dtype), backend)
        assert torch.equal(got.pairs, want.pairs)
        assert torch.equal(got.target, positives.to(torch.int8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values, named", [([0.5, 2.0], "0.5, 2"), ([float("nan")], "nan"), ([-2.0], "-2")])
def test_other_values_are_named(values: list[float], named: str, backend: str) -> None:
    labels = make_labels(4, 5)
    labels[1, : len(values)] = torch.tensor(values)
    with pytest.raises(ValueError, match=rf"labels: expected 0, 1 or -1 \(ignored\), got values {named}"):
        compact_labels(labels, backend)


def test_wrong_shapes_and_types() -> None:
    with pytest.raises(ValueError, match=r"labels: expected shape \[B, C\], got \(3,\)"):
        compact_labels(torch.ones(3))
    with pytest.raises(ValueError, match="no empty dimension"):
        compact_labels(torch.ones(0, 4))
    with pytest.raises(TypeError, match="labels: expected a torch.Tensor"):
        compact_labels([[1, 0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="real dtype"):
        compact_labels(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="compact has no such implementation|cannot run compact"):
        compact_labels(torch.ones(2, 2), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_capacity(backend: str) -> None:
    labels = make_labels(6, 5)
    count = int(labels.sum())
    full, bounded = compact_labels(labels, backend), compact_labels(labels, backend, capacity=count)
    assert bounded.pairs.tolist() == full.pairs[:count].tolist() and not bounded.overflowed
    assert compact_labels(labels, backend, capacity=1000).pairs.shape == (30,)
    x = make_features(6, 2, 5, 16)
    results = [
        value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, active=active, backend=backend), x)
        for active in (full, bounded)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"capacity: the labels have {count} active pairs, more than {count - 1}"):
        compact_labels(labels, backend, capacity=count - 1)
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="capacity: expected None or an integer > 0"):
            compact_labels(labels, backend, capacity=wrong)


def test_capacity_compiles() -> None:
    labels, x = make_labels(6, 5), make_features(6, 2, 5, 16)

    def run(x: torch.Tensor) -> torch.Tensor:
        return F.sample_contrastive_loss(x, labels, active=compact_labels(labels, capacity=25))

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
