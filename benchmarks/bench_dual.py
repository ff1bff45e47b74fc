"""SSCL + PSCL of one batch, forward + backward, COCO size: the fused op against our two ops and torch's best forms.

Floor: the first view read twice and both gradients written once, at copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness, peers
from benchmarks.bench_pscl import ENTRIES as PSCL
from sadcl import functional as F
from sadcl.testing import COCO, make_features, make_labels, value_and_grads

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def torch_form(sscl: Callable[[Tensor, Tensor], Tensor], pscl: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    return lambda x, bank, p, y: 10 * sscl(torch.stack([x, bank], dim=1), y) + 10 * pscl(x, p, y)


def apart(x: Tensor, bank: Tensor, p: Tensor, y: Tensor) -> Tensor:
    """Our two ops, labels compacted once."""
    active = F.compact_labels(y)
    sample = F.sample_contrastive_loss(torch.stack([x, bank], dim=1), y, active=active)
    return 10 * sample + 10 * F.prototype_contrastive_loss(x, p, y, active=active)


ENTRIES: dict[str, Loss] = {
    "eager, class sums": torch_form(peers.sscl_class_sums, PSCL["vectorised"]),
    "torch.compile": torch_form(peers.sscl_compiled, PSCL["vectorised, torch.compile"]),
    "sadcl, two ops": apart,
    "sadcl": lambda x, bank, p, y: 10 * sum(F.dual_contrastive_loss(x, bank, p, y)),  # type: ignore[return-value]
}


def problem() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    b, c, d = COCO.b, COCO.c, COCO.d
    inputs = make_features(b, c, d), make_features(b, c, d, seed=3), make_features(c, d, seed=5)
    return inputs, make_labels(b, c)


def gate(name: str) -> None:
    """Raise if the entry is not the loss."""
    inputs, labels = problem()
    truth = torch_form(
        lambda x, y: F.sample_contrastive_loss(x, y, backend="reference"),
        lambda x, p, y: F.prototype_contrastive_loss(x, p, y, backend="reference"),
    )
    got, want = (value_and_grads(lambda *t, f=f: f(*t, labels), *inputs) for f in (ENTRIES[name], truth))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_dual(benchmark: Callable[..., object], name: str) -> None:
    gate(name)
    inputs, labels = problem()
    benchmark(harness.forward_backward(lambda *t: ENTRIES[name](*t, labels), *inputs))


def main() -> None:
    inputs, labels = problem()
    for name in ENTRIES:
        gate(name)
    harness.compare(
        "dual coco",
        f"SSCL + PSCL forward + backward, {COCO}, float32; floor: read the view that PSCL takes twice, write both"
        " gradients",
        {name: harness.forward_backward(lambda *t, f=entry: f(*t, labels), *inputs) for name, entry in ENTRIES.items()},
        traffic=4 * inputs[0].numel() * 4,
    )


if __name__ == "__main__":
    main()
