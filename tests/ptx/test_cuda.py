"""CUDA C++ kernels, compiled by NVRTC for sm_80 and executed at the edges of their blocks, beside the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from sadcl import _backends, functional
from sadcl.cuda import _nvrtc
from sadcl.ops import bank, compact, pscl
from sadcl.ops._library import OPS
from sadcl.testing import make_features, make_labels
from sadcl.testing.examples import EXAMPLES, Size
from sadcl.testing.oracles import ORACLES
from tests.ptx.budgets import check, ours
from tests.ptx.cases import Case, examples_of
from tests.ptx.cuda_cases import SMALL, check_most_faults_are_seen, gaps, same
from tests.ptx.launching_cuda import CudaExecutor, executing_cuda

pytestmark = pytest.mark.skipif(_nvrtc.path() is None, reason="NVRTC is not installed")
CUDA = sorted(name for name, op in OPS.items() if "cuda" in op.backends and name in EXAMPLES and name in ORACLES)


def sizes_of(op: str) -> Iterator[Size]:
    """One below, at and one above what a warp, a block or a load takes."""
    if op == "asl":
        yield from (replace(SMALL, b=2, c=c) for c in (127, 128, 129))
    elif op == "asl_total":  # one block of 1,024 threads
        yield from (replace(SMALL, b=b, c=c) for b, c in ((3, 341), (2, 512), (5, 205)))
    elif op == "dual_mean":
        yield from (replace(SMALL, b=b, d=d) for b, d in ((10, 63), (11, 64), (16, 65)))
    elif op == "compact":
        sizes = ((31, 33), (32, 32), (33, 31), (1, 2), (3, 1023), (2, 1024), (2, 1025))
        yield from (replace(SMALL, b=b, c=c) for b, c in sizes)
    elif op == "bank_update":
        yield from (replace(SMALL, b=3, e=e) for e in (127, 128, 129))
    elif op == "pscl":  # 16 warps; 128 images; rows of whole loads, and not; slices of 128 and of 512
        yield from (replace(SMALL, b=b, d=d) for b, d in ((15, 127), (16, 128), (17, 129)))
        yield from (replace(SMALL, b=b, c=2, d=d) for b, d in ((127, 4), (128, 1), (129, 6), (150, 5)))
        yield from (replace(SMALL, c=2, d=d) for d in (508, 512, 516))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case(op, kind, size, number), marks=() if kind in ("bf16", "fp32") else pytest.mark.slow,
            id=str(Case(op, kind, size, number)),
        )
        for op in CUDA
        for size in sizes_of(op)
        for number in range(examples_of(op))
        for kind in ("bf16", "fp32", "fp16", *(() if op == "dual_mean" else ("fp64",)))
    ],
)  # fmt: skip
def test_at_the_edges_of_its_blocks(case: Case) -> None:
    check(case, backend="cuda")


@pytest.mark.parametrize("op", [op for op in CUDA if list(sizes_of(op))])
def test_bits_do_not_depend_on_the_order_of_warps_and_blocks(op: str) -> None:
    case = Case(op, "bf16", list(sizes_of(op))[2], 0)
    found = []
    for options in ({}, {"order": 1}, {"order": 5}, {"strict_warps": True}):
        with executing_cuda(CudaExecutor(options)) as executor:
            found.append(ours(op, case.inputs(), executor, "cuda")[0])
    assert all(same(other, found[0]) for other in found[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("op", ["asl", "asl_total", "bank_update", "compact", "pscl"])
def test_most_planted_faults_are_seen(op: str, kind: str) -> None:
    cases = [Case(op, kind, size, n) for size in sizes_of(op) for n in range(examples_of(op))]
    check_most_faults_are_seen(cases, per_class=4, unseen=0.15, lost=0.45)


def run(op: str, x: Any) -> Any:
    """An op's outputs by the executed kernels."""
    with executing_cuda():
        return OPS[op].run(x, "cuda")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
                                   torch.float16, torch.bfloat16, torch.float32, torch.float64])  # fmt: skip
