"""Every op with a Triton kernel at every edge of its tiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from sadcl.kernels import _launch, _tiles

from sadcl.ops import compact
from sadcl.ops._library import OPS
from sadcl.testing import make_features
from sadcl.testing.examples import EXAMPLES, Maker, Size
from sadcl.testing.oracles import ORACLES
from tests.ptx.launching import ARCH

TRITON = sorted(name for name, op in OPS.items() if "triton" in op.backends and name in EXAMPLES and name in ORACLES)
KINDS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "fp64": (torch.float64, "ieee"),
}
OFTEN = ("bf16", "fp32")  # in CI, which has minutes for this; of MLC bf16 alone
PRODUCTS = ("sscl", "label_attention_core")  # ops with matrix products, which tf32 and the tables concern


@dataclass(frozen=True)
class Case:
    """An op's example ``number``, how its operands are multiplied, and on which part.

    ``tile`` is the number of the tile in the table, 0 the default; ``processors`` of the part, if not all of them.
    ``ties``: every logit is that far on the wrong side, so that all exponentials of a sum are exactly 1.
    """

    op: str
    kind: str
    size: Size
    number: int
    tile: int = 0
    processors: int | None = None
    ties: float = 0.0

    def __str__(self) -> str:
        s = self.size
        shape = "-".join(map(str, (s.b, s.v, s.c, s.d, s.e, s.length, s.heads)))
        return (
            f"{self.op}-{self.kind}-{shape}-{self.number}"
            + (f"-tile{self.tile}" if self.tile else "")
            + (f"-on{self.processors}" if self.processors else "")
            + (f"-ties{self.ties:g}" if self.ties else "")
        )

    def inputs(self) -> Any:
        """The example; dropout is left to the tests that know its mask, unnormalised rows to SupCon's."""
        x = list(EXAMPLES[self.op](Maker(self.size, KINDS[self.kind][0])))[self.number]
        if self.op == "sscl":  # as many active rows as there are images, at places drawn among three times as many
            places = torch.randperm(3 * self.size.b, generator=torch.Generator().manual_seed(2))[: self.size.b]
            labels = torch.zeros(3 * self.size.b).index_fill_(0, places, 1.0).view(self.size.b, 3)
            pairs, class_ptr, _ = compact.compact(labels, None, "torch")
            x = x._replace(features=make_features(self.size.b, self.size.v, 3, self.size.d, dtype=x.features.dtype),
                           pairs=pairs, class_ptr=class_ptr)  # fmt: skip
        if self.ties:
            x = x._replace(logits=torch.where(x.labels == 1, -self.ties, self.ties).to(x.logits.dtype))
        return x._replace(dropout=0.0, seed=None) if "dropout" in x._fields else x


def examples_of(op: str) -> int:
    """How many examples an op has that the oracle knows."""
    size = Size(b=1, v=1, c=1, d=1, e=2, length=1, heads=1)
    found = list(EXAMPLES[op](Maker(size, torch.float32)))
    return len([x for x in found if getattr(x, "normalize", True) or op != "sscl"])


@contextlib.contextmanager
def precise(case: Case) -> Iterator[None]:
    """With the case's precision and tile."""
    original = _tiles.candidates

    def picked(op: str, part: Any, kind: str) -> tuple[Any, ...]:
        rows = original(op, part, kind)
        return rows[min(case.tile, len(rows) - 1) :]

    tiles = mock.patch.object(_tiles, "candidates", picked) if case.tile else contextlib.nullcontext()
    with mock.patch.dict("os.environ", {"SADCL_TRITON_PRECISION": KINDS[case.kind][1]}), tiles:
        yield


