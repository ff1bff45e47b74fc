"""SSCL, forward + backward: ours against the dense formula and the compacted torch implementations.

Cases: ``coco`` (B32 V2 C80 D1024, 2.9 labels an image), ``large`` (8,192 active rows, D 1,024, 500 classes; the dense
form would need N = 64,000 squared), ``tiny`` (B4 V2 C20 D64), and ``growth``: ours alone from N = 1,024 to 65,536 at
D 256, against the N^2 D line. ``memory`` prints what one forward + backward adds to the process, beyond the features.

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
    timings = harness.interleave(runs, case.rounds, slow_every=5 if name == "coco" else 1)
    rows = case.shape.v * int(labels.sum())
    flops, peak = 4.0 * rows * rows * case.shape.d, harness.fma_peak()
    floor = max(4 * features.numel() / harness.copy_bandwidth(), flops / peak if peak else 0.0)
    harness.print_table(
        f"SSCL forward + backward, {name}: {case.shape}, {rows} active rows, float32; "
        f"{flops / 1e9:.3g} GFLOP, {flops / timings['sadcl'].median / 1e6:.0f} GFLOP/s of {peak / 1e9:.0f}",
        timings, "sadcl", 1e3 * floor,
    )  # fmt: skip


def memory() -> None:
    """Bytes that one forward + backward adds, the gradient among them."""
    for name, case in CASES.items():
        features, labels = case.problem()
        rows = case.shape.v * int(labels.sum())
        print(f"\nSSCL peak memory beyond the inputs, {name}: gradient {4e-6 * features.numel():.1f} MB, "
              f"6 N D floats {24e-6 * rows * case.shape.d:.1f} MB")  # fmt: skip
        for entry, loss in case.entries().items():
            used = harness.peak_memory(harness.forward_backward(lambda x, f=loss: f(x, labels), features))
            print(f"  {entry:28s} {used / 1e6:10.1f} MB")


def growth(largest: int = GROWTH[-1]) -> None:
    """Time over N^2 D, and memory over N D, as N grows: both should be flat."""
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
        extra = harness.peak_memory(run) / (4 * n * 256)
        print(f"  {n:8d} {timing.median:10.1f}ms {4e-6 * n * n * 256 / timing.median:9.1f} {extra:22.1f}", flush=True)


def main(cases: Sequence[str] = ()) -> None:
    print(harness.machine())
    for name in cases or (*CASES, "growth", "memory"):
        if name in CASES:
            compare(name, CASES[name])
        elif name == "growth":
            growth()
        elif name == "memory":
            memory()
        else:
            raise SystemExit(f"bench_sscl: unknown case {name!r}; expected {', '.join(CASES)}, growth, memory")


if __name__ == "__main__":
    main(sys.argv[1:])
