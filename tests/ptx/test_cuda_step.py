"""What a COCO step's losses launch by the backend "cuda", torch's own kernels counted, and that they are right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sadcl import _checks, functional
from sadcl.cuda import _nvrtc
from sadcl.cuda import pscl as of_pscl
from sadcl.cuda import sscl as of_sscl
from sadcl.ops import _library
from sadcl.testing import make_features, make_labels
from tests.ptx.launching import Executor
from tests.ptx.launching_cuda import executing_cuda

pytestmark = pytest.mark.skipif(_nvrtc.path() is None, reason="NVRTC is not installed")
# torch's operators that launch nothing: they allocate, or look at what is there in another way.
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "view", "expand", "select", "slice", "unsqueeze",
             "squeeze", "transpose", "detach", "alias", "as_strided", "unbind", "t", "permute", "split")  # fmt: skip


class Counting(TorchDispatchMode):
    """Notes torch's operators that would launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.split("_")[0] not in NO_LAUNCH and name.rstrip("_") not in NO_LAUNCH and not name.startswith("sadcl"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(executor: Executor) -> Iterator[list[str]]:
    """The names of all launches made inside: torch's operators, those within our ops too, and ours."""
    names: list[str] = []
    before = len(executor.results)
    as_on_a_gpu = mock.patch.object(_checks, "reads_values", lambda labels: False)
    with as_on_a_gpu, mock.patch.object(_library, "watched", lambda *args: False), Counting() as mode:
        yield names
    names += mode.found + [name for name, _ in executor.results[before:]]


def step(b: int, c: int, d: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves (two views, prototypes, temperatures, logits), and labels."""
    first, second = (make_features(b, c, d, dtype=dtype, seed=seed) for seed in (1, 2))
    prototypes = make_features(1, c, d, dtype=dtype, seed=3)[0]
    leaves = [first, second, prototypes, torch.tensor(0.2), torch.tensor(0.07), make_features(b, c, seed=4).to(dtype)]
    return [leaf.detach().requires_grad_() for leaf in leaves], [make_labels(b, c, "ignored")]


def losses(leaves: list[Tensor], labels: Tensor, backend: str) -> list[Tensor]:
    """SSCL, PSCL and ASL as the published training has them."""
    first, second, prototypes, sample, prototype, logits = leaves
    parts = functional.dual_contrastive_loss(
        first, second, prototypes, labels, sample_temperature=sample, prototype_temperature=prototype, backend=backend
    )
    return [*parts, functional.asymmetric_loss(logits, labels, backend=backend)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_is_four_launches_each_way(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, (labels,) = step(32, 80, 8, dtype)
    state = torch.zeros(64, dtype=torch.int32)  # on a GPU made once a stream
    for module in (of_pscl, of_sscl):
        monkeypatch.setattr(module, "counters", lambda device: state)
    few = torch.where(torch.arange(80) < 4, labels, labels.clamp(max=0))  # to execute: what is launched is the same
    with executing_cuda() as executor:
        with counted(executor) as forward:
            found = losses(leaves, few, "cuda")
        upstream = [torch.ones(()) for _ in found]
        with counted(executor) as backward:
            torch.autograd.grad(found, leaves, upstream)
    assert sorted(forward) == ["asl_forward", "pscl_forward", "sscl_forward", "stack"]
    assert sorted(backward) == ["asl_backward", "mul", "pscl_backward", "sscl_backward"]
    assert not state.any()  # for the next launch, and for a captured graph


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("processors", [None, 2])
def test_and_its_losses_and_gradients_are_those_of_the_ops(dtype: torch.dtype, processors: int | None) -> None:
    leaves, (labels,) = step(9, 7, 40, dtype)
    upstream = [torch.tensor(weight) for weight in (0.7, 1.3, 0.5)]
    with executing_cuda(None, processors) as executor:
        found = losses(leaves, labels, "cuda")
        grads = torch.autograd.grad(found, leaves, upstream)
    assert len(executor.results) == 6
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = losses(exact, labels, "reference")
    expected = torch.autograd.grad(want, exact, [u.double() for u in upstream])
    for value, truth in zip(found, want, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=1e-6)
    for grad, truth in zip(grads, expected, strict=True):
        rounding = 2.0**-7 if dtype == torch.bfloat16 else 5e-6  # of weights and of results
        assert (grad.double() - truth).abs().max() <= rounding * truth.abs().max()


def test_a_batch_without_a_positive_is_zero_and_stays_connected() -> None:
    leaves, _ = step(5, 3, 8, torch.float32)
    with executing_cuda():
        found = losses(leaves, torch.zeros(5, 3), "cuda")
        grads = torch.autograd.grad(found[:2], leaves[:5], [torch.ones(()), torch.ones(())])
    assert [value.item() for value in found[:2]] == [0, 0]
    assert all((grad == 0).all() for grad in grads)


def test_one_of_the_two_alone() -> None:
    """The other's upstream gradient is missing."""
    leaves, (labels,) = step(6, 4, 8, torch.float32)
    for part in (0, 1):
        with executing_cuda():
            grads = torch.autograd.grad(losses(leaves, labels, "cuda")[part], leaves[:5])
        want = torch.autograd.grad(losses(leaves, labels, "torch")[part], leaves[:5], materialize_grads=True)
        for grad, truth in zip(grads, want, strict=True):
            torch.testing.assert_close(grad, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["weights", "released", "one view", "active", "float64 total"])
def test_what_has_no_launch_of_its_own_takes_the_ops(case: str) -> None:
    leaves, (labels,) = step(6, 4, 8, torch.float32)
    first, second, prototypes, sample, prototype, logits = leaves
    options: dict[str, Any] = {"formulation": "released"} if case == "released" else {}
    if case == "weights":
        options["class_weight"] = torch.tensor([0.5, 1.0, 2.0, 1.0])
    bank = None if case == "one view" else second
    found = []
    for backend in ("cuda", "torch"):
        with executing_cuda():
            if case == "active":
                options["active"] = functional.compact_labels(labels, backend)
            if case == "float64 total":
                found.append(functional.asymmetric_loss(logits.double(), labels, backend=backend, reduction="mean"))
            else:
                parts = functional.dual_contrastive_loss(first, bank, prototypes, labels, backend=backend, **options)
                found.append(torch.stack(list(parts)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
