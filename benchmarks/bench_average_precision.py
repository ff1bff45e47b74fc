"""Average precision at the size of COCO's validation set: ours against torchmetrics, scikit-learn, one torch.sort."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from sadcl.metrics import average_precision

IMAGES, CLASSES = 40504, 80


def _peers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Those that are installed."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    try:
        from sklearn.metrics import average_precision_score
    except ImportError:
        pass
    else:
        found["scikit-learn"] = lambda s, y: torch.as_tensor(
            average_precision_score(y.numpy(), s.numpy(), average=None)
        )
    try:
        from torchmetrics.functional.classification import multilabel_average_precision
    except ImportError:
        pass
    else:
        found["torchmetrics"] = lambda s, y: multilabel_average_precision(s, y, CLASSES, average="none")
    return found


PEERS = _peers()
ENTRIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **PEERS,
    "torch.sort alone": lambda s, y: torch.sort(s, dim=0, descending=True).values,
    "sadcl sklearn": lambda s, y: average_precision(s, y, "sklearn"),
    "sadcl voc11": lambda s, y: average_precision(s, y, "voc11"),
    "sadcl": average_precision,
}


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(IMAGES, CLASSES, generator=generator) < 2.9 / CLASSES).long()
    return torch.sigmoid(torch.randn(IMAGES, CLASSES, generator=generator) + 3 * labels - 3), labels


def gate() -> None:
    """Raise if a peer's values are not ours of its protocol; scikit-learn's are of float64, as ours are."""
    scores, labels = problem()
    ours = average_precision(scores, labels, "sklearn")
    for name, entry in PEERS.items():
        rtol, atol = (1e-12, 0) if name == "scikit-learn" else (1e-5, 1e-6)
        torch.testing.assert_close(entry(scores, labels).double(), ours, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_average_precision(benchmark: Callable[..., object], name: str) -> None:
    gate()
    benchmark(ENTRIES[name], *problem())


def main() -> None:
    gate()
    arguments = problem()
    harness.compare(
        "average_precision",
        f"Average precision, {IMAGES} x {CLASSES} float32 scores, int64 labels; floor: read both",
        {name: lambda f=entry: f(*arguments) for name, entry in ENTRIES.items()},
        traffic=2 * arguments[0].numel() * (4 + 8),  # a copy writes what it reads
        rounds=9,
    )


if __name__ == "__main__":
    main()
