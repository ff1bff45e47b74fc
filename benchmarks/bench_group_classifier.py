"""Group-wise classifier, forward + backward, B32 C80 E2048: ours against the formula, einsum, bmm and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from sadcl import reference
from sadcl.functional.group_classifier import group_classifier
from sadcl.testing import make_features, value_and_grads

BATCH, CLASSES, WIDTH = 32, 80, 2048


def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x * w).sum(-1) + b


def batched(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """One matrix-vector product a class."""
    return torch.bmm(x.transpose(0, 1), w[:, :, None])[:, :, 0].t() + b


ENTRIES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain formula": plain,
    "plain, torch.compile": torch.compile(plain),
    "einsum": lambda x, w, b: torch.einsum("bce,ce->bc", x, w) + b,
    "bmm": batched,
    "sadcl": lambda x, w, b: group_classifier(x, w, b, "cpp"),
}


def problem() -> tuple[Tensor, ...]:
    x, w = make_features(BATCH, CLASSES, WIDTH), make_features(CLASSES, WIDTH, seed=3) / WIDTH**0.5
    return x, w, torch.zeros(CLASSES), torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0))


def gate(name: str) -> None:
    """Raise if the entry is not the classifier."""
    *inputs, upstream = problem()
    got = value_and_grads(ENTRIES[name], *inputs, upstream=upstream)
    want = value_and_grads(lambda *v: reference.group_classifier(*v).float(), *inputs, upstream=upstream)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_group_classifier(benchmark: Callable[..., object], name: str) -> None:
    gate(name)
    *inputs, upstream = problem()
    benchmark(harness.forward_backward(lambda *v: (ENTRIES[name](*v) * upstream).sum(), *inputs))


def main() -> None:
    *inputs, upstream = problem()
    for name in ENTRIES:
        gate(name)
    harness.compare(
        "group_classifier",
        f"Group-wise classifier forward + backward, B{BATCH} C{CLASSES} E{WIDTH} float32; floor: read the features"
        " twice, write their gradient",
        {
            name: harness.forward_backward(lambda *v, f=entry: (f(*v) * upstream).sum(), *inputs)
            for name, entry in ENTRIES.items()
        },
        traffic=3 * inputs[0].numel() * 4,
    )


if __name__ == "__main__":
    main()
