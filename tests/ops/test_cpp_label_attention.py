"""Label attention in the C++ extension: every instruction set, thread counts, ragged shapes, the op's manners."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from sadcl.functional.label_attention import FORMS, label_attention
from sadcl.reference.label_attention import label_attention as oracle
from sadcl.testing import assert_within_budget, error_budgets

_C = pytest.importorskip("sadcl._C", reason="the CPU extension is not built")
NAMES = ("out", "query", "memory", "in_weight", "in_bias", "out_weight", "out_bias", "pos")


@pytest.fixture
def isa(every_isa: str):
    """Every instruction set in turn; fresh tensors hold NaN, so that nothing unwritten goes unseen."""
    torch.use_deterministic_algorithms(True)
    yield every_isa
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(b: int, c: int, l: int, heads: int, d: int, shared: bool = True, dtype=torch.float32, seed: int = 0):  # noqa: E741
    """query, memory, the four parameters, positions."""
    g = torch.Generator().manual_seed(seed)
    e = heads * d

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * std).to(dtype)

    query = normal(*(() if shared else (b,)), c, e)
    weights = normal(3 * e, e, std=e**-0.5), normal(3 * e, std=0.2), normal(e, e, std=e**-0.5), normal(e, std=0.2)
    return query, normal(b, l, e), *weights, normal(l, e)


def run(tensors, heads: int, upstream: Tensor, backend: str | None, form: str, mask: Tensor | None = None, dtype=None):
    """Output and gradients of all tensors."""
    leaves = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors]
    *inputs, pos = leaves
    if backend == "reference":
        if form == "folded":  # it leaves the key bias out, which cancels in the softmax
            inputs[3] = inputs[3] * torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(len(inputs[3]) // 3)
        out, _ = oracle(*inputs, heads, memory_pos=pos, key_padding_mask=mask)
    else:
        out, _ = label_attention(*inputs, heads, memory_pos=pos, key_padding_mask=mask, form=form, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@functools.lru_cache(maxsize=32)
def budgets(
    shape: tuple[int, ...],
    form: str,
    shared: bool,
    padded: bool,
    own_pos: bool,
    dtype: torch.dtype,
    arithmetic: torch.dtype = torch.float32,
):
    """Tensors, upstream gradient, padding, and what the oracle says of output and gradients."""
    b, c, length, heads, _ = shape
    mask = torch.zeros(b, length, dtype=torch.bool) if padded else None
    if mask is not None:
        mask[0, length // 2 + 1 :] = True
        mask[2:3] = True
    *tensors, pos = make(*shape, shared=shared, dtype=dtype)
    tensors.append(pos.expand(b, -1, -1) if own_pos else pos)
    upstream = torch.randn(b, c, pos.shape[-1], generator=torch.Generator().manual_seed(9)).to(dtype)
    wanted = error_budgets(lambda: run(tensors, heads, upstream, "reference", form, mask, torch.float64), arithmetic)
    return tensors, upstream, mask, wanted


def within_budget(
    shape, form: str, shared: bool = True, padded: bool = False, own_pos: bool = False, dtype=torch.float32
) -> None:
    tensors, upstream, mask, wanted = budgets(shape, form, shared, padded, own_pos, dtype)
    ours = run(tensors, shape[3], upstream, "cpp", form, mask)
    for name, got, want in zip(NAMES, ours, wanted, strict=True):
        assert got.dtype == dtype
        assert_within_budget(name, got, want)


@pytest.mark.budget
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 1, 1, 16),
        (1, 5, 1, 2, 24),
        (3, 1, 7, 3, 40),
        (2, 20, 33, 2, 24),
        (2, 70, 13, 4, 16),
        pytest.param((2, 7, 49, 1, 512), marks=pytest.mark.published),
    ],
    ids=str,
)
def test_matches_the_oracle(shape, shared: bool, form: str, isa: str) -> None:
    within_budget(shape, form, shared, padded=shape[0] > 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_the_same_bits_for_every_number_of_threads(shared: bool, form: str, threads) -> None:
    tensors = make(3, 21, 50, 2, 40, shared=shared)
    upstream = torch.randn(3, 21, 80)
    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        results.append(run(tensors, 2, upstream, "cpp", form))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.budget
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_accumulated_in_float32(form: str, isa: str) -> None:
    """Positions are the images' own here: those that images share have the sum of such gradients, each rounded."""
    shape = (2, 6, 30, 2, 24)
    within_budget(shape, form, own_pos=True, dtype=torch.bfloat16)
    tensors, upstream, *_ = budgets(shape, form, True, False, True, torch.bfloat16)
    own = run(tensors, 2, upstream, "cpp", form)[-1]
    shared = run([*tensors[:-1], tensors[-1][0]], 2, upstream, "cpp", form)[-1]
    assert torch.equal(shared, own.sum(0))


@pytest.mark.budget
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 16), (3, 5, 7, 3, 13), (2, 20, 33, 2, 24), (1, 3, 600, 1, 31)], ids=str)
def test_rounded_bfloat16_products(shape, shared: bool, form: str, isa: str) -> None:
    """With no backend named a processor that multiplies bfloat16 does; odd sizes leave half a pair, 600 is two cuts."""
    padded = shape[0] > 1
    tensors, upstream, mask, wanted = budgets(shape, form, shared, padded, True, torch.bfloat16, torch.bfloat16)
    if mask is not None:  # what is dropped is dropped out of pairs, too
        tensors = [tensors[0], tensors[1].masked_fill(mask[:, :, None], torch.nan), *tensors[2:]]
    ours = run(tensors, shape[3], upstream, None, form, mask)
    for name, got, want in zip(NAMES, ours, wanted, strict=True):
        assert_within_budget(name, got, want)
    if shape[2] == 33:
        named = run(tensors, shape[3], upstream, "cpp", form, mask)
        same = all(torch.equal(a, b) for a, b in zip(ours, named, strict=True))
        assert same == (isa != "avx512_bf16")


