"""PSCL, forward + backward, COCO size: ours against the loop over classes, the vectorised formula and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from benchmarks import harness
from sadcl import functional as F
from sadcl.testing import COCO, make_features, make_labels, value_and_grads

TEMPERATURE = 0.07


def loop(x: Tensor, p: Tensor, y: Tensor) -> Tensor:
    """Class by class, as the equation reads."""
    total = x.new_zeros(())
    for c in range(x.shape[1]):
        positive = y[:, c] == 1
        if positive.any():
            s = cosine_similarity(x[:, c], p[c][None], dim=-1) / TEMPERATURE
            total = total + torch.logsumexp(s, 0) - torch.logsumexp(s[positive], 0)
    return total / y.sum().clamp(min=1)


def vectorised(x: Tensor, p: Tensor, y: Tensor) -> Tensor:
    """All classes at once."""
    s = (normalize(x, dim=-1) * normalize(p, dim=-1)).sum(dim=-1) / TEMPERATURE
    positives = torch.logsumexp(s.masked_fill(y != 1, float("-inf")), dim=0)
    loss = torch.where((y == 1).any(dim=0), torch.logsumexp(s, dim=0) - positives, 0.0)
    return loss.sum() / y.sum().clamp(min=1)


ENTRIES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loop over classes": loop,
    "vectorised": vectorised,
    "vectorised, torch.compile": torch.compile(vectorised),
    "sadcl torch": lambda x, p, y: F.prototype_contrastive_loss(x, p, y, backend="torch"),
    "sadcl": F.prototype_contrastive_loss,
}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    features, prototypes = make_features(COCO.b, COCO.c, COCO.d), make_features(COCO.c, COCO.d, seed=5)
    return features, prototypes, make_labels(COCO.b, COCO.c)


def gate(name: str) -> None:
    """Raise if the entry is not the loss."""
    features, prototypes, labels = problem()
    got = value_and_grads(lambda x, p: ENTRIES[name](x, p, labels), features, prototypes)
    want = value_and_grads(
        lambda x, p: F.prototype_contrastive_loss(x, p, labels, backend="reference"), features, prototypes
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_pscl_coco(benchmark: Callable[..., object], name: str) -> None:
    gate(name)
    features, prototypes, labels = problem()
    benchmark(harness.forward_backward(lambda x, p: ENTRIES[name](x, p, labels), features, prototypes))


def main() -> None:
    features, prototypes, labels = problem()
    for name in ENTRIES:
        gate(name)
    harness.compare(
        "pscl coco",
        f"PSCL forward + backward, [{COCO.b}, {COCO.c}, {COCO.d}] float32; floor: read the features twice, write their"
        " gradient",
        {
            name: harness.forward_backward(lambda x, p, f=entry: f(x, p, labels), features, prototypes)
            for name, entry in ENTRIES.items()
        },
        traffic=3 * features.numel() * 4,
    )
    for dtype in (torch.bfloat16, torch.float16):
        runs = {
            name: harness.forward_backward(
                lambda x, p, f=ENTRIES[name]: f(x, p, labels), features.to(dtype), prototypes.to(dtype)
            )
            for name in ("vectorised, torch.compile", "sadcl")
        }
        ours = ENTRIES["sadcl"]
        runs["sadcl, float32"] = harness.forward_backward(lambda x, p: ours(x, p, labels), features, prototypes)
        about = f"PSCL forward + backward, [{COCO.b}, {COCO.c}, {COCO.d}] {str(dtype)[6:]}"
        harness.compare(f"pscl {str(dtype)[6:]}", about, runs, traffic=3 * features.numel() * 2)


if __name__ == "__main__":
    main()
