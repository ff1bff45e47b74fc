"""A problem with its truth, and what is required of a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from sadcl.testing import assert_within_budget, error_budgets, poisoned_allocations

Run = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass
class Problem:
    """``run(backend, **tensors)``, and its truth: ``oracle(**tensors)`` in float64, or the backend "reference"."""

    run: Run
    tensors: dict[str, Tensor]  # those that may have a gradient; the oracle gets them in float64
    oracle: Run | None = None
    arithmetic: torch.dtype = torch.float32  # what intermediate results may be rounded to
    wider: Mapping[str, torch.dtype] = field(default_factory=dict)  # the same of backends that round to another
    # By backend, the results whose gradients are rounded to the tensor's dtype before they are added to the others'.
    separate: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # By backend, tensors that images share, whose gradients are rounded an image before they are added up.
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: int = 1
    # Terms of a sum that are made of the same numbers err alike, which errors drawn for each of them do not.
    alike: int = 1

    def truth(self, wanted: tuple[str, ...], upstream: list[Tensor]) -> list[Tensor]:
        """Results and gradients by the oracle."""
        oracle = self.oracle or (lambda **tensors: self.run("reference", **tensors))
        return evaluate(oracle, {name: x.double() for name, x in self.tensors.items()}, wanted, upstream)


def evaluate(run: Run, tensors: dict[str, Tensor], wanted: tuple[str, ...], upstream: list[Tensor]) -> list[Tensor]:
    """Results, and gradients of the ``wanted`` tensors; ``upstream``: of every result, longer than needed."""
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    results = run(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    values = [x.detach() for x in results]
    used = [(x, u[: x.numel()].reshape(x.shape).to(x.dtype)) for x, u in zip(results, upstream, strict=False)]
    used = [(x, u) for x, u in used if x.requires_grad]  # a result may have nothing to do with the tensor
    if not wanted:
        return values
    outputs, given = zip(*used, strict=True)
    grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], given, materialize_grads=True)
    return [*values, *(grad.detach() for grad in grads)]


@dataclass(frozen=True)
class Generator:
    """What is drawn beside :data:`drawn.COMMON`, and what a case is a problem of."""

    problem: Callable[[SimpleNamespace], Problem]
    drawn: Mapping[str, SearchStrategy[Any]] = field(default_factory=dict)
    backends: tuple[str, ...] = ("cpp", "torch", "triton")  # by which it can be asked for


def hold(generator: Generator, values: Mapping[str, Any], backend: str) -> None:
    """Require of a case what the oracle says: exactly where there is no derivative, else within the budget of rounding.

    Raises:
        AssertionError: naming the result or the tensor whose gradient it is.
    """
    case = SimpleNamespace(**values)
    problem = generator.problem(case)
    if not problem.tensors:
        with poisoned_allocations():
            got = problem.run(backend)
        want = problem.oracle()
        for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0, equal_nan=True)  # of integers: equal
        return
    names = tuple(problem.tensors)
    wanted: tuple[str, ...] = names
    if -1 <= case.only < len(names):
        wanted = names[case.only : case.only + 1] if case.only >= 0 else ()
    draw = torch.Generator().manual_seed(case.seed + 7)
    upstream = [torch.randn(4096, generator=draw, dtype=torch.float64).bfloat16().double() for _ in range(2)]
    with poisoned_allocations():
        got = evaluate(lambda **tensors: problem.run(backend, **tensors), problem.tensors, wanted, upstream)
    for draws in (2, 16):  # a spread of few draws is a noisy one: what it refuses is looked at again
        try:
            assert_within(problem, backend, got, wanted, upstream, draws)
            return
        except AssertionError:
            if draws == 16:
                raise


def _stored(
    problem: Problem, backend: str, wanted: tuple[str, ...], upstream: list[Tensor], results: int
) -> list[Tensor | None]:
    """Of results and gradients: size of all that is rounded to the tensor's dtype, where that is more than it is."""
    sizes: list[Tensor | None] = [None] * (results + len(wanted))
    rounded = problem.separate.get(backend, ())
    if rounded and wanted:
        nothing = torch.zeros_like(upstream[0])
        alone = [
            problem.truth(wanted, [u if i == k else nothing for k, u in enumerate(upstream)])[results:]
            for i in range(results)
        ]
        for at, parts in enumerate(zip(*alone, strict=True)):
            first = sum((parts[i].abs() for i in rounded), torch.zeros_like(parts[0]))
            # Nothing is rounded where 0 is added to a part that is rounded already.
            there = [i for i in range(results) if (parts[i] != 0).any()]
            done = len(there) < 2 and set(there) <= set(rounded)
            sizes[results + at] = first if done else first + sum(parts).abs()
    for name in set(problem.shared.get(backend, ())) & set(wanted):
        own = {**problem.tensors, name: problem.tensors[name].expand(problem.images, *problem.tensors[name].shape)}
        *_, of_images = replace(problem, tensors=own).truth((name,), upstream)
        sizes[results + wanted.index(name)] = of_images.abs().sum(dim=0) + of_images.sum(dim=0).abs()
    return sizes


def assert_within(
    problem: Problem, backend: str, got: list[Tensor], wanted: tuple[str, ...], upstream: list[Tensor], draws: int
) -> None:
    """Require results and gradients of a backend within what its roundings may do."""
    arithmetic = problem.wider.get(backend, problem.arithmetic)
    budgets = error_budgets(lambda: problem.truth(wanted, upstream), arithmetic, draws)
    results = len(got) - len(wanted)
    stored = _stored(problem, backend, wanted, upstream, results)
    labels = [f"result {i}" for i in range(results)] + [f"gradient of {name}" for name in wanted]
    for label, ours, want, size in zip(labels, got, budgets, stored, strict=True):
        if label.startswith("grad"):
            expected = problem.tensors[label.split()[-1]].dtype
            assert ours.dtype == expected, f"{label} is {ours.dtype}, expected {expected}"
        fits = want.truth.abs() <= torch.finfo(ours.dtype).max
        assert (ours.isinf() | fits).all(), f"{label}: finite where {ours.dtype} ends"
        spread = want.spread.where(fits, 0.0) * problem.alike**0.5
        held = replace(want, truth=want.truth.where(fits, 0.0), spread=spread)
        assert_within_budget(label, ours.where(fits, 0.0), held, stored=size)
