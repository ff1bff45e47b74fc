"""Faults planted into compiled kernels, one instruction at a time, and whether the tests see them.

``python -m tests.ptx.mutants FILE`` plants a sample in every kernel; docs/gpu_executed.md has what came of it.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tests.ptx.budgets import budgets_of, hold, ours
from tests.ptx.cases import KINDS, PRODUCTS, TRITON, Case, cases_of, precise
from tests.ptx.launching import Executor, executing
from tests.ptx.launching_cuda import CudaExecutor, executing_cuda
from tests.ptx.ptxemu import Fault, Kernel, opcodes
from tests.ptx.ptxemu.parse import Instruction, Program

LIMIT = 10_000_000  # of a launch; what is not mutated needs a tenth
# An opcode's first words -> what stands instead.
ARITHMETIC = {
    "add.": ("sub.",), "sub.": ("add.",), "mul.lo.": ("add.",), "mul.f": ("add.f",), "mul.rn.f": ("add.rn.f",),
    "min.": ("max.",), "max.": ("min.",), "and.": ("or.",), "or.": ("and.",), "xor.": ("or.",), "shl.b": ("shr.b",),
    "shr.u": ("shl.b",), "shr.s": ("shl.b",), "neg.": ("mov.",), "abs.": ("mov.",), "div.": ("add.",), "bfe.": (),
}  # fmt: skip
COMPARISONS = {"lt": ("le", "ge"), "le": ("lt", "gt"), "gt": ("ge", "le"), "ge": ("gt", "lt"), "eq": ("ne",),
               "ne": ("eq",), "geu": ("gtu", "lt"), "gtu": ("geu", "le"), "ltu": ("leu", "ge"), "leu": ("ltu", "gt"),
               "neu": ("eq",), "equ": ("ne",), "num": ("nan",), "nan": ("num",)}  # fmt: skip
WAITS = ("ld.acquire.", "ld.relaxed.", "ld.volatile.")
DRAWN = ("fp32", "bf16", "fp64", "tf32")


def kinds_drawn(op: str) -> tuple[str, ...]:
    """Kinds of operands in which faults are planted; another op that launches PSCL's kernels has none."""
    return () if op == "group_pscl" else DRAWN if op in PRODUCTS else DRAWN[:3]


@dataclass(frozen=True)
class Mutant:
    """One instruction of a kernel that is another."""

    what: str
    place: int
    instruction: Instruction
    program: Program

    def kernel(self) -> Kernel:
        """The kernel with the fault."""
        code = [*self.program.code]
        code[self.place] = self.instruction
        return Kernel(replace(self.program, code=code))


def mutants_of(program: Program) -> Iterator[Mutant]:
    """Every fault that is planted into a kernel."""
    program = copy.copy(program)
    program.widths, program.constants = [*program.widths], dict(program.constants)

    def constant(bits: int, width: int) -> int:
        program.widths.append(width)
        program.constants[len(program.widths) - 1] = bits
        return len(program.widths) - 1

    never, zeros = constant(0, 1), {width: constant(0, width) for width in (16, 32, 64)}
    steps = {by: constant(by, 32) for by in (1, 2, 8)}
    for place, instruction in enumerate(program.code):
        for what, changed in _changes(instruction, program, never, zeros, steps):
            yield Mutant(what, place, changed, program)


