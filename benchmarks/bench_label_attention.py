"""Label attention block, published width: ours against nn.MultiheadAttention, SDPA and the folded form in plain torch.

Floor, E 2048, 4 heads, C 80, L 196, B 8, shared queries, multiply-accumulates of the forward (the backward is twice
that): nn.MultiheadAttention 19.0 G (it projects every image's queries), plain 16.7 G, folded 8.1 G. So folding is worth
2.35 times at the same fraction of the FMA peak; the rest is the products' speed, printed beside each result in GFLOP/s.

``python -m benchmarks.bench_label_attention [case ...]`` interleaves the entries;
``pytest benchmarks/bench_label_attention.py`` gives one timing each. Every entry is checked first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import harness
from sadcl.attention import LabelAttention
from sadcl.functional.label_attention import choose_form, forward_macs

Entry = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one attention block."""

    classes: int = 80
    shared: bool = True
    batch: int = 8
    length: int = 196
    width: int = 2048
    heads: int = 4
    dtype: torch.dtype = torch.float32

    def macs(self) -> int:
        sizes = (self.batch, self.classes, self.length, self.width, self.heads, self.shared)
        return forward_macs(choose_form(*sizes), *sizes)


CASES = {
    "coco": Case(),
    "coco per image": Case(shared=False),
    "vg500": Case(classes=500),
    "vg500 per image": Case(classes=500, shared=False),
    "coco bfloat16": Case(dtype=torch.bfloat16),
}


class Block:
    """One block's parameters, and the ways to run it."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.ours = LabelAttention(case.width, case.heads).to(case.dtype)
        self.mha = nn.MultiheadAttention(case.width, case.heads, batch_first=True).to(case.dtype)
        self.mha.load_state_dict(self.ours.state_dict())
        query = torch.randn(*(() if case.shared else (case.batch,)), case.classes, case.width)
        memory, pos = torch.randn(case.batch, case.length, case.width), torch.randn(case.length, case.width)
        self.query, self.memory, self.pos = (x.to(case.dtype) for x in (query, memory, pos))

    def entries(self) -> dict[str, tuple[nn.Module, Entry]]:
        torch_forms = {
            f"{form}, plain torch": LabelAttention(self.case.width, self.case.heads, form=form, backend="torch")
            for form in ("folded", "plain")
        }
        for module in torch_forms.values():
            module.to(self.case.dtype).load_state_dict(self.ours.state_dict())
        return {
            "nn.MultiheadAttention": (self.mha, self._mha),
            "SDPA": (self.mha, self._sdpa),
            **{name: (m, lambda q, x, p, m=m: m(q, x, p)[0]) for name, m in torch_forms.items()},
            "sadcl": (self.ours, lambda q, x, p: self.ours(q, x, p)[0]),
        }

    def _mha(self, query: Tensor, memory: Tensor, pos: Tensor) -> Tensor:
        return self.mha(query.expand(self.case.batch, -1, -1), memory + pos, memory)[0]

    def _sdpa(self, query: Tensor, memory: Tensor, pos: Tensor) -> Tensor:
        """The best form with scaled_dot_product_attention: shared queries projected once, no weights."""
        return self._around(F.scaled_dot_product_attention, query, memory, pos)

    def flex(self, query: Tensor, memory: Tensor, pos: Tensor) -> Tensor:
        """The same with FlexAttention, which has a backward on GPUs alone."""
        return self._around(torch.compile(flex_attention), query, memory, pos)

    def _around(self, attend: Callable[..., Tensor], query: Tensor, memory: Tensor, pos: Tensor) -> Tensor:
        m, heads = self.mha, self.case.heads
        projected = (
            F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(-3, -2).expand(self.case.batch, -1, -1, -1)
            for x, w, b in zip(
                (query, memory + pos, memory), m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3), strict=True
            )
        )
        return m.out_proj(attend(*projected).transpose(1, 2).flatten(2))

    def step(self, name: str, backward: bool) -> Callable[[], object]:
        """One forward, or forward and backward for query, memory and all parameters."""
        module, run = self.entries()[name]
        if not backward:

            def forward() -> Tensor:
                with torch.no_grad():
                    return run(self.query, self.memory, self.pos)

            return forward
        leaves = [self.query.requires_grad_(), self.memory.requires_grad_(), *module.parameters()]
        upstream = torch.randn(self.case.batch, self.case.classes, self.case.width).to(self.case.dtype)
        return lambda: torch.autograd.grad(run(self.query, self.memory, self.pos), leaves, upstream)

    def gate(self, name: str) -> None:
        """Raise if the entry is not the block."""
        with torch.no_grad():
            got, want = (self.entries()[n][1](self.query, self.memory, self.pos) for n in (name, "SDPA"))
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if got.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
        torch.testing.assert_close(got, want, **tolerance)


NAMES = ("nn.MultiheadAttention", "SDPA", "folded, plain torch", "plain, plain torch", "sadcl")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_label_attention(benchmark: Callable[..., object], case: str, name: str, backward: bool) -> None:
    block = Block(CASES[case])
    block.gate(name)
    benchmark(block.step(name, backward))


def main(cases: Sequence[str] = ()) -> None:
    for name in cases or CASES:
        case, block = CASES[name], Block(CASES[name])
        for entry in NAMES:
            block.gate(entry)
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            harness.compare(
                f"label_attention {name} {what}",
                f"{case}, {what}",
                {entry: block.step(entry, backward) for entry in NAMES},
                flops=2.0 * case.macs() * (3 if backward else 1),
                peak=harness.bfloat16_rate() if case.dtype == torch.bfloat16 else None,
                rounds=6,
                warmup=1,
                slow=0.0,
                slow_every=1,
            )


if __name__ == "__main__":
    start = time.perf_counter()
    main(sys.argv[1:])
    print(f"({time.perf_counter() - start:.0f} s)")
