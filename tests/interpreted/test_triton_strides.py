"""Offsets past 2^31 elements: every strided input of every op, spread over memory that is not there."""

from __future__ import annotations

import functools
import itertools
import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sadcl.ops import asl, bank, compact, group_classifier, label_attention_core, pscl, sscl  # noqa: F401 (register)
from sadcl.testing import make_features, make_labels

OP = torch.ops.sadcl
FAR = 1 << 31

if not sys.platform.startswith("linux"):
    pytest.skip("memory without pages behind it is mapped as Linux does", allow_module_level=True)


def spread(x: Tensor) -> Tensor:
    """The same values, each dimension's last element more than 2^31 elements behind its first.

    Memory that nobody touched costs nothing: this takes a page an element.
    """
    steps = [-(-FAR // max(size - 1, 1)) + 301**number for number, size in enumerate(x.shape)]
    last = sum((size - 1) * step for size, step in zip(x.shape, steps, strict=True))
    places = {sum(map(int.__mul__, index, steps)) for index in itertools.product(*map(range, x.shape))}
    assert len(places) == x.numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    memory = mmap.mmap(-1, (last + 1) * x.element_size(), flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, steps).copy_(x)


def half(*shape: int, seed: int = 1) -> Tensor:
    return make_features(*shape, dtype=torch.bfloat16, seed=seed)


TAU = torch.tensor(0.2)
LABELS = make_labels(3, 3, "random", labels_per_image=2.0)


def run_sscl(features: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    pairs, class_ptr, _ = OP.compact(LABELS, 9, "triton")
    saved = OP.sscl(features, pairs, class_ptr, TAU, True, False, 0, "triton")
    return *saved, *OP.sscl_backward(upstream, features, pairs, class_ptr, TAU, *saved[1:], True, "triton")


def run_pscl(features: Tensor, prototypes: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    target = LABELS.to(torch.int8)
    saved = OP.pscl(features, prototypes, target, TAU, False, "triton")
    return *saved, *OP.pscl_backward(upstream, features, prototypes, target, TAU, *saved[1:], False, "triton")


def run_asl(logits: Tensor, labels: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    loss, grad = OP.asl(logits, labels, weight, 4.0, 1.0, 0.05, 1e-8, False, False, True, "triton")
    return loss, grad, OP.asl_backward(upstream, grad, logits, "triton")


def run_classifier(upstream: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    logits = OP.group_classifier(features, weight, bias, "triton")
    return logits, *OP.group_classifier_backward(upstream, features, weight, True, True, "triton")


def run_bank(slots: Tensor, features: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    OP.bank_update(slots, features, scores, labels, 0.5, False, "triton")
    return (slots,)


def run_attention(upstream: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    saved = OP.label_attention_core(*inputs, None, 0.25, 0.0, True, "triton")
    return *saved, *OP.label_attention_core_backward(
        upstream, None, saved[2], *inputs, None, *saved, 0.25, 0.0, [True, True, inputs[2] is not None], "triton"
    )


PADDED = torch.tensor([[False] * 4 + [True], [False] * 5])
CASES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], dict[str, Tensor | None]]] = {
    "compact": (lambda labels: OP.compact(labels, 12, "triton"), {"labels": make_labels(4, 3)}),
    "compact_large": (lambda labels: OP.compact(labels, 900, "triton"), {"labels": make_labels(300, 3)}),
    "sscl": (run_sscl, {"features": half(3, 2, 3, 20), "upstream": torch.rand(3, 2, 3)}),
    "pscl": (
        run_pscl,
        {"features": half(3, 3, 20), "prototypes": half(3, 20, seed=5), "upstream": torch.rand(3)},
    ),
    "asl": (
        run_asl,
        {"logits": half(4, 3), "labels": make_labels(4, 3), "weight": torch.rand(3), "upstream": torch.rand(4, 3)},
    ),
    "group_classifier": (
        run_classifier,
        {"upstream": half(4, 3), "features": half(4, 3, 20), "weight": half(3, 20, seed=5), "bias": torch.rand(3)},
    ),
    "bank": (
        run_bank,
        {
            "slots": torch.zeros(3, 3, 20),
            "features": half(3, 3, 20),
            "scores": torch.ones(3, 3),
            "labels": torch.ones(3, 3),
        },
    ),
    "plain": (
        run_attention,
        {"upstream": half(2, 3, 3, 8), "query": half(2, 3, 3, 8), "keys": half(2, 5, 3, 8, seed=2),
         "values": half(2, 5, 3, 8, seed=3), "pos": None, "padded": PADDED},
    ),
    "folded": (
        run_attention,
        {"upstream": half(2, 3, 3, 8), "query": half(1, 3, 3, 8), "keys": half(2, 5, 1, 8, seed=2), "values": None,
         "pos": half(2, 5, 8, seed=3), "padded": PADDED},
    ),
}  # fmt: skip
NAMES = [(op, name) for op, (_, inputs) in CASES.items() for name, value in inputs.items() if value is not None]


@functools.cache
def near(op: str) -> tuple[Tensor, ...]:
    """What the op gives from inputs as they are."""
    run, inputs = CASES[op]
    return run(*(value.clone() if isinstance(value, Tensor) else None for value in inputs.values()))


@pytest.mark.parametrize("op, name", NAMES, ids=lambda value: value)
def test_offsets_pass_two_to_the_31(op: str, name: str) -> None:
    run, inputs = CASES[op]
    got = run(*{**inputs, name: spread(inputs[name])}.values())
    assert all(torch.equal(ours, want) for ours, want in zip(got, near(op), strict=True))
