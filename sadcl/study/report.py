"""What a study leaves behind: ``study.json``, ``study.md`` and ``study.png``."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sadcl._json import dumps
from sadcl.checkpoint import write_atomically
from sadcl.study.compare import LEVEL, TITLES, Comparison, PartResult, collect, holm, spread
from sadcl.study.config import ARMS, PARTS
from sadcl.study.plot import plot_study
from sadcl.study.trials import Study

__all__ = ["cells", "markdown", "versions", "write_report"]


def write_report(study: Study) -> dict[str, Any]:
    """Write ``study.json``, ``study.md`` and ``study.png`` from what is finished.

    Returns:
        The content of ``study.json``.
    """
    results = [found for name in PARTS if (found := collect(study, name))]
    trials = [json.loads(path.read_text()) for path in sorted((study.folder / "trials").glob("*.json"))]
    content = {
        "config": asdict(study.config),
        "versions": versions(),
        "plan": [dict(zip(("part", "phase", "trainings", "finished"), row, strict=True)) for row in study.plan()],
        "parts": [_as_json(result) for result in results],
        "trials": trials,
    }
    text = dumps(content, indent=1)
    write_atomically(study.folder / "study.json", lambda file: file.write(text.encode()))
    page = markdown(study, results, trials)
    write_atomically(study.folder / "study.md", lambda file: file.write(page.encode()))
    if results:
        plot_study(study.folder / "study.png", results)
    study.say(f"report: {study.folder / 'study.md'}")
    return content


def markdown(study: Study, results: Sequence[PartResult], trials: Sequence[dict[str, Any]]) -> str:
    """The report for people."""
    finished = sum(row[3] for row in study.plan())
    planned = sum(row[2] for row in study.plan())
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    hours = sum(trial["result"]["seconds"] for trial in trials) / 3600
    titles = sorted({trial["data"]["title"] for trial in trials})
    lines = ["# Does the method help here?", ""]
    lines += [f"Pictures: {'; '.join(titles)}. {finished} of {planned} trainings finished ({hours:.1f} h of training)."]
    lines += [f"Made by `sadcl study --config config.yaml` with {made_with}.", ""]
    lines += ["![paired differences](study.png)", ""]
    for result in results:
        lines += _part_lines(study, result)
    lines += ["## How it was measured", "", *_protocol(study), ""]
    return "\n".join(lines)


def _part_lines(study: Study, result: PartResult) -> list[str]:
    part = getattr(study.config, result.name)
    lines = [f"## {TITLES[result.name]}", ""]
    lines += [
        f"{part.train_images} training and {part.val_images} validation pictures, {part.step1.epochs} + "
        f"{part.step2.epochs} epochs for every arm. Validation mAP and CF1 after the last epoch, mean and standard "
        "deviation over the seeds; difference from the control on the same seed, mean and "
        f"{LEVEL:.0%} interval (paired t).",
        "",
    ]
    for figure, comparisons in (("mAP", result.against_control), ("CF1", result.cf1_against_control)):
        lines += [
            f"| arm | {figure} | difference | interval | seeds above | p (Holm) | |",
            "|---|---:|---:|---:|---:|---:|---|",
        ]
        adjusted = holm([comparison.p for comparison in comparisons])
        row_of = {one.arm: cells(one, p) for one, p in zip(comparisons, adjusted, strict=True)}
        for arm, found in result.values.items():
            mean = _mean_spread([one[figure] for one in found.values()])
            lines.append(f"| {' | '.join([ARMS[arm].title, mean, *row_of.get(arm, [''] * 5)])} |")
        lines.append("")
    if result.formulations:
        lines += ["Paper's equations minus released formulation, each with its own weights:", ""]
        lines += [
            "| losses | difference in mAP | interval | seeds above | p (Holm) | |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for comparison, p in zip(result.formulations, holm([c.p for c in result.formulations]), strict=True):
            name = ARMS[comparison.arm].title.removesuffix(", paper")
            lines.append(f"| {' | '.join([name, *cells(comparison, p)])} |")
        lines.append("")
    lines += _seed_table(result)
    lines += _choice_table(study, result)
    return lines


def cells(comparison: Comparison, adjusted: float, more_is_better: bool = True) -> list[str]:
    """Of a row: difference, interval, seeds above, p, verdict."""
    above = sum(difference > 0 for difference in comparison.differences)
    count = len(comparison.seeds)
    interval = "-" if math.isnan(comparison.low) else f"{_signed(comparison.low)} to {_signed(comparison.high)}"
    verdict = "too few seeds" if math.isnan(adjusted) else "no difference shown"
    if adjusted < 1 - LEVEL:
        verdict = "better" if (comparison.mean > 0) == more_is_better else "worse"
    p = "-" if math.isnan(adjusted) else "< 0.001" if adjusted < 0.001 else f"{adjusted:.3f}"
    return [_signed(comparison.mean), interval, f"{above} of {count}", p, verdict]


def _signed(value: float) -> str:
    """With its sign, unless it rounds to 0."""
    text = f"{value:+.4f}"
    return "0.0000" if float(text) == 0 else text


def _seed_table(result: PartResult) -> list[str]:
    seeds = sorted({seed for found in result.values.values() for seed in found})
    lines = ["mAP of every seed:", "", f"| arm | {' | '.join(map(str, seeds))} |", "|---|" + "---:|" * len(seeds)]
    for arm, found in result.values.items():
        row = [f"{found[seed]['mAP']:.4f}" if seed in found else "" for seed in seeds]
        lines.append(f"| {ARMS[arm].title} | {' | '.join(row)} |")
    return [*lines, ""]


def _choice_table(study: Study, result: PartResult) -> list[str]:
    """Arms with one candidate have their choice from the config, and their line says so."""
    seeds = getattr(study.config, result.name).weight_seeds
    tried = f" on the weight seeds {', '.join(map(str, seeds))}" if seeds else ""
    lines = [
        f"What was tried{tried}, with the mean mAP; the chosen one in bold:",
        "",
        "| arm | learning rates | weights (SSCL / PSCL) | mAP |",
        "|---|---|---|---:|",
    ]
    for arm in result.values:
        rows = study.tried(result.name, arm)
        for choice, value in rows:
            bold = "**" if choice == result.chosen.get(arm) else ""
            measured = "given" if len(rows) == 1 else "-" if value is None else f"{value:.4f}"
            weights = f"{choice.sample_weight:g} / {choice.prototype_weight:g}" if ARMS[arm].contrastive else ""
            rates = f"{choice.rate1:.2g}, {choice.rate2:.2g}"
            lines.append(f"| {ARMS[arm].title} | {rates} | {weights} | {bold}{measured}{bold} |")
    return [*lines, ""]


def _protocol(study: Study) -> list[str]:
    what = "the initialisation and the order of the pictures, not which pictures: the intervals leave that out"
    if study.config.data.composed:
        what = (
            "the split of source objects and backgrounds into training and validation, the scenes, the "
            "initialisation and the order"
        )
    return [
        f"- A seed decides {what}. All arms of a seed share all of it.",
        "- SARL and every arm built on it share step 1 of the seed. The control goes on with the classification loss "
        "alone for as many epochs as the others train step 2; linear trains for as many epochs in total.",
        "- The learning rate of step 2 and the loss weights of an arm are those with the best mean mAP on the weight "
        "seeds, which are no evaluation seeds. The control chooses among the same learning rates.",
        "- Nothing is chosen on an evaluation seed: no early stopping, no best epoch.",
        "- Intervals are not corrected for their number; p is, by Holm's method, over the rows of its table. "
        "Better and worse mean p < 0.05. Student's t from scipy.",
    ]


def _mean_spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ± {spread(values):.4f}"


def _as_json(result: PartResult) -> dict[str, Any]:
    return {
        "part": result.name,
        "chosen": {arm: asdict(choice) for arm, choice in result.chosen.items()},
        "values": result.values,
        "against_control": [asdict(comparison) for comparison in result.against_control],
        "cf1_against_control": [asdict(comparison) for comparison in result.cf1_against_control],
        "paper_minus_released": [asdict(comparison) for comparison in result.formulations],
    }


def versions() -> dict[str, str]:
    """Of what a report depends on."""
    import scipy
    import torch

    import sadcl

    return {
        "sadcl": sadcl.__version__,
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "Python": platform.python_version(),
    }