@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str) -> None:
    """Transposed, stepped and expanded inputs give the numbers of contiguous ones."""
    query, memory, in_weight, in_bias, out_weight, out_bias, pos = make(2, 9, 20, 2, 24)
    strided = [
        query.t().contiguous().t(),
        memory.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([in_weight, in_weight], -1)[..., 0],
        torch.stack([in_bias, in_bias], -1)[..., 0],
        out_weight.t().contiguous().t(),
        out_bias,
        torch.stack([pos, pos], 0)[1],
    ]
    upstream = torch.randn(9, 1, 48).expand(9, 2, 48).transpose(0, 1)
    want = run((query, memory, in_weight, in_bias, out_weight, out_bias, pos), 2, upstream.contiguous(), "cpp", form)
    leaves = [t.detach().requires_grad_() for t in strided]
    *inputs, moved = leaves
    out, _ = label_attention(*inputs, 2, memory_pos=moved, form=form, backend="cpp")
    got = [out, *torch.autograd.grad(out, leaves, upstream)]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_reproducible_and_the_same_in_the_backward(form: str) -> None:
    tensors = make(2, 5, 12, 2, 16, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    *inputs, pos = leaves
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out, applied = label_attention(
            *inputs, 2, memory_pos=pos, dropout=0.4, need_weights=True, form=form, backend="cpp"
        )
        results.append((out, applied))
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][0], results[2][0])
    out, applied = results[0]
    dropped = (applied.detach() != 0).double() / 0.6
    want, weights = oracle(*inputs, 2, memory_pos=pos, dropped=dropped)
    torch.testing.assert_close(applied, weights, rtol=1e-11, atol=1e-13)
    upstream, of_weights = torch.randn_like(out), torch.randn_like(applied)
    got = torch.autograd.grad((out, applied), leaves, (upstream, of_weights))
    for g, w in zip(got, torch.autograd.grad((want, weights), leaves, (upstream, of_weights)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def arguments(dtype: torch.dtype, folded: bool, shared: bool, grad: bool) -> tuple[object, ...]:
    query, memory, *weights, pos = (t.requires_grad_(grad) for t in make(2, 3, 5, 2, 4, shared=shared, dtype=dtype))
    padded = torch.tensor([[False] * 5, [False, True, True, False, True]])
    kept = torch.rand(2, 5, 6) > 0.3
    return query, memory, *weights, pos.expand(2, -1, -1), padded, kept, 2, folded, 1 / 0.7, True, "cpp"


@pytest.mark.parametrize("folded, shared, grad", list(itertools.product([False, True], repeat=3)))
def test_opcheck(folded: bool, shared: bool, grad: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        opcheck(torch.ops.sadcl.label_attention.default, arguments(dtype, folded, shared, grad))


@pytest.mark.parametrize("folded, shared", list(itertools.product([False, True], repeat=2)))
def test_gradcheck_of_output_and_weights(folded: bool, shared: bool) -> None:
    *tensors, padded, kept, heads, _, scale, rounded, name = arguments(torch.float64, folded, shared, True)
    leaves = [t.detach().contiguous().requires_grad_() for t in tensors]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.sadcl.label_attention(*values, padded, kept, heads, folded, scale, rounded, name)[:2]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_partial_gradients(form: str) -> None:
    tensors = make(2, 3, 7, 2, 8)
    upstream = torch.randn(2, 3, 16)
    full = run(tensors, 2, upstream, "cpp", form)[1:]
    for wanted in itertools.product([False, True], repeat=7):
        leaves = [t.detach().clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        *inputs, pos = leaves
        out, _ = label_attention(*inputs, 2, memory_pos=pos, form=form, backend="cpp")
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(upstream)
        for leaf, grad, asked in zip(leaves, full, wanted, strict=True):
            assert torch.equal(leaf.grad, grad) if asked else leaf.grad is None


def test_second_derivative_is_a_clear_error() -> None:
    query, memory, *weights, pos = make(2, 3, 7, 2, 8)
    query.requires_grad_()
    out, _ = label_attention(query, memory, *weights, 2, memory_pos=pos, backend="cpp")
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_exports_in_plain_aten(form: str) -> None:
    """Backend "torch" leaves no op of ours in an exported program."""
    from sadcl.attention import LabelAttention

    module = LabelAttention(16, 2, form=form, backend="torch").eval()
    inputs = torch.randn(3, 16), torch.randn(2, 7, 16), torch.randn(7, 16)
    exported = torch.export.export(module, inputs)
    assert not [n for n in exported.graph.nodes if "sadcl" in str(n.target)]
    torch.testing.assert_close(exported.module()(*inputs)[0], module(*inputs)[0])


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 3, 7), (63, 100, 257), (13, 2, 800)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matrix_product(m: int, n: int, k: int, dtype: torch.dtype, isa: str) -> None:
    from sadcl.ops._native import array

    bias = torch.randn(n, dtype=dtype)
    for flip_left, flip_right in itertools.product([False, True], repeat=2):
        left = (torch.randn(k, m).t() if flip_left else torch.randn(m, k)).to(dtype)
        right = (torch.randn(n, k).t() if flip_right else torch.randn(k, n)).to(dtype)
        out = torch.full((m, n), float("nan"), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        _C.linear(left=array(left), right=array(right), bias=array(bias), out=array(out), threads=2)
        want = left.double() @ right.double() + bias.double()
        scale = left.double().abs() @ right.double().abs() + bias.double().abs()
        unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        assert ((out - want).abs() <= unit * (k**0.5 + 4) * scale).all()
