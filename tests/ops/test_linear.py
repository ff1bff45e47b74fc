"""Linear layers on our own matrix product: values, gradients, the switch, what stays with torch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from sadcl.functional import linear as ops
from sadcl.functional.linear import linear
from sadcl.linear import Linear
from sadcl.ops import linear as linear_op
from sadcl.testing import assert_within_budget, error_budgets

pytest.importorskip("sadcl._C", reason="the CPU extension is not built")


@pytest.fixture(autouse=True)
def ours(monkeypatch) -> None:
    monkeypatch.setenv(ops.SWITCH, "cpp")


def run(function, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.budget
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 63, 100), (33, 257, 40), (50, 20, 700)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_within_the_error_budget(shape, bias: bool) -> None:
    m, n, k = shape
    leaves = [torch.randn(m, k), torch.randn(n, k) / k**0.5, *([torch.randn(n)] if bias else [])]
    upstream = torch.randn(m, n)
    budgets = error_budgets(lambda: run(F.linear, [t.double() for t in leaves], upstream))
    for name, got, want in zip(("out", "x", "weight", "bias"), run(linear, leaves, upstream), budgets, strict=False):
        assert_within_budget(name, got, want)


def test_strides_batches_and_float64() -> None:
    x = torch.randn(5, 3, 4, dtype=torch.float64).transpose(0, 2)
    w, b = torch.randn(5, 6).double().t(), torch.randn(6).double()
    upstream = torch.randn(1, 1, 6).double().expand(4, 3, 6)
    for got, want in zip(run(linear, [x, w, b], upstream), run(F.linear, [x, w, b], upstream), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_partial_gradients_opcheck_and_second_derivative() -> None:
    leaves = [torch.randn(4, 5), torch.randn(3, 5), torch.randn(3)]
    full = run(linear, leaves, torch.ones(4, 3))[1:]
    for wanted in itertools.product([False, True], repeat=3):
        some = [t.clone().requires_grad_(w) for t, w in zip(leaves, wanted, strict=True)]
        opcheck(torch.ops.sadcl.linear.default, (*some, "cpp"))
        if any(wanted):
            linear(*some).sum().backward()
        for leaf, grad, asked in zip(some, full, wanted, strict=True):
            assert torch.equal(leaf.grad, grad) if asked else leaf.grad is None
    # Elsewhere it is torch's, so a second derivative must not depend on the processor.
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradgradcheck(linear, wide)


def test_compiles_whole() -> None:
    layer = Linear(5, 3)
    x = torch.randn(2, 4, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    want, got = (torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (layer, compiled))
    torch.testing.assert_close(got, want)


def test_the_switch(monkeypatch) -> None:
    calls: list[str] = []
    product = linear_op.product
    monkeypatch.setattr(linear_op, "product", lambda *a: (calls.append("cpp"), product(*a))[1])
    layer, x = Linear(5, 3), torch.randn(4, 5)
    with torch.no_grad():
        layer(x)
        assert calls == ["cpp"]
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer(x[:0])
        monkeypatch.setenv(ops.SWITCH, "torch")
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        monkeypatch.delenv(ops.SWITCH)
        monkeypatch.setattr(ops, "OURS_IS_FASTER", False)
        layer(x)
        assert calls == ["cpp"]
        monkeypatch.setattr(ops, "OURS_IS_FASTER", True)
        layer(x)
        assert calls == ["cpp", "cpp"]
        monkeypatch.setenv(ops.SWITCH, "fast")
        with pytest.raises(ValueError, match="SADCL_LINEAR: expected one of auto, cpp, torch"):
            layer(x)
    assert Linear(5, 3).load_state_dict(torch.nn.Linear(5, 3).state_dict())
