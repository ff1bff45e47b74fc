"""Numbers of docs/faithfulness.md: what the released formulation does to value and gradient.

``python -m benchmarks.faithfulness`` prints its tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.functional.sscl import released_anchors
from sadcl.testing import make_features, make_labels, value_and_grads


def distance(got: Tensor, want: Tensor) -> float:
    """Relative distance of two gradients, in percent."""
    return 100 * ((got - want).norm() / want.norm()).item()


def sscl(b: int, v: int, c: int, labels_per_image: float) -> None:
    features = make_features(b, v, c, 256, dtype=torch.float64)
    labels = make_labels(b, c, labels_per_image=labels_per_image)
    results = {}
    for name in F.FORMULATIONS:
        results[name] = value_and_grads(lambda x, f=name: F.sample_contrastive_loss(x, labels, formulation=f), features)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(0))
    permuted = F.sample_contrastive_loss(features[order], labels[order], formulation="released")
    (paper, paper_grad), (released, released_grad) = results["paper"], results["released"]
    kept = released_anchors(labels, v) & (labels == 1)[:, None]
    print(
        f"| {b} | {v} | {c} | {labels_per_image:g} | {paper:.3f} | {released:.3f} | {permuted:.3f} "
        f"| {100 * kept.sum() / (v * (labels == 1).sum()):.0f} % | {distance(released_grad, paper_grad):.1f} % |"
    )


def pscl(b: int, c: int, labels_per_image: float) -> None:
    x, p = make_features(b, c, 256, dtype=torch.float64), make_features(c, 256, dtype=torch.float64, seed=3)
    labels = make_labels(b, c, labels_per_image=labels_per_image)
    results = [
        value_and_grads(lambda x, p, f=name: F.prototype_contrastive_loss(x, p, labels, formulation=f), x, p)
        for name in F.FORMULATIONS
    ]
    (paper, paper_x, _), (released, released_x, _) = results
    absent = int((labels.sum(dim=0) == 0).sum())
    print(
        f"| {b} | {c} | {labels_per_image:g} | {absent} | {paper:.3f} | {released:.3f} "
        f"| {distance(released_x, paper_x):.1f} % |"
    )


def main() -> None:
    columns = "B | V | C | labels/image | paper | released | released, batch permuted | anchors kept | gradient off by"
    print(f"SSCL\n| {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for v in (1, 2, 3):
        sscl(32, v, 80, 2.9)
    sscl(64, 2, 20, 1.5)
    sscl(16, 2, 500, 13.6)
    sscl(32, 2, 8, 1e9)
    print("\nPSCL\n| B | C | labels/image | classes without a positive | paper | released | gradient off by |")
    print("|---|---|---|---|---|---|---|")
    pscl(32, 80, 2.9)
    pscl(8, 80, 2.9)
    pscl(64, 20, 1.5)
    pscl(16, 500, 13.6)


if __name__ == "__main__":
    main()
