"""What every case has, and the tensors that are made of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sadcl._dtypes import accumulation_dtype
from sadcl.testing import RAGGED, layouts, make_features, make_labels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int16, torch.int32,
                torch.int64, torch.uint8, torch.bool)  # fmt: skip
LAYOUTS = ("contiguous", "permuted", "every_other", "offset", "expanded", "negated")


def sizes(largest: int) -> st.SearchStrategy[int]:
    return st.one_of(st.just(1), st.integers(2, largest))


COMMON: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**20),
    "b": sizes(9),
    "c": sizes(9),
    "d": st.sampled_from([1, 2, 3, 7, 16, 17, 33]),
    "v": st.integers(1, 2),
    "dtype": st.sampled_from(DTYPES),
    "pattern": st.sampled_from(RAGGED),
    "label_dtype": st.sampled_from(LABEL_DTYPES),
    "layouts": st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4),
    "only": st.integers(-2, 4),  # of which tensor alone a gradient is taken; -1: none, -2: of all
    "isa": st.integers(0, 3),
}
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
TEMPERATURES = st.one_of(st.sampled_from([0.05, 0.1, 0.2, 1.0]), st.floats(0.03, 3.0))
WIDE = st.sampled_from([1, 2, 3, 8, 17, 35])
WEIGHTED = st.sampled_from(["", "class", "sample", "both"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` in a layout; "expanded" repeats its first slice."""
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "negated":
        return torch._neg_view(-x)
    return dict(layouts(x))[layout]


def features(case: SimpleNamespace, index: int, *shape: int, size: float = 1.0) -> Tensor:
    """The ``index``-th features of a case."""
    x = size * make_features(*(shape if len(shape) > 1 else (1, *shape)), seed=case.seed + index)
    return laid_out(x.reshape(shape).to(case.dtype), case.layouts[index % 4])


def labels(case: SimpleNamespace, *shape: int, index: int = 0) -> Tensor:
    """Labels of the case's pattern and dtype; where that has no -1, 0 instead."""
    y = make_labels(*shape, case.pattern, seed=case.seed + index)
    if case.label_dtype in (torch.uint8, torch.bool):
        y = y.clamp(min=0)
    y = y.to(case.label_dtype)
    layout = case.layouts[(3 + index) % 4]
    return laid_out(y, layout) if y.is_floating_point() or layout == "expanded" else y.t().contiguous().t()


def poison(case: SimpleNamespace, x: Tensor, hidden: Tensor) -> Tensor:
    """NaN in the places of ``x`` that play no part (where they are ``x``'s own)."""
    if not case.poisoned or 0 in x.stride():
        return x
    return laid_out(torch.where(hidden, torch.nan, x), "permuted")


def weights(case: SimpleNamespace, b: int, c: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Class and sample weights as the case wants them, in the dtype that losses have."""
    generator = torch.Generator().manual_seed(case.seed)
    drawn = {
        "class_weight": torch.rand(c or 1, generator=generator),
        "sample_weight": torch.rand(b, generator=generator),
    }
    wanted = {"": (), "class": ("class_weight",), "sample": ("sample_weight",), "both": tuple(drawn)}[case.weighted]
    return {name: x.to(dtype) for name, x in drawn.items() if name in wanted and (c or name == "sample_weight")}


def number(value: float, case: SimpleNamespace) -> Tensor:
    return torch.tensor(value, dtype=accumulation_dtype(case.dtype))
