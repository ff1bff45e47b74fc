"""``python -m tests.ptx.report OUTCOMES``: execute every case and write docs/gpu_executed.md.

OUTCOMES is the file that ``python -m tests.ptx.mutants OUTCOMES`` made.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tests.ptx.cases import PRODUCTS, TRITON, cases_of, check

_KINDS = ("bf16", "fp32", "fp64", "tf32")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu_executed.md"
HEAD = """# Triton kernels, compiled for sm_80 and executed

Executed on a CPU, not on a GPU, and timed nowhere: Triton compiles each launch to PTX for sm_80 with the tiles that
ship, and `tests/ptx` (README.md there) executes that text instruction by instruction on the very tensors of the
op. What `ptxas` makes of the PTX is not executed. Made with Triton {triton} by

    python -m tests.ptx.mutants outcomes.jsonl 2 && python -m tests.ptx.report outcomes.jsonl

CI runs `SADCL_EXECUTE_PTX=1 pytest tests/ptx`; `-m slow` adds float16, float64, tf32, tf32x3, the other tiles of the
table and more planted faults; `SADCL_EXECUTE_PTX=1 pytest tests/interpreted` executes what the interpreter runs
otherwise (patterns of labels, strides, dropout, padding, golden numbers, offsets past 2^31).

## What was executed

{cases} cases at one less, exactly, and one more than a tile in every direction, with several ragged tiles on a part
of one processor, and with rows longer than a step: results and gradients are within the budget of the float64 oracle
in every one, all that an op gives out is written in full, and no launch reads or writes outside of the elements of
its tensors, uses a value that is none, reads a copy that was not waited for, races, or hangs. The budget counts the
roundings of the kernels: of operands in tf32, of weights of a product in the operands' dtype, of chains of sums, of
constants, and the errors that PTX documents for `ex2.approx`, `lg2.approx` and `div.full`, which are drawn.

`executed` is the share of a kernel's instructions that some lane of some case executed, over its compiled versions.

| kernel | operands | launches | versions | instructions | executed |
|---|---|---|---|---|---|
"""
FAULTS = """
## Planted faults

One instruction of the compiled kernel is another: a product without its operand, or with two registers of operands
swapped; a transposed `ldmatrix`; `sub` for `add`, `le` for `lt`, and so on; an addend, a store, a wait or a barrier
left out; another lane of a shuffle; an address one access further; a guard or a selection turned round. {total} were
drawn from the instructions that are executed (seed 0, {per_class} of a class in a kernel of
{ops}); each is held against the cases that run its compiled version.

| class | planted | seen | no bit of any result changes | changed, within the budget |
|---|---|---|---|---|
"""
AFTER = """
{share} of those that change any bit of any result are seen, by: {by}.

### What was not seen

"No effect": not a bit of results or gradients changes in any case, nor does any report come. Most are equivalent:
bounds of loops that come out alike (`lt` for `le` beyond the last tile), guards that let lanes store what another
lane stores too, barriers that Triton puts between accesses that do not meet, first additions to zero, halves of
shuffles over lanes that hold the same number, pivots of an exponential. Some are not, and no case tells: loops over
more rows than the cases have. "Within the budget": low words of float64 sums (norms, the temperature's gradient)
and single products of many that 16-bit operands already blur.

| kernel | operands | fault | source | verdict |
|---|---|---|---|---|
"""


def executed() -> tuple[list[str], int]:
    """Rows of the first table, and the number of cases."""
    versions: dict[tuple[str, str, str], dict[int, Any]] = defaultdict(dict)
    launches: Counter[tuple[str, str, str]] = Counter()
    cases = 0
    for op, kind in [(name, kind) for name in TRITON for kind in (("bf16",) if name == "mlc" else _KINDS)]:
        if kind.startswith("tf32") and op not in PRODUCTS:
            continue
        for case in cases_of(op, kind):
            cases += 1
            for name, result in check(case).results:
                key = op, name, kind
                launches[key] += 1
                known = versions[key]
                place = id(result.code)
                known[place] = result.hits if place not in known else known[place] + result.hits
    rows = []
    for (op, name, kind), known in sorted(versions.items()):
        sizes = [len(hits) for hits in known.values()]
        share = sum(int((hits > 0).sum()) for hits in known.values()) / sum(sizes)
        rows.append(
            f"| `{op}.{name}` | {kind} | {launches[op, name, kind]} | {len(sizes)} | {max(sizes)} | {share:.1%} |"
        )
    return rows, cases


def planted(outcomes: list[dict[str, str]]) -> list[str]:
    """The part on faults."""
    classes: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        classes[outcome["what"].split(":")[0]][outcome["verdict"]] += 1
    rows = []
    for name, verdicts in sorted(classes.items()):
        total, none, within = sum(verdicts.values()), verdicts["no effect"], verdicts["unseen"]
        rows.append(f"| {name} | {total} | {total - none - within} | {none} | {within} |")
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    none, within, total = verdicts.pop("no effect", 0), verdicts.pop("unseen", 0), len(outcomes)
    rows.insert(0, f"| all | {total} | {total - none - within} | {none} | {within} |")
    per_class = max(Counter((o["op"], o["kind"], o["kernel"], o["what"].split(":")[0]) for o in outcomes).values())
    by = ", ".join(f"{count} {kind}" for kind, count in verdicts.most_common())
    share = f"{(total - none - within) / max(total - none, 1):.1%}"
    survivors = [
        f"| `{o['op']}.{o['kernel']}` | {o['kind']} | {o['what']} | {o['source']} | "
        f"{'no effect' if o['verdict'] == 'no effect' else 'within the budget'} |"
        for o in outcomes
        if o["verdict"] in ("no effect", "unseen")
    ]
    ops = ", ".join(sorted({outcome["op"] for outcome in outcomes}))
    faults = FAULTS.format(total=total, per_class=per_class, ops=ops) + "\n".join(rows) + "\n"
    return [faults, AFTER.format(share=share, by=by) + "\n".join(survivors)]


def main() -> None:
    """Write the page."""
    import triton

    rows, cases = executed()
    outcomes = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    parts = [HEAD.format(triton=triton.__version__, cases=cases) + "\n".join(rows), *planted(outcomes)]
    PAGE.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
