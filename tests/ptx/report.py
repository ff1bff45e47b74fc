"""``python -m tests.ptx.report OUTCOMES``: execute every case and write docs/gpu_executed.md.

OUTCOMES is the file that ``python -m tests.ptx.mutants OUTCOMES`` made.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ptx.budgets import FLOAT32, check
from tests.ptx.cases import PRODUCTS, TRITON, cases_of

_KINDS = ("bf16", "fp32", "fp64", "tf32")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu_executed.md"
HEAD = """# Triton kernels, compiled for sm_80 and executed

Executed on a CPU, not on a GPU, and timed nowhere: Triton compiles each launch to PTX for sm_80 with the tiles that
ship, and `tests/ptx` (README.md there) executes that text instruction by instruction on the very tensors of the
op. What `ptxas` makes of the PTX is not executed. Made with Triton {triton} by

    python -m tests.ptx.mutants outcomes.jsonl 2 && python -m tests.ptx.report outcomes.jsonl

in about eight minutes of one core. Ops may be run apart (`outcomes.jsonl 2 sscl:bf16 pscl`), each appending its lines,
and were.

CI runs `SADCL_EXECUTE_PTX=1 pytest tests/ptx`; `-m slow` adds float16, float64, tf32, tf32x3, the other tiles of the
table and more planted faults; `SADCL_EXECUTE_PTX=1 pytest tests/interpreted` executes what the interpreter runs
otherwise (patterns of labels, strides, dropout, padding, golden numbers, offsets past 2^31).

Of the 830 tests that `-m slow` adds, CUDA's among them, 805 ran on 2026-11-26, with Triton 3.8.0, and passed:
all 786 but those of planted faults in each of Triton's kernels, and of these the 19 of `asl`, `bank_update`, `compact`,
`group_classifier`, `group_pscl` and label attention; the faults below are another sample.

## What was executed

{cases} cases at one less, exactly, and one more than a tile in every direction, with several ragged tiles on a part
of one processor, and with rows longer than a step: results and gradients are within the budget of the float64 oracle
in every one, all that an op gives out is written in full, and no launch reads or writes outside of the elements of
its tensors, uses a value that is none, reads a copy that was not waited for, races, or hangs. The budget counts the
roundings of the kernels: of operands in tf32, of weights of a product in the operands' dtype, of chains of sums, of
constants, and the errors that PTX documents for `ex2.approx`, `lg2.approx` and `div.full`, which are drawn. What is
float64 up to its last rounding (PSCL's losses) or is kept so for the backward (norms, PSCL's scores and log-sum-exps,
on ties those of ZLPR and the two-way loss) has a few roundings of float64, and gradients that are float32 until they
are rounded to 16 bits are held element by element. `group_pscl` launches PSCL's kernels.

`executed` is the share of a kernel's instructions that some lane of some case executed, over its compiled versions.

| kernel | operands | launches | versions | instructions | executed |
|---|---|---|---|---|---|
"""
FAULTS = """
## Planted faults

One instruction of the compiled kernel is another: a product without its operand, or with two registers of operands
swapped; a transposed `ldmatrix`; `sub` for `add`, `le` for `lt`, and so on; an addend, a store, a wait or a barrier
left out; another lane of a shuffle; an address one access further; a guard or a selection turned round. {total} were
drawn from the instructions that are executed (seed 0, up to {per_class} of a class in a kernel); each is held against
the cases that run its compiled version. `no effect`: not a bit of losses, gradients or kept statistics changes in any
case, nor does any report come.

**{share} of those that have an effect are seen**: {by}.

| op | operands | planted | seen | changed, within the budget | no effect | seen of those with an effect |
|---|---|---|---|---|---|---|
{ops}

| class | planted | seen | changed, within the budget | no effect | seen of those with an effect |
|---|---|---|---|---|---|
{classes}
"""
AFTER = """
### Changed, within the budget

How far the largest change goes, of the largest number of a result; of 1 where a result is 0.

| kernel | operands | fault | source | what changes | reason |
|---|---|---|---|---|---|
{unseen}

### No effect

{reasons}

