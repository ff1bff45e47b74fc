"""Devices without float64 (MPS): no backend "torch" makes a float64 tensor there, forward, backward or after."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from calls import CALLS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sadcl import _dtypes
from sadcl.ops._library import OPS
from sadcl.testing import value_and_grads
from sadcl.testing.examples import EXAMPLES, SMALL, Maker


class WithoutFloat64(TorchDispatchMode):
    """Raises where an operator makes a float64 tensor, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func}: Cannot convert a MPS Tensor to float64 dtype")
        return made


@pytest.fixture(autouse=True)
def _no_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The norms' dtype is what it is on MPS, on this device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sadcl") and hasattr(module, "norm_dtype"):
            monkeypatch.setattr(module, "norm_dtype", lambda device: torch.float32)
    yield


def test_the_rule_is_kept_by_what_stands_for_the_device() -> None:
    with WithoutFloat64(), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()
    assert _dtypes.norm_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("name", [name for name, op in sorted(OPS.items()) if "torch" in op.backends])
def test_ops(name: str) -> None:
    """Past the dispatcher, where every operator of the implementation is seen."""
    op = OPS[name]
    for x in EXAMPLES[name](Maker(SMALL, torch.float32)):
        with WithoutFloat64():
            out = op.run(x, "torch")
            if op.backward is None:
                continue
            upstream = tuple(torch.ones_like(value) for value in out[: op.results])
            grads = op.derivative.run(op.derivative.pack(upstream, x, out), "torch")
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str) -> None:
    """With checks, compaction, weights and reductions; the numbers are float32's."""
    call = CALLS[name]
    tensors = call.make()
    fixed = {key: x for key, x in tensors.items() if key not in call.derived}
    values = [tensors[key] for key in call.derived]

    def run(*given: Tensor) -> Tensor:
        return call.run("torch", **fixed, **dict(zip(call.derived, given, strict=True)))

    with WithoutFloat64():
        got = value_and_grads(run, *values)
    wide = {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}
    fixed = {key: x for key, x in wide.items() if key not in call.derived}
    want = value_and_grads(run, *(wide[key] for key in call.derived))
    for ours, truth in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-4, atol=2e-4 * max(1.0, float(truth.abs().max())))


@pytest.mark.parametrize("name", ["sscl", "pscl", "dual", "mlc", "mlc-msc"])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_features_whose_squares_overflow_or_vanish_in_float32(name: str, scale: float) -> None:
    call = CALLS[name]
    tensors = call.make()
    want = call.run("torch", **tensors)
    scaled = {key: x * scale if call.axes[key].endswith("D") else x for key, x in tensors.items()}
    with WithoutFloat64():
        got = call.run("torch", **scaled)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
