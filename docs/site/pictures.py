"""The site's pictures, a function each: what attracts, what repels, and what a loss looks like."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

TEXT = "#010203"  # stands for the page's own colour
TEAL, ORANGE, BLUE, GREY = "#009485", "#f4511e", "#3f7fd9", "#8a8f98"
CLASSES = (TEAL, ORANGE, BLUE)
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "sadcl", "font.family": "sans-serif", "font.size": 11,
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": GREY, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


def draw(name: str, root: Path) -> str:
    """The picture ``name`` as an SVG element that takes the colour of the text around it."""
    with plt.rc_context(STYLE):
        figure = PICTURES[name](root)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    svg = file.getvalue()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    start, rest = svg.split(">", 1)
    svg = re.sub(r' (width|height)="[^"]*"', "", start) + ">" + rest  # the page decides
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    return re.sub(r"\n\s*\n+", "\n", svg).replace(TEXT, "currentColor")


def _circle(width: float = 5.6, height: float = 4.6) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color=GREY, lw=1, alpha=0.6))
    axes.set(xlim=(-1.45, 1.45), ylim=(-1.25, 1.25), aspect="equal")
    axes.axis("off")
    return figure, axes


def _at(angle: float) -> np.ndarray:
    return np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])


def _pull(axes: Axes, start: np.ndarray, end: np.ndarray, width: float = 2.0, **how: object) -> None:
    arrow = {"arrowstyle": "-|>", "color": TEAL, "lw": width, "shrinkA": 9, "shrinkB": 9, "mutation_scale": 13, **how}
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow)


def _push(axes: Axes, start: np.ndarray, end: np.ndarray, width: float = 1.2) -> None:
    how = {"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "color": ORANGE, "lw": width, "ls": (0, (4, 3))}
    axes.annotate("", xy=end, xytext=start, arrowprops={**how, "shrinkA": 9, "shrinkB": 9})


def _key(axes: Axes, *entries: tuple[str, str, str]) -> None:
    handles = []
    for kind, colour, label in entries:
        if kind == "-":
            handles.append(plt.Line2D([], [], color=colour, lw=2, label=label))
        elif kind == "--":
            handles.append(plt.Line2D([], [], color=colour, lw=1.4, ls=(0, (4, 3)), label=label))
        else:
            full = colour if not kind.endswith("o") or kind == "o" else "none"
            handles.append(
                plt.Line2D([], [], marker=kind[-1], ls="", color=colour, markerfacecolor=full, ms=8, label=label)
            )
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncol=2, fontsize=10)


def sscl(_: Path) -> plt.Figure:
    """Rows (image, label) on the circle; the anchor's pulls and pushes."""
    figure, axes = _circle()
    angles = {0: (20, 75, 115), 1: (190, 235), 2: (285, 325)}
    anchor = _at(20)
    for label, where in angles.items():
        for angle in where:
            if angle != 20:
                (_pull if label == 0 else _push)(axes, anchor, _at(angle))
            axes.plot(*_at(angle), "o", color=CLASSES[label], ms=13)
    for angle in (50, 150, 260, 350):
        axes.plot(*_at(angle), "o", mfc="none", mec=GREY, ms=11)
    axes.annotate("anchor: image 1, cat", _at(20), (12, 6), textcoords="offset points")
    for angle, text, side in ((75, "image 2, cat", "left"), (115, "image 3, cat", "right")):
        axes.annotate(text, _at(angle), (0, 12), textcoords="offset points", ha=side)
    axes.annotate("dog", _at(212), (-34, 0), textcoords="offset points")
    axes.annotate("car", _at(305), (14, -8), textcoords="offset points")
    _key(axes, ("-", TEAL, "attracts: same label"), ("--", ORANGE, "repels: other labels"),
         ("mo", GREY, "label not in the image: no part"))  # fmt: skip
    return figure


