"""SSCL, forward + backward, COCO size: ours against the dense formula and the compacted torch implementations.

``python -m benchmarks.bench_sscl`` interleaves the entries and prints ratios; ``pytest benchmarks/bench_sscl.py`` gives
pytest-benchmark one timing each. Both check every entry against the oracle first and time nothing that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness, peers
from sadcl import functional as F
from sadcl.testing import COCO, make_features, make_labels, value_and_grads

ENTRIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **peers.SSCL,
    "sadcl torch": lambda x, y: F.sample_contrastive_loss(x, y, backend="torch"),
    "sadcl": F.sample_contrastive_loss,
}


def problem() -> tuple[Tensor, Tensor]:
    return make_features(COCO.b, COCO.v, COCO.c, COCO.d), make_labels(COCO.b, COCO.c)


def gate(name: str) -> None:
    """Raise if the entry is not the loss."""
    features, labels = problem()
    got = value_and_grads(lambda x: ENTRIES[name](x, labels), features)
    want = value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend="reference"), features)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_sscl_coco(benchmark: Callable[..., object], name: str) -> None:
    gate(name)
    features, labels = problem()
    benchmark(harness.forward_backward(lambda x: ENTRIES[name](x, labels), features))


def main() -> None:
    features, labels = problem()
    for name in ENTRIES:
        gate(name)
    timings = harness.interleave(
        {name: harness.forward_backward(lambda x, f=entry: f(x, labels), features) for name, entry in ENTRIES.items()}
    )
    rows = COCO.v * int(labels.sum())
    floor = 1e3 * 2 * features.numel() * 4 / harness.copy_bandwidth()
    print(harness.machine())
    harness.print_table(
        f"SSCL forward + backward, {COCO}, {rows} active rows, float32; floor: writing the gradient at copy bandwidth",
        timings, "sadcl", floor / 2,
    )  # fmt: skip


if __name__ == "__main__":
    main()
