"""Triton SSCL and SupCon where scores are large, held to what float32 products allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

from sadcl._backends import triton_interprets
from tests.ops.test_large_scores import assert_as_good, sscl_case, sscl_grad, supcon_case, supcon_grad


@pytest.fixture(autouse=True)
def _products_of_the_same_bits() -> Iterator[None]:
    """As on a GPU, a score has the same bits in forward and backward, which their difference hangs on where a softmax
    is certain. numpy's BLAS sums by the shape of a tile, and differently on every processor: products are rounded once.
    """

    def create_dot(self: Any, a: Any, b: Any, to: Any, *options: Any) -> Any:
        exact = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(exact.astype(to.data.dtype) + to.data, to.dtype.scalar)

    with pytest.MonkeyPatch.context() as change:
        if triton_interprets():
            change.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.mark.parametrize("norm, images", [(5.0, 20), (40.0, 20), (160.0, 20), (640.0, 60)])
def test_long_features(norm: float, images: int) -> None:
    x, labels, truth, allowed = supcon_case(norm, images)
    assert_as_good(supcon_grad(x, labels, "triton"), truth, allowed)


@pytest.mark.parametrize("formulation", ["paper", "released"])
@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_small_temperatures(temperature: float, formulation: str) -> None:
    x, labels, truth, allowed = sscl_case(temperature, formulation, 5)  # 40 rows: three tiles, more than a panel
    assert_as_good(sscl_grad(x, labels, temperature, formulation, "triton"), truth, allowed)
