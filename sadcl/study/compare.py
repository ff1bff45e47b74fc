"""Paired comparisons of a study's arms: Student's t over the common seeds, and Holm's adjustment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sadcl.study.config import Choice
from sadcl.study.trials import Study

__all__ = ["CONTROL", "LEVEL", "TITLES", "Comparison", "PartResult", "collect", "compare", "holm", "spread"]

CONTROL = "sarl"
LEVEL = 0.95
TITLES = {"frozen": "Frozen backbone", "finetuned": "Fine-tuned backbone"}


@dataclass(frozen=True)
class Comparison:
    """Paired differences ``arm - against`` over the seeds that have both.

    Attributes:
        arm: which arm.
        against: what it is compared with.
        seeds: the n seeds.
        differences: one of each seed.
        mean: of the differences.
        low, high: 95 % confidence interval of the mean by the paired t distribution (NaN for n = 1).
        p: two-sided p of the paired t test (NaN for n = 1).
    """

    arm: str
    against: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class PartResult:
    """Everything finished of one part.

    Attributes:
        name: frozen or finetuned.
        chosen: each arm's choice.
        values: arm -> seed -> figures (mAP, CF1, OF1 and more).
        against_control: every other arm against SARL continued, in mAP.
        cf1_against_control: the same in CF1 (threshold 0.5), which nothing was chosen on.
        formulations: each paper arm against the released one with the same losses.
    """

    name: str
    chosen: dict[str, Choice]
    values: dict[str, dict[int, dict[str, float]]]
    against_control: list[Comparison]
    cf1_against_control: list[Comparison]
    formulations: list[Comparison]


def compare(arm: str, against: str, ours: dict[int, float], theirs: dict[int, float]) -> Comparison | None:
    """Paired comparison over the common seeds; None if there are none.

    Args:
        arm: name of the one.
        against: name of the other.
        ours: seed -> figure of ``arm``.
        theirs: seed -> figure of ``against``.
    """
    from scipy.stats import t  # scikit-learn depends on scipy, so [train] brings it

    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return None
    differences = tuple(ours[seed] - theirs[seed] for seed in seeds)
    count = len(seeds)
    mean = sum(differences) / count
    if count == 1:
        return Comparison(arm, against, seeds, differences, mean, math.nan, math.nan, math.nan)
    error = spread(differences) / math.sqrt(count)
    half = float(t.ppf(0.5 + LEVEL / 2, count - 1)) * error
    if error == 0.0:
        p = 1.0 if mean == 0.0 else 0.0
    else:
        p = float(2 * t.sf(abs(mean) / error, count - 1))
    return Comparison(arm, against, seeds, differences, mean, mean - half, mean + half, p)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjustment of several p values; NaN stays NaN and counts for nothing."""
    adjusted = [math.nan] * len(values)
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=lambda i: values[i])
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted


def collect(study: Study, name: str) -> PartResult | None:
    """The finished evaluation trials of a part; None if there are none."""
    part = getattr(study.config, name)
    values: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in part.arms}
    for seed in part.seeds:
        for trial in study.seed_trials(name, seed):
            result = study.result(trial)
            if result is not None:
                values[trial.arm][seed] = result
    values = {arm: found for arm, found in values.items() if found}
    if not values:
        return None
    pairs = [(arm, CONTROL) for arm in values if arm != CONTROL]
    both = [(arm, arm.replace("-paper", "-released")) for arm in values if arm.endswith("-paper")]
    return PartResult(
        name,
        study.chosen(name),
        values,
        _compare_all(values, pairs, "mAP"),
        _compare_all(values, pairs, "CF1"),
        _compare_all(values, both, "mAP"),
    )


def _compare_all(
    values: dict[str, dict[int, dict[str, float]]], pairs: Sequence[tuple[str, str]], figure: str
) -> list[Comparison]:
    """The pairs of arms that have a common seed."""
    numbers = {arm: {seed: result[figure] for seed, result in found.items()} for arm, found in values.items()}
    compared = (compare(arm, other, numbers[arm], numbers[other]) for arm, other in pairs if other in numbers)
    return [comparison for comparison in compared if comparison is not None]


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample (n - 1)."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
