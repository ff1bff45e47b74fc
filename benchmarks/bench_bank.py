"""Memory-bank update, B32 C80 E2048: ours against the loop over labels and one masked copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from sadcl import reference
from sadcl.bank import MemoryBank
from sadcl.testing import make_labels

BATCH, CLASSES, WIDTH, THRESHOLD = 32, 80, 2048, 0.8


def loop(bank: MemoryBank, features: Tensor, scores: Tensor, labels: Tensor) -> None:
    """Label by label."""
    chance = scores.sigmoid()
    for b in range(features.shape[0]):
        for c in labels[b].nonzero()[:, 0]:
            if chance[b, c] > THRESHOLD:
                bank.slots[b, c] = features[b, c]


def masked(bank: MemoryBank, features: Tensor, scores: Tensor, labels: Tensor) -> None:
    """Boolean indexing."""
    write = (scores.sigmoid() > THRESHOLD) & (labels == 1)
    bank.slots[: features.shape[0]][write] = features[write]


def ours(bank: MemoryBank, features: Tensor, scores: Tensor, labels: Tensor) -> None:
    bank.update(features, scores, labels, THRESHOLD)


ENTRIES: dict[str, Callable[[MemoryBank, Tensor, Tensor, Tensor], None]] = {
    "loop over labels": loop, "boolean indexing": masked, "sadcl": ours,
}  # fmt: skip


def problem() -> tuple[MemoryBank, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = make_labels(BATCH, CLASSES)
    scores = 4 * labels + torch.randn(BATCH, CLASSES, generator=generator)  # most positives are recognised
    return (MemoryBank(BATCH, CLASSES, WIDTH), torch.randn(BATCH, CLASSES, WIDTH, generator=generator), scores, labels)


def gate(name: str) -> None:
    """Raise if the entry does not write what the oracle writes."""
    bank, *arguments = problem()
    want = reference.bank_update(bank.slots, *arguments, THRESHOLD, False)
    ENTRIES[name](bank, *arguments)
    assert torch.equal(bank.slots, want)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_bank_update(benchmark: Callable[..., object], name: str) -> None:
    gate(name)
    benchmark(ENTRIES[name], *problem())


def main() -> None:
    arguments = problem()
    for name in ENTRIES:
        gate(name)
    written = int(((arguments[2].sigmoid() > THRESHOLD) & (arguments[3] == 1)).sum()) * WIDTH * 4
    harness.compare(
        "bank",
        f"Bank update, B{BATCH} C{CLASSES} E{WIDTH}; floor: copy the recognised rows",
        {name: lambda f=entry: f(*arguments) for name, entry in ENTRIES.items()},
        traffic=2 * written,
        rounds=51,
    )


if __name__ == "__main__":
    main()
