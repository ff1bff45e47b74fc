"""Drawn shapes, strides, dtypes, labels and options of every public function, held to the float64 oracle's budget.

``SADCL_FUZZ=10`` draws ten times as many cases, other ones every time (``--hypothesis-seed=N`` for the same ones), and
keeps what failed in ``.hypothesis`` to try it first the next time. A fault that was found goes to :data:`FOUND`.
"""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import Any

import fuzz
import pytest
import torch
from fuzz.problem import assert_within, evaluate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sadcl
from tests.here import instruction_sets

MORE = int(os.environ.get("SADCL_FUZZ", "0"))
CASES = 2000 * max(MORE, 1)
ISAS = instruction_sets()
BACKENDS = [name for name in ("cpp", "torch") if sadcl.backends()[name].available]

# What was found, by generator: cases whose right result is a test for ever.
FOUND: dict[str, list[dict[str, Any]]] = {
    # A probability below float32's smallest normal number, times the factor of the reduction.
    "asl": [
        {
            "seed": 323934, "b": 5, "c": 3, "d": 1, "v": 1, "dtype": torch.float32, "pattern": "random",
            "label_dtype": torch.float32, "layouts": ["contiguous"] * 4, "only": 0, "isa": 0, "gamma_neg": 0,
            "gamma_pos": 0, "clip": 0.0, "eps": 1e-8, "detach_focal_weight": False, "soft": False, "poisoned": False,
            "reduction": "released", "weighted": "", "size": 100.0,
        },
    ],
    # Doubles by way of e^-lse: off by as many units as a score has.
    "sscl": [
        {
            "seed": 0, "b": 2, "c": 2, "d": 1, "v": 1, "dtype": torch.float64, "pattern": "random",
            "label_dtype": torch.float32, "layouts": ["contiguous"] * 4, "only": 1, "isa": 0, "temperature": 0.05,
            "weighted": "", "formulation": "released", "reduction": "sum", "poisoned": False, "compacted": False,
            "zero": False, "size": 1.0, "base": None,
        },
    ],
    # A weight of 2e-8, which is 0 in float16, and a gradient of 36 times as much.
    "label_attention": [
        {
            "seed": 0, "b": 1, "c": 1, "d": 1, "v": 1, "dtype": torch.float16, "pattern": "random",
            "label_dtype": torch.float32, "layouts": ["contiguous", "contiguous", "expanded", "contiguous"], "only": -2,
            "isa": 0, "width": 24, "heads": 1, "masked": False, "form": "plain", "shared": False, "biased": False,
            "length": 8, "pos": "", "need": True,
        },
        # Rows of a weight that repeat: the terms of a score are one number, and so are their errors.
        {
            "seed": 524286, "b": 1, "c": 3, "d": 1, "v": 1, "dtype": torch.float32, "pattern": "random",
            "label_dtype": torch.float32, "layouts": ["contiguous", "contiguous", "expanded", "contiguous"], "only": 0,
            "isa": -1, "width": 24, "heads": 3, "masked": False, "form": "plain", "shared": False, "biased": False,
            "length": 4, "pos": "", "need": True,
        },
    ],
    # A gradient of two parts, each rounded to float16, whose sum is rounded once more.
    "dual": [
        {
            "seed": 0, "b": 7, "c": 8, "d": 16, "v": 1, "dtype": torch.float16, "pattern": "random",
            "label_dtype": torch.float32, "layouts": ["contiguous"] * 4, "only": 0, "isa": 0, "temperature": 0.05,
            "weighted": "", "formulation": "paper", "size": 1.0,
        },
    ],
    # Two rows, whose losses and gradients are differences of equal scores.
    "sscl-supcon": [
        {
            "seed": seed, "b": 1, "c": 1, "d": 16, "v": 2, "dtype": torch.float32, "pattern": "random",
            "label_dtype": torch.float32, "layouts": ["contiguous"] * 4, "only": only, "isa": 0, "temperature": 0.05,
            "reduction": "mean", "base": base, "size": 1.0, "mode": "all", "weighted": "", "positives": "groups",
        }
        for seed, only, base in ((78, 0, None), (92597, 1, 0.07))
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _isa_as_before():
    if not ISAS:
        yield
        return
    extension = importlib.import_module("sadcl._C")
    before = extension.isa()
    yield
    extension.set_isa(before)


def hold(name: str, case: dict[str, Any], backend: str) -> None:
    if ISAS:
        importlib.import_module("sadcl._C").set_isa(ISAS[case["isa"] % len(ISAS)])
    fuzz.hold(fuzz.GENERATORS[name], case, backend)


@pytest.mark.parametrize("name", fuzz.GENERATORS)
@settings(
    max_examples=CASES // len(fuzz.GENERATORS),
    deadline=None,
    derandomize=not MORE,
    database=settings.default.database if MORE else None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_results_and_gradients_are_the_oracles(name: str, data: st.DataObject) -> None:
    backends = [backend for backend in BACKENDS if backend in fuzz.GENERATORS[name].backends]
    case = data.draw(fuzz.cases(name))
    hold(name, case, data.draw(st.sampled_from(backends)))


@pytest.mark.parametrize("name, number", [(name, i) for name, found in FOUND.items() for i in range(len(found))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_found(name: str, number: int, backend: str) -> None:
    if backend in fuzz.GENERATORS[name].backends:
        hold(name, FOUND[name][number], backend)


@pytest.mark.parametrize("name, backend", [("dual", "cpp"), ("dual", "torch"), ("label_attention", "cpp")])
@pytest.mark.skipif(not ISAS, reason="the CPU extension is not built")
def test_two_units_of_a_narrow_gradient_are_refused(name: str, backend: str) -> None:
    """Of what is added in narrow numbers too, and where narrow numbers end: budgets count the roundings that happen."""
    case = {**FOUND[name][0], "size": 1.0}
    if name == "label_attention":
        case |= {"c": 3, "b": 2, "layouts": ["contiguous"] * 4, "pos": "shared"}
    problem = fuzz.GENERATORS[name].problem(SimpleNamespace(**case))
    wanted = tuple(key for key, x in problem.tensors.items() if x.dtype == torch.float16)
    upstream = [torch.ones(4096, dtype=torch.float64)] * 2
    got = evaluate(lambda **tensors: problem.run(backend, **tensors), problem.tensors, wanted, upstream)
    assert_within(problem, backend, got, wanted, upstream, 16)
    for gradient in got[-len(wanted) :]:
        at = gradient.abs().argmax()
        before = gradient.reshape(-1)[at].clone()
        gradient.reshape(-1)[at] += 2 * torch.finfo(torch.float16).eps * before.abs()
        with pytest.raises(AssertionError, match="is off by .*1 of .* rows over"):
            assert_within(problem, backend, got, wanted, upstream, 16)
        gradient.reshape(-1)[at] = before