def cases_of(op: str, kind: str, tile: int = 0) -> Iterator[Case]:
    """All cases of an op: at the edges of its tiles, and one of many tiles on a part of one processor."""
    count, largest = examples_of(op), torch.finfo(KINDS[kind][0]).max
    all_ties = [ties for ties in TIES.get(op, ()) if ties < largest]
    for number in range(count):
        # MLC's weightings share their kernels, and the oracle of some walks over pairs: edges for two of them.
        for size in edges(op, kind, tile) if op != "mlc" or number in (0, count - 1) else ():
            yield Case(op, kind, size, number, tile)
            for ties in all_ties:
                yield Case(op, kind, size, number, tile, ties=ties)
        for size in LARGE.get(op, LARGE[""]):
            yield Case(op, kind, size, number, tile, processors=1)
            for ties in all_ties:
                yield Case(op, kind, size, number, tile, processors=1, ties=ties)


# Logits that are moderate, and so large that a sum of exponentials hangs on its peak.
TIES = {"two_way": (0.75, 2.0**20), "zlpr": (0.75, 2.0**20)}

# Several tiles in every direction, none of them full; then the loops that only long rows, or many of them, go round.
LARGE = {
    "": (
        Size(b=70, v=1, c=9, d=140, e=140, length=7, heads=1),
        Size(b=3, v=1, c=2, d=1100, e=1100, length=7, heads=1),
        Size(b=1100, v=1, c=2, d=5, e=6, length=7, heads=1),
    ),
    "asl": (Size(b=70, v=1, c=9, d=5, e=6, length=7, heads=1), Size(b=3, v=1, c=2100, d=5, e=6, length=7, heads=1)),
    "compact": (
        Size(b=3000, v=1, c=5, d=5, e=6, length=7, heads=1),
        Size(b=20000, v=1, c=3, d=5, e=6, length=7, heads=1),
    ),
    "label_attention_core": (Size(b=3, v=1, c=70, d=20, e=80, length=130, heads=2),),
    "mlc": (
        Size(b=70, v=2, c=9, d=100, e=24, length=7, heads=1),
        Size(b=5, v=2, c=3, d=1100, e=24, length=7, heads=1),
    ),
    "sscl": (
        Size(b=150, v=2, c=3, d=100, e=24, length=7, heads=1),
        Size(b=5, v=2, c=3, d=1100, e=24, length=7, heads=1),
    ),
    "two_way": (
        Size(b=70, v=1, c=140, d=5, e=6, length=7, heads=1),
        Size(b=1100, v=1, c=2, d=5, e=6, length=7, heads=1),
    ),
    "zlpr": (Size(b=70, v=1, c=9, d=5, e=6, length=7, heads=1), Size(b=3, v=1, c=2100, d=5, e=6, length=7, heads=1)),
}


def edges(op: str, kind: str, tile: int = 0) -> Iterator[Size]:
    """Sizes one below, at and one above the edges of a tile."""
    dtype, precision = KINDS[kind]
    of = _tiles.kind_of(dtype, precision)
    small = Size(b=4, v=2, c=3, d=20, e=24, length=7, heads=2)
    if op in ("sscl", "label_attention_core"):
        rows_of_table = _tiles.candidates(op, _launch.PARTS[ARCH], of)
        choice = rows_of_table[min(tile, len(rows_of_table) - 1)]
        for more in (-1, 0, 1):
            rows, width = choice.block_m + more, choice.block_d + more
            if op == "sscl":  # every row active
                yield replace(small, b=rows, v=1, d=width)
                yield replace(small, b=choice.block_n + more, v=1, d=2 * choice.block_d + more)
            else:
                yield replace(small, b=1, c=rows, length=choice.block_n + more, e=32 + 16 * more, heads=1)
        return
    if op == "asl":
        for c in (15, 16, 17, 1023, 1024, 1025):
            yield replace(small, b=2, c=c)
        return
    if op == "compact":
        for b, c in ((1, 2), (31, 33), (32, 32), (33, 31), (127, 9), (128, 8), (129, 8), (600, 5)):
            yield replace(small, b=b, c=c)
        return
    for more in (-1, 0, 1):
        yield replace(small, b=32 + more, c=16 + more, d=64 + more, e=64 + more, length=16 + more, heads=1)
    yield replace(small, b=3, c=2, d=257, e=258)
