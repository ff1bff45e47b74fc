"""Triton label attention against the oracle: both forms, every gradient, padding, dropout, weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from sadcl.kernels import _launch, label_attention_core_backward
from torch import Tensor
from torch.library import opcheck

from sadcl.functional.label_attention import FORMS, label_attention
from sadcl.reference.label_attention import label_attention as oracle
from sadcl.testing import Budget, assert_within_budget, error_budgets, layouts, poisoned_allocations

FORWARD = ["_attend_kernel"]
NAMES = ("query", "memory", "in_weight", "in_bias", "out_weight", "out_bias", "pos")
# images, labels, positions, heads, head width: one of each; an odd width; more labels than a block; more keys.
SHAPES = [(1, 1, 1, 1, 16), (3, 5, 21, 2, 20), (2, 19, 7, 1, 11), (1, 2, 50, 1, 40)]


def make(
    b: int, c: int, length: int, heads: int, d: int, shared: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """query, memory, the four parameters, positions."""
    g, e = torch.Generator().manual_seed(b + c), heads * d

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * std).to(dtype)

    weights = normal(3 * e, e, std=e**-0.5), normal(3 * e, std=0.2), normal(e, e, std=e**-0.5), normal(e, std=0.2)
    return [normal(*(() if shared else (b,)), c, e), normal(b, length, e), *weights, normal(length, e)]


def padding(b: int, length: int) -> Tensor | None:
    """One image half padded, one whole, the third fully padded."""
    mask = torch.zeros(b, length, dtype=torch.bool)
    mask[0, length // 2 + 1 :] = True
    mask[2:3] = True
    return mask if b > 1 else None


def run(
    tensors: list[Tensor],
    heads: int,
    upstream: Tensor,
    backend: str,
    form: str,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Output and gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    *inputs, pos = leaves
    if backend == "reference":
        if form == "folded":  # it leaves the key bias out, which cancels in the softmax
            inputs[3] = inputs[3] * torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(len(inputs[3]) // 3)
        out, _ = oracle(*inputs, heads, memory_pos=pos, key_padding_mask=mask)
    else:
        out, _ = label_attention(*inputs, heads, memory_pos=pos, key_padding_mask=mask, form=form, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))


def budgets(
    shape: tuple[int, ...], form: str, shared: bool, padded: bool, dtype: torch.dtype
) -> tuple[Tensor, tuple[Budget, ...]]:
    """The upstream gradient and what the oracle says of output and gradients."""
    tensors, mask = make(*shape, shared=shared, dtype=dtype), padding(shape[0], shape[2]) if padded else None
    upstream = torch.randn(shape[0], *tensors[0].shape[-2:], generator=torch.Generator().manual_seed(9)).to(dtype)
    wide = [t.double() for t in tensors]
    draws = 4 if shape[3] * shape[4] > 1024 else 16  # the largest of so wide a row needs few; they are millions
    return upstream, error_budgets(lambda: run(wide, shape[3], upstream, "reference", form, mask), dtype, draws)


def within_budget(
    shape: tuple[int, ...], form: str, shared: bool = True, padded: bool = True, dtype: torch.dtype = torch.float32
) -> None:
    tensors, mask = make(*shape, shared=shared, dtype=dtype), padding(shape[0], shape[2]) if padded else None
    upstream, wanted = budgets(shape, form, shared, padded, dtype)
    with poisoned_allocations():
        ours = run(tensors, shape[3], upstream, "triton", form, mask)
    for name, got, want in zip(("out", *NAMES), ours, wanted, strict=True):
        assert got.dtype == dtype
        assert_within_budget(name, got, want)


@pytest.mark.budget
@pytest.mark.parametrize(
    "shape, shared, form",
    [
        *((SHAPES[1], shared, form) for shared, form in itertools.product([True, False], FORMS)),
        (SHAPES[0], True, "plain"),
        (SHAPES[0], True, "folded"),
        (SHAPES[2], False, "plain"),
        (SHAPES[2], True, "folded"),
        (SHAPES[3], True, "plain"),
        (SHAPES[3], False, "folded"),
    ],
    ids=str,
)
def test_within_the_error_budget(form: str, shape: tuple[int, ...], shared: bool) -> None:
    within_budget(shape, form, shared)


@pytest.mark.budget
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, form: str) -> None:
    within_budget((2, 3, 18, 2, 12), form, dtype=dtype)


def through(tensors: list[Tensor], heads: int, **options: object) -> tuple[Tensor, Tensor | None]:
    *inputs, pos = tensors
    return label_attention(*inputs, heads, memory_pos=pos, backend="triton", **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_weights_and_their_gradient(form: str, shared: bool) -> None:
    leaves = [t.requires_grad_() for t in make(3, 3, 13, 2, 8, shared, torch.float64)]
    mask = padding(3, 13)
    with _launch.recording() as recorded:
        got = through(leaves, 2, key_padding_mask=mask, need_weights=True, form=form)
    assert [launch.name for launch in recorded] == [*FORWARD, "_weight_kernel"]
    *inputs, pos = leaves
    want = oracle(*inputs, 2, memory_pos=pos, key_padding_mask=mask)
    upstream = [torch.randn_like(x) for x in want]
    for picked in ((0, 1), (1,)):
        arguments = [[x[i] for i in picked] for x in (got, want, upstream)]
        ours = torch.autograd.grad(arguments[0], leaves, arguments[2], retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(arguments[1], leaves, arguments[2], retain_graph=True, allow_unused=True)
        for mine, other in zip((*got, *ours), (*want, *theirs), strict=True):
            if other is not None:
                torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_is_the_same_in_the_backward_and_in_both_forms(shared: bool) -> None:
    leaves = [t.requires_grad_() for t in make(3, 3, 13, 2, 8, shared, torch.float64)]
    *inputs, pos = leaves
    mask = padding(3, 13)
    applied: dict[str, Tensor] = {}
    for form in FORMS:
        torch.manual_seed(3)
        out, weights = through(leaves, 2, key_padding_mask=mask, dropout=0.4, need_weights=True, form=form)
        plain = oracle(*inputs, 2, memory_pos=pos, key_padding_mask=mask)[1].detach()
        dropped = torch.where(plain > 0, (weights.detach() != 0).double() / 0.6, 0.0)
        want = oracle(*inputs, 2, memory_pos=pos, key_padding_mask=mask, dropped=dropped)
        upstream = [torch.randn_like(x) for x in want]
        ours, theirs = (torch.autograd.grad(pair, leaves, upstream) for pair in ((out, weights), want))
        for mine, other in zip((out, weights, *ours), (*want, *theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
        applied[form] = weights.detach()
    torch.testing.assert_close(applied["plain"], applied["folded"])
    torch.manual_seed(4)
    other, _ = through(leaves, 2, key_padding_mask=mask, dropout=0.4, form="plain")
    assert not torch.equal(other, out)


def test_dropout_drops_at_its_rate() -> None:
    tensors = make(3, 16, 48, 1, 8)
    _, weights = through(tensors, 1, dropout=0.3, need_weights=True, form="plain")
    assert weights is not None
    kept = (weights != 0).double()
    for share in (kept.mean(), kept.mean((1, 2, 3)).min(), kept.mean((1, 2, 3)).max()):
        assert abs(share - 0.7) < 0.05
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, :, 0], kept[:, :, 1])


@pytest.mark.parametrize("form", FORMS)
def test_what_padded_positions_hold_is_never_read(form: str) -> None:
    tensors, mask = make(3, 4, 9, 2, 8), padding(3, 9)
    tensors[1][mask] = torch.nan
    leaves = [t.requires_grad_() for t in tensors]
    out, _ = through(leaves, 2, key_padding_mask=mask, form=form)
    assert torch.equal(out[2], leaves[5].expand(4, 16)) and out.isfinite().all()
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads) and not grads[1][mask].any()


@pytest.mark.parametrize("form", FORMS)
def test_launches_partial_gradients_and_determinism(form: str) -> None:
    tensors, upstream = make(2, 3, 7, 2, 8), torch.randn(2, 3, 16)
    full = run(tensors, 2, upstream, "triton", form)[1:]
    plain = form == "plain"
    score, query, key = "_score_gradient_kernel", "_query_gradient_kernel", "_key_gradient_kernel"
    expected = {
        (0,): [score, query],
        (1,): [score, *[key] * (2 if plain else 1)],  # folded: keys and values are one tensor, with one gradient
        (6,): [score, *[key] * (1 if plain else 2)],
        (5,): [],
        tuple(range(7)): [score, query, key, key],
    }
    for wanted, names in expected.items():
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        with _launch.recording() as recorded:
            out, _ = through(leaves, 2, form=form)
            out.backward(upstream)
        assert [launch.name for launch in recorded] == FORWARD + names, wanted
        for i in wanted:
            if i == 1 and wanted == (1,) and not plain:  # the sum of two products in one accumulator
                torch.testing.assert_close(leaves[i].grad, full[i])
            else:
                assert torch.equal(leaves[i].grad, full[i])


@pytest.mark.parametrize("form", FORMS)
def test_layouts_and_chunks_of_images(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(3, 4, 9, 2, 10)
    upstream = torch.randn(4, 1, 20).expand(4, 3, 20).transpose(0, 1)
    want = run(tensors, 2, upstream.contiguous(), "triton", form)
    for name, layout in layouts(tensors[1]):
        moved = [tensors[0].t().contiguous().t(), layout, *tensors[2:]]
        for mine, other in zip(run(moved, 2, upstream, "triton", form), want, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6, msg=name)
    monkeypatch.setattr(label_attention_core_backward, "SCRATCH_BYTES", 1)
    with _launch.recording() as recorded:
        got = run(tensors, 2, upstream, "triton", form)
    assert sum(launch.name == "_score_gradient_kernel" for launch in recorded) == 3
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_and_second_derivative(form: str) -> None:
    leaves = [t.requires_grad_() for t in make(2, 3, 7, 2, 8)]
    want, _ = through(leaves, 2, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = through(leaves, 2, need_weights=True, form=form)
    assert weights is not None and out.dtype == weights.dtype == torch.bfloat16
    assert (out - want).abs().max() < 0.05 * want.abs().max()
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), leaves)] == [torch.float32] * 7
    (grad,) = torch.autograd.grad(want.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.budget
@pytest.mark.published
@pytest.mark.parametrize(
    "shape, form",
    [
        ((1, 2, 5, 1, 512), "plain"),  # the head width: several steps of the width in every loop
        ((1, 2, 3, 4, 512), "folded"),  # the folded width, 2,048
        ((1, 3, 1296, 1, 16), "plain"),  # an input of 576 pixels
        ((1, 3, 1296, 2, 8), "folded"),
    ],
    ids=str,
)
def test_the_published_sizes(shape: tuple[int, ...], form: str) -> None:
    within_budget(shape, form, padded=False)


def test_registration() -> None:
    query, keys = torch.randn(1, 2, 2, 4, requires_grad=True), torch.randn(1, 3, 1, 4, requires_grad=True)
    arguments = (query, keys, None, None, None, None, 0.5, 0.0, False, "triton")
    opcheck(torch.ops.sadcl.label_attention_core.default, arguments)
