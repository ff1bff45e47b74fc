"""Offsets past 2^31 elements: every strided input of every op, spread over memory that is not there."""

from __future__ import annotations

import functools
import itertools
import mmap
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sadcl.ops._library import OPS
from sadcl.testing.examples import EXAMPLES, Maker, Size

FAR = 1 << 31
SIZE = Size(b=3, v=2, c=3, d=20, e=24, length=5, heads=3)
CONTIGUOUS = {"pairs", "class_ptr", "seed"}  # sadcl's own

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


def examples(op: str) -> list[Any]:
    """Inputs of an op; options and most weightings change no offset, and compaction has a way of its own for large
    batches."""
    small = list(EXAMPLES[op](Maker(SIZE, torch.bfloat16)))
    large = list(EXAMPLES[op](Maker(replace(SIZE, b=300), torch.bfloat16)))
    few = {"sscl": small[:1], "compact": [small[0], large[0]], "pscl": small[:1]}
    if op == "mlc":  # any, with keys; msc; dense weights
        few[op] = [small[1], *small[-2:]]
    return few.get(op, small)


def run(op: str, x: Any, far: str = "") -> list[Tensor]:
    """Outputs and gradients, with the input ``far`` (or the upstream gradient) spread out."""
    declared = OPS[op]
    x = x._replace(**{name: value.clone() for name, value in x._asdict().items() if isinstance(value, Tensor)})
    if far and far != "upstream":
        x = x._replace(**{far: spread(getattr(x, far))})
    out = declared.run(x, "triton")
    results = [x.slots] if declared.mutates else list(out)
    if declared.derivative is not None:
        upstream = [torch.linspace(-1, 1, y.numel()).to(y.dtype).reshape(y.shape) for y in out[: declared.results]]
        upstream = [spread(y) if far == "upstream" and y.numel() > 0 else y for y in upstream]
        results += declared.derivative.run(declared.derivative.pack(tuple(upstream), x, out), "triton")
    return results


@functools.cache
def near(op: str, index: int) -> list[Tensor]:
    """What comes of inputs as they are."""
    return run(op, examples(op)[index])


CASES = [
    (op, index, name)
    for op, declared in OPS.items()
    if "triton" in declared.backends
    for index, x in enumerate(examples(op))
    for name in (*x._fields, *(["upstream"] if declared.derivative else []))
    if name == "upstream"
    or (isinstance(value := getattr(x, name), Tensor) and value.dim() > 0 and name not in CONTIGUOUS)
]


@pytest.mark.parametrize("op, index, name", CASES)
def test_offsets_pass_two_to_the_31(op: str, index: int, name: str) -> None:
    got = run(op, examples(op)[index], name)
    assert all(torch.equal(ours, want) for ours, want in zip(got, near(op, index), strict=True))
