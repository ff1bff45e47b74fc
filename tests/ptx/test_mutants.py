"""Faults planted into our compiled kernels are seen: one of each class in three ops' kernels, more with -m slow."""

from __future__ import annotations

import pytest

from tests.ptx.cases import PRODUCTS, TRITON
from tests.ptx.mutants import Outcome, sampled, summary


def check(outcomes: list[Outcome]) -> None:
    """Most faults that change any bit of a result are seen, and most of all that are planted.

    The others leave every bit as it was: most are no faults (docs/gpu_executed.md has the share of a larger sample).
    In one of so few, a fault in the low words of a float64 sum, smaller than float32's rounding, weighs much.
    """
    verdicts = summary(outcomes)
    survivors = [outcome for outcome in outcomes if outcome.verdict in ("unseen", "no effect")]
    seen = len(outcomes) - len(survivors)
    assert seen >= 0.9 * (seen + verdicts["unseen"]), survivors
    assert seen >= 0.5 * len(outcomes), survivors


@pytest.mark.parametrize("op, kind", [("sscl", "bf16"), ("label_attention_core", "bf16"), ("pscl", "fp32")])
def test_most_planted_faults_are_seen(op: str, kind: str) -> None:
    check(list(sampled(op, kind, per_class=1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp64", "tf32"])
@pytest.mark.parametrize("op", TRITON)
def test_most_planted_faults_are_seen_in_every_kernel(op: str, kind: str) -> None:
    if kind == "tf32" and op not in PRODUCTS:
        pytest.skip("it has no products")
    check(list(sampled(op, kind, per_class=4)))
