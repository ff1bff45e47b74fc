"""Triton SSCL and SupCon where scores are large, held to what float32 products allow."""

from __future__ import annotations

import pytest

from tests.ops.test_large_scores import assert_as_good, sscl_case, sscl_grad, supcon_case, supcon_grad


@pytest.mark.parametrize("norm, images", [(5.0, 20), (40.0, 20), (160.0, 20), (640.0, 60)])
def test_long_features(norm: float, images: int) -> None:
    x, labels, truth, allowed = supcon_case(norm, images)
    assert_as_good(supcon_grad(x, labels, "triton"), truth, allowed)


@pytest.mark.parametrize("formulation", ["paper", "released"])
@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_small_temperatures(temperature: float, formulation: str) -> None:
    x, labels, truth, allowed = sscl_case(temperature, formulation, 5)  # 40 rows: three tiles, more than a panel
    assert_as_good(sscl_grad(x, labels, temperature, formulation, "triton"), truth, allowed)
