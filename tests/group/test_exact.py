"""Losses over a group give what one process gives for the concatenated batch, whatever the split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from group_cases import CASES, B, Case, on_rank, put_together, value_and_gradients
from ranks import ranks, split_sizes

from sadcl.testing import assert_within_budget, error_budgets

WORLDS = [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("family", CASES)
def test_float64_is_one_process(family: str, world: int) -> None:
    compare_with_one_process(family, world, None)


@pytest.mark.parametrize("family", ["sscl", "dual", "supcon", "mlc"])
def test_torch_operators_are_one_process(family: str) -> None:
    """What computes where there is no kernel: on another device, the released formulation, rare gradients."""
    compare_with_one_process(family, 3, "torch")


def compare_with_one_process(family: str, world: int, backend: str | None) -> None:
    cases = list(CASES[family]())
    sizes = [split_sizes(B, world, seed) for seed in range(len(cases))]
    assert world == 1 or any(0 in size for size in sizes)
    results = ranks(world).run(on_rank, cases, sizes, backend)
    for number, case in enumerate(cases):
        truth = value_and_gradients(case, case.split)
        got = put_together(case, [parts[number] for parts in results])
        assert got.keys() == truth.keys()
        for name, want in truth.items():
            where = f"{case.name}, split {sizes[number]}: {name}"
            np.testing.assert_allclose(got[name], want, rtol=1e-9, atol=1e-9, err_msg=where)


@pytest.mark.parametrize("world", [2, 3])
def test_the_same_bits_on_every_run(world: int) -> None:
    cases = [case for family in CASES.values() for case in family()]
    sizes = [split_sizes(B, world, seed) for seed in range(len(cases))]
    first, second = (ranks(world).run(on_rank, cases, sizes) for _ in range(2))
    for once, again in zip(first, second, strict=True):
        for case, mine, theirs in zip(cases, once, again, strict=True):
            for name in mine:
                assert np.array_equal(mine[name], theirs[name]), f"{case.name}: {name}"


# One of each kind; a budget takes many draws.
BUDGETED = ("sscl ignored", "pscl paper ignored", "supcon all classes", "mlc mulsupcon", "mlc simdis", "mlc msc")


def test_float32_is_within_the_row_budget() -> None:
    chosen = [case for family in CASES.values() for case in family() if case.name in BUDGETED]
    assert len(chosen) == len(BUDGETED)
    cases = [case.to(torch.float32) for case in chosen]
    sizes = [split_sizes(B, 3, seed) for seed in range(len(cases))]
    results = ranks(3).run(on_rank, cases, sizes)
    for number, case in enumerate(cases):
        names, budgets = _budgets(case)
        got = put_together(case, [parts[number] for parts in results])
        for name, budget in zip(names, budgets, strict=True):
            assert_within_budget(f"{case.name}: {name}", torch.as_tensor(got[name], dtype=torch.float32), budget)


def _budgets(case: Case) -> tuple[list[str], tuple[object, ...]]:
    """Names and error budgets of what the float64 oracle computes from the float32 inputs."""
    wide = case.to(torch.float64)
    names: list[str] = []

    def oracle() -> list[torch.Tensor]:
        got = value_and_gradients(wide, wide.split, backend="reference")
        names[:] = list(got)
        return [torch.as_tensor(x) for x in got.values()]

    budgets = error_budgets(oracle, torch.float32)
    return names, budgets
