"""The roofline on paper: ``python -m benchmarks.roofline`` writes docs/roofline.md. Nothing here is measured.

Operations and bytes of each op are counted from its sizes by the functions below and divided by the data-sheet rates
of two parts. The larger quotient is the time that no version can beat; overlap is taken to be perfect. Bytes
count each tensor once per pass over it that must reach memory: tiles re-read from L2 are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sadcl.functional.label_attention import backward_macs, choose_form, forward_macs

REPORT = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"
ELEMENT = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Part:
    """Data-sheet rates: dense bfloat16 tensor cores, float64 without them, memory."""

    name: str
    matrix: float
    double: float
    memory: float
    capacity: float


PARTS = (Part("A100 SXM 80 GB", 312e12, 9.7e12, 2.039e12, 80e9), Part("H100 SXM", 989e12, 34e12, 3.35e12, 80e9))


@dataclass(frozen=True)
class Problem:
    """Sizes of a batch; labels per image set how many rows are active."""

    name: str
    b: int
    c: int
    labels: float
    v: int = 2
    d: int = 1024
    e: int = 2048
    length: int = 196
    heads: int = 4

    @property
    def active(self) -> int:
        """Active rows N."""
        return round(self.b * self.labels) * self.v

    @property
    def rows(self) -> int:
        """All rows, active or not."""
        return self.b * self.v * self.c


@dataclass(frozen=True)
class Work:
    """Operations by unit, and bytes through memory."""

    matrix: float = 0.0
    double: float = 0.0
    bytes: float = 0.0

    def seconds(self, part: Part) -> tuple[float, str]:
        """The bound, and what sets it."""
        times = {
            "matrix": self.matrix / part.matrix,
            "float64": self.double / part.double,
            "memory": self.bytes / part.memory,
        }
        unit = max(times, key=lambda name: times[name])
        return times[unit], unit


def compact(p: Problem) -> Work:
    """Labels in (float32), targets out and in again, pairs out."""
    return Work(bytes=p.b * p.c * (4 + 1 + 1 + 4))


def sscl(p: Problem) -> Work:
    """Stage: rows in for the norm, z out. Sweep: z in, 2 N^2 D. Losses of every row are written."""
    row = p.d * ELEMENT
    return Work(2 * p.active**2 * p.d, 2 * p.active * p.d, p.active * 3 * row + p.rows * 4 + p.rows * 12)


def sscl_backward(p: Problem) -> Work:
    """Stage and scores again, and their product with z: 4 N^2 D. The gradient is cleared, then written where active."""
    row = p.d * ELEMENT
    return Work(4 * p.active**2 * p.d, 0, p.active * 4 * row + p.rows * row)


def mlc(p: Problem) -> Work:
    """A row an image and view. Stage: rows in for the norm, z out. Sweep: z in, 2 N^2 D; labels in as bits."""
    n, row = p.b * p.v, p.d * ELEMENT
    return Work(2 * n**2 * p.d, 2 * n * p.d, n * (3 * row + 12) + p.b * p.c * 4.25)


def mlc_backward(p: Problem) -> Work:
    """Stage and scores again, and the product of their gradient with z: 4 N^2 D. The gradient out."""
    n, row = p.b * p.v, p.d * ELEMENT
    return Work(4 * n**2 * p.d, 0, n * (4 * row + 24) + p.b * p.c * 4.25)


def pscl(p: Problem) -> Work:
    """One view in; two float64 multiply-adds an element; scores and norms out, scores in."""
    elements = p.b * p.c * p.d
    return Work(0, 4 * elements, elements * ELEMENT + p.c * p.d * ELEMENT + p.b * p.c * (8 * 3 + 1))


def pscl_backward(p: Problem) -> Work:
    """One view in, its gradient out."""
    return Work(0, 0, 2 * p.b * p.c * p.d * ELEMENT + 2 * p.c * p.d * ELEMENT + p.b * p.c * 17)


def asl(p: Problem) -> Work:
    """Logits and labels in, the derivative out; backward reads it and writes the gradient."""
    return Work(bytes=p.b * p.c * (ELEMENT + 4 + 4) + p.b * p.c * (4 + ELEMENT))


def zlpr(p: Problem) -> Work:
    """Logits and labels in twice, the gradient out."""
    return Work(bytes=p.b * p.c * (2 * (ELEMENT + 4) + ELEMENT))


def label_attention(p: Problem) -> Work:
    """The whole block in the form with fewer operations, projections included. Memory, weights (``4 E^2``) and queries
    in, context out; in between the projected or folded tensors out and in, and the panel of scores stays in L2."""
    form = _form(p)
    flops = 2.0 * forward_macs(form, p.b, p.c, p.length, p.e, p.heads, True)
    return Work(flops, 0, (_block(p) + _between(p, form)) * ELEMENT)


def label_attention_backward(p: Problem) -> Work:
    """Every product has two gradients of its size, the scores are made again. What the forward read and kept, in;
    gradients of memory, weights and queries out."""
    form = _form(p)
    flops = 2.0 * backward_macs(form, p.b, p.c, p.length, p.e, p.heads, True)
    scores = 2.0 * p.b * p.c * p.length * p.e * (p.heads if form == "folded" else 1)
    return Work(flops + scores, 0, (2 * _block(p) + 2 * _between(p, form)) * ELEMENT)


def _form(p: Problem) -> str:
    return choose_form(p.b, p.c, p.length, p.e, p.heads, True)


def _block(p: Problem) -> int:
    """Elements that enter or leave the block: memory, weights, shared queries, context."""
    return p.b * p.length * p.e + 4 * p.e**2 + p.c * p.e + p.b * p.c * p.e


def _between(p: Problem, form: str) -> int:
    """Elements between the projections and the fused part, written once and read once."""
    if form == "plain":
        return 2 * (p.c * p.e + 2 * p.b * p.length * p.e + p.b * p.c * p.e)
    return 2 * (p.heads * p.c * p.e + p.b * p.heads * p.c * p.e) + p.b * p.length * p.e


def classifier(p: Problem) -> Work:
    """Label features and weights in, logits out; backward reads both and writes both gradients."""
    elements = p.b * p.c * p.e + p.c * p.e
    return Work(bytes=3 * elements * ELEMENT + 2 * p.b * p.c * ELEMENT)


def bank(p: Problem) -> Work:
    """Labels and scores in; the features of active pairs (at most: those above the threshold) in, their slots out."""
    return Work(bytes=p.b * p.c * (4 + ELEMENT) + p.b * p.labels * p.e * (ELEMENT + 4))


def dense(p: Problem) -> Work:
    """SSCL without compaction: every row against every row, the float32 matrix written and read once per pass."""
    return Work(6 * p.rows**2 * p.d, 0, 4 * p.rows**2 * 4 + 4 * p.rows * p.d * ELEMENT)


OPS: dict[str, Callable[[Problem], Work]] = {
    "compact": compact,
    "sscl": sscl,
    "sscl backward": sscl_backward,
    "mlc": mlc,
    "mlc backward": mlc_backward,
    "pscl": pscl,
    "pscl backward": pscl_backward,
    "asl, both passes": asl,
    "zlpr, both passes": zlpr,
    "two_way, both passes": zlpr,
    "label_attention": label_attention,
    "label_attention backward": label_attention_backward,
    "group_classifier, both passes": classifier,
    "bank_update": bank,
    "sscl dense, both passes": dense,
}
# Labels an image: COCO's and Visual Genome's averages; for OpenImages's classes a round assumption.
SETS = {"COCO": (80, 2.9), "VG500": (500, 13.0), "OpenImages": (9605, 8.0)}
BATCHES = (32, 256, 1024, 4096)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def held_by(count: Callable[[Problem], Work], p: Problem) -> float:
    """Bytes that an op's tensors, or the dense form's matrix, take at once."""
    if count is dense:
        return float(p.rows**2 * 4)
    if count in (compact, asl, zlpr):
        return 0.0
    if count in (mlc, mlc_backward):
        return float(p.b * p.v * p.d * ELEMENT * 3)
    if count in (label_attention, label_attention_backward):
        return float((_block(p) + _between(p, _form(p))) * ELEMENT)
    if count is classifier:
        return float(2 * p.b * p.c * p.e * ELEMENT)
    if count is bank:
        return float(p.b * p.c * p.e * (ELEMENT + 4))
    return float(p.rows * p.d * ELEMENT * 2)


def report() -> str:
    """The text of docs/roofline.md."""
    lines = [
        "# Roofline on paper",
        "",
        "**Predicted, not measured**: made by `python -m benchmarks.roofline` from counts and data-sheet rates",
        "(bfloat16, V=2, D=1024; attention of width E=2048, 4 heads, 196 positions, with its projections, in the",
        "form with fewer operations). A bound is the time that no version can beat; below about 10 us a launch",
        "costs more than the bound. `n/a`: the tensors that the op needs do not fit the part's memory. The dense form",
        "is SSCL over all `B V C` rows with the inactive ones masked, without compaction.",
        "",
        "| shape | B | N active | op | GFLOP | MB | " + " | ".join(part.name for part in PARTS) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(PARTS),
    ]
    for name, (classes, labels) in SETS.items():
        for batch in BATCHES:
            problem = Problem(name, batch, classes, labels)
            for op, count in OPS.items():
                work = count(problem)
                held = held_by(count, problem)
                cells = []
                for part in PARTS:
                    seconds, unit = work.seconds(part)
                    cells.append("n/a" if held > part.capacity else f"{duration(seconds)} ({unit})")
                flops = (work.matrix + work.double) / 1e9
                sizes = f"{name} C={classes} | {batch} | {problem.active}"
                counts = f"{flops:.3g} | {work.bytes / 1e6:.3g}"
                lines.append(f"| {sizes} | {op} | {counts} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    REPORT.write_text(report())
    print(REPORT)
