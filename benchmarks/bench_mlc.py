"""Image-level multi-label losses, forward + backward: ours against the formula in torch operators, in three forms.

Eager dense: z z^T, masks, log-softmax, W. Leanest eager: ``lam lse - z . (W z)``, no softmax matrix kept. Compiled: the
dense one under ``torch.compile``. Rows of 3.9 labels; a queue of keys that want no gradient is a problem of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import harness
from sadcl import functional as F
from sadcl.testing import make_features, make_labels, value_and_grads

TEMPERATURE, LABELS_PER_IMAGE = 0.1, 3.9


@dataclass(frozen=True)
class Problem:
    """Anchors, width, classes, keys (0: the anchors are the columns), weightings."""

    n: int
    d: int
    c: int
    k: int
    weightings: tuple[str, ...]

    def __str__(self) -> str:
        return f"N{self.n}-D{self.d}-C{self.c}" + (f"-K{self.k}" if self.k else "")


PROBLEMS = (
    Problem(4096, 128, 80, 0, ("any", "jaccard", "mulsupcon")),
    Problem(8192, 1024, 500, 0, ("any", "jaccard", "simdis")),
    Problem(256, 128, 80, 65536, ("any", "mulsupcon")),
)
SMALL = Problem(96, 24, 20, 0, ("any", "jaccard", "mulsupcon", "simdis"))


def pair_weights(y: Tensor, other: Tensor, weighting: str, square: bool) -> Tensor:
    """``W [N, columns]``, dense."""
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device) if square else torch.zeros(1, 1, dtype=torch.bool)
    both, own, theirs = y @ other.t(), y.sum(1, keepdim=True), other.sum(1)
    if weighting == "mulsupcon":
        partners = other.sum(0) - (y if square else 0.0)
        return ((y / partners.clamp(min=1)) @ other.t()).masked_fill(itself, 0.0)
    value = torch.ones_like(both)
    if weighting == "jaccard":
        value = both / (own + theirs - both).clamp(min=1)
    elif weighting == "simdis":
        value = both / own.clamp(min=1) / (1 + theirs - both)
    positive = (value >= 0.3 if weighting == "jaccard" else both > 0) & ~itself
    return value * positive / positive.sum(1, keepdim=True).clamp(min=1)


def _mean(rows: Tensor, y: Tensor, weighting: str) -> Tensor:
    return rows.sum() / (y.sum() if weighting == "mulsupcon" else len(y))


def dense(x: Tensor, y: Tensor, keys: Tensor | None, key_labels: Tensor | None, weighting: str) -> Tensor:
    """The formula as one writes it."""
    z = normalize(x, dim=1)
    columns = z if keys is None else normalize(keys, dim=1)
    s = z @ columns.t() / TEMPERATURE
    if keys is None:
        s = s.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), float("-inf"))
    w = pair_weights(y, y if key_labels is None else key_labels, weighting, keys is None)
    log_probability = torch.log_softmax(s, dim=1).masked_fill(w == 0, 0.0)
    return _mean(-(w * log_probability).sum(1), y, weighting)


def leanest(x: Tensor, y: Tensor, keys: Tensor | None, key_labels: Tensor | None, weighting: str) -> Tensor:
    """``lam lse - z . (W z)``: one matrix of scores, one of weights."""
    z = normalize(x, dim=1)
    columns = z if keys is None else normalize(keys, dim=1)
    s = z @ columns.t() / TEMPERATURE
    if keys is None:
        s = s.fill_diagonal_(float("-inf"))
    with torch.no_grad():
        w = pair_weights(y, y if key_labels is None else key_labels, weighting, keys is None)
    pull = (z * (w @ columns)).sum(1) / TEMPERATURE
    return _mean(w.sum(1) * torch.logsumexp(s, dim=1) - pull, y, weighting)


def published(x: Tensor, y: Tensor, keys: Tensor | None, key_labels: Tensor | None, weighting: str) -> Tensor:
    """MultiSupCon as its authors describe it: labels compared pair by pair in Python, then dense."""
    assert keys is None and weighting == "jaccard"
    w, has = x.new_zeros(len(x), len(x)), y == 1
    for i in range(len(x)):
        for j in range(len(x)):
            overlap = (has[i] & has[j]).sum() / (has[i] | has[j]).sum().clamp(min=1)
            if i != j and overlap >= 0.3:
                w[i, j] = overlap
    w = w / (w > 0).sum(1, keepdim=True).clamp(min=1)
    z = normalize(x, dim=1)
    s = (z @ z.t() / TEMPERATURE).masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), float("-inf"))
    return _mean(-(w * torch.log_softmax(s, dim=1).masked_fill(w == 0, 0.0)).sum(1), y, weighting)


def ours(x: Tensor, y: Tensor, keys: Tensor | None, key_labels: Tensor | None, weighting: str) -> Tensor:
    options: dict[str, Any] = {"keys": keys, "key_labels": key_labels, "include_batch": keys is None}
    return F.multilabel_supcon_loss(x, y, weighting=weighting, temperature=TEMPERATURE, **options)


ENTRIES: dict[str, Callable[..., Tensor]] = {
    "eager, dense": dense,
    "eager, leanest": leanest,
    "dense, torch.compile": torch.compile(dense),
    "sadcl": ours,
}


def problem(size: Problem) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Features, labels, keys and their labels."""
    x, y = make_features(size.n, size.d), make_labels(size.n, size.c, labels_per_image=LABELS_PER_IMAGE)
    if size.k == 0:
        return x, y, None, None
    return x, y, make_features(size.k, size.d, seed=2), make_labels(size.k, size.c, "random", LABELS_PER_IMAGE, seed=2)


