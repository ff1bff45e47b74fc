"""Image-level multi-label losses, forward + backward: ours against the formula in torch operators, in three forms.

Cases: ``small`` ([4096, 128], 80 classes: eager dense, leanest eager, compiled dense, our SupCon), ``large`` ([8192,
1024], 500 classes: our SSCL of as many rows), ``bfloat16`` (the same in that dtype), ``published`` (256 images, labels
compared pair by pair in Python), ``queue`` (256 anchors, 65,536 keys without gradient), ``growth`` (N 65,536: time and
memory). Rows of 3.9 labels. What was wished for stands beside what was measured, at the end.

``python -m benchmarks.bench_mlc [case ...]``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sadcl
from benchmarks import harness
from benchmarks.peers_mlc import TEMPERATURE, dense, leanest, published
from sadcl import functional as F
from sadcl.testing import make_features, make_labels, value_and_grads

LABELS_PER_IMAGE = 3.9
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
# Every size and weighting of the compiled peer is one more compilation of the same function.
torch._dynamo.config.recompile_limit = 64


@dataclass(frozen=True)
class Problem:
    """Anchors, width, classes, keys (0: the anchors are the columns)."""

    n: int
    d: int
    c: int
    k: int = 0

    def __str__(self) -> str:
        return f"N{self.n}-D{self.d}-C{self.c}" + (f"-K{self.k}" if self.k else "")

    def parts(self) -> Parts:
        """Features, labels, keys and their labels."""
        x, y = make_features(self.n, self.d), make_labels(self.n, self.c, labels_per_image=LABELS_PER_IMAGE)
        if self.k == 0:
            return x, y, None, None
        return x, y, make_features(self.k, self.d, seed=2), make_labels(self.k, self.c, "random", LABELS_PER_IMAGE, 2)


SMALL, LARGE = Problem(4096, 128, 80), Problem(8192, 1024, 500)
PUBLISHED, QUEUE = Problem(256, 128, 80), Problem(256, 128, 80, 65536)
GROWTH = (Problem(8192, 128, 500), Problem(65536, 128, 500))
CHECKED = (Problem(96, 24, 20), Problem(24, 24, 20, 130))  # sizes that every entry is checked at
PROBLEMS = {
    SMALL: ("any", "jaccard", "mulsupcon"),
    LARGE: ("any", "jaccard", "simdis"),
    QUEUE: ("any", "jaccard", "mulsupcon"),
}


def ours(x: Tensor, y: Tensor, keys: Tensor | None, key_labels: Tensor | None, weighting: str) -> Tensor:
    options: dict[str, Any] = {"keys": keys, "key_labels": key_labels, "include_batch": keys is None}
    return F.multilabel_supcon_loss(x, y, weighting=weighting, temperature=TEMPERATURE, **options)


ENTRIES: dict[str, Callable[..., Tensor]] = {
    "eager, dense": dense,
    "eager, leanest": leanest,
    # dynamic=False: it knows its sizes; fullgraph: past the limit it raises and does not become eager.
    "dense, torch.compile": torch.compile(dense, fullgraph=True, dynamic=False),
    "sadcl": ours,
}


def run_of(entry: Callable[..., Tensor], parts: Parts, weighting: str) -> Callable[[], object]:
    x, *others = parts
    return harness.forward_backward(lambda x: entry(x, *others, weighting), x)


def gate(name: str) -> None:
    """Raise if the entry is not the loss, at sizes that float64 is quick at."""
    for size in CHECKED:
        x, *others = size.parts()
        for weighting in sorted({*PROBLEMS[SMALL], *PROBLEMS[LARGE]}):
            got = value_and_grads(lambda x, w=weighting, o=others: ENTRIES[name](x, *o, w), x)
            wide = [None if t is None else t.double() for t in others]
            want = value_and_grads(lambda x, w=weighting, o=wide: dense(x, *o, w), x.double())
            torch.testing.assert_close([t.double() for t in got], list(want), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(ENTRIES))
@pytest.mark.parametrize("weighting", PROBLEMS[SMALL])
def test_mlc(benchmark: Callable[..., object], weighting: str, name: str) -> None:
    gate(name)
    benchmark(run_of(ENTRIES[name], SMALL.parts(), weighting))


@dataclass(frozen=True)
class Wish:
    """What a measurement should be, at most or at least, and what it is; None: not measured here."""

    work: str
    unit: str
    bound: float
    got: float | None
    at_most: bool = True

    def __str__(self) -> str:
        wished = f"{'at most' if self.at_most else 'at least'} {self.bound:g}x"
        if self.got is None:
            return f"  {self.work:40s} {self.unit:38s} {wished:>14s}   not measured"
        met = self.got <= self.bound if self.at_most else self.got >= self.bound
        return f"  {self.work:40s} {self.unit:38s} {wished:>14s}   {self.got:7.2f}x{'' if met else '   MISSED'}"


def small(weightings: Sequence[str] = PROBLEMS[SMALL]) -> list[Wish]:
    wishes = []
    parts = SMALL.parts()
    rows, classes = normalize(parts[0], dim=1), torch.arange(SMALL.n) % SMALL.c
    supcon = harness.forward_backward(
        lambda x: F.supcon_loss(x[:, None], classes, temperature=TEMPERATURE, base_temperature=None), rows
    )
    for weighting in weightings:
        row = harness.compare(
            f"mlc {weighting} {SMALL.n}",
            f"{weighting}, forward + backward, {SMALL}, float32; floor: 4 N^2 D",
            {**{name: run_of(f, parts, weighting) for name, f in ENTRIES.items()}, "our SupCon": supcon},
            flops=4.0 * SMALL.n**2 * SMALL.d,
            rounds=9,
            warmup=2,
            slow=0.4,
            slow_every=3,
        )
        for name, bound in (("eager, dense", 7), ("eager, leanest", 6), ("dense, torch.compile", 3.5)):
            wishes.append(Wish(row.name, name, bound, _ratio(row, name, "sadcl"), at_most=False))
        wishes.append(Wish(row.name, "times our SupCon", 1.3, _ratio(row, "sadcl", "our SupCon")))
    return wishes


def large(dtype: torch.dtype = torch.float32) -> list[Wish]:
    what = "" if dtype == torch.float32 else " bfloat16"
    weightings = PROBLEMS[LARGE]
    wishes = [Wish(f"mlc {w} {LARGE.n}{what}", "times our SSCL of as many rows", 1.15, None) for w in weightings]
    if what and not sadcl.backends()["cpp"].detail.startswith("instruction set avx512_bf16"):
        return wishes  # without its instructions bfloat16 is float32's products
    x, *others = LARGE.parts()
    parts: Parts = (x.to(dtype), *others)
    images = LARGE.n // 64
    features = normalize(make_features(images, 1, 64, LARGE.d), dim=3).to(dtype)  # 64 classes of 128 rows
    sscl = harness.forward_backward(lambda x: F.sample_contrastive_loss(x, torch.ones(images, 64)), features)
    row = harness.compare(
        f"mlc {LARGE.n}{what}",
        f"forward + backward, {LARGE}, {dtype}; sadcl: {weightings[0]}; floor: 4 N^2 D, float32",
        {
            "our SSCL of as many rows": sscl,
            **{w: run_of(ours, parts, w) for w in weightings[1:]},
            "sadcl": run_of(ours, parts, weightings[0]),
        },
        flops=4.0 * LARGE.n**2 * LARGE.d,
        rounds=4,
        warmup=1,
        slow=60,
    )
    of = {weightings[0]: "sadcl"}
    return [
        Wish(wish.work, wish.unit, wish.bound, _ratio(row, of.get(w, w), "our SSCL of as many rows"))
        for w, wish in zip(weightings, wishes, strict=True)
    ]


def as_published() -> list[Wish]:
    """The loop over pairs in Python beside the vectorised peer: only where it ends."""
    parts = PUBLISHED.parts()
    for f in (published, ours):
        torch.testing.assert_close(f(*parts, "jaccard"), dense(*parts, "jaccard"), rtol=1e-5, atol=1e-6)
    row = harness.compare(
        f"mlc published {PUBLISHED.n}",
        f"jaccard, forward + backward, {PUBLISHED}, float32",
        {"published form": run_of(published, parts, "jaccard")}
        | {name: run_of(ENTRIES[name], parts, "jaccard") for name in ("eager, dense", "sadcl")},
        rounds=9,
        warmup=2,
        slow_every=3,
    )
    dense_too = f"published form (dense: {_ratio(row, 'eager, dense', 'sadcl'):.1f}x)"
    return [Wish(row.name, dense_too, 500, _ratio(row, "published form", "sadcl"), at_most=False)]


def queue() -> list[Wish]:
    parts = QUEUE.parts()
    names = {w: "sadcl" if w == "any" else w for w in PROBLEMS[QUEUE]}
    row = harness.compare(
        f"mlc queue {QUEUE.n} x {QUEUE.k}",
        f"forward + backward, {QUEUE}, keys without gradient, float32; sadcl: any; floor: 6 N K D",
        {"eager, leanest": run_of(leanest, parts, "any"), **{n: run_of(ours, parts, w) for w, n in names.items()}},
        flops=6.0 * QUEUE.n * QUEUE.k * QUEUE.d,
        rounds=15,
    )
    return [
        Wish(f"{row.name} {w}", "times its floor", 1.5, row.floor_ms and row.timings[n].median / row.floor_ms)
        for w, n in names.items()
    ]


def growth() -> list[Wish]:
    """Time against N^2, and memory against N D, from N 8,192 to N 65,536."""
    runs = {size: run_of(ours, size.parts(), "any") for size in GROWTH}
    lines: dict[int, tuple[float, ...]] = {}
    print(f"\nmlc growth: any, forward + backward, {', '.join(map(str, GROWTH))}, float32")
    print(f"  {'N':>8s} {'median':>12s} {'GFLOP/s':>9s} {'extra floats / (N D)':>22s}")
    for size, run in runs.items():
        times: list[float] = []

        def timed(run: Callable[[], object] = run, times: list[float] = times) -> None:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))

        extra = harness.peak_memory(timed) / (4 * size.n * size.d)
        # The largest takes a quarter of a minute: its second run, the one whose memory was read, is the figure.
        median = times[-1] if size is GROWTH[-1] else harness.interleave({"": run}, rounds=9, warmup=1)[""].median
        lines[size.n] = (size.n, median, 4e-6 * size.n**2 * size.d / median, extra)
        print("  {:8.0f} {:10.1f}ms {:9.1f} {:22.2f}".format(*lines[size.n]), flush=True)
    columns = ("N", "median ms", "GFLOP/s", "extra floats / (N D)")
    about = "multi-label SupCon of ours, any, D 128, 500 classes"
    harness.RECORD.series.append(harness.Series("mlc growth", about, columns, list(lines.values())))
    few, last = GROWTH
    square = (last.n / few.n) ** 2
    packed = 2 * -(-last.c // 32) / last.d  # two bits a label, in units of N D floats
    slower = lines[last.n][1] / lines[few.n][1] / square
    return [
        Wish(f"mlc {last.n}", f"{square:g} times the time at {few.n}", 1.2, slower),
        Wish(f"mlc {last.n}", "N D floats of memory (8, and labels)", 8 + packed, lines[last.n][3]),
    ]


CASES: dict[str, Callable[[], list[Wish]]] = {
    "small": small,
    "any": partial(small, ("any",)),
    "large": large,
    "bfloat16": partial(large, torch.bfloat16),
    "published": as_published,
    "queue": queue,
    "growth": growth,
}


def _ratio(row: harness.Row, over: str, under: str) -> float:
    return row.timings[over].median / row.timings[under].median


def main(cases: Sequence[str] = ()) -> None:
    if unknown := set(cases) - set(CASES):
        raise SystemExit(f"bench_mlc: unknown case {sorted(unknown)[0]!r}; expected some of {', '.join(CASES)}")
    for name in ENTRIES:
        gate(name)
    wishes = [wish for name in cases or (c for c in CASES if c != "any") for wish in CASES[name]()]
    print(f"\n  {'work':40s} {'against':38s} {'wished':>14s}   {'got':>8s}")
    print("\n".join(map(str, wishes)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
