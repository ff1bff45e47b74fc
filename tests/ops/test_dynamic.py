"""One compiled graph for any number of images: torch.compile, torch.export, make_fx, fake tensors, torch.jit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import CALLS, cases
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sadcl import functional as F
from sadcl.testing import make_labels

BATCHES = (3, 4, 5, 6, 7, 8, 9, 16, 31, 63, 64, 130)  # 2 views of 4 classes: from 24 to 1040 rows


# An op's graph is the same for every backend but for the scores that cpp keeps; "torch" where it is no op.
CASES = [case for case in cases() if case.values[1] == "cpp" or case.values[0] in ("sscl", "attention")]


def values(call: Any, b: int, grad: bool = False) -> list[Tensor]:
    return list(call.make(b, torch.float64, grad).values())


def positional(name: str, backend: str | None) -> Callable[..., Tensor]:
    call = CALLS[name]
    return lambda *tensors: call.run(backend, **dict(zip(call.axes, tensors, strict=True)))


def with_gradients(run: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """``run`` and the gradients of its inputs that require one, as make_fx can trace it."""

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        value = run(*tensors)
        return (value, *torch.autograd.grad(value, [x for x in tensors if x.requires_grad]))

    return both


def assert_one_graph(name: str, backend: str | None, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counters.clear()
    run = with_gradients(positional(name, backend))
    compiled = torch.compile(positional(name, backend), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for b in BATCHES:
        tensors = values(CALLS[name], b, grad=True)
        if dynamic is None:
            for x, axes in zip(tensors, CALLS[name].axes.values(), strict=True):
                torch._dynamo.mark_dynamic(x, [at for at, letter in enumerate(axes) if letter == "B"])
        torch.testing.assert_close(with_gradients(compiled)(*tensors), run(*tensors))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name, backend", CASES)
def test_one_graph_where_the_batch_is_marked_dynamic(name: str, backend: str) -> None:
    assert_one_graph(name, backend, dynamic=None)


@pytest.mark.parametrize("name", ["sscl-released", "pscl-shares", "dual", "asl", "supcon"])
def test_one_graph_where_every_size_is_dynamic(name: str) -> None:
    assert_one_graph(name, None, dynamic=True)


@pytest.mark.parametrize("capacity", [None, 90])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_one_graph_of_compaction(backend: str, capacity: int | None) -> None:
    torch._dynamo.reset()
    counters.clear()

    def run(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(F.compact_labels(labels, backend, capacity=capacity))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for b in (*BATCHES[:8], *BATCHES[:2]):  # from fewer pairs than the capacity to more
        labels = make_labels(b, 6)
        for got, want in zip(compiled(labels), run(labels), strict=True):
            assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] <= 2


def test_recompiling_is_an_error_after_the_first_graph_under_inductor() -> None:
    torch._dynamo.reset()
    labels = {b: make_labels(b, 4, "ignored") for b in (3, 9, 70)}

    def total(x: Tensor, p: Tensor, y: Tensor) -> Tensor:
        losses = F.dual_contrastive_loss(x[:, 0] * 2.0, x[:, 1], p, y)
        return sum(losses) + F.asymmetric_loss(x[:, 0, :, 0], y, reduction="mean")

    compiled = torch.compile(total, fullgraph=True, dynamic=True)
    first = True
    for b, y in labels.items():
        x, p = torch.randn(b, 2, 4, 8).requires_grad_(), torch.randn(4, 8).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=not first):
            got = torch.autograd.grad(compiled(x, p, y), (x, p))
        torch.testing.assert_close(got, torch.autograd.grad(total(x, p, y), (x, p)))
        first = False


class Module(torch.nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.run(*tensors)


@pytest.mark.parametrize("name, backend", CASES)
def test_exported_for_any_batch(name: str, backend: str) -> None:
    run = positional(name, backend)
    batch = torch.export.Dim("batch", min=2, max=4096)
    shapes = tuple({axes.index("B"): batch} if "B" in axes else None for axes in CALLS[name].axes.values())
    if "mask" in CALLS[name].axes:
        shapes = tuple(
            {0: batch, 1: batch} if axes == "BB" else s
            for s, axes in zip(shapes, CALLS[name].axes.values(), strict=True)
        )
    program = torch.export.export(Module(run), tuple(values(CALLS[name], 4)), dynamic_shapes={"tensors": shapes})
    for b in (2, 4, 9, 130):
        tensors = values(CALLS[name], b)
        torch.testing.assert_close(program.module()(*tensors), run(*tensors))


@pytest.mark.parametrize("name, backend", CASES)
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx_of_value_and_gradients(name: str, backend: str, mode: str) -> None:
    run = with_gradients(positional(name, backend))
    graph = make_fx(run, tracing_mode=mode)(*values(CALLS[name], 4, grad=True))
    for b in (4, 9, 130) if mode == "symbolic" else (4,):
        tensors = values(CALLS[name], b, grad=True)
        torch.testing.assert_close(graph(*tensors), run(*tensors))


@pytest.mark.parametrize("name, backend", CASES)
@pytest.mark.parametrize("b", [4, 300])
def test_fake_tensors_have_the_shapes_of_real_ones(name: str, backend: str, b: int) -> None:
    """Above 512 rows, where the number of kept scores hangs on the labels, too."""
    run, tensors = with_gradients(positional(name, backend)), values(CALLS[name], b, grad=True)
    with FakeTensorMode() as mode:
        got = run(*(mode.from_tensor(x) for x in tensors))
    leaves = [x for x in tensors if x.requires_grad]
    assert [(x.shape, x.dtype) for x in got[1:]] == [(x.shape, x.dtype) for x in leaves]
    assert got[0].shape == ()


@pytest.mark.parametrize("name, backend", CASES)
def test_traced_by_torch_jit(name: str, backend: str) -> None:
    """Nothing is baked in: other batch sizes give their own values and gradients."""
    run = positional(name, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecation, and that sizes are compared
        traced = torch.jit.trace(run, tuple(values(CALLS[name], 4, grad=True)), check_trace=False)
        for b in (2, 4, 9, 130):
            tensors = values(CALLS[name], b, grad=True)
            got, want = (with_gradients(f)(*tensors) for f in (traced, run))
            torch.testing.assert_close(got, want)
