"""What else holds over a group: narrow dtypes, hosts that do not wait, ranks that need no gradient, torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import ranks
from torch import Tensor

import sadcl
from sadcl import _checks
from sadcl import functional as F
from sadcl.testing import make_features, make_labels

B, V, C, D = 6, 2, 4, 8
SIZES = [4, 2]


def part(rank: int, *tensors: Tensor) -> list[Tensor]:
    return [x.split(SIZES)[rank] for x in tensors]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return make_features(B, V, C, D, dtype=dtype), make_labels(B, C, "ignored")


def losses(x: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
    group = {name: value for name, value in more.items() if name == "group"}
    prototypes = make_features(C, D, seed=5).to(x.dtype)
    return {
        "sscl": F.sample_contrastive_loss(x, labels, **more),
        "pscl": F.prototype_contrastive_loss(x[:, 0], prototypes, labels, **group),
        "supcon": F.supcon_loss(x[:, :, 0], labels[:, 1], **{**more, "capacity": more.get("capacity") and B}),
        "mlc": F.multilabel_supcon_loss(x[:, :, 1], labels, **{**more, "capacity": more.get("capacity") and B}),
    }


def values_and_grads(x: Tensor, labels: Tensor, **more: Any) -> dict[str, tuple[Tensor, Tensor]]:
    leaf = x.clone().requires_grad_()
    found = losses(leaf, labels, **more)
    return {
        name: (loss.detach(), torch.autograd.grad(loss, leaf, retain_graph=True)[0]) for name, loss in found.items()
    }


def plainly(found: dict[str, tuple[Tensor, Tensor]]) -> dict[str, list[Any]]:
    return {name: [x.double().numpy() for x in both] for name, both in found.items()}


def narrow(rank: int, dtype: torch.dtype) -> dict[str, list[Any]]:
    return plainly(values_and_grads(*part(rank, *batch(dtype)), group="world"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_vectors_are_sent_as_they_are(dtype: torch.dtype) -> None:
    """So that there is one rounding, of the gradient, as in one process."""
    first, second = ranks(2).run(narrow, dtype)
    for name, (loss, grad) in values_and_grads(*batch(dtype)).items():
        mean = (first[name][0] + second[name][0]) / 2
        torch.testing.assert_close(torch.as_tensor(mean), loss.double(), rtol=1e-6, atol=0, msg=name)
        got = torch.cat([torch.as_tensor(one[name][1]) for one in (first, second)]) / 2
        off = (got - grad.double()).abs().amax() / grad.double().abs().amax()
        assert off <= 2 * torch.finfo(dtype).eps, name


def hurried(rank: int, capacity: int) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """As on a GPU with a capacity: the host reads nothing, the buffers have room for more than there is."""
    x, labels = part(rank, *batch())
    waited = plainly(values_and_grads(x, labels, group="world"))
    reads = _checks.reads_values
    _checks.reads_values = lambda tensor: False
    try:
        return waited, plainly(values_and_grads(x, labels, group="world", capacity=capacity))
    finally:
        _checks.reads_values = reads


def test_a_host_that_does_not_wait_gets_the_same() -> None:
    for waited, not_waited in ranks(2).run(hurried, B * C):
        for name, both in waited.items():
            for want, got in zip(both, not_waited[name], strict=True):
                torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=1e-5, atol=1e-7, msg=name)


def test_more_than_capacity_is_nan_where_the_host_does_not_wait() -> None:
    for _, not_waited in ranks(2).run(hurried, 3):
        assert torch.as_tensor(not_waited["sscl"][0]).isnan()


def frozen(rank: int) -> tuple[bool, float]:
    """Rank 1's features need no gradient, its temperature does: it goes backward with rank 0 all the same."""
    x, labels = part(rank, *batch())
    loss = sadcl.SampleContrastiveLoss(learnable_temperature=(0.3, 0.1, 1.0), group="world")
    x = x.clone().requires_grad_(rank == 0)
    for _ in range(2):
        loss(x, labels).backward()
    nothing = F.sample_contrastive_loss(
        torch.zeros(0, V, C, D) if rank else x, labels[: 0 if rank else None], group="world"
    )
    nothing.backward()
    return x.grad is not None, float(loss.log_temperature.grad)


def test_ranks_that_need_no_gradient_go_backward_too() -> None:
    (first, of_first), (second, of_second) = ranks(2).run(frozen)
    assert first and not second
    one = sadcl.SampleContrastiveLoss(learnable_temperature=(0.3, 0.1, 1.0))
    one(*batch()).backward()
    assert (of_first + of_second) / 4 == pytest.approx(float(one.log_temperature.grad), rel=1e-5)


def in_evaluation(rank: int) -> None:
    x, labels = part(rank, *batch())
    with torch.no_grad():
        quiet = losses(x, labels, group="world")
    for name, loss in losses(x.clone().requires_grad_(), labels, group="world").items():
        assert torch.equal(loss, quiet[name]) and not quiet[name].requires_grad, name


def test_without_gradients() -> None:
    ranks(2).run(in_evaluation)


def transformed(rank: int) -> None:
    x, labels = part(rank, *batch())
    for name, (_, grad) in values_and_grads(x, labels, group="world").items():
        got = torch.func.grad(lambda x, name=name: losses(x, labels, group="world")[name])(x)
        torch.testing.assert_close(got, grad, msg=name)


def test_under_torch_func() -> None:
    ranks(2).run(transformed)


def test_no_image_at_all() -> None:
    """In one process alone too, where there is a group."""
    x = torch.zeros(0, V, C, D, requires_grad=True)
    for name, loss in losses(x, torch.zeros(0, C), group="world").items():
        assert loss == 0 and torch.autograd.grad(loss, x)[0].shape == x.shape, name
    with pytest.raises(ValueError, match="features: expected no empty dimension"):
        F.sample_contrastive_loss(x, torch.zeros(0, C))


def test_an_exported_program_of_a_process_alone() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = sadcl.SampleContrastiveLoss(group="world")

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.loss(x, labels)

    x, labels = batch()
    program = torch.export.export(Step(), (x, labels)).module()
    assert torch.equal(program(x, labels), Step()(x, labels))
