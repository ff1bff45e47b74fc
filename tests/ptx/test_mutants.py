"""Faults planted into our compiled kernels are seen: one of each class in three ops' kernels, more with -m slow."""

from __future__ import annotations

import pytest

from tests.ptx.cases import PRODUCTS, TRITON
from tests.ptx.mutants import Outcome, sampled

# Whatever the tests compare, these leave no result as it was: a product is missing, or was read before it was there.
MUST_BE_SEEN = ("mma dropped", "wait removed")
UNSEEN = ("unseen", "no effect")


def seen(outcomes: list[Outcome]) -> float:
    """Share of the faults that had an effect which was seen."""
    return 1 - sum(outcome.verdict in UNSEEN for outcome in outcomes) / len(outcomes)


def check(outcomes: list[Outcome], share: float) -> None:
    survivors = [outcome for outcome in outcomes if outcome.verdict in UNSEEN]
    assert not [outcome for outcome in survivors if outcome.what in MUST_BE_SEEN], survivors
    assert seen(outcomes) >= share, survivors


@pytest.mark.parametrize("op, kind", [("sscl", "bf16"), ("label_attention_core", "bf16"), ("pscl", "fp32")])
def test_most_planted_faults_are_seen(op: str, kind: str) -> None:
    check(list(sampled(op, kind, per_class=1)), 0.75)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp64", "tf32"])
@pytest.mark.parametrize("op", TRITON)
def test_most_planted_faults_are_seen_in_every_kernel(op: str, kind: str) -> None:
    if kind == "tf32" and op not in PRODUCTS:
        pytest.skip("it has no products")
    check(list(sampled(op, kind, per_class=4)), 0.75)