def pscl(_: Path) -> plt.Figure:
    """One class: images with it are drawn to its prototype, those without are pushed away."""
    figure, axes = _circle()
    prototype = _at(90)
    for angle, positive in ((40, True), (125, True), (160, False), (215, False), (300, False), (350, True)):
        place = _at(angle)
        (_pull if positive else _push)(axes, place, prototype)
        axes.plot(*place, "o" if positive else "s", color=TEAL if positive else GREY, ms=12)
    axes.plot(*prototype, "*", color=ORANGE, ms=24)
    axes.annotate("prototype of cat", prototype, (0, 15), textcoords="offset points", ha="center")
    _key(axes, ("o", TEAL, "image with a cat: attracts"), ("s", GREY, "image without: repels"))
    return figure


def dual(_: Path) -> plt.Figure:
    """Both at once, for two classes."""
    figure, axes = _circle()
    for label, (centre, where) in enumerate(((60, (30, 85, 115)), (245, (215, 270)))):
        prototype = 0.72 * _at(centre)
        for angle in where:
            _pull(axes, _at(angle), prototype, 1.5)
            axes.plot(*_at(angle), "o", color=CLASSES[label], ms=13)
        for first, second in pairwise(where):
            _pull(axes, _at(first), _at(second), 1.5, arrowstyle="<|-|>")
        axes.plot(*prototype, "*", color=CLASSES[label], ms=20)
    _push(axes, _at(30), _at(270))
    _push(axes, _at(115), _at(215))
    _push(axes, 0.72 * _at(60), _at(215))
    _key(axes, ("-", TEAL, "attracts"), ("--", ORANGE, "repels"), ("*", GREY, "prototype of a label"),
         ("o", GREY, "label embedding of an image"))  # fmt: skip
    return figure


def supcon(_: Path) -> plt.Figure:
    """Whole images of one class each, two views an image."""
    figure, axes = _circle()
    anchor = _at(15)
    for angle, label in ((15, 0), (60, 0), (100, 0), (175, 1), (220, 1), (280, 2), (320, 2)):
        if angle != 15:
            (_pull if label == 0 else _push)(axes, anchor, _at(angle))
        axes.plot(*_at(angle), "o", color=CLASSES[label], ms=13)
    axes.annotate("anchor", anchor, (13, 2), textcoords="offset points")
    axes.annotate("its other view", _at(60), (12, 6), textcoords="offset points")
    axes.annotate("same class", _at(100), (0, 12), textcoords="offset points", ha="center")
    _key(axes, ("-", TEAL, "attracts: same class"), ("--", ORANGE, "repels: every other image"))
    return figure


def multilabel(_: Path) -> plt.Figure:
    """Label sets round an anchor, and the shares that three weightings give them."""
    figure, (axes, shares) = plt.subplots(1, 2, figsize=(7.6, 3.3), width_ratios=(1.25, 1))
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color=GREY, lw=1, alpha=0.6))
    axes.set(xlim=(-1.9, 2.2), ylim=(-1.2, 1.35), aspect="equal")
    axes.axis("off")
    anchor, sets = _at(95), {"cat dog sofa": 30, "cat": 160, "dog car": 215, "tree": 325}
    for labels, angle in sets.items():
        place = _at(angle)
        (_push if labels == "tree" else _pull)(axes, anchor, place)
        axes.plot(*place, "o", color=GREY if labels == "tree" else TEAL, ms=13)
        axes.text(*(1.17 * place), labels, ha="left" if place[0] > 0 else "right", va="center")
    axes.plot(*anchor, "o", color=ORANGE, ms=14)
    axes.text(*(1.2 * anchor), "anchor: cat dog", ha="center", va="center")
    weights = {"any": (1, 1, 1, 0), "jaccard": (2 / 3, 1 / 2, 1 / 3, 0), "mulsupcon": (2, 1, 1, 0)}
    for index, (name, colour) in enumerate(zip(weights, (GREY, BLUE, TEAL), strict=True)):
        values = np.array(weights[name]) / sum(weights[name])
        shares.barh(np.arange(4) + 0.26 * (index - 1), values, height=0.24, color=colour, label=f'"{name}"')
    shares.set_yticks(range(4), sets)
    shares.invert_yaxis()
    shares.set_title("share of the attraction", fontsize=11)
    shares.legend(fontsize=10, loc="lower right")
    figure.tight_layout()
    return figure


