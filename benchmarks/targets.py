"""``python -m benchmarks.targets [--readme] benchmarks.json``: a run's rows, what each is meant to reach beside it.

With ``--readme`` it is the table under README's heading "Speed", of which docs/site draws a picture. A target is a
ratio, the peer's time over ours, on processors with AVX-512 and AVX512_BF16; it says what was aimed at, not what was
reached: the column beside it does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Row
from benchmarks.results import Results, load


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
        work: how README calls it.
        row: the row's name in a run.
        peer: the entry that it is held against; several: the fastest of them.
        must: the peer's time over ours.
        entry: which of ours.
    """

    work: str
    row: str
    peer: str | tuple[str, ...]
    must: float
    entry: str = "sadcl"


_COMPILED = "compacted, torch.compile"
_FORMS = ("folded, plain torch", "plain, plain torch", "SDPA", "nn.MultiheadAttention")
TARGETS = (
    Target("label attention, C 80, bfloat16, forward", "label_attention coco bfloat16 forward", _FORMS, 0.97),
    Target("... and backward", "label_attention coco bfloat16 forward + backward", _FORMS, 1.1),
    Target("label attention, C 80, float32", "label_attention coco forward + backward", _FORMS, 1.0),
    Target("label attention, C 500", "label_attention vg500 forward + backward", "SDPA", 1.25),
    Target("SSCL, 8,058 rows, bfloat16", "sscl large bfloat16", "sadcl, float32", 1.6),
    Target("SSCL, 8,058 rows", "sscl large", _COMPILED, 1.0),
    Target("SSCL, COCO", "sscl coco", _COMPILED, 2.5),
    Target("SSCL, tiny", "sscl tiny", _COMPILED, 2.0),
    Target("PSCL, COCO", "pscl coco", "vectorised, torch.compile", 2.2),
    Target("PSCL, bfloat16", "pscl bfloat16", "sadcl, float32", 1.0),
    Target("PSCL, float16", "pscl float16", "sadcl, float32", 1.0),
    Target("SSCL + PSCL, one op", "dual coco", "torch.compile", 3.2),
    Target("ASL [256, 9605]", "asl", "plain, torch.compile", 8.0),
    Target("ASL, bfloat16", "asl bfloat16", "sadcl, float32", 1.0),
    Target("ASL, float16", "asl float16", "sadcl, float32", 1.0),
    Target('SSCL, `backend="torch"`', "sscl coco", "compacted", 1.0, "sadcl torch"),
    Target('PSCL, `backend="torch"`', "pscl coco", "vectorised", 1.0, "sadcl torch"),
    Target('ASL, `backend="torch"`', "asl", "plain formula", 1.0, "sadcl torch"),
    Target("linear layer, 2048 to 2048", "linear 2048 x 2048", ("MKL", "oneDNN"), 0.97),
    Target("linear layer, 2048 to 8192", "linear 2048 x 8192", ("MKL", "oneDNN"), 0.97),
    Target("head + three losses + bank, B 8", "head 8", "plain torch modules", 1.5),
)


@dataclass(frozen=True)
class Line:
    """A line of README's table: ours beside the slow form that is usual, and beside the best that plain torch does.

    Attributes:
        work: first cell.
        row: the row's name in a run.
        naive: entries of which the fastest goes to the second column; those that a run lacks are passed over.
        best: ... to the third.
        entry: which of ours.
    """

    work: str
    row: str
    naive: tuple[str, ...]
    best: tuple[str, ...]
    entry: str = "sadcl"


