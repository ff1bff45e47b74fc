"""Sizes of zero at the op layer (the public functions refuse most): nothing crashes, nothing stays unwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sadcl import metrics
from sadcl.ops import (
    asl,
    bank,
    compact,
    dual,
    group_classifier,
    label_attention,
    linear,
    mlc,
    pscl,
    sscl,
    two_way,
    zlpr,
)

pytest.importorskip("sadcl._C", reason="the CPU extension is not built")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Whatever is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def active(s: Any) -> compact.Active:
    """Every label is positive."""
    return compact.compact(torch.ones(s.B, s.C), None, "torch")


def make_sscl(s: Any, released: bool, keep: int) -> sscl.Inputs:
    rows, tau = active(s), torch.tensor(0.3, requires_grad=True)
    return sscl.Inputs(leaf(s.B, s.V, s.C, s.D), rows.pairs, rows.class_ptr, tau, True, released, keep)


def make_pscl(s: Any, released: bool) -> pscl.Inputs:
    return pscl.Inputs(
        leaf(s.B, s.C, s.D), leaf(s.C, s.D), active(s).target, torch.tensor(0.3, requires_grad=True), released
    )


def make_pscl_mean(s: Any) -> pscl.MeanInputs:
    x = make_pscl(s, False)
    return pscl.MeanInputs(*x[:3], active(s).class_ptr, x.temperature)


def make_dual(s: Any, released: bool, mean: bool = False) -> dual.Inputs:
    rows, views = active(s), (leaf(s.B, s.C, s.D), leaf(s.B, s.C, s.D) if s.V > 1 else None)
    tau = torch.tensor(0.3, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    return dual.Inputs(*views, leaf(s.C, s.D), rows.pairs, rows.class_ptr, rows.target, *tau, released, mean, 7)


def make_asl(s: Any, sum_classes: bool) -> asl.Inputs:
    constants = (4.0, 1.0, 0.05, 1e-8, False, sum_classes, True)
    return asl.Inputs(leaf(s.B, s.C), torch.ones(s.B, s.C), torch.ones(s.C), *constants)


def make_attention(s: Any, folded: bool, shared: bool) -> label_attention.Inputs:
    query = leaf(s.C, s.E) if shared else leaf(s.B, s.C, s.E)
    weights = leaf(3 * s.E, s.E), leaf(3 * s.E), leaf(s.E, s.E), leaf(s.E)
    return label_attention.Inputs(query, leaf(s.B, s.L, s.E), *weights, leaf(s.B, s.L, s.E), None, None, 2, folded, 1.0)


def make_mlc(s: Any, weighting: str) -> mlc.Inputs:
    code, prototypes = mlc.WEIGHTINGS.index(weighting), leaf(s.C, s.D) if weighting == "msc" else None
    return mlc.Inputs(
        leaf(s.B, s.V, s.D), torch.ones(s.B, s.C), leaf(s.K, s.D), torch.ones(s.K, s.C), prototypes, None, None,
        torch.tensor(0.3, requires_grad=True), code, 0.3, 0.7, 0.6, True, True, 0,
    )  # fmt: skip


# Op, its inputs from sizes, and which of the sizes may be 0.
CASES: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "sscl": (sscl.sscl, lambda s: make_sscl(s, False, 0), "BVCD"),
    "sscl-released": (sscl.sscl, lambda s: make_sscl(s, True, 7), "BVCD"),
    "pscl": (pscl.pscl, lambda s: make_pscl(s, False), "BCD"),
    "pscl-mean": (pscl.pscl_mean, make_pscl_mean, "BCD"),
    "pscl-released": (pscl.pscl, lambda s: make_pscl(s, True), "BCD"),
    "dual": (dual.dual, lambda s: make_dual(s, False), "BCD"),
    "dual-mean": (dual.dual, lambda s: make_dual(s, False, mean=True), "BCD"),
    "dual-released": (dual.dual, lambda s: make_dual(s, True), "BCD"),
    "asl": (asl.asl, lambda s: make_asl(s, False), "BC"),
    "asl-sums": (asl.asl, lambda s: make_asl(s, True), "BC"),
    **{f"mlc-{kind}": (mlc.mlc, lambda s, k=kind: make_mlc(s, k), "BVCDK") for kind in ("all", "mulsupcon", "msc")},
    "zlpr": (zlpr.zlpr, lambda s: zlpr.Inputs(leaf(s.B, s.C), torch.ones(s.B, s.C)), "BC"),
    "two_way": (two_way.two_way, lambda s: two_way.Inputs(leaf(s.B, s.C), torch.ones(s.B, s.C), 4.0, 1.0), "BC"),
    "group_classifier": (
        group_classifier.group_classifier,
        lambda s: group_classifier.Inputs(leaf(s.B, s.C, s.E), leaf(s.C, s.E), leaf(s.C)),
        "BCE",
    ),
    "linear": (linear.linear, lambda s: linear.Inputs(leaf(s.M, s.K), leaf(s.N, s.K), leaf(s.N)), "MKN"),
    "linear-plain": (linear.linear, lambda s: linear.Inputs(leaf(s.M, s.K), leaf(s.N, s.K), None), "MKN"),
    **{
        f"attention{'-folded' * folded}{'-shared' * shared}": (
            label_attention.label_attention,
            lambda s, folded=folded, shared=shared: make_attention(s, folded, shared),
            "B",
        )
        for folded in (False, True)
        for shared in (False, True)
    },
}
SIZES = {"B": 3, "V": 2, "C": 4, "D": 5, "E": 6, "L": 7, "M": 3, "K": 4, "N": 5}


def value_and_grads(op: Any, inputs: Any, backend: str) -> list[Tensor | None]:
    """Results and gradients of everything that has one."""
    results = op(inputs, backend)[: op.results]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return [*results, *torch.autograd.grad([r.sum() for r in results], leaves, allow_unused=True)]


@pytest.mark.parametrize("name, zeros", [(name, zero) for name, case in CASES.items() for zero in (*case[2], case[2])])
def test_sizes_of_zero(name: str, zeros: str) -> None:
    op, make, _ = CASES[name]
    inputs = make(SimpleNamespace(**{**SIZES, **dict.fromkeys(zeros, 0)}))
    got = value_and_grads(op, inputs, "cpp")
    for x in got:
        assert x is None or torch.isfinite(x).all()
    if name.startswith("linear"):
        plain = torch.nn.functional.linear(*inputs)
        leaves = [x for x in inputs if x is not None]
        want = [plain, *torch.autograd.grad(plain.sum(), leaves)]
    elif name.startswith("dual"):  # the two ops, and of their gradients that they are there
        views = dual.stacked(inputs.embeddings, inputs.bank)
        rows = sscl.Inputs(views, *inputs[3:5], inputs.sample_temperature, True, inputs.released, 0)
        classes = pscl.Inputs(inputs.embeddings, inputs.prototypes, inputs.target, *inputs[7:9])
        losses = sscl.sscl(rows, "torch").row_loss, pscl.pscl(classes, "torch").class_loss
        if inputs.mean:
            count = int(inputs.class_ptr[-1])
            losses = losses[0].sum() / max(count * views.shape[1], 1), losses[1].sum() / max(count, 1)
        want = [*losses, *got[2:]]
    elif name == "pscl-mean":
        loss = pscl.pscl(pscl.Inputs(*inputs[:3], inputs.temperature, False), "torch").class_loss
        want = [loss.sum() / max(int(inputs.class_ptr[-1]), 1), *got[1:]]
    elif "torch" in op.backends:
        want = value_and_grads(op, inputs, "torch")
    else:
        want = [x if x is None else torch.zeros_like(x) for x in got]  # sums of nothing
    for a, b in zip(got, want, strict=True):
        if a is not b and (
            a is not None or b.numel() > 0
        ):  # the op layer says None for the gradient of a vector without elements
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_labels(shape: tuple[int, int]) -> None:
    labels = torch.ones(shape)
    for a, b in zip(compact.compact(labels, None, "cpp"), compact.compact(labels, None, "torch"), strict=True):
        assert torch.equal(a, b)
    scores = torch.randn(shape)
    if shape[1] > 0:
        for method in ("voc_area", "sklearn", "voc11"):
            assert metrics.average_precision(scores, labels, method).isnan().all()


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_bank(shape: tuple[int, int, int]) -> None:
    slots = torch.full((4, *shape[1:]), 2.0)
    features, labels = torch.randn(shape), torch.ones(shape[:2])
    bank.bank_update(bank.Inputs(slots, features, labels, labels, 0.5, True), "cpp")
    assert torch.equal(slots, torch.full_like(slots, 2.0))