def gate(name: str) -> None:
    """Raise if the entry is not the loss, at a size that the oracle can do."""
    for size in (SMALL, Problem(24, 24, 20, 130, SMALL.weightings)):
        x, *others = problem(size)
        for weighting in size.weightings:
            got = value_and_grads(lambda x, w=weighting, o=others: ENTRIES[name](x, *o, w), x)
            wide = [None if t is None else t.double() for t in others]
            want = value_and_grads(lambda x, w=weighting, o=wide: dense(x, *o, w), x.double())
            torch.testing.assert_close([t.double() for t in got], list(want), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(ENTRIES))
@pytest.mark.parametrize("weighting", PROBLEMS[0].weightings)
def test_mlc(benchmark: Callable[..., object], weighting: str, name: str) -> None:
    gate(name)
    x, *others = problem(PROBLEMS[0])
    benchmark(harness.forward_backward(lambda x: ENTRIES[name](x, *others, weighting), x))


def as_published(size: Problem) -> None:
    """The loop over pairs in Python beside the vectorised peer: only where it ends."""
    x, *others = problem(size)
    for f in (published, ours):
        torch.testing.assert_close(f(x, *others, "jaccard"), dense(x, *others, "jaccard"), rtol=1e-5, atol=1e-6)
    entries = {"published form": published, "eager, dense": dense, "sadcl": ours}
    harness.compare(
        f"mlc published {size.n} x {size.n}",
        f"jaccard, forward + backward, {size}, float32",
        {
            name: harness.forward_backward(lambda x, f=entry: f(x, *others, "jaccard"), x)
            for name, entry in entries.items()
        },
        rounds=9,
        slow=2.0,
    )


def main() -> None:
    for name in ENTRIES:
        gate(name)
    for size in PROBLEMS:
        x, *others = problem(size)
        for weighting in size.weightings:
            harness.compare(
                f"mlc {weighting} {size.n} x {size.k or size.n}",
                f"{weighting}, forward + backward, {size}, float32; floor: {'6 N K D' if size.k else '4 N^2 D'}",
                {
                    name: harness.forward_backward(lambda x, f=entry, w=weighting, o=others: f(x, *o, w), x)
                    for name, entry in ENTRIES.items()
                },
                flops=6.0 * size.n * size.k * size.d if size.k else 4.0 * size.n * size.n * size.d,
                rounds=9,
                slow=2.0,
            )
    as_published(Problem(256, 128, 80, 0, ("jaccard",)))


if __name__ == "__main__":
    main()