def test_labels_of_every_dtype_and_layout(dtype: torch.dtype) -> None:
    plain = make_labels(35, 6, "random" if dtype in (torch.bool, torch.uint8) else "ignored").to(dtype)
    want = compact.compact(plain.double(), None, "torch")
    for labels in (plain, plain.t().contiguous().t(), plain.repeat(2, 3)[::2, ::3]):
        if labels.shape == plain.shape and torch.equal(labels, plain):
            got = run("compact", compact.Inputs(labels, None))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_and_what_stands_in_ignored_places_change_no_bit(dtype: torch.dtype) -> None:
    labels = make_labels(6, 5, "ignored")
    target = compact.compact(labels, None, "torch").target
    x = pscl.Inputs(make_features(6, 5, 24, dtype=dtype), make_features(5, 24, dtype=dtype, seed=3), target,
                    torch.tensor(0.2), False)  # fmt: skip
    hidden = torch.where((target == -1)[:, :, None], float("nan"), x.features)
    other = x._replace(features=gaps(hidden), prototypes=gaps(x.prototypes))
    op = OPS["pscl"]
    assert op.derivative is not None
    grad = torch.tensor([0.5]).expand(5)
    found = []
    with executing_cuda():
        for given in (x, other):
            out = op.run(given, "cuda")
            saved = op.derivative.saved_of(op.derivative.tensors_of(given, out))
            upstream = op.derivative.upstream(grad)
            found.append([*out, *op.derivative.grads(upstream, given, saved, op.backward.gradients, "cuda")])  # type: ignore[union-attr]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
        assert not second.isnan().any()


def test_asl_of_an_ignored_nan_and_of_expanded_gradients() -> None:
    labels = make_labels(4, 9, "ignored")
    logits = torch.where(labels == -1, float("nan"), make_features(4, 9)).requires_grad_()
    with executing_cuda():
        got = functional.asymmetric_loss(gaps(logits), labels, reduction="none", backend="cuda")
        total = functional.asymmetric_loss(logits, labels, backend="cuda")
        (grad,) = torch.autograd.grad(total, logits)
    want = functional.asymmetric_loss(logits, labels, reduction="none", backend="reference")
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-7)
    (expected,) = torch.autograd.grad(want.sum(), logits)
    valid = labels != -1
    torch.testing.assert_close(grad[valid], expected[valid], rtol=1e-5, atol=1e-6)
    assert (grad[~valid] == 0).all()


@pytest.mark.parametrize("wide", [False, True])
def test_the_bank_compares_in_the_scores_dtype(wide: bool) -> None:
    scores = torch.tensor([[0.8, 0.8000001]], dtype=torch.float64 if wide else torch.float32)
    slots, features = torch.zeros(1, 2, 5), make_features(1, 2, 5)
    run("bank_update", bank.Inputs(slots, features, scores, torch.ones(1, 2), 0.8, True))
    kept = (slots != 0).any(2).tolist()[0]
    assert kept == [False, True]


def test_a_misaligned_row_takes_the_way_of_single_elements() -> None:
    storage = make_features(1, 4 * 3 * 8 + 1, dtype=torch.bfloat16)[0]
    labels = make_labels(4, 3)
    x = pscl.Inputs(storage[1:].view(4, 3, 8), make_features(3, 8, dtype=torch.bfloat16),
                    compact.compact(labels, None, "torch").target, torch.tensor(0.2), False)  # fmt: skip
    got, want = run("pscl", x), run("pscl", x._replace(features=x.features.clone()))
    torch.testing.assert_close(got.class_loss, want.class_loss)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = make_features(2, 3), make_labels(2, 3)
    with pytest.raises(RuntimeError, match=r"cannot run asl: it runs on NVIDIA GPUs, not on cpu"):
        functional.asymmetric_loss(logits, labels, backend="cuda")
    with pytest.raises(
        RuntimeError, match=r"zlpr has no such implementation.*ops with CUDA kernels: asl, bank, compact"
    ):
        functional.zlpr_loss(logits, labels, backend="cuda")
    missing = _backends.BackendInfo(False, reason="NVRTC was not found")
    monkeypatch.setitem(_backends._FOUND, "cuda", missing)
    with pytest.raises(RuntimeError, match="NVRTC was not found"):
        functional.asymmetric_loss(logits, labels, backend="cuda")


def test_small_problems_on_a_gpu_are_theirs() -> None:
    gpu = torch.device("cuda")
    take = lambda op, sizes: _backends.resolve(None, op, gpu, OPS[op].backends, sizes)  # noqa: E731
    assert take("asl", (32, 80)) == take("pscl", (32, 80, 1024)) == take("compact", (32, 80)) == "cuda"
    large = take("pscl", (512, 80, 2048))
    assert large == ("triton" if _backends._FOUND["triton"].available else "cuda")
    assert _backends.resolve(None, "asl", torch.device("cpu"), OPS["asl"].backends, (32, 80)) != "cuda"
