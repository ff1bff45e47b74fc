"""What kernels give in a case, and how far from the float64 oracle their roundings may move it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sadcl.ops._library import OPS
from sadcl.testing import BUDGET, Budget, Rounded, assert_within_budget, error_budgets
from sadcl.testing.oracles import ORACLES
from tests.ptx.cases import KINDS, Case, precise
from tests.ptx.launching import Executor, executing
from tests.ptx.launching_cuda import executing_cuda

# What is rounded on the way. 16-bit operands are multiplied and summed in float32, or PSCL's losses in float64, and
# results rounded once; but weights of a product are stored in the operands' dtype, those of SSCL's and MLC's gradients.
# tf32 rounds operands to 11 bits, as float16 does.
FLOAT32 = ("asl", "asl_total", "group_classifier", "pscl", "two_way", "zlpr")
FLOAT32_FORWARD = ("dual_mean", "mlc", "sscl")
FLOAT64_FORWARD = ("pscl",)
# What an op keeps for its backward in float64.
KEPT = {
    "mlc": ("norm",),
    "pscl": ("score", "norm_x", "norm_p", "lse"),
    "sscl": ("norm",),
    "two_way": ("row_lse", "class_lse"),
    "zlpr": ("lse",),
}


def _widened(x: Any) -> Any:
    wide = {n: v.double() for n, v in x._asdict().items() if isinstance(v, Tensor) and v.is_floating_point()}
    return x._replace(**{name: value.detach() for name, value in wide.items()})


def differentiable(op: str, x: Any) -> tuple[str, ...]:
    """The inputs of an op that have a gradient here."""
    derivative = OPS[op].backward
    names = derivative.gradients if derivative else ()
    return tuple(name for name in names if getattr(x, name) is not None and getattr(x, name).is_floating_point())


def truth(
    op: str, x: Any, upstream: list[Tensor], rounds_operands: bool = False, gradients: bool = True
) -> list[Tensor]:
    """Results and gradients by the oracle; ``rounds_operands`` makes what goes in a result too, which is rounded."""
    x, derivative = _widened(x), OPS[op].backward
    names = differentiable(op, x)
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
    if rounds_operands:
        upstream = [u * 1.0 for u in upstream]
    operands = {name: leaf * 1.0 if rounds_operands else leaf for name, leaf in leaves.items()}
    for name in {"query", "temperature"} & {*operands}:
        # scale log2 e, log2 e / temperature: rounded once, and then off by as much in every score.
        operands[name] = operands[name] * (torch.ones((), dtype=torch.float64) * 1.0)
    results = ORACLES[op](x._replace(**operands))[: OPS[op].results if derivative else None]
    if not names or not gradients:
        return [result.detach() for result in results]
    pairs = [(r, u) for r, u in zip(results, upstream, strict=True) if r.requires_grad and r.numel() > 0]
    grads = torch.autograd.grad([r for r, _ in pairs], list(leaves.values()), [u for _, u in pairs], allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves.values(), grads, strict=True)]
    return [*(result.detach() for result in results), *zeros]


def kept(op: str, x: Any, out: Any) -> dict[str, Tensor]:
    """What stands in :data:`KEPT`: 0 where that is read by nobody, -99 for -inf."""
    found = {name: torch.where(torch.isneginf(getattr(out, name)), -99.0, getattr(out, name)) for name in KEPT[op]}
    if op == "sscl":
        found["norm"] = found["norm"][: int(x.class_ptr[-1]) * x.features.shape[1]]
    if op == "pscl":
        found |= {name: torch.where(x.target == -1, 0.0, found[name]) for name in ("score", "norm_x")}
    return found


def ours(op: str, x: Any, executor: Executor, backend: str = "triton") -> tuple[list[Tensor], list[str], list[Tensor]]:
    """Results, gradients and :func:`kept` of the kernels, their names, and the upstream gradients.

    Everything that is given out must have been written, what only the backward reads included.
    """
    declared = OPS[op]
    x = x._replace(**{name: value.clone() for name, value in x._asdict().items() if isinstance(value, Tensor)})
    out = declared.run(x, backend)
    if declared.mutates:
        return [getattr(x, declared.mutates)], [declared.mutates], []
    if declared.derivative is None:
        executor.require_written(out)
        return list(out), list(declared.outputs._fields), []
    generator = torch.Generator().manual_seed(7)
    results = list(out[: declared.results])
    upstream = [(torch.rand(y.shape, generator=generator, dtype=torch.float64) + 0.5).to(y.dtype) for y in results]
    derivative = declared.derivative
    assert derivative is not None
    wanted = differentiable(op, x)
    saved = derivative.saved_of(derivative.tensors_of(x, out))
    grads: Any = derivative.grads(derivative.upstream(*upstream), x, saved, wanted, backend)
    spread = declared.backward.spread  # type: ignore[union-attr]
    by_name = spread(grads, x) if spread else grads._asdict()
    found = [by_name[f"grad_{name}"] for name in wanted]
    executor.require_written([*out, *(grad for grad in grads if grad is not None)])
    also = kept(op, x, out) if op in KEPT else {}
    names = [*declared.outputs._fields[: declared.results], *(f"grad_{name}" for name in wanted), *also]
    return [*results, *found, *also.values()], names, upstream


def check(case: Case, executor: Executor | None = None, backend: str = "triton") -> Executor:
    """Execute a case and hold results and gradients against the oracle."""
    dtype, precision = KINDS[case.kind]
    x = case.inputs()
    start = executing if backend == "triton" else executing_cuda
    with precise(case), start(executor, case.processors) as done:
        got, names, upstream = ours(case.op, x, done, backend)
    hold(case, got, names, budgets_of(case, x, upstream, dtype, precision))
    return done


_steps: dict[tuple[object, ...], Tensor] = {}  # the draws of a budget sum the same shapes again and again


_PRODUCTS = ("aten::mm", "aten::bmm")


class OnGpu(Rounded):
    """The arithmetic of a thread: sums are chains, of n terms off by the root of n; exponentials by two ulp."""

    def steps_of_sum(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The number of terms is the same sum over ones; adding a 0 rounds nothing."""
        if func._schema.name == "aten::sum":
            return func(args[0].ne(0).double(), *args[1:], **kwargs).clamp(min=1.0).sqrt()
        key = func, repr(tree_map_only(Tensor, lambda x: (*x.shape,), args)), repr(kwargs)
        if key not in _steps:
            _steps[key] = func(*tree_map_only(Tensor, torch.ones_like, args), **kwargs).clamp(min=1.0).sqrt()
        return _steps[key]

    def steps_of_each(self, func: Any) -> float:
        """As PTX documents ex2.approx, lg2.approx and div.full."""
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        return 4.0 if name in ("exp", "log", "div", "reciprocal") else 1.0