def _changes(
    i: Instruction, program: Program, never: int, zeros: dict[int, int], steps: dict[int, int]
) -> Iterator[tuple[str, Instruction]]:
    def to(what: str, **changed: Any) -> tuple[str, Instruction]:
        return what, replace(i, **changed)

    removed = {"guard": never, "negated": False}
    o = [*i.operands]
    if i.name.startswith("mma."):
        a = i.results
        depth = {"m16n8k16": (4, 2), "m16n8k8": (2, 1), "m8n8k4": (1, 1)}[i.name.split(".")[3]]
        if ".tf32" in i.name:
            depth = (4, 2)
        yield to("mma dropped", operands=[*o[:a], *[zeros[program.widths[r]] for r in o[a : a + depth[0]]],
                                          *o[a + depth[0] :]])  # fmt: skip
        yield to("mma operands swapped", operands=[*o[:a], o[a + depth[0]], *o[a + 1 : a + depth[0]], o[a],
                                                   *o[a + depth[0] + 1 :]])  # fmt: skip
        if depth[0] > 1:
            yield to("mma operands swapped", operands=[*o[:a], o[a + 1], o[a], *o[a + 2 :]])
    elif i.name.startswith("ldmatrix"):
        yield to("ldmatrix transposed", numbers=(i.numbers[0], 1 - i.numbers[1], i.numbers[2]))
        yield to("address off by one", numbers=(*i.numbers[:2], i.numbers[2] + 16))
    elif i.name == "bar.sync":
        yield to("barrier removed", **removed)
    elif i.name == "cp.async.wait_group":
        yield to("wait removed", **removed)
    elif i.name.startswith("shfl."):
        by = program.constants.get(o[2])
        yield to("shuffle's lane", operands=[*o[:2], steps[2 if by == 1 else 8 if by == 16 else 1], *o[3:]])
    elif i.name.startswith(("ld.global", "ld.shared", "st.global", "st.shared", "cp.async.c")) and len(i.numbers) > 2:
        bytes_ = i.numbers[0] * max(i.numbers[1], 1)
        yield to("address off by one", numbers=(*i.numbers[:2], i.numbers[2] + bytes_, *i.numbers[3:]))
        if i.name.startswith("st."):
            yield to("store removed", **removed)
        if i.guard >= 0:
            yield to("guard turned round", negated=not i.negated)
    elif i.name.startswith(("atom.", "red.", *WAITS, "st.release.")) and i.numbers[3]:
        yield to("order removed", numbers=(*i.numbers[:3], 0))
    elif i.name.startswith(("membar.", "fence.")):
        yield to("order removed", **removed)
    elif i.name == "bra" and i.guard >= 0:
        loop = program.code[i.numbers[0] : program.code.index(i)]
        if any(o.name.startswith(WAITS) for o in loop) and not any(o.name == "bar.sync" for o in loop):
            yield to("barrier of the grid removed", **removed)
        else:
            yield to("guard turned round", negated=not i.negated)
    elif i.name.startswith("setp."):
        _, how, *rest = i.name.split(".")
        for other in COMPARISONS.get(how, ()):
            yield from _renamed(i, ".".join(("setp", other, *rest)), "comparison")
    elif i.name.startswith("selp."):
        yield to("selection turned round", operands=[o[0], o[2], o[1], o[3]])
    elif i.name.startswith("fma.rn"):
        yield to("addend dropped", operands=[*o[:3], zeros[program.widths[o[3]]]])
    else:
        for start, others in ARITHMETIC.items():
            if i.name.startswith(start):
                for other in others:
                    name = other + i.name[len(start) :]
                    if start.startswith("shr."):
                        name = "shl.b" + i.name.rsplit(".", 1)[1][1:]
                    yield from _renamed(i, name, "arithmetic")
                break


def _renamed(i: Instruction, name: str, what: str) -> Iterator[tuple[str, Instruction]]:
    known = opcodes()
    name = next((n for n in (name, name.replace(".rn", ""), name.replace(".full", ""), name.replace(".ftz", ""),
                             name.replace("add.u", "add.s")) if n in known), "")  # fmt: skip
    if name and known[name].registers == known[i.name].registers:
        yield f"{what}: {i.name} -> {name}", replace(i, name=name, opcode=known[name].index)


@dataclass
class Target:
    """A compiled kernel with the cases in which it runs."""

    name: str
    kernel: Kernel
    hits: Any = None
    cases: list[Case] = field(default_factory=list)


