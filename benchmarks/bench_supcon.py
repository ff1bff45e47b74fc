"""SupCon, forward + backward, [4096, 128], 100 classes: ours against pytorch-metric-learning and plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import harness
from sadcl import functional as F
from sadcl.testing import value_and_grads

ROWS, WIDTH, CLASSES, TEMPERATURE = 4096, 128, 100, 0.1


def plain(x: Tensor, y: Tensor) -> Tensor:
    """The formula with its N x N matrices, no more of them than needed."""
    s = x @ x.t() / TEMPERATURE
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    positive = (y[:, None] == y[None, :]) & ~itself
    log_probability = s - torch.logsumexp(s.masked_fill(itself, float("-inf")), dim=1, keepdim=True)
    return -((log_probability * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def _entries() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    entries: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain formula": plain,
        "plain, torch.compile": torch.compile(plain),
        "sadcl": lambda x, y: F.supcon_loss(x[:, None], y, temperature=TEMPERATURE, base_temperature=None),
    }
    try:
        from pytorch_metric_learning.losses import SupConLoss
    except ImportError:
        return entries
    return {"pytorch-metric-learning": SupConLoss(temperature=TEMPERATURE), **entries}


ENTRIES = _entries()


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(ROWS, WIDTH, generator=generator), dim=1)
    return rows, torch.randint(CLASSES, (ROWS,), generator=generator)


def gate(name: str) -> None:
    """Raise if the entry's value is not the loss. (Gradients: pytorch-metric-learning normalises again, ours does not,
    so theirs is compared across the sphere only.)"""
    x, y = problem()

    def tangential(grad: Tensor) -> Tensor:
        return grad - x * (grad * x).sum(1, keepdim=True)

    (value, grad), (want, want_grad) = (value_and_grads(lambda x, f=f: f(x, y), x) for f in (ENTRIES[name], plain))
    torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tangential(grad), tangential(want_grad), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_supcon(benchmark: Callable[..., object], name: str) -> None:
    gate(name)
    x, y = problem()
    benchmark(harness.forward_backward(lambda x: ENTRIES[name](x, y), x))


def main() -> None:
    x, y = problem()
    for name in ENTRIES:
        gate(name)
    harness.compare(
        "supcon",
        f"SupCon forward + backward, [{ROWS}, {WIDTH}], {CLASSES} classes, float32; floor: 4 N^2 D",
        {name: harness.forward_backward(lambda x, f=entry: f(x, y), x) for name, entry in ENTRIES.items()},
        flops=4.0 * ROWS * ROWS * WIDTH,
        rounds=9,
        slow=2.0,
    )


if __name__ == "__main__":
    main()
