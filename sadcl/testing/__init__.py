"""Inputs and comparisons that tests and benchmarks share, so that what is timed is what is tested."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

RAGGED = (
    "random",
    "none",
    "single_pair",
    "one_row_per_class",
    "one_huge_class",
    "all_active",
    "empty_images",
    "ignored",
)


@dataclass(frozen=True)
class Shape:
    """Size of a contrastive problem: images, views, classes, embedding width, labels per image."""

    b: int
    v: int
    c: int
    d: int
    labels_per_image: float = 2.9

    def __str__(self) -> str:
        return f"B{self.b}-V{self.v}-C{self.c}-D{self.d}"


COCO = Shape(b=32, v=2, c=80, d=1024)


def make_labels(b: int, c: int, pattern: str = "random", labels_per_image: float = 2.9, seed: int = 0) -> Tensor:
    """Multi-hot float32 labels ``[b, c]`` of a named ragged case out of :data:`RAGGED`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(b, c, device="cpu")
    if b == 0 or c == 0:
        return labels
    if pattern in ("random", "empty_images", "ignored"):
        labels = (torch.rand(b, c, generator=generator, device="cpu") < labels_per_image / c).float()
        if pattern == "empty_images":
            labels[::2] = 0
        if pattern == "ignored":
            labels[torch.rand(b, c, generator=generator, device="cpu") < 0.2] = -1
    elif pattern == "single_pair":
        labels[b // 2, c // 2] = 1
    elif pattern == "one_row_per_class":
        labels[[category % b for category in range(c)], list(range(c))] = 1
    elif pattern == "one_huge_class":
        labels[:, c // 2] = 1
    elif pattern == "all_active":
        labels[:] = 1
    elif pattern != "none":
        raise ValueError(f"pattern: expected one of {', '.join(RAGGED)}, got {pattern!r}")
    return labels


def make_features(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, clustered: float = 0.5) -> Tensor:
    """Features ``[..., C, D]`` that share a direction per class, so that positives differ from negatives."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(shape[-2], shape[-1], generator=generator, device="cpu")
    return (torch.randn(*shape, generator=generator, device="cpu") + clustered * centres).to(dtype)


def value_and_grads(
    function: Callable[..., Tensor], *inputs: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``function(*inputs)`` and its gradients with respect to every floating input, all detached."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    value = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(value, wanted, grad_outputs=upstream)
    return (value.detach(), *(grad.detach() for grad in grads))


# How many times its spread a row may be off. Results of correct kernels were seen up to 5 spreads off, whatever the
# instruction set, BLAS or order of summation; a kernel that loses three bits is over.
BUDGET = 8.0

# Operators that move, pick or compare: their results are elements of their arguments, or constants.
_EXACT = {
    "abs", "amax", "amin", "arange", "cat", "clamp", "clamp_max", "clamp_min", "clone", "constant_pad_nd", "copy",
    "empty", "empty_like", "eye", "fill", "flip", "full", "full_like", "gather", "index", "index_put", "index_select",
    "lift_fresh", "masked_fill", "masked_scatter", "max", "maximum", "min", "minimum", "nan_to_num", "neg",
    "new_empty", "new_empty_strided", "new_full", "new_zeros", "ones", "ones_like", "relu", "repeat", "scalar_tensor",
    "scatter", "select_backward", "sgn", "sign", "slice_backward", "sort", "squeeze", "stack", "t",
    "threshold_backward", "topk", "transpose", "unsqueeze", "where", "zero", "zeros", "zeros_like", "_to_copy",
    "_unsafe_view",
}  # fmt: skip
_SUMS = {"addmm", "addmv", "baddbmm", "bmm", "cumsum", "dot", "index_add", "mean", "mm", "mv", "sum"}
# Operators that are several roundings; torch has their parts.
_COMPOUND = ("_softmax", "_softmax_backward_data", "linalg_vector_norm", "log_sigmoid_backward", "log_sigmoid_forward",
             "logsumexp", "softplus_backward")  # fmt: skip


@functools.cache
def _parts() -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten
    torchs = get_decompositions([getattr(aten, name) for name in _COMPOUND])
    return {**torchs, aten.linalg_vector_norm.default: _vector_norm, aten.logsumexp.default: _logsumexp}


# As torch's, without the checks that take most of the time of these two, which every oracle calls.
def _vector_norm(x: Tensor, ord: float = 2.0, dim: Any = None, keepdim: bool = False) -> Tensor:
    if ord != 2:
        raise NotImplementedError(f"the norm of order {ord}: how it rounds is not known here")
    return x.pow(2.0).sum(dim, keepdim).pow(0.5)


def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    most = x.amax(dim, keepdim=True)
    most = most.masked_fill(most.isinf(), 0.0)
    return (x - most).exp().sum(dim, keepdim).log() + (most if keepdim else most.squeeze(dim))


@functools.cache
def _rounds(func: Any) -> str:
    """How an operator rounds: ``parts``, ``exact``, ``sum``, ``each`` (every element alone), or ``unknown``."""
    returned = func._schema.returns[0].alias_info if func._schema.returns else None
    written = returned is not None and returned.is_write
    name = func._schema.name.removeprefix("aten::")
    name = name.rstrip("_") if written else name
    if func in _parts():
        return "parts"
    if name in _EXACT or (returned is not None and not written):
        return "exact"
    if name in _SUMS and not written:
        return "sum"
    return "each" if torch.Tag.pointwise in func.tags else "unknown"


@functools.cache
def _carries(func: Any) -> str:
    """What becomes of a product's terms: ``scaled`` as the product is, the ``same``, or nothing."""
    name = func._schema.name.removeprefix("aten::")
    return "scaled" if name in ("div", "mul", "masked_fill") else "same" if name in ("add", "sub") else ""


class Rounded(TorchDispatchMode):
    """Context in which float64 arithmetic, gradients included, makes the rounding errors of a narrower one, drawn.

    Every result moves by up to the unit roundoff of its own size, and every sum of products by up to that of the sum of
    its terms' sizes, which is what cancels. What the backward reads of the forward moves once more, for kernels make it
    again. The errors come from ``seed`` and from the values alone: neither BLAS nor
    instruction set nor threads have a part in them. An operator that is neither known to be exact nor pointwise nor a
    sum is refused.
    """

    def __init__(self, arithmetic: torch.dtype, seed: int) -> None:
        super().__init__()
        self.unit = torch.finfo(arithmetic).eps / 2
        # Products of narrow numbers are summed in float32 and rounded once.
        self.sum_unit = min(self.unit, torch.finfo(torch.float32).eps / 2)
        self.smallest = torch.finfo(torch.promote_types(arithmetic, torch.float32)).smallest_normal
        # Half the distance between numbers near 0, where that is no matter of the last digits of float32: of float16.
        narrow = torch.finfo(arithmetic)
        self.floor = narrow.smallest_normal * narrow.eps / 2 if arithmetic == torch.float16 else 0.0
        self.generator = torch.Generator().manual_seed(seed)
        self.terms = WeakTensorKeyDictionary()  # of products and what they were scaled to: the sum of the terms' sizes
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, self._again)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here: torch's guard against it costs more than what is done for a small tensor."""
        return False

    def __enter__(self) -> Any:
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.hooks.__exit__(*raised)

    def _again(self, x: Tensor) -> Tensor:
        """A tensor that the forward has saved, as a kernel makes it again; inputs are what they are."""
        if not x.is_floating_point() or (x.is_leaf and x.requires_grad):
            return x
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            terms = self.terms.get(x)
            return x + self._drawn(self._each(x) if terms is None else self.sum_unit * terms)

    def _each(self, x: Tensor) -> Tensor:
        """How far each of ``x`` moves; what is below the smallest normal number may become 0."""
        size = x.abs()
        return self._stored(torch.where(size < self.smallest, size, self.unit * size), size)

    def _stored(self, moved: Tensor, size: Tensor) -> Tensor:
        """How far what is not 0 moves at least."""
        return torch.where(size > 0, moved.clamp(min=self.floor), moved) if self.floor else moved

    def _drawn(self, size: Tensor) -> Tensor:
        draw = torch.empty(size.shape, dtype=torch.float64, device=size.device)
        draw.uniform_(-1.0, 1.0, generator=self.generator)
        return draw.mul_(size).nan_to_num_(0.0, 0.0, 0.0)  # infinities stay what they are

    def _carry(self, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
        """What of a product's terms is left after a scaling, a shift or a mask."""
        terms = self.terms.get(args[0]) if isinstance(args[0], Tensor) else None
        if terms is not None and isinstance(out, Tensor) and out.shape == terms.shape:
            self.terms[out] = func(terms, *args[1:]).abs() if _carries(func) == "scaled" else terms

    def steps_of_sum(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float:
        """How many unit roundoffs a sum may be off: a subclass knows the order of its arithmetic."""
        return 1.0

    def steps_of_each(self, func: Any) -> float:
        """The same of an operator that works on every element alone."""
        return 1.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _rounds(func)
        if kind == "parts":
            with self:
                return _parts()[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if _carries(func):
            self._carry(func, args, out)
        if kind == "exact":
            return out
        made = [out] if isinstance(out, Tensor) else tree_leaves(out)  # the tree is walked in Python
        if not any(isinstance(x, Tensor) and x.is_floating_point() for x in made):
            return out
        if kind == "sum":
            terms = func(*(x.abs() if isinstance(x, Tensor) else x for x in args), **kwargs)
            self.terms[out] = terms = terms.mul_(self.steps_of_sum(func, args, kwargs))
            size = self.sum_unit * terms
            if self.unit > self.sum_unit:
                size += (self.unit - self.sum_unit) * out.abs()
            size = self._stored(size, terms)
        elif kind == "each" and isinstance(out, Tensor):
            size = self._each(out) * self.steps_of_each(func)
        else:
            raise NotImplementedError(f"{func}: how it rounds is not known here")
        return out.add_(self._drawn(size))


@dataclass(frozen=True)
class Budget:
    """A float64 value, the root mean square of what rounding does to each element, and the arithmetic that rounds."""

    truth: Tensor
    spread: Tensor
    arithmetic: torch.dtype


def error_budgets(
    function: Callable[[], Sequence[Tensor]],
    arithmetic: torch.dtype = torch.float32,
    draws: int = 16,
    rounding: type[Rounded] = Rounded,
) -> tuple[Budget, ...]:
    """How far rounding may move the results of ``function``: what :func:`assert_within_budget` holds a kernel against.

    Args:
        function: computes values and gradients by the float64 oracle.
        arithmetic: the dtype that intermediate results are rounded to. Sums of bfloat16 and float16 products are taken
            to be made in float32.
        draws: how often the rounding errors are drawn. With 16 the spread of a single number is its own to a third.
        rounding: draws them.
    """
    truth = [x.detach() for x in function()]
    spread = [torch.zeros_like(x) for x in truth]
    for seed in range(draws):
        with rounding(arithmetic, seed):
            drawn = function()
        for total, x, want in zip(spread, drawn, truth, strict=True):
            total.hypot_((x.detach() - want).nan_to_num_().div_(draws**0.5))  # squares would underflow
    return tuple(Budget(want, total, arithmetic) for want, total in zip(truth, spread, strict=True))


def largest_of_rows(x: Tensor) -> Tensor:
    """The largest absolute value of each row (last dimension)."""
    return x.abs().reshape(-1, x.shape[-1]).amax(dim=1) if x.dim() > 0 else x.abs().reshape(1)


def assert_within_budget(name: str, got: Tensor, budget: Budget, *, stored: Tensor | None = None) -> None:
    """Require, row by row, an error of at most ``BUDGET`` spreads and the rounding of the result to its dtype.

    The spread follows from the terms that are summed on the way to the row, also where they cancel; no peer has a part
    in it, so that the verdict on one result is the same on every host.

    Args:
        name: of the tensor, for the message.
        got: our result.
        budget: of the same tensor, from :func:`error_budgets`.
        stored: size of all that was rounded to the dtype of ``got``, where that is more than the result: its summands.
    """
    truth, result = budget.truth, torch.finfo(got.dtype)
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    ours = largest_of_rows(got.double() - truth)
    allowed = BUDGET * largest_of_rows(budget.spread)
    allowed += result.eps / 2 * largest_of_rows(truth if stored is None else stored)
    # Where numbers end: of the result, and of what it is made of (float32 for the narrower ones).
    allowed += result.smallest_normal * result.eps
    allowed += torch.finfo(torch.promote_types(budget.arithmetic, torch.float32)).smallest_normal
    over = ~(ours <= allowed)  # NaN is over
    worst = (ours / allowed).nan_to_num(torch.inf).argmax()
    assert not over.any(), (
        f"{name}: row {worst.item()} is off by {ours[worst]:.3g}, budget {allowed[worst]:.3g} "
        f"({over.sum().item()} of {ours.numel()} rows over)"
    )


class poisoned_allocations:
    """Context in which ``torch.empty`` and ``new_empty`` come filled with NaN (or the largest integer)."""

    def __enter__(self) -> poisoned_allocations:
        self._previous: tuple[Any, ...] = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        enabled, warn_only, fill = self._previous
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in several layouts: contiguous, permuted, with a gap, and offset in a larger buffer."""
    yield "contiguous", x
    yield "permuted", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "every_other", torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    padded = x.new_full((x.shape[0] + 1, *x.shape[1:]), torch.nan)
    padded[1:] = x
    yield "offset", padded[1:]