class Bench:
    """Cases of an op and a kind of operand, and what comes of them without a fault."""

    def __init__(self, cases: Iterable[Case], backend: str = "triton") -> None:
        self.backend = backend
        self.executor, self.executing = (Executor, executing) if backend == "triton" else (CudaExecutor, executing_cuda)
        self.targets: dict[int, Target] = {}
        self.inputs: dict[Case, Any] = {}
        self.results: dict[Case, list[torch.Tensor]] = {}
        self.budgets: dict[Case, Any] = {}
        for case in cases:
            dtype, precision = KINDS[case.kind]
            used: list[tuple[str, Kernel]] = []

            def note(name: str, kernel: Kernel, used: list[tuple[str, Kernel]] = used) -> Kernel:
                used.append((name, kernel))
                return kernel

            self.inputs[case] = x = case.inputs()
            executor = self.executor(edit=note)
            with precise(case), self.executing(executor, case.processors):
                results, names, upstream = ours(case.op, x, executor, backend)
            self.results[case] = results
            self.budgets[case] = names, budgets_of(case, x, upstream, dtype, precision)
            hold(case, results, *self.budgets[case])
            for (name, kernel), (_, result) in zip(used, executor.results, strict=True):
                target = self.targets.setdefault(id(kernel), Target(name, kernel))
                target.hits = result.hits if target.hits is None else target.hits + result.hits
                if case not in target.cases:
                    target.cases.append(case)

    def verdict(self, target: Target, mutant: Mutant) -> tuple[str, str]:
        """How the fault was seen: the kind of a report, ``result``; or ``unseen``, ``no effect``; and what it moves."""
        faulty, moved = mutant.kernel(), dict[str, float]()
        edit: Callable[[str, Kernel], Kernel] = lambda _, kernel: faulty if kernel is target.kernel else kernel  # noqa: E731
        # Blocks that meet may do so in an order in which nothing goes wrong.
        orders = (0,) if self.backend == "triton" else (0, 1)
        for case, order in itertools.product(target.cases, orders):
            options = {"limit": LIMIT, "order": order}
            try:
                with precise(case), self.executing(self.executor(options, edit), case.processors) as executor:
                    results, _, _ = ours(case.op, self.inputs[case], executor, self.backend)
                hold(case, results, *self.budgets[case])
            except Fault as fault:
                return fault.kind, ""
            except (AssertionError, ValueError, RuntimeError, IndexError):
                return "result", ""
            for name, got, want in zip(self.budgets[case][0], results, self.results[case], strict=True):
                if not torch.equal(got, want):
                    by = (got.double() - want.double()).abs().max().item() / (want.double().abs().max().item() or 1.0)
                    moved[name] = max(moved.get(name, 0.0), by)
        return "unseen" if moved else "no effect", ", ".join(f"{name} by {by:.0e}" for name, by in moved.items())


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    op: str
    kind: str
    kernel: str
    what: str
    source: str
    verdict: str
    moved: str = ""  # of a fault that is not seen: which results, by how much of their largest


def sampled(op: str, kind: str, per_class: int, seed: int = 0) -> Iterator[Outcome]:
    """Outcomes of ``per_class`` faults of every class in every kernel of an op."""
    yield from outcomes_of(Bench(cases_of(op, kind)), op, kind, per_class, seed)


def outcomes_of(bench: Bench, op: str, kind: str, per_class: int, seed: int = 0) -> Iterator[Outcome]:
    """The same of a bench."""
    generator = random.Random(f"{seed} {op} {kind}")
    largest: dict[str, Target] = {}
    for target in bench.targets.values():  # of a kernel's compiled versions, the one that most cases run
        if target.name not in largest or len(target.cases) > len(largest[target.name].cases):
            largest[target.name] = target
    for target in largest.values():
        classes: dict[str, list[Mutant]] = defaultdict(list)
        for mutant in mutants_of(target.kernel.program):
            if target.hits[mutant.place] > 0:
                classes[mutant.what.split(":")[0]].append(mutant)
        for mutants in classes.values():
            for mutant in generator.sample(mutants, min(per_class, len(mutants))):
                source = target.kernel.program.code[mutant.place].source
                yield Outcome(op, kind, target.name, mutant.what, source, *bench.verdict(target, mutant))


def all_sampled(per_class: int, ops: Iterable[str] = TRITON, kinds: Iterable[str] = DRAWN) -> Iterator[Outcome]:
    """The same of several ops and kinds of operands."""
    for op, kind in itertools.product(ops, kinds):
        if kind in kinds_drawn(op):
            yield from sampled(op, kind, per_class)


def summary(outcomes: list[Outcome]) -> Counter[str]:
    """How many of each verdict."""
    return Counter(outcome.verdict for outcome in outcomes)


def main() -> None:
    """``python -m tests.ptx.mutants FILE [PER_CLASS [OP[:KIND] ...]]``: outcomes as JSON lines, appended."""
    per_class = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    for name in sys.argv[3:] or TRITON:
        op, _, kind = name.partition(":")
        with open(sys.argv[1], "a") as file:
            for outcome in all_sampled(per_class, [op], [kind] if kind else DRAWN):
                file.write(json.dumps(asdict(outcome)) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
