"""The op layer: opcheck, gradcheck, torch.compile, autocast, partial gradients, second derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import sadcl
from sadcl import functional as F
from sadcl.ops._library import OPS, call
from sadcl.testing import make_features, make_labels, value_and_grads
from sadcl.testing.examples import EXAMPLES, SMALL, Maker
from tests.here import backends_here

ops = torch.ops.sadcl
HERE = {name for name, info in sadcl.backends().items() if info.available and name not in ("triton", "cuda")}
CASES = [
    pytest.param(name, backend, index, id=f"{name}-{backend}-{index}")
    for name, op in sorted(OPS.items())
    for backend in op.backends
    if backend in HERE
    for index in range(len(list(EXAMPLES[name](Maker(SMALL, torch.float32)))))
]
BACKENDS = backends_here("sscl")
# Outside float64 too: what holds no number (compaction) or writes in place has no derivative to check.
DERIVED = [case for case in CASES if OPS[case.values[0]].backward is not None]


def example(name: str, index: int, backend: str, dtype: torch.dtype, grad: bool) -> Any:
    """Inputs of an op whose gradients are wanted, or not."""
    x = list(EXAMPLES[name](Maker(SMALL, dtype)))[index]
    op = OPS[name]
    if grad and op.backward is not None:
        for field in op.backward.gradients:
            if isinstance(value := getattr(x, field), Tensor) and value.is_floating_point():
                x = x._replace(**{field: value.clone().requires_grad_()})
    if "keep" in x._fields and "capacity" not in x._fields and backend == "cpp" and grad:  # scores, not items
        x = x._replace(keep=24 * 24)
    return x._replace(save=grad) if "save" in x._fields else x


def takes(name: str, backend: str, dtype: torch.dtype) -> bool:
    """The matrix product is float32 and float64 alone."""
    return not (name == "linear" and dtype == torch.bfloat16)


@pytest.mark.parametrize("name, backend, index", CASES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(name: str, backend: str, index: int, dtype: torch.dtype, grad: bool) -> None:
    if not takes(name, backend, dtype):
        dtype = torch.float32
    x = example(name, index, backend, dtype, grad and OPS[name].backward is not None)
    opcheck(getattr(ops, name).default, (*x, backend))


@pytest.mark.parametrize("name, backend, index", DERIVED)
@pytest.mark.parametrize("run", [lambda name, *args: getattr(ops, name)(*args), call], ids=["dispatched", "eager"])
def test_gradcheck(name: str, backend: str, index: int, run: Callable[..., Any]) -> None:
    op, x = OPS[name], example(name, index, backend, torch.float64, True)
    if name in (
        "sscl",
        "dual",
        "group_rows",
    ):  # the released gradient is not its value's: the maxima are constants in it
        x = x._replace(released=False)
    leaves = [value for value in x if isinstance(value, Tensor) and value.requires_grad]

    def value(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        filled = [next(given) if isinstance(v, Tensor) and v.requires_grad else v for v in x]
        outputs = run(name, *filled, backend)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return tuple(out for out in outputs[: op.results] if out.requires_grad)

    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("name, backend, index", DERIVED)
def test_only_the_gradients_that_are_wanted(name: str, backend: str, index: int) -> None:
    """Each input alone, and none: the others' gradients are not made, and the wanted one is the same."""
    op, x = OPS[name], example(name, index, backend, torch.float32, True)
    with torch.no_grad():  # as an op's implementation is run
        out = op.run(x, backend)
    upstream = tuple(torch.ones_like(value) for value in out[: op.results])
    fields = [field for field in op.backward.gradients if getattr(getattr(x, field), "requires_grad", False)]

    def grads_of(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = x._replace(**{f: getattr(x, f).detach().requires_grad_(f in wanted) for f in fields})
        made = op(leaves, backend)[: op.results]
        pairs = [(m, u) for m, u in zip(made, upstream, strict=True) if m.requires_grad]
        assert bool(pairs) == bool(wanted)
        if wanted:
            torch.autograd.backward([m for m, _ in pairs], [u for _, u in pairs])
        return {f: getattr(leaves, f).grad for f in fields}

    full = grads_of(tuple(fields))
    for field in fields:
        alone = grads_of((field,))
        assert torch.equal(alone[field], full[field]), field
        assert all(alone[other] is None for other in fields if other != field)
    assert all(grad is None for grad in grads_of(()).values())


class Seen(TorchDispatchMode):
    """Writes down what passes the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dispatcher_is_passed_by_unless_somebody_watches(backend: str) -> None:
    x, p = make_features(6, 5, 16), make_features(5, 16, seed=4)
    for run in losses(backend).values():
        want = value_and_grads(lambda x, run=run: run(x, p), x)
        with Seen() as seen:
            got = value_and_grads(lambda x, run=run: run(x, p), x)
        assert any(name.startswith("sadcl::") and name.endswith("_backward") for name in seen.names), seen.names
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def losses(backend: str | None) -> dict[str, Callable[..., Tensor]]:
    labels = make_labels(6, 5, "ignored")
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    return {
        "sscl": lambda x, p: F.sample_contrastive_loss(x, labels, backend=backend),
        "sscl_rows": lambda x, p: (
            F.sample_contrastive_loss(x, labels, reduction="none", backend=backend).square().sum()
        ),
        "sscl_released": lambda x, p: F.sample_contrastive_loss(
            x, labels, formulation="released", base_temperature=0.1, backend=backend
        ),
        "pscl": lambda x, p: F.prototype_contrastive_loss(x, p, labels, backend=backend),
        "pscl_weighted": lambda x, p: F.prototype_contrastive_loss(
            x, p, labels, sample_weight=torch.arange(6.0), backend=backend
        ),
        "asl": lambda x, p: F.asymmetric_loss(x[..., 0], labels, backend=backend),
        "asl_mean": lambda x, p: F.asymmetric_loss(x[..., 1], labels, reduction="mean", backend=backend),
        "supcon": lambda x, p: F.supcon_loss(x, groups, backend=backend),
        "mlc": lambda x, p: F.multilabel_supcon_loss(x, labels, keys=p, key_labels=labels[1:], backend=backend),
        "mlc_jaccard": lambda x, p: (
            F.multilabel_supcon_loss(x, labels, weighting="jaccard", reduction="none", backend=backend).square().sum()
        ),
        "zlpr": lambda x, p: F.zlpr_loss(x[..., 0], labels, backend=backend),
        "two_way": lambda x, p: F.two_way_loss(x[..., 0], labels, backend=backend),
        "dual": lambda x, p: sum(F.dual_contrastive_loss(x, x.flip(0), p.to(x.dtype), labels, backend=backend)),
    }


@pytest.mark.parametrize("name", list(losses(None)))
def test_compiled_values_and_gradients(name: str) -> None:
    run = losses(None)[name]
    x, p = make_features(6, 5, 16), make_features(5, 16, seed=4)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x = make_features(6, 5, 16, seed=seed)
        used = (x, p) if name.startswith("pscl") else (x,)
        padded = (lambda f: f) if len(used) == 2 else (lambda f: lambda x: f(x, p))
        got, want = value_and_grads(padded(compiled), *used), value_and_grads(padded(run), *used)
        torch.testing.assert_close(got, want)


def test_compiled_by_inductor() -> None:
    labels = make_labels(6, 5)

    def total(x: Tensor) -> Tensor:
        return F.sample_contrastive_loss(x * 2.0, labels) + F.asymmetric_loss(x[:, 0, :, 0], labels, reduction="mean")

    x = make_features(6, 2, 5, 16)
    torch._dynamo.reset()
    got = value_and_grads(torch.compile(total, fullgraph=True), x)
    torch.testing.assert_close(got, value_and_grads(total, x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_inside(
    dtype: torch.dtype, autocast_dtype: torch.dtype, enabled: bool, backend: str
) -> None:
    x, p = make_features(6, 5, 16, dtype=dtype), make_features(5, 16, seed=4, dtype=dtype)
    for name, run in losses(backend).items():
        want = run(x, p)
        with torch.autocast("cpu", dtype=autocast_dtype, enabled=enabled):
            got = run(x, p)
            if dtype == autocast_dtype and enabled and name.startswith("pscl"):
                run(x, p.float())  # a projected feature is low precision, a parameter is not
        assert got.dtype == torch.float32 and torch.equal(got, want), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_gradients(backend: str) -> None:
    x, p, labels = make_features(6, 5, 16), make_features(5, 16, seed=4), make_labels(6, 5)
    full = value_and_grads(
        lambda x, p, t: F.prototype_contrastive_loss(x, p, labels, temperature=t, backend=backend),
        x, p, torch.tensor(0.1),
    )[1:]  # fmt: skip
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [v.clone().requires_grad_(w) for v, w in zip((x, p, torch.tensor(0.1)), wanted, strict=True)]
        loss = F.prototype_contrastive_loss(*leaves[:2], labels, temperature=leaves[2], backend=backend)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for leaf, grad, asked in zip(leaves, full, wanted, strict=True):
            assert torch.equal(leaf.grad, grad) if asked else leaf.grad is None
    features = x[:, None].contiguous()
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = F.sample_contrastive_loss(features, labels, temperature=temperature, backend=backend)
    loss.backward()
    assert temperature.grad is not None and temperature.grad != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(losses(None)))
def test_second_derivative_is_a_clear_error(name: str, backend: str) -> None:
    x, p = make_features(6, 5, 16).requires_grad_(), make_features(5, 16, seed=4)
    (grad,) = torch.autograd.grad(losses(backend)[name](x, p), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.square().sum().backward()
    (grad,) = torch.autograd.grad(losses("reference")[name](x, p), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_upstream_are_left_alone(backend: str) -> None:
    x, p = make_features(6, 5, 16), make_features(5, 16, seed=4)
    for name, run in losses(backend).items():
        before = x.clone(), p.clone()
        value_and_grads(lambda x, run=run: run(x, p), x)
        assert torch.equal(x, before[0]) and torch.equal(p, before[1]), name
