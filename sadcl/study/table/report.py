"""What a study on a table leaves behind: ``study.json`` and ``study.md``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sadcl._json import dumps
from sadcl.checkpoint import write_atomically
from sadcl.study.compare import LEVEL, Comparison, compare, holm, spread
from sadcl.study.report import cells, versions
from sadcl.study.table.bench import FIGURES
from sadcl.study.table.config import ARMS, CONTROL
from sadcl.study.table.trials import TableStudy

__all__ = ["table_markdown", "write_table_report"]

Values = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> figures
_COMPARED = ("mAP", "micro F1", "macro F1", "label ranking AP", "ranking loss")


def write_table_report(study: TableStudy) -> dict[str, Any]:
    """Write ``study.json`` and ``study.md`` from what is finished; returns the content of the first."""
    values: Values = {}
    for arm in (name for name in ARMS if name in study.config.arms):
        results = {seed: study.result(arm, seed) for seed in study.config.seeds}
        found = {seed: result for seed, result in results.items() if result is not None}
        if found:
            values[arm] = found
    compared = {figure: comparisons(values, figure) for figure in _COMPARED}
    content = {
        "config": asdict(study.config),
        "versions": versions(),
        "values": values,
        "against": {figure: [asdict(one) for one in found] for figure, found in compared.items()},
    }
    text = dumps(content, indent=1)
    write_atomically(study.folder / "study.json", lambda file: file.write(text.encode()))
    page = table_markdown(study, values, compared)
    write_atomically(study.folder / "study.md", lambda file: file.write(page.encode()))
    study.say(f"report: {study.folder / 'study.md'}")
    return content


def comparisons(values: Values, figure: str) -> list[Comparison]:
    """Every arm against the one it belongs to, on their common seeds."""
    numbers = {arm: {seed: found[figure] for seed, found in seeds.items()} for arm, seeds in values.items()}
    pairs = [(arm, ARMS[arm].against) for arm in numbers if arm != CONTROL]
    found = (compare(arm, other, numbers[arm], numbers[other]) for arm, other in pairs if other in numbers)
    return [one for one in found if one is not None]


def table_markdown(study: TableStudy, values: Values, compared: dict[str, list[Comparison]]) -> str:
    """The report for people."""
    config, sizes = study.config, study.table.sizes
    split = "split anew for every seed" if config.resplit or sizes is None else f"{' / '.join(map(str, sizes))} rows"
    lines = [
        f"# Which loss helps on {study.table.name}?",
        "",
        f"{study.describe()}; training / validation / test: {split}.",
    ]
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines += [f"Made by `sadcl study table --config config.yaml` with {made_with}.", ""]
    lines += [
        "Test rows, mean over the seeds:",
        "",
        f"| arm | {' | '.join(FIGURES)} |",
        "|---|" + "---:|" * len(FIGURES),
    ]
    for arm, seeds in values.items():
        means = [sum(found[figure] for found in seeds.values()) / len(seeds) for figure in FIGURES]
        lines.append(f"| {ARMS[arm].title} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    lines.append("")
    for figure, found in compared.items():
        lines += _figure_lines(values, figure, found)
    return "\n".join([*lines, "## How it was measured", "", *_protocol(study), ""])


def _figure_lines(values: Values, figure: str, found: list[Comparison]) -> list[str]:
    less = "" if FIGURES[figure] else " (less is better)"
    lines = [
        f"## {figure}{less}",
        "",
        f"| arm | {figure} | against | difference | {LEVEL:.0%} interval | seeds above | p (Holm) | |",
    ]
    lines.append("|---|---:|---|---:|---:|---:|---:|---|")
    by_arm = {one.arm: (one, p) for one, p in zip(found, holm([one.p for one in found]), strict=True)}
    for arm, seeds in values.items():
        numbers = [result[figure] for result in seeds.values()]
        deviation = f" ± {spread(numbers):.4f}" if len(numbers) > 1 else ""
        row = [ARMS[arm].title, f"{sum(numbers) / len(numbers):.4f}{deviation}"]
        row += (
            [ARMS[by_arm[arm][0].against].title, *cells(*by_arm[arm], FIGURES[figure])] if arm in by_arm else [""] * 6
        )
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def _protocol(study: TableStudy) -> list[str]:
    config = study.config
    resplit = config.resplit or study.table.sizes is None
    seed = (
        "the split, the initial weights"
        if resplit
        else "the initial weights (the split is the file's: intervals leave it out)"
    )
    layers = " -> ".join(map(str, config.widths))
    return [
        f"- A seed decides {seed}, the order of rows and the masks; all arms of a seed start from the same weights.",
        f"- Encoder: a perceptron {layers}; Adam, learning rate {config.learning_rate:g} (linear probe: "
        f"{config.probe_rate:g}), batches of {config.batch_size}. Features have mean 0 and deviation 1.",
        f"- Pretraining: {config.pretrain_steps} steps; vectors of {config.proj_dim} numbers, temperature "
        f"{config.temperature:g}; keys are the batch's other view by a slow encoder (momentum {config.momentum:g}) and "
        f"a queue of {config.queue}; both views have features set to 0 with probability {config.masking:g}. The same "
        "weights serve the linear probe and the fine-tuning, both by BCE.",
        f"- Logits: {config.epochs} epochs; the one with the best validation mAP is measured. Jointly: ASL of the row "
        f"plus the contrastive loss of two masked views times one of {', '.join(map(str, config.joint_weights))}, "
        "chosen by validation mAP.",
        "- mAP is `sadcl.metrics`' default (area under the envelope of precision; scikit-learn reads 0.004 less on "
        "yeast). F1: one threshold for all classes, the best micro F1 on the validation rows. Rankings: rows that have "
        "positives and negatives.",
        "- Nothing was chosen on the test rows. Intervals (paired t) are not corrected for their number; p is, by "
        "Holm's method, over the rows of its table. Better and worse mean p < 0.05.",
    ]
