"""Average precision at the size of COCO's validation set: ours against torchmetrics, scikit-learn, one torch.sort."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from sadcl.metrics import average_precision

IMAGES, CLASSES = 40504, 80


def by_scikit_learn(scores: Tensor, labels: Tensor) -> Tensor:
    from sklearn.metrics import average_precision_score

    return torch.as_tensor(average_precision_score(labels.numpy(), scores.numpy(), average=None))


def by_torchmetrics(scores: Tensor, labels: Tensor) -> Tensor:
    from torchmetrics.functional.classification import multilabel_average_precision

    return multilabel_average_precision(scores, labels, CLASSES, average="none")


ENTRIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scikit-learn": by_scikit_learn,
    "torchmetrics": by_torchmetrics,
    "torch.sort alone": lambda s, y: torch.sort(s, dim=0, descending=True).values,
    "sadcl sklearn": lambda s, y: average_precision(s, y, "sklearn"),
    "sadcl voc11": lambda s, y: average_precision(s, y, "voc11"),
    "sadcl": average_precision,
}
SAME_PROTOCOL = ("torchmetrics", "sadcl sklearn")


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(IMAGES, CLASSES, generator=generator) < 2.9 / CLASSES).long()
    return torch.sigmoid(torch.randn(IMAGES, CLASSES, generator=generator) + 3 * labels - 3), labels


def gate() -> None:
    """Raise if entries of one protocol disagree; scikit-learn is the judge."""
    scores, labels = problem()
    want = by_scikit_learn(scores, labels)
    for name in SAME_PROTOCOL:
        torch.testing.assert_close(ENTRIES[name](scores, labels).double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average_precision(scores, labels, "sklearn"), want, rtol=1e-12, atol=0)


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
