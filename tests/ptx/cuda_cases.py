"""What tests of the CUDA C++ kernels share: an op on the executor, its bits, and faults planted into its kernels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sadcl.testing.examples import Size
from tests.ptx.budgets import KEPT, ours
from tests.ptx.cases import Case
from tests.ptx.launching_cuda import CudaExecutor, executing_cuda
from tests.ptx.mutants import Bench, Mutant, mutants_of, outcomes_of
from tests.ptx.ptxemu import Fault, Kernel, opcodes

SMALL = Size(b=4, v=1, c=3, d=20, e=24, length=1, heads=1)
LOST = ("unseen", "no effect")  # verdicts of faults that no case shows


def results(op: str, x: Any, processors: int = 3, **options: Any) -> list[Tensor]:
    """Row losses and gradients by the executed kernels."""
    with executing_cuda(CudaExecutor(options), processors) as executor:
        return ours(op, x, executor, "cuda")[0][: -len(KEPT[op])]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether all bits are alike."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def gaps(x: Tensor) -> Tensor:
    """The same numbers with gaps between them, which hold NaN."""
    wide = torch.full([2 * n for n in x.shape], float("nan"), dtype=x.dtype)
    every = tuple(slice(0, None, 2) for _ in x.shape)
    wide[every] = x
    return wide[every]


def check_missing_order_is_a_race(op: str, x: Any, order: int, barriers: int) -> None:
    """Without a barrier of the grid, or the order of its accesses, blocks read what may not be there yet."""
    kernels: dict[str, Kernel] = {}
    with executing_cuda(CudaExecutor(edit=lambda name, kernel: kernels.setdefault(name, kernel)), 3) as executor:
        ours(op, x, executor, "cuda")
    planted = [(name, mutant) for name, kernel in kernels.items() for mutant in mutants_of(kernel.program)
               if mutant.what in ("barrier of the grid removed", "order removed")]  # fmt: skip
    assert len(planted) == 3 * barriers  # an atomic operation, a load, and the branch back to it
    for name, mutant in planted[:-3]:  # the last barrier stands between rounds of weights, of which x has one
        faulty = mutant.kernel()
        edit = lambda n, kernel, name=name, faulty=faulty: faulty if n == name else kernel  # noqa: E731
        with executing_cuda(CudaExecutor({"order": order}, edit), 3) as executor, pytest.raises(Fault, match="race"):
            ours(op, x, executor, "cuda")


def check_missing_barriers_of_blocks_are_seen(case: Case) -> None:
    """But for those beside another one: where a phase ends, and a tile begins with its own."""
    bench = Bench([case], "cuda")
    for target in bench.targets.values():
        planted = [mutant for mutant in mutants_of(target.kernel.program) if mutant.what == "barrier removed"]
        seen = Counter(bench.verdict(target, mutant)[0] for mutant in planted if target.hits[mutant.place] > 0)
        assert {*seen} == {"race", "uninitialised", "no effect"}, (target.name, seen)
        assert 2 * seen["no effect"] <= seen.total() and seen["race"] >= 2, (target.name, seen)


def check_miscounted_bits_are_seen(case: Case, most: int | None = None) -> None:
    """Leading zeros for bits, at ``most`` places of each kernel that are drawn, or at all that are executed."""
    bench, known, generator = Bench([case], "cuda"), opcodes(), random.Random(3)
    for target in bench.targets.values():
        program, planted = target.kernel.program, []
        for place, i in enumerate(program.code):
            name = i.name.replace("popc.", "clz.")
            if name != i.name and target.hits[place] > 0:
                planted.append(Mutant("", place, replace(i, name=name, opcode=known[name].index), program))
        assert planted
        for mutant in planted if most is None else generator.sample(planted, min(most, len(planted))):
            assert bench.verdict(target, mutant)[0] not in LOST, (target.name, mutant.place)


def check_most_faults_are_seen(cases: Iterable[Case], per_class: int, unseen: float, lost: float) -> None:
    """At most a share of ``unseen`` of those that have an effect, and of ``lost`` of all.

    What no case sees leaves all bits as they were, or moves them by less than rounding does.
    """
    cases = list(cases)
    outcomes = list(outcomes_of(Bench(cases, "cuda"), cases[0].op, cases[0].kind, per_class))
    survivors = [outcome for outcome in outcomes if outcome.verdict in LOST]
    moved = [outcome for outcome in survivors if outcome.verdict == "unseen"]
    assert len(moved) <= unseen * (len(outcomes) - len(survivors) + len(moved)), moved
    assert len(survivors) <= lost * len(outcomes), survivors
    assert not [o for o in survivors if o.what.startswith(("barrier of the grid", "order"))], survivors