| kernel | operands | fault | source | times |
|---|---|---|---|---|
{equivalent}
"""
NO_EFFECT = """Most are equivalent: bounds of loops and masks that come out alike (`lt` for `le` beyond the last tile),
guards and selections between sides that hold the same number, barriers that Triton puts between accesses that do not
meet, first additions to zero, shuffles over lanes that hold the same number, branches of `exp` and `log` for infinities
and subnormal numbers that their callers never pass. Some are not, and no case tells: loops over more rows than the
cases have. Barriers and waits among them are proven to be so: a race, or a read that was not waited for, is reported
whatever came of it."""
# Changes of a result by less than this, of its largest number, and why nothing tells.
SMALL = (
    (1e-14, "the last bits of float64: another pivot, or order of a sum, is as good"),
    (1e-9, "last bits of a float64 sum of what float32 has rounded"),
    (1e-6, "a bit or two of float32's 24, where several of its roundings meet"),
)


def executed() -> tuple[list[str], int]:
    """Rows of the first table, and the number of cases."""
    versions: dict[tuple[str, str, str], dict[int, Any]] = defaultdict(dict)
    launches: Counter[tuple[str, str, str]] = Counter()
    cases = 0
    for op, kind in itertools.product(TRITON, _KINDS):
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


def counted(outcomes: list[dict[str, str]], key: Callable[[dict[str, str]], tuple[str, ...]]) -> str:
    """Rows of a table: of all outcomes, then of those that share a key."""
    groups: dict[tuple[str, ...], Counter[str]] = {}
    every = ("all", *[""] * (len(key(outcomes[0])) - 1))
    for outcome in outcomes:
        for name in (every, key(outcome)):
            groups.setdefault(name, Counter())[outcome["verdict"]] += 1
    rows = []
    for name, verdicts in groups.items():
        total, none, within = sum(verdicts.values()), verdicts["no effect"], verdicts["unseen"]
        seen = total - none - within
        share = f"{seen / (seen + within):.1%}" if seen + within else "-"
        rows.append(f"| {' | '.join(name)} | {total} | {seen} | {within} | {none} | {share} |")
    return "\n".join([rows[0], *sorted(rows[1:])])


def reason(outcome: dict[str, str]) -> str:
    """Why a fault that changes something is not seen, by how much that is."""
    narrow = outcome["kind"] in ("bf16", "fp16") and "grad" in outcome["moved"] and outcome["op"] not in FLOAT32
    if narrow or outcome["kind"] == "tf32":
        return "roundings of the products' narrow operands are larger"
    by = max(float(part.rsplit(" ", 1)[1]) for part in outcome["moved"].split(", "))
    return next((why for bound, why in SMALL if by <= bound), "the budget's draws are larger")


def planted(outcomes: list[dict[str, str]]) -> list[str]:
    """The part on faults."""
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    none, within, total = verdicts.pop("no effect", 0), verdicts.pop("unseen", 0), len(outcomes)
    faults = FAULTS.format(
        total=total,
        per_class=max(Counter((o["op"], o["kind"], o["kernel"], class_of(o)) for o in outcomes).values()),
        share=f"{(total - none - within) / max(total - none, 1):.1%}",
        by=", ".join(f"{count} {kind}" for kind, count in verdicts.most_common()),
        ops=counted(outcomes, lambda o: (f"`{o['op']}`", o["kind"])),
        classes=counted(outcomes, lambda o: (class_of(o),)),
    )
    unseen = [
        f"| `{o['op']}.{o['kernel']}` | {o['kind']} | {o['what']} | {o['source']} | {o['moved']} | {reason(o)} |"
        for o in outcomes
        if o["verdict"] == "unseen"
    ]
    kinds: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for o in outcomes:
        if o["verdict"] == "no effect":
            kinds[f"`{o['op']}.{o['kernel']}`", o["what"], o["source"]][o["kind"]] += 1
    equivalent = [
        f"| {kernel} | {', '.join(of)} | {what} | {source} | {sum(of.values())} |"
        for (kernel, what, source), of in sorted(kinds.items())
    ]
    after = AFTER.format(unseen="\n".join(unseen), reasons=NO_EFFECT, equivalent="\n".join(equivalent))
    return [faults, after]


def class_of(outcome: dict[str, str]) -> str:
    """The class of a fault."""
    return outcome["what"].split(":")[0]


def main() -> None:
    """Write the page."""
    import triton

    rows, cases = executed()
    outcomes = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    parts = [HEAD.format(triton=triton.__version__, cases=cases) + "\n".join(rows), *planted(outcomes)]
    PAGE.write_text("\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main()
