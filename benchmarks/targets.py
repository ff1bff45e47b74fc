"""``python -m benchmarks.targets benchmarks.json``: README's table of a run, what each row is meant to reach beside it.

A target is a ratio, the peer's time over ours, on processors with AVX-512 and AVX512_BF16; it says what was aimed at,
not what was reached: the column beside it does.
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
    Target('ASL, `backend="torch"`', "asl", "plain", 1.0, "sadcl torch"),
    Target("linear layer, 2048 to 2048", "linear 2048 x 2048", ("MKL", "oneDNN"), 0.97),
    Target("linear layer, 2048 to 8192", "linear 2048 x 8192", ("MKL", "oneDNN"), 0.97),
    Target("head + three losses + bank, B 8", "head 8", "plain torch modules", 1.5),
)


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _line(target: Target, row: Row) -> str:
    names = (target.peer,) if isinstance(target.peer, str) else target.peer
    best = min((name for name in names if name in row.timings), key=lambda name: row.timings[name].median)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="benchmarks.json")
    print(table(load(parser.parse_args(arguments).run)))


if __name__ == "__main__":
    main()