class Chains(OnGpu):
    """The same, where a sum of a gradient is off by the roundings of its partial sums.

    The squares of all partial sums of n terms t add up to (n + 1) (sum t^2 / 6 + (sum t)^2 / 3), on average over the
    orders of the terms: where these cancel that is less than the root of n times the sum of their sizes.
    """

    def steps_of_sum(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Gradient mode is off in a backward."""
        steps = super().steps_of_sum(func, args, kwargs)
        if torch.is_grad_enabled() or func._schema.name not in ("aten::sum", *_PRODUCTS):
            return steps
        of_powers = (tree_map_only(Tensor, lambda t, by=power: t.abs() ** by, args) for power in (2, 1))
        squares, sizes = (func(*terms, **kwargs) for terms in of_powers)
        partial_sums = (steps**2 + 1) * (squares / 6 + func(*args, **kwargs) ** 2 / 3)
        return partial_sums.sqrt() / sizes.clamp(min=self.smallest)


class NarrowWeights(OnGpu):
    """The same, where weights of a gradient's products are bfloat16: each of their terms is off by half a digit."""

    def steps_of_sum(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Gradient mode is off in a backward."""
        steps = super().steps_of_sum(func, args, kwargs)
        if torch.is_grad_enabled() or func._schema.name not in _PRODUCTS:
            return steps
        squares, sizes = (func(*(t.abs() ** power for t in args)) for power in (2, 1))
        ratio = torch.finfo(torch.bfloat16).eps / 2 / self.sum_unit
        return steps.maximum(ratio * squares.sqrt() / sizes.clamp(min=self.smallest))


_budgets: dict[Case, Any] = {}


def budgets_of(case: Case, x: Any, upstream: list[Tensor], dtype: torch.dtype, precision: str) -> Any:
    """Made once a case: mutants share them."""
    key = replace(case, tile=0, processors=None)
    if key not in _budgets:
        statistics = _kept(case, x, dtype)
        slopes = [u.double() for u in upstream]
        function = functools.partial(truth, case.op, x, slopes, precision == "tf32")
        wide = torch.promote_types(dtype, torch.float32)
        if OPS[case.op].derivative is None:
            _budgets[key] = function()
        elif case.ties:  # losses of exact sums are rounded once; gradients are two exponentials and a few products
            *losses, grad = function()
            spread = torch.finfo(wide).eps / 2 * grad.abs()
            _budgets[key] = [*map(_few_roundings, losses), Budget(grad, spread, wide), *statistics]
        else:
            narrow = torch.float16 if precision == "tf32" else dtype
            rounding = Chains if case.op == "mlc" else OnGpu
            forward = backward = _drawn(function, wide if case.op in FLOAT32 else narrow, rounding)
            if case.op in FLOAT32_FORWARD and dtype == torch.bfloat16:
                forward = error_budgets(function, wide, rounding=NarrowWeights)
                # A temperature's is z . gradient, a sum that the oracle does not make.
                names = *("" for _ in range(OPS[case.op].results)), *differentiable(case.op, x)
                threes = zip(names, forward, backward, strict=True)
                backward = [loose if "temperature" in name else sharp for name, sharp, loose in threes]
            elif case.op in FLOAT32_FORWARD and dtype == torch.float16:
                forward = _drawn(functools.partial(function, gradients=False), wide)
            forward, backward = forward[: OPS[case.op].results], backward[OPS[case.op].results :]
            if case.op == "pscl" and dtype != torch.float64:
                backward = [*backward[:-1], _of_classes(x, slopes[0], backward[-1])]
            if case.op in FLOAT64_FORWARD:
                forward = [_few_roundings(budget.truth) for budget in forward]
            if case.op in FLOAT32 and dtype.itemsize == 2:
                backward = [_by_element(budget) for budget in backward]
            _budgets[key] = [*forward, *backward, *statistics]
    return _budgets[key]


def _kept(case: Case, x: Any, dtype: torch.dtype) -> list[Budget]:
    """By torch's operators. Sums of exponentials are in the accumulation dtype, and exact where these are ones."""
    if case.op not in KEPT:
        return []
    exact = case.ties or case.op not in ("two_way", "zlpr")
    arithmetic = torch.float64 if exact else torch.promote_types(dtype, torch.float32)
    x = _widened(x)
    return [_few_roundings(truth, arithmetic) for truth in kept(case.op, x, OPS[case.op].run(x, "torch")).values()]


def _of_classes(x: Any, slopes: Tensor, whole: Budget) -> Budget:
    """The temperature's gradient by PSCL: the classes' are float64, rounded to float32 and summed in float64."""
    x = _widened(x)
    tau = x.temperature.expand(slopes.shape).clone().requires_grad_()
    (parts,) = torch.autograd.grad(ORACLES["pscl"](x._replace(temperature=tau))[0], tau, slopes)
    most = torch.finfo(torch.float32).eps / 2 * parts.abs().sum() + 1e-12
    return Budget(whole.truth, most / BUDGET, torch.float64)


def _by_element(budget: Budget) -> Budget:
    """Of what is rounded to 16 bits once: each element by its own size, from numbers as exact as its row's largest."""
    if budget.truth.dim() == 0:
        return budget
    spread = budget.spread.amax(-1, keepdim=True).expand_as(budget.spread)
    return replace(budget, truth=budget.truth[..., None], spread=spread[..., None])


def _few_roundings(truth: Tensor, arithmetic: torch.dtype = torch.float64) -> Budget:
    """Of each element, and of 1."""
    return Budget(truth, torch.finfo(arithmetic).eps * (1.0 + truth.abs()), arithmetic)


def _drawn(function: Any, arithmetic: torch.dtype, rounding: type[Rounded] = OnGpu) -> Sequence[Budget]:
    """In float64 nothing smaller than its own rounding can be drawn: float32's errors, in proportion."""
    if arithmetic != torch.float64:
        return error_budgets(function, arithmetic, rounding=rounding)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    drawn = error_budgets(function, torch.float32, rounding=rounding)
    return [Budget(budget.truth, budget.spread * ratio, torch.float64) for budget in drawn]


def hold(case: Case, got: list[Tensor], names: list[str], budgets: Any) -> None:
    """Raise an AssertionError that names what is off."""
    for name, value, want in zip(names, got, budgets, strict=False):
        if value.numel() == 0:
            continue
        if isinstance(want, Tensor):
            assert value.shape == want.shape, name
            assert torch.equal(value.double(), want.double()), f"{name} differs"
        else:
            assert_within_budget(name, value[..., None] if want.truth.dim() > value.dim() else value, want)
