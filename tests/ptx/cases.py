"""Every op with a Triton kernel at every edge of its tiles, beside the float64 oracle."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from sadcl.kernels import _launch, _tiles
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sadcl.ops import compact
from sadcl.ops._library import OPS
from sadcl.testing import BUDGET, Budget, Rounded, assert_within_budget, error_budgets, make_features
from sadcl.testing.examples import EXAMPLES, Maker, Size
from sadcl.testing.oracles import ORACLES
from tests.ptx.launching import ARCH, Executor, executing
from tests.ptx.launching_cuda import executing_cuda

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


class NarrowWeights(OnGpu):
    """The same, where weights of a gradient's products are bfloat16: each of their terms is off by half a digit."""

    def steps_of_sum(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Gradient mode is off in a backward."""
        steps = super().steps_of_sum(func, args, kwargs)
        if torch.is_grad_enabled() or func._schema.name not in ("aten::mm", "aten::bmm"):
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
            forward = backward = _drawn(function, wide if case.op in FLOAT32 else narrow)
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


def _drawn(function: Any, arithmetic: torch.dtype) -> Sequence[Budget]:
    """In float64 nothing smaller than its own rounding can be drawn: float32's errors, in proportion."""
    if arithmetic != torch.float64:
        return error_budgets(function, arithmetic, rounding=OnGpu)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    drawn = error_budgets(function, torch.float32, rounding=OnGpu)
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