def asl(_: Path) -> plt.Figure:
    """The loss of one logit, and its slope."""
    figure, (value, slope) = plt.subplots(1, 2, figsize=(7.2, 3.0))
    x = np.linspace(-6, 6, 400)
    p = 1 / (1 + np.exp(-x))
    curves = {
        "positive, gamma_pos 1": (-(1 - p) * np.log(p), TEAL, "-"),
        "negative, gamma_neg 4, clip 0.05": (
            -(np.maximum(p - 0.05, 0) ** 4) * np.log(1 - np.maximum(p - 0.05, 0)),
            ORANGE,
            "-",
        ),
        "negative, plain": (-np.log(1 - p), GREY, "--"),
    }
    for label, (loss, colour, line) in curves.items():
        value.plot(x, loss, line, color=colour, label=label)
        slope.plot(x, np.abs(np.gradient(loss, x)), line, color=colour)
    value.set(xlabel="logit", title="loss", ylim=(0, 4))
    slope.set(xlabel="logit", title="|slope|: how hard it pulls")
    figure.tight_layout()
    figure.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=1)
    return figure


def zlpr(_: Path) -> plt.Figure:
    """Logits on a line: positives to the right of 0, negatives to the left."""
    figure, axes = plt.subplots(figsize=(6.4, 1.9))
    axes.axhline(0, color=GREY, lw=1)
    axes.plot([0, 0], [-0.35, 0.35], color=TEXT, lw=1.5)
    axes.text(0, 0.5, "threshold 0, for every label", ha="center", fontsize=10)
    for x, positive, name in (
        (-3, False, "car"),
        (-1.7, False, "tree"),
        (0.9, False, "sofa"),
        (-0.6, True, "dog"),
        (2.4, True, "cat"),
    ):
        colour = TEAL if positive else ORANGE
        axes.plot(x, 0, "o" if positive else "s", color=colour, ms=11)
        axes.text(x, -0.45, name, ha="center", va="top", fontsize=10)
        pull = 1.0 / (1 + np.exp(2 * x if positive else -2 * x)) + 0.15
        end = x + (pull if positive else -pull)
        axes.annotate("", xy=(end, 0.2), xytext=(x, 0.2), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.8})
    axes.set(xlim=(-4.2, 4.2), ylim=(-0.9, 0.8))
    axes.axis("off")
    return figure


def two_way(_: Path) -> plt.Figure:
    """A table of logits: contrasted along a row and along a column."""
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    labels = np.array([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 1]])
    for (row, column), positive in np.ndenumerate(labels):
        colour = TEAL if positive else GREY
        axes.add_patch(
            plt.Rectangle((column, 3 - row), 0.92, 0.92, color=colour, alpha=0.85 if positive else 0.25, lw=0)
        )
        axes.text(column + 0.46, 3.46 - row, "+" if positive else "−", ha="center", va="center")
    axes.add_patch(plt.Rectangle((-0.06, 0.94), 5.05, 1.04, fill=False, ec=ORANGE, lw=2.2))
    axes.add_patch(plt.Rectangle((3.94, -0.06), 1.04, 4.05, fill=False, ec=BLUE, lw=2.2))
    axes.text(-0.2, 1.46, "an image:\nits labels\nabove the rest", ha="right", va="center", fontsize=10)
    axes.text(4.46, 4.15, "a label: its images above the rest", ha="center", fontsize=10)
    axes.set(xlim=(-2.2, 6.2), ylim=(-0.2, 4.5), aspect="equal")
    axes.axis("off")
    return figure


