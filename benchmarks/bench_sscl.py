"""SSCL, forward + backward: ours against the dense formula and the compacted torch implementations.

Cases: ``coco`` (B32 V2 C80 D1024, 2.9 labels an image), ``large`` (8,192 active rows, D 1,024, 500 classes; the dense
form would need N = 64,000 squared), ``tiny`` (B4 V2 C20 D64), and ``growth``: ours alone from N = 1,024 to 65,536 at
D 256, against the N^2 D line; ``bfloat16``: the large case in that dtype.

Floor, whichever is more: 4 N^2 D flops at the FMA peak (half the scores twice, by symmetry, and the gradient's
product), or the gradient [B, V, C, D] written once at copy bandwidth.

``python -m benchmarks.bench_sscl [case ...]`` interleaves the entries and prints ratios; ``pytest
benchmarks/bench_sscl.py`` gives pytest-benchmark one timing each. Both check every entry first and time nothing wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import harness, peers
from sadcl import functional as F
from sadcl.testing import COCO, Shape, make_features, make_labels, value_and_grads

Loss = Callable[[Tensor, Tensor], Tensor]

ENTRIES: dict[str, Loss] = {
    **peers.SSCL,
    "sadcl torch": lambda x, y: F.sample_contrastive_loss(x, y, backend="torch"),
    "sadcl": F.sample_contrastive_loss,
}
GROWTH = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Case:
    """A shape, the entries that can run it, and how often."""

    shape: Shape
    without: tuple[str, ...] = ()
    rounds: int = 15

    def problem(self) -> tuple[Tensor, Tensor]:
        s = self.shape
        return make_features(s.b, s.v, s.c, s.d), make_labels(s.b, s.c, labels_per_image=s.labels_per_image)

    def entries(self) -> dict[str, Loss]:
        return {name: entry for name, entry in ENTRIES.items() if name not in self.without}


CASES = {
    "coco": Case(COCO),
    "large": Case(Shape(64, 2, 500, 1024, labels_per_image=64), without=("dense N x N", "sadcl torch"), rounds=5),
    "tiny": Case(Shape(4, 2, 20, 64), rounds=200),
}


def gate(case: Case) -> None:
    """Raise if an entry is not the loss: against the oracle, or where that is too large, against the class sums."""
    features, labels = case.problem()
    truth: Loss = lambda x, y: F.sample_contrastive_loss(x, y, backend="reference")  # noqa: E731
    if case is CASES["large"]:
        truth = peers.sscl_class_sums
    want = value_and_grads(lambda x: truth(x, labels), features)
    for entry in case.entries().values():
        got = value_and_grads(lambda x: entry(x, labels), features)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("case, name", [(c, name) for c in CASES for name in CASES[c].entries()])
def test_sscl(benchmark: Callable[..., object], case: str, name: str) -> None:
    gate(CASES[case])
    features, labels = CASES[case].problem()
    benchmark(harness.forward_backward(lambda x: ENTRIES[name](x, labels), features))


def compare(name: str, case: Case) -> None:
    gate(case)
    features, labels = case.problem()
    runs = {n: harness.forward_backward(lambda x, f=f: f(x, labels), features) for n, f in case.entries().items()}
    rows = case.shape.v * int(labels.sum())
    harness.compare(
        f"sscl {name}",
        f"SSCL forward + backward, {case.shape}, {rows} active rows, float32; floor: 4 N^2 D, or the gradient written",
        runs,
        flops=4.0 * rows * rows * case.shape.d,
        traffic=4 * features.numel(),
        rounds=case.rounds,
        slow_every=5 if name == "coco" else 1,
    )


def bfloat16() -> None:
    """The large case in bfloat16, beside itself in float32: what its dot products are worth."""
    case = CASES["large"]
    features, labels = case.problem()
    rows = case.shape.v * int(labels.sum())
    compiled = "compacted, torch.compile"
    runs = {
        "sadcl, float32": harness.forward_backward(lambda x: ENTRIES["sadcl"](x, labels), features),
        f"{compiled}, bfloat16": harness.forward_backward(lambda x: ENTRIES[compiled](x, labels), features.bfloat16()),
        "sadcl": harness.forward_backward(lambda x: ENTRIES["sadcl"](x, labels), features.bfloat16()),
    }
    about = f"SSCL forward + backward, {case.shape}, {rows} active rows, bfloat16; the peak is float32's"
    flops = 4.0 * rows * rows * case.shape.d
    harness.compare("sscl large bfloat16", about, runs, flops=flops, rounds=case.rounds, slow_every=1)


def growth(largest: int = GROWTH[-1]) -> None:
    """Time over N^2 D, and memory over N D, as N grows: both should be flat."""
    lines = []
    print("\nSSCL growth, D 256, 100 classes, forward + backward of ours")
    print(f"  {'N':>8s} {'median':>12s} {'GFLOP/s':>9s} {'extra floats / (N D)':>22s}")
    for n in GROWTH:
        if n > largest:
            break
        features = make_features(n // 100 + 1, 1, 100, 256)
        labels = torch.zeros(n // 100 + 1, 100)
        labels.view(-1)[:n] = 1
        run = harness.forward_backward(lambda x, y=labels: F.sample_contrastive_loss(x, y), features)
        timing = harness.interleave({"sadcl": run}, rounds=7 if n <= 8192 else 3, warmup=1, slow_every=1)["sadcl"]
        lines.append((n, timing.median, 4e-6 * n * n * 256 / timing.median, harness.peak_memory(run) / (4 * n * 256)))
        print("  {:8d} {:10.1f}ms {:9.1f} {:22.1f}".format(*lines[-1]), flush=True)
    columns = ("N", "median ms", "GFLOP/s", "extra floats / (N D)")
    harness.RECORD.series.append(harness.Series("sscl growth", "SSCL of ours, D 256, 100 classes", columns, lines))


def main(cases: Sequence[str] = ()) -> None:
    for name in cases or (*CASES, "bfloat16", "growth"):
        if name in CASES:
            compare(name, CASES[name])
        elif name == "bfloat16":
            bfloat16()
        elif name == "growth":
            growth()
        else:
            raise SystemExit(f"bench_sscl: unknown case {name!r}; expected {', '.join(CASES)}, bfloat16, growth")


if __name__ == "__main__":
    main(sys.argv[1:])