_SSCL = ("compacted", "compacted, class sums", _COMPILED)
_PSCL = ("vectorised", "vectorised, torch.compile")
_PLAIN = ("plain formula", "plain, torch.compile")
_TORCH = ("SDPA", "folded, plain torch", "plain, plain torch")
_BLOCK = "label attention block, E 2048, 4 heads, L 196, B 8"
README = (
    Line("SSCL, B32 V2 C80 D1024, 2.9 labels/image (`bench_sscl coco`)", "sscl coco", ("dense N x N",), _SSCL),
    Line('... `backend="torch"`', "sscl coco", ("dense N x N",), _SSCL, "sadcl torch"),
    Line("SSCL, 8,058 active rows, D 1,024, 500 classes (`bench_sscl large`)", "sscl large", ("compacted",), _SSCL),
    Line("... bfloat16; the floor is float32's", "sscl large bfloat16", (), ("compacted, torch.compile, bfloat16",)),
    Line("SSCL, B4 V2 C20 D64 (`bench_sscl tiny`)", "sscl tiny", ("dense N x N",), _SSCL),
    Line("SSCL + PSCL in one op, B32 V2 C80 D1024 (`bench_dual`)", "dual coco", ("eager, class sums",),
         ("torch.compile",)),
    Line("PSCL, [32, 80, 1024] (`bench_pscl`)", "pscl coco", ("loop over classes",), _PSCL),
    Line("... bfloat16", "pscl bfloat16", (), _PSCL[1:]),
    Line("... float16", "pscl float16", (), _PSCL[1:]),
    Line('... `backend="torch"`', "pscl coco", ("loop over classes",), _PSCL, "sadcl torch"),
    Line("ASL, [256, 9605] (`bench_asl`)", "asl", ("plain formula",), _PLAIN[1:]),
    Line("... bfloat16", "asl bfloat16", (), _PLAIN[1:]),
    Line("... float16", "asl float16", (), _PLAIN[1:]),
    Line('... `backend="torch"`', "asl", ("plain formula",), _PLAIN[1:], "sadcl torch"),
    Line("SupCon, [4096, 128], 100 classes (`bench_supcon`)", "supcon", ("pytorch-metric-learning",), _PLAIN),
    Line("multi-label SupCon, [4096, 128], 80 classes, `any` (`bench_mlc`)", "mlc any 4096", ("eager, dense",),
         ("eager, leanest", "dense, torch.compile")),
    Line("... 256 anchors, 65,536 keys without gradient", "mlc queue 256 x 65536", (), ("eager, leanest",)),
    Line(f"{_BLOCK} (`bench_label_attention`): C 80, shared queries", "label_attention coco forward + backward",
         ("nn.MultiheadAttention",), _TORCH),
    Line("... bfloat16", "label_attention coco bfloat16 forward + backward", ("nn.MultiheadAttention",), _TORCH),
    Line("... bfloat16, forward alone", "label_attention coco bfloat16 forward", ("nn.MultiheadAttention",), _TORCH),
    Line("... C 500", "label_attention vg500 forward + backward", ("nn.MultiheadAttention",), _TORCH),
    Line("linear layer, 1,568 x 2,048 to 2,048, forward (`bench_linear`)", "linear 2048 x 2048", ("MKL",), ("oneDNN",)),
    Line("... to 8,192", "linear 2048 x 8192", ("MKL",), ("oneDNN",)),
    Line("head + three losses + bank + backward, published sizes, B 8 (`bench_head 8`)", "head 8", (),
         ("plain torch modules",)),
    Line("average precision, 40,504 x 80 (`bench_average_precision`)", "average_precision", ("scikit-learn",),
         ("torchmetrics",)),
)  # fmt: skip


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _fastest(row: Row, names: tuple[str, ...]) -> str | None:
    there = [name for name in names if name in row.timings]
    return min(there, key=lambda name: row.timings[name].median, default=None)


def _line(target: Target, row: Row) -> str:
    names = (target.peer,) if isinstance(target.peer, str) else target.peer
    best = _fastest(row, names)
    if best is None:
        return f"| {target.work} | – | none of {', '.join(names)} ran | – | {target.must:g}x | – |"
    ours, peer = row.timings[target.entry].median, row.timings[best].median
    floor = "–" if row.floor_ms is None else _ms(row.floor_ms)
    return (
        f"| {target.work} | {_ms(ours)} | {best}: {_ms(peer)} | **{peer / ours:.2f}x** | {target.must:g}x | {floor} |"
    )


def table(results: Results) -> str:
    """The run's rows that have a target, as markdown; what the run lacks is named under it."""
    rows = {row.name: row for row in results.rows}
    lines = [f"{results.title()}; {results.rates()}.", ""]
    lines += ["| work | ours | peer | peer / ours | aim | floor |", "|---|---|---|---|---|---|"]
    lines += [_line(target, rows[target.row]) for target in TARGETS if target.row in rows]
    if missing := sorted({target.row for target in TARGETS} - rows.keys()):
        lines += ["", f"Not in this run: {', '.join(missing)}."]
    return "\n".join(lines)


def readme(results: Results) -> str:
    """README's table of a run, as markdown; rows that the run lacks are named under it."""
    rows = {row.name: row for row in results.rows}

    def line(of: Line) -> str:
        row = rows[of.row]
        ours = row.timings[of.entry].median

        def beside(names: tuple[str, ...]) -> str:
            name = _fastest(row, names)
            if name is None:
                return "–"
            median = row.timings[name].median
            return f"{name}: {_ms(median)}, **{median / ours:.{0 if median > 100 * ours else 2}f}x**"

        floor = "–" if row.floor_ms is None else _ms(row.floor_ms)
        return f"| {of.work} | {_ms(ours)} | {beside(of.naive)} | {beside(of.best)} | {floor} |"

    lines = [f"{results.title()}; {results.rates()}.", ""]
    lines += ["| work | ours | dense or naive form | best torch form | floor |", "|---|---|---|---|---|"]
    lines += [line(of) for of in README if of.row in rows]
    if missing := sorted({of.row for of in README} - rows.keys()):
        lines += ["", f"Not in this run: {', '.join(missing)}."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="benchmarks.json")
    parser.add_argument("--readme", action="store_true", help="README's table instead, without targets")
    options = parser.parse_args(arguments)
    print((readme if options.readme else table)(load(options.run)))


if __name__ == "__main__":
    main()
