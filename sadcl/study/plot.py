"""The study's picture: mAP of every arm and seed, and the paired differences from the control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sadcl.checkpoint import write_atomically
from sadcl.report.plots import BLUE, GRAY, INK, RED
from sadcl.study.compare import CONTROL, TITLES, PartResult
from sadcl.study.config import ARMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_study"]


def plot_study(path: Path, results: Sequence[PartResult]) -> None:
    """One row a part: on the left every seed's mAP, on the right its difference from the control.

    Args:
        path: PNG file to write.
        results: the parts that have results.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1.2 + 0.36 * len(result.values) for result in results]
    figure = Figure(figsize=(13.5, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.subplots(len(results), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (left, right), result in zip(axes, results, strict=True):
        _values(left, result)
        _differences(right, result)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _values(axis: Axes, result: PartResult) -> None:
    """mAP by arm; a gray line joins the arms of one seed."""
    arms = list(result.values)
    _names(axis, arms)
    seeds = sorted({seed for found in result.values.values() for seed in found})
    for seed in seeds:
        points = [(found[seed]["mAP"], row) for row, found in enumerate(result.values.values()) if seed in found]
        axis.plot(*zip(*points, strict=True), "-o", color="#c9ccd1", ms=3.5, lw=0.8, mec=GRAY, mfc=GRAY)
    for row, (arm, found) in enumerate(result.values.items()):
        mean = sum(one["mAP"] for one in found.values()) / len(found)
        axis.plot([mean], [row], "|", color=_color(arm), ms=15, mew=2.5)
    axis.set_title(
        f"{TITLES[result.name]}: validation mAP, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
        fontsize=11,
        color=INK,
        loc="left",
    )


def _differences(axis: Axes, result: PartResult) -> None:
    """Dots: seeds; bar: mean and its interval. The linear arm is on the left only: it would squeeze the others."""
    shown = [comparison for comparison in result.against_control if not ARMS[comparison.arm].linear]
    if not shown:
        axis.set_visible(False)
        return
    _names(axis, [comparison.arm for comparison in shown])
    axis.axvline(0.0, color=INK, lw=1)
    for row, comparison in enumerate(shown):
        color = _color(comparison.arm)
        axis.plot(comparison.differences, [row + 0.18] * len(comparison.differences), "o", color=GRAY, ms=3.5)
        if not math.isnan(comparison.low):
            axis.plot([comparison.low, comparison.high], [row - 0.12] * 2, color=color, lw=2.5, solid_capstyle="butt")
        axis.plot([comparison.mean], [row - 0.12], "D", color=color, ms=6)
    axis.set_title(
        f"minus {ARMS[CONTROL].title.split(',')[0]} continued as long: mean, 95% interval",
        fontsize=11,
        color=INK,
        loc="left",
    )


def _names(axis: Axes, arms: Sequence[str]) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_yticks(range(len(arms)), [ARMS[arm].title for arm in arms])
    axis.set_ylim(len(arms) - 0.4, -0.6)


def _color(arm: str) -> str:
    return GRAY if not ARMS[arm].contrastive else BLUE if ARMS[arm].formulation == "paper" else RED
