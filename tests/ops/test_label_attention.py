"""Label attention: both forms against the oracle and nn.MultiheadAttention, padding, dropout, cost model."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import Tensor, nn

from sadcl.attention import LabelAttention
from sadcl.functional.label_attention import FORMS, backward_macs, choose_form, forward_macs, label_attention
from sadcl.reference.label_attention import label_attention as oracle
from sadcl.testing import assert_within_budget, error_budgets
from tests.here import backends_here

B, C, L, E, H = 3, 5, 11, 24, 4


@pytest.fixture(params=backends_here("label_attention"), autouse=True)
def backend(request, monkeypatch) -> str:
    """Every test of this file runs on every backend that can run here."""
    monkeypatch.setenv("SADCL_BACKEND", request.param)
    return request.param


def make(shared: bool, pos: str, seed: int = 0, dtype=torch.float64, heads: int = H, bias: bool = True):
    """A module and its inputs: query, memory, memory_pos."""
    torch.manual_seed(seed)
    module = LabelAttention(E, heads, bias=bias).to(dtype)
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    query = torch.randn(*(() if shared else (B,)), C, E, dtype=dtype)
    memory = torch.randn(B, L, E, dtype=dtype)
    shapes = {"none": None, "shared": (L, E), "image": (B, L, E)}
    shape = shapes[pos]
    return module, query, memory, None if shape is None else torch.randn(shape, dtype=dtype)


def weights_of(module: LabelAttention) -> tuple[Tensor | None, ...]:
    return module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias


def padding() -> Tensor:
    """One image without padding, one ragged, one fully padded."""
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[1, 4:] = True
    mask[2] = True
    return mask


CASES = list(itertools.product(FORMS, (True, False), ("none", "shared", "image"), (False, True), (False, True)))


@pytest.mark.parametrize(("form", "shared", "pos", "masked", "need"), CASES)
def test_both_forms_match_the_oracle_with_gradients(form, shared, pos, masked, need):
    module, query, memory, memory_pos = make(shared, pos)
    module.form = form
    mask = padding() if masked else None
    leaves = [t.requires_grad_() for t in (query, memory, memory_pos, *module.parameters()) if t is not None]
    out, weights = module(query, memory, memory_pos, mask, need_weights=need)
    want, want_weights = oracle(query, memory, *weights_of(module), H, memory_pos=memory_pos, key_padding_mask=mask)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    assert (weights is None) == (not need)
    if need:
        torch.testing.assert_close(weights, want_weights, rtol=1e-11, atol=1e-12)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, upstream)
    for g, w in zip(got, torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 4, 12])
def test_equals_multihead_attention(form, bias, heads):
    module, query, memory, memory_pos = make(False, "shared", bias=bias, heads=heads)
    module.form = form
    mask = padding()
    mask[2, 3] = False  # nn.MultiheadAttention has no answer for a fully padded image
    peer = nn.MultiheadAttention(E, heads, bias=bias, batch_first=True).double()
    peer.load_state_dict(module.state_dict())
    want, want_weights = peer(query, memory + memory_pos, memory, mask, average_attn_weights=False)
    out, weights = module(query, memory, memory_pos, mask, need_weights=True)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(weights, want_weights, rtol=1e-11, atol=1e-12)


@pytest.mark.budget
@pytest.mark.parametrize("form", FORMS)
def test_float32_is_within_the_error_budget(form):
    torch.manual_seed(1)
    module = LabelAttention(512, 1, form=form)
    query, memory, pos = torch.randn(7, 512), torch.randn(2, 49, 512), torch.randn(49, 512)
    wide = [x.detach().double() for x in (query, memory, *weights_of(module), pos)]
    (budget,) = error_budgets(lambda: oracle(*wide[:-1], 1, memory_pos=wide[-1])[:1])
    assert_within_budget("out", module(query, memory, pos)[0].detach(), budget)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("need", [True, False])
def test_a_fully_padded_image_gives_the_output_bias_and_no_gradient(form, shared, need):
    module, query, memory, memory_pos = make(shared, "image")
    module.form = form
    memory[2] = float("nan")  # whatever a padded position holds
    memory[1, 4:] = float("inf")
    memory.requires_grad_()
    memory_pos.requires_grad_()
    out, weights = module(query, memory, memory_pos, padding(), need_weights=need)
    assert torch.equal(out[2], module.out_proj.bias.expand(C, E))
    assert out.isfinite().all()
    out.square().sum().backward()
    assert memory.grad[2].eq(0).all() and memory.grad[1, 4:].eq(0).all() and memory_pos.grad[2].eq(0).all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    if need:
        assert weights[2].eq(0).all() and weights[1, :, :, 4:].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_acts_on_the_weights(form, masked):
    """The value bias enters times the row sum of the kept weights, so they alone give the output."""
    module, query, memory, memory_pos = make(True, "shared")
    module.form, module.dropout = form, 0.5
    mask = padding() if masked else None
    torch.manual_seed(3)
    out, applied = module(query, memory, memory_pos, mask, need_weights=True)
    plain = oracle(query, memory, *weights_of(module), H, memory_pos=memory_pos, key_padding_mask=mask)[1]
    dropped = torch.where(plain > 0, applied / plain, 0.0)
    assert ((dropped < 1e-9) | ((dropped - 2).abs() < 1e-9)).all()
    assert 0.3 < dropped[0].count_nonzero() / dropped[0].numel() < 0.7
    want, _ = oracle(
        query, memory, *weights_of(module), H, memory_pos=memory_pos, key_padding_mask=mask, dropped=dropped
    )
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
    module.eval()
    still, _ = module(query, memory, memory_pos, mask)
    reference = oracle(query, memory, *weights_of(module), H, memory_pos=memory_pos, key_padding_mask=mask)
    torch.testing.assert_close(still, reference[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_without_weights_is_unbiased(form):
    module, query, memory, memory_pos = make(True, "shared")
    module.form, module.dropout = form, 0.3
    torch.manual_seed(4)
    with torch.no_grad():
        many = memory[:1].expand(3000, -1, -1)
        mean = module(query, many, memory_pos)[0].mean(0)
        want = oracle(query, memory[:1], *weights_of(module), H, memory_pos=memory_pos)[0][0]
    assert (mean - want).abs().max() < 0.15 * want.abs().max()


def test_cost_model_counts_and_picks():
    # The published head: 80 labels, 196 positions, width 2048, 4 heads, 8 images.
    sizes = (8, 80, 196, 2048, 4)
    plain, folded = (forward_macs(form, *sizes, shared=True) for form in FORMS)
    assert plain == 9 * 80 * 2048**2 + 2 * 8 * 196 * 2048**2 + 2 * 8 * 80 * 196 * 2048
    assert folded == 2 * 9 * 80 * 2048**2 + 16 * 4 * 80 * 196 * 2048
    for form, forward in zip(FORMS, (plain, folded), strict=True):
        assert backward_macs(form, *sizes, shared=True) == 2 * forward
    assert choose_form(*sizes, shared=True) == "folded"
    assert choose_form(*sizes, shared=False) == "folded"  # the second decoder layer
    assert choose_form(8, 500, 196, 2048, 4, shared=True) == "plain"  # Visual Genome: C > L
    assert choose_form(8, 500, 196, 2048, 4, shared=False) == "plain"
    assert choose_form(8, 80, 196, 256, 8, shared=True) == "plain"  # many narrow heads: H*L is over E
    assert choose_form(1, 20, 196, 2048, 4, shared=True) == "folded"


def test_the_choice_is_what_runs(monkeypatch):
    ops = importlib.import_module("sadcl.functional.label_attention")  # the package has a function of that name

    ran: list[str] = []
    fused, attend = ops._fused, ops.portable.attend
    monkeypatch.setattr(ops, "_fused", lambda *a: (ran.append(a[-3]), fused(*a))[1])
    monkeypatch.setattr(ops.portable, "attend", lambda *a: (ran.append(a[-1]), attend(*a))[1])
    many, few = torch.randn(300, 64), torch.randn(2, 64)
    module = LabelAttention(64, 1)
    memory = torch.randn(4, 60, 64)
    module(many, memory)
    module(few, memory)
    assert ran == ["plain", "folded"]


@pytest.mark.parametrize("name, dtype, torchs", [
    (None, torch.bfloat16, True), ("cpp", torch.bfloat16, False), (None, torch.float32, False),
])  # fmt: skip
def test_bfloat16_goes_to_torch_where_the_processor_has_tiles(monkeypatch, name, dtype, torchs):
    ops = importlib.import_module("sadcl.functional.label_attention")
    ran: list[str] = []
    fused, attend = ops._fused, ops.portable.attend
    monkeypatch.setattr(ops, "TORCH_HAS_TILES", True)
    monkeypatch.delenv("SADCL_BACKEND", raising=False)
    monkeypatch.setattr(ops, "_fused", lambda *a: (ran.append("cpp"), fused(*a))[1])
    monkeypatch.setattr(ops.portable, "attend", lambda *a: (ran.append("torch"), attend(*a))[1])
    module = LabelAttention(64, 1, backend=name).to(dtype)
    module(torch.randn(3, 64).to(dtype), torch.randn(4, 20, 64).to(dtype))
    assert ran == ["torch" if torchs else "cpp"]


def test_gradcheck():
    module, query, memory, memory_pos = make(True, "shared")
    for form in FORMS:

        def run(*tensors, form=form):
            query, memory, pos, *params = tensors
            mask = padding()
            return label_attention(query, memory, *params, H, memory_pos=pos, key_padding_mask=mask, form=form)[0]

        inputs = [t.detach().requires_grad_() for t in (query, memory, memory_pos, *weights_of(module))]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_and_strided_inputs(form, backend):
    module, query, memory, memory_pos = make(True, "shared", dtype=torch.float32)
    module.form = form
    wide = torch.full((B, L, 2 * E), float("nan"))
    wide[..., ::2] = memory
    want, _ = module(query, memory, memory_pos)
    torch.testing.assert_close(module(query, wide[..., ::2], memory_pos)[0], want, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        for need in (False, True):
            out, _ = module(query, memory, memory_pos, padding(), need_weights=need)
            assert out.dtype == torch.bfloat16
            out.float().sum().backward()
            assert (out[0] - want[0]).abs().max() < 0.05 * want[0].abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole(form):
    module, query, memory, memory_pos = make(True, "shared", dtype=torch.float32)
    module.form = form
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for masked in (None, padding()):
        leaves = (module.in_proj_weight, memory.requires_grad_())
        want = torch.autograd.grad(module(query, memory, memory_pos, masked)[0].square().sum(), leaves)
        got = torch.autograd.grad(compiled(query, memory, memory_pos, masked)[0].square().sum(), leaves)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_bad_input_names_the_argument():
    module = LabelAttention(E, H)
    query, memory = torch.randn(C, E), torch.randn(B, L, E)
    with pytest.raises(ValueError, match="num_heads"):
        LabelAttention(10, 3)
    with pytest.raises(ValueError, match="dropout"):
        LabelAttention(8, 2, dropout=1.0)
    with pytest.raises(ValueError, match="form"):
        LabelAttention(8, 2, form="fast")
    with pytest.raises(ValueError, match="query"):
        module(query[0], memory)
    with pytest.raises(ValueError, match=r"query.*B=3"):
        module(torch.randn(2, C, E), memory)
    with pytest.raises(ValueError, match=r"query.*E=24"):
        module(torch.randn(C, E + 1), memory)
    with pytest.raises(ValueError, match=r"memory_pos.*L=11"):
        module(query, memory, torch.randn(L + 1, E))
    with pytest.raises(TypeError, match=r"key_padding_mask.*bool"):
        module(query, memory, None, torch.zeros(B, L))
    with pytest.raises(ValueError, match="key_padding_mask"):
        module(query, memory, None, torch.zeros(B, L + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one position"):
        module(query, memory[:, :0])
    with pytest.raises(TypeError, match="query"):
        module(query.long(), memory)


def test_backend_by_name(monkeypatch):
    module, query, memory, memory_pos = make(True, "shared")
    want, _ = module(query, memory, memory_pos)
    module.backend = "reference"
    torch.testing.assert_close(module(query, memory, memory_pos)[0], want, rtol=1e-11, atol=1e-12)
    module.dropout = 0.5
    out, weights = module(query, memory, memory_pos, need_weights=True)
    assert (weights == 0).any() and out.shape == want.shape
    module.backend = "triton"
    with pytest.raises(RuntimeError, match="cannot run label_attention"):
        module(query, memory, memory_pos)
    module.backend = None
    monkeypatch.setenv("SADCL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="SADCL_BACKEND"):
        module(query, memory, memory_pos)