def label_attention(_: Path) -> plt.Figure:
    """Queries of three labels look at the same map of positions."""
    figure, every = plt.subplots(1, 3, figsize=(7.2, 2.7))
    y, x = np.mgrid[0:7, 0:7]
    for axes, (name, row, column, colour) in zip(
        every, (("cat", 4, 2, TEAL), ("dog", 3, 5, ORANGE), ("sofa", 5, 3.5, BLUE)), strict=True
    ):
        weight = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (1.4 if name != "sofa" else 4))
        for place, value in np.ndenumerate(weight / weight.max()):
            axes.add_patch(
                plt.Rectangle((place[1], 6 - place[0]), 0.94, 0.94, color=colour, alpha=0.1 + 0.85 * value, lw=0)
            )
        axes.set(xlim=(-0.1, 7.1), ylim=(-0.1, 7.1), aspect="equal", title=f"query of {name}")
        axes.axis("off")
    figure.tight_layout()
    return figure


def triangle(_: Path) -> plt.Figure:
    """What is computed of the matrix of scores: the active rows, and half of their tiles."""
    figure, (dense, ours) = plt.subplots(1, 2, figsize=(7.4, 3.6))
    rng = np.random.default_rng(3)
    active = np.sort(rng.choice(40, 10, replace=False))
    dense.add_patch(plt.Rectangle((0, 0), 40, 40, color=GREY, alpha=0.22, lw=0))
    for row in active:
        for column in active:
            dense.add_patch(plt.Rectangle((column, 39 - row), 1, 1, color=TEAL, lw=0))
    dense.set(xlim=(-1, 41), ylim=(-1, 41), aspect="equal", title="all rows: N x N, most of it nothing")
    bounds = (0, 4, 7, 10)
    for row in range(10):
        for column in range(10):
            kept = column >= row
            same = any(a <= row < b and a <= column < b for a, b in pairwise(bounds))
            colour = (TEAL if same else ORANGE) if kept else GREY
            ours.add_patch(plt.Rectangle((column, 9 - row), 0.9, 0.9, color=colour, alpha=0.85 if kept else 0.15, lw=0))
    ours.set(xlim=(-0.3, 10.2), ylim=(-0.3, 10.2), aspect="equal", title="active rows, label by label, one half")
    for axes in (dense, ours):
        axes.axis("off")
    figure.tight_layout()
    return figure


def speed(root: Path) -> plt.Figure:
    """Ratios out of README's table: the best form in plain torch, as a multiple of our time."""
    rows = ratios((root / "README.md").read_text())[::-1]
    figure, axes = plt.subplots(figsize=(7.4, 0.4 * len(rows) + 1.0))
    values = [value for _, value in rows]
    axes.barh(range(len(rows)), values, color=TEAL, height=0.62)
    axes.axvline(1, color=ORANGE, lw=1.5)
    for index, value in enumerate(values):
        axes.text(value * 1.04, index, f"{value:g}x", va="center", fontsize=10)
    axes.set(xscale="log", xlim=(0.9, max(values) * 1.5), xlabel="time of the best plain torch form / ours")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    figure.tight_layout()
    return figure


def ratios(readme: str) -> list[tuple[str, float]]:
    """``(work, ratio)`` of every row of README's speed table that names its ratio to the best torch form.

    A row's name is what stands before the first comma, and the size that its command names; rows that begin with "..."
    go on with the one above and are left out.
    """
    section = readme[readme.index("## Speed") :]
    table = section[section.index("\n|") :].split("\n\n")[0].strip().splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    peer = next(index for index, name in enumerate(lines[0]) if "best torch" in name)
    found = []
    for cells in lines[2:]:
        ratio = re.search(r"([\d.,]+)x", cells[peer])
        size = re.search(r"`bench_\w+ (\w+)`", cells[0])
        name = re.split(r"[,(:]", cells[0])[0].strip() + (f", {size[1]}" if size else "")
        if ratio and not name.startswith("..."):
            found.append((name, float(ratio[1].replace(",", ""))))
    return found


PICTURES: dict[str, Callable[[Path], plt.Figure]] = {
    f.__name__: f for f in (sscl, pscl, dual, supcon, multilabel, asl, zlpr, two_way, label_attention, triangle, speed)
}
