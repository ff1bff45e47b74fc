"""ZLPR and the two-way loss, forward + backward, 9,605 classes: ours against the plain formulas, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks import harness
from sadcl import functional as F
from sadcl.testing import make_labels, value_and_grads

BATCH, CLASSES, LABELS_PER_IMAGE = 256, 9605, 6.0


def plain_zlpr(x: Tensor, y: Tensor) -> Tensor:
    """The formula with masks; a zero logit stands for the 1 in each logarithm."""
    zero = x.new_zeros(len(x), 1)
    low = torch.cat([x.masked_fill(y == 1, float("-inf")), zero], dim=1)
    high = torch.cat([(-x).masked_fill(y == 0, float("-inf")), zero], dim=1)
    return (torch.logsumexp(low, dim=1) + torch.logsumexp(high, dim=1)).mean()


def plain_two_way(x: Tensor, y: Tensor) -> Tensor:
    """The formula with masks."""
    low, high = x.masked_fill(y == 1, float("-inf")), (-x / 4).masked_fill(y == 0, float("-inf"))

    def one_way(dim: int) -> Tensor:
        has = (y == 1).any(dim=dim)
        scaled = torch.logsumexp(low, dim=dim) + 4 * torch.logsumexp(high, dim=dim)
        return softplus(scaled[has]).mean()

    return one_way(1) + one_way(0)


ENTRIES: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "zlpr": {
        "plain formula": plain_zlpr,
        "plain, torch.compile": torch.compile(plain_zlpr),
        "sadcl torch": lambda x, y: F.zlpr_loss(x, y, backend="torch"),
        "sadcl": F.zlpr_loss,
    },
    "two_way": {
        "plain formula": plain_two_way,
        "plain, torch.compile": torch.compile(plain_two_way),
        "sadcl torch": lambda x, y: F.two_way_loss(x, y, backend="torch"),
        "sadcl": F.two_way_loss,
    },
}


def problem(batch: int = BATCH, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(0)) - 2
    return logits, make_labels(batch, classes, labels_per_image=LABELS_PER_IMAGE)


def gate(loss: str, name: str) -> None:
    """Raise if the entry is not the loss, at a size that the oracle can do."""
    logits, labels = problem(64, 301)
    got = value_and_grads(lambda x: ENTRIES[loss][name](x, labels), logits)
    oracle = {"zlpr": F.zlpr_loss, "two_way": F.two_way_loss}[loss]
    want = value_and_grads(lambda x: oracle(x, labels, backend="reference"), logits.double())
    torch.testing.assert_close([t.double() for t in got], list(want), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss, name", [(loss, name) for loss in ENTRIES for name in ENTRIES[loss]])
def test_zlpr(benchmark: Callable[..., object], loss: str, name: str) -> None:
    gate(loss, name)
    logits, labels = problem()
    benchmark(harness.forward_backward(lambda x: ENTRIES[loss][name](x, labels), logits))


def main() -> None:
    logits, labels = problem()
    for loss, entries in ENTRIES.items():
        for name in entries:
            gate(loss, name)
        harness.compare(
            loss,
            f"{loss} forward + backward, [{BATCH}, {CLASSES}] float32; floor: logits and labels in twice, the gradient"
            " out",
            {
                name: harness.forward_backward(lambda x, f=entry: f(x, labels), logits)
                for name, entry in entries.items()
            },
            traffic=5 * logits.numel() * 4,
        )


if __name__ == "__main__":
    main()
