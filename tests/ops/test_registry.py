"""Every declared op is whole, equals its oracle on its examples, and a new one is told what it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import fuzz
import pytest
import registry
import torch
from torch import Tensor
from torch.library import opcheck

import sadcl
from sadcl.ops._library import OPS, Backward, Op
from sadcl.testing.examples import EXAMPLES, SMALL, Maker
from sadcl.testing.oracles import ORACLES

HERE = {name for name, info in sadcl.backends().items() if info.available and name not in ("triton", "cuda")}


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_lacks_nothing(name: str) -> None:
    assert registry.lacks(name) == []


def test_exemptions_are_of_ops_that_are_there() -> None:
    assert {name for name, _ in registry.EXEMPT} <= set(OPS)


@pytest.mark.parametrize(
    "name, backend", [(name, backend) for name, op in sorted(OPS.items()) for backend in op.backends if backend in HERE]
)
def test_results_are_the_oracles(name: str, backend: str) -> None:
    """On the examples that tests, static compilation and benchmarks share; error budgets are the op's own tests'."""
    op = OPS[name]
    for x in EXAMPLES[name](Maker(SMALL, torch.float64)):
        if name == "sscl" and not x.normalize:
            continue  # its oracle is SupCon's: tests/ops/test_supcon.py
        if name == "compact" and x.capacity is not None:
            x = x._replace(capacity=int((x.labels == 1).sum()) + 1)
        truth = ORACLES[name](x)
        out = op.run(x, backend)
        got = (x.slots,) if op.mutates else out[: len(truth)]
        for field, ours, want in zip(("slots",) if op.mutates else op.outputs._fields, got, truth, strict=False):
            torch.testing.assert_close(ours.double(), want.double(), rtol=1e-9, atol=1e-12, msg=f"{name}.{field}")


# -- the walk-through of docs/architecture.md, "To add an op" --


class Inputs(NamedTuple):
    """What the example's loss is of."""

    x: Tensor  # [B, C]
    margin: float
    scaled: bool


class Outputs(NamedTuple):
    """The loss, and what the backward reads."""

    loss: Tensor  # [B]
    above: Tensor  # [B, C]


def forward(x: Inputs) -> dict[str, Tensor]:
    above = (x.x - x.margin).clamp(min=0.0)
    loss = above.square().sum(1)
    return {"loss": loss / 2 if x.scaled else loss, "above": above}


def backward(upstream: Any, x: Inputs, saved: Outputs, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    return {"grad_x": upstream.grad_loss[:, None] * saved.above * (1.0 if x.scaled else 2.0)}


def allocate(x: Inputs) -> Outputs:
    return Outputs(x.x.new_empty(x.x.shape[0]), x.x.new_empty(x.x.shape))


@pytest.fixture(scope="module")
def hinge() -> Iterator[Op]:
    """An op that is added while the tests run."""
    yield Op("hinge", Inputs, Outputs, allocate, {"torch": forward}, Backward(("x",), {"torch": backward}))
    del OPS["hinge"]


def test_a_declaration_is_all_that_autograd_and_compilers_need(hinge: Op) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    opcheck(torch.ops.sadcl.hinge.default, (x, 0.1, True, "torch"))
    loss = lambda x: hinge(Inputs(x, 0.1, False), "torch").loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, x)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    (want,) = torch.autograd.grad(loss(x).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x).sum())(x.detach()), want)
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([x, 2 * x]))[1], loss(2 * x))
    checkpointed = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(checkpointed.sum(), x)[0], want)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (grad,) = torch.autograd.grad(loss(x).sum(), x, create_graph=True)
        grad.sum().backward()


def test_what_a_new_op_lacks_is_named(hinge: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [part.split(":")[0] for part in registry.lacks("hinge")] == [
        "oracle", "example", "fuzz", "tests", "benchmark", "workload", "roofline",
    ]  # fmt: skip
    monkeypatch.setitem(ORACLES, "hinge", lambda x: (forward(x)["loss"].double(),))
    monkeypatch.setitem(EXAMPLES, "hinge", lambda make: iter([Inputs(make.normal(4, 3), 0.1, False)]))
    monkeypatch.setitem(fuzz.GENERATORS, "hinge", fuzz.Generator(lambda case: None))
    assert [part.split(":")[0] for part in registry.lacks("hinge")] == ["tests", "benchmark", "workload", "roofline"]


def test_fields_that_are_no_schema_are_refused() -> None:
    class Wrong(NamedTuple):
        x: Tensor
        names: dict[str, int]

    with pytest.raises(KeyError):
        Op("wrong", Wrong, Outputs, allocate, {"torch": forward})
    assert "wrong" not in OPS
