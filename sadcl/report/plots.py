"""The pictures of a run: scenes, curves, attention overlays, and the scatter of label embeddings."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sadcl.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "curve_figures",
    "embeddings_figure",
    "heatmap_figure",
    "overlay",
    "plot_attention",
    "plot_curves",
    "plot_scenes",
    "precision_recall_figure",
    "save_figure",
    "svg",
]

INK, MUTED = "#222222", "#777777"
HEATMAP_NAMES, LEGEND_NAMES = 60, 90  # more names than these are too small to read
BLUE, GRAY, RED = "#2b6cb0", "#8a8f98", "#c0392b"


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, np.ndarray]:
    """A figure that needs no display, with its axes as an array [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # an empty box has to do
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


_save = save_figure


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def plot_scenes(path: Path, images: Sequence[Tensor], titles: Sequence[str], heading: str, columns: int = 6) -> None:
    """A sheet of pictures, each under its labels.

    Args:
        path: PNG file to write.
        images: uint8 [3, H, W] each.
        titles: one line each.
        heading: title of the sheet.
        columns: pictures a row.
    """
    rows = -(-len(images) // columns)
    figure, axes = _figure(2.0 * columns, 2.2 * rows + 0.4, rows, columns)
    figure.suptitle(heading, color=INK)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(_wrap(title, 26), fontsize=7.5, color=INK)
    save_figure(figure, path)


def plot_curves(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Loss parts and validation mAP by epoch.

    Args:
        path: PNG file to write.
        history: one dict an epoch: ``stage`` (step1, control, step2), ``epoch`` (counted through the steps),
            ``val_mAP`` and ``losses`` (name -> mean over the epoch).
    """
    figure, axes = _figure(13, 3.8, 1, 3)
    _draw_curves(axes[0], history)
    save_figure(figure, path)


def curve_figures(history: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """The three panels of :func:`plot_curves`, each a figure, by title (without contrastive losses: two)."""
    panels = [_figure(5, 3.6) for _ in range(3)]
    _draw_curves([axes[0, 0] for _, axes in panels], history)
    drawn = {axes[0, 0].get_title(loc="left"): figure for figure, axes in panels if axes[0, 0].get_visible()}
    for figure in drawn.values():
        figure.axes[0].set_title("", loc="left")
    return drawn


def _draw_curves(axes: Sequence[Axes], history: Sequence[dict[str, Any]]) -> None:
    """Classification loss, contrastive losses and validation mAP on three axes."""
    from matplotlib.ticker import MaxNLocator

    loss_axis, contrast_axis, map_axis = axes
    rows = {stage: [row for row in history if row["stage"] == stage] for stage in ("step1", "control", "step2")}
    first_end = rows["step1"][-1:]
    styles = {
        "step1": (INK, "-", "step 1 (SARL, ASL)"),
        "control": (GRAY, "--", "step 1 continued (control)"),
        "step2": (RED, "-", "step 2 (ASL + SSCL + PSCL)"),
    }
    for stage, (color, line, name) in styles.items():
        if not rows[stage]:
            continue
        joined = rows[stage] if stage == "step1" else first_end + rows[stage]
        epochs = [row["epoch"] for row in joined]
        loss_axis.plot(epochs, [row["losses"]["classification"] for row in joined], line, color=color, marker="o", ms=4)
        map_axis.plot(epochs, [row["val_mAP"] for row in joined], line, color=color, marker="o", ms=4, label=name)
    for part, color, name in (("sample", BLUE, "SSCL"), ("prototype", RED, "PSCL")):
        values = [(row["epoch"], row["losses"][part]) for row in rows["step2"] if part in row["losses"]]
        if values:
            contrast_axis.plot(*zip(*values, strict=True), color=color, marker="o", ms=4, label=name)
    titles = (
        "classification loss (ASL), training",
        "contrastive losses (unweighted), training",
        "validation mAP",
    )
    for axis, title in zip(axes, titles, strict=True):
        _plain(axis)
        axis.set_title(title, fontsize=11, color=INK, loc="left")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if contrast_axis.lines:
        contrast_axis.legend(frameon=False)
    else:
        contrast_axis.set_visible(False)
    low, high = map_axis.get_ylim()
    widen = max(0.0, 0.06 - (high - low)) / 2  # a flat curve shall look flat
    map_axis.set_ylim(low - widen, high + widen)
    map_axis.legend(frameon=False, fontsize=9, loc="lower right")


def plot_attention(
    path: Path,
    images: Sequence[Tensor],
    titles: Sequence[str],
    attention: Sequence[Tensor],
    chosen: Sequence[Sequence[tuple[int, str, bool | None]]],
    heading: str,
) -> None:
    """Every picture with, beside it, where the model looked for some labels.

    Args:
        path: PNG file to write.
        images: uint8 [3, H, W] each.
        titles: one line each.
        attention: [C, h, w] each, weights that sum to 1 over h and w.
        chosen: per picture (class index, caption, right: green, wrong: red, or None where the truth is
            unknown).
        heading: title of the sheet.
    """
    columns = 1 + max(1, *(len(labels) for labels in chosen))
    figure, axes = _figure(2.1 * columns, 2.35 * len(images) + 0.4, len(images), columns)
    figure.suptitle(heading, color=INK, fontsize=11)
    for axis in axes.flat:
        axis.axis("off")
    for row, image, title, maps, labels in zip(axes, images, titles, attention, chosen, strict=True):
        picture = image.permute(1, 2, 0).numpy()
        row[0].imshow(picture)
        row[0].set_title(_wrap(title, 26), fontsize=8.5, color=INK)
        for axis, (index, caption, right) in zip(row[1:], labels, strict=False):
            _overlay(axis, picture, maps[index].numpy())
            color = MUTED if right is None else "#2e7d32" if right else RED
            axis.set_title(_plain_text(caption), fontsize=8.5, color=color)
    save_figure(figure, path)


def _overlay(axis: Axes, picture: np.ndarray, weights: np.ndarray) -> None:
    axis.imshow(overlay(picture, weights))


def overlay(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The picture in gray, coloured where the attention is: the stronger, the brighter and the less gray.

    Args:
        picture: uint8 [H, W, 3].
        weights: [h, w].

    Returns:
        float [H, W, 3] in 0..1.
    """
    from matplotlib import colormaps
    from PIL import Image

    height, width = picture.shape[:2]
    low, high = float(weights.min()), float(weights.max())
    strength = (weights - low) / max(high - low, 1e-12)
    smooth = Image.fromarray(strength.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(smooth), 0.0, 1.0)
    gray = np.repeat(picture.mean(axis=2, keepdims=True) / 255.0, 3, axis=2) * 0.85
    colour = colormaps["inferno"](heat)[..., :3]
    opacity = 0.8 * heat[..., None]
    return gray * (1.0 - opacity) + colour * opacity


def embeddings_figure(
    panels: Sequence[tuple[str, np.ndarray]],
    classes: np.ndarray,
    names: Sequence[str],
    seed: int = 0,
) -> Figure:
    """Label embeddings of the same (image, label) pairs under several models, in two dimensions by t-SNE.

    Args:
        panels: (title, embeddings [n, E]) each; the caption adds the cosine silhouette score, which t-SNE
            does not touch (higher: labels lie further apart).
        classes: [n] label of every row.
        names: label names.
        seed: of t-SNE.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    figure, axes = _figure(6.2 * len(panels) + 1.4, 5.8, 1, len(panels))
    colors, markers = _label_styles(len(names))
    for axis, (title, vectors) in zip(axes[0], panels, strict=True):
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        perplexity = min(30.0, max(2.0, (len(unit) - 1) / 4))
        points = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(unit)
        for index in np.unique(classes):
            rows = classes == index
            axis.scatter(
                *points[rows].T,
                s=13,
                color=colors[index],
                marker=markers[index],
                linewidths=0,
                alpha=0.85,
                rasterized=True,
            )
        score = silhouette_score(unit, classes, metric="cosine") if 1 < len(np.unique(classes)) < len(unit) else np.nan
        axis.set_title(f"{title}\nsilhouette {score:.3f}", fontsize=11, color=INK)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color("#cccccc")
    if len(names) <= LEGEND_NAMES:
        styles = zip(colors, markers, strict=True)
        handles = [axes[0, 0].scatter([], [], s=28, color=color, marker=mark, linewidths=0) for color, mark in styles]
        shown = [_plain_text(_short(name)) for name in names]
        columns = -(-len(names) // 30)
        figure.legend(handles, shown, loc="outside right center", frameon=False, fontsize=8.5, ncols=columns)
    return figure


def precision_recall_figure(curves: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Figure:
    """Precision over recall.

    Args:
        curves: (name, recall, precision) each; the first one is drawn thick.
    """
    figure, axes = _figure(5.5, 5)
    axis = axes[0, 0]
    for number, (name, recall, precision) in enumerate(curves):
        color = (INK, BLUE, "#b7791f", RED)[number % 4]
        axis.plot(recall, precision, color=color, linewidth=1.3 if number else 2.4, label=_plain_text(_short(name, 60)))
    _plain(axis)
    axis.set(xlim=(0, 1.01), ylim=(0, 1.03), xlabel="recall", ylabel="precision")
    if curves:
        figure.legend(frameon=False, fontsize=8.5, loc="outside lower center")
    return figure


def heatmap_figure(
    values: np.ndarray, names: Sequence[str], low: float, high: float, colours: str, ylabel: str = "", xlabel: str = ""
) -> Figure:
    """A square matrix [C, C] with label names (left out where they would be too small to read)."""
    count = len(names)
    side = min(9.0, 2.6 + 0.19 * count)
    figure, axes = _figure(side + 0.9, side)
    axis = axes[0, 0]
    drawn = axis.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(drawn, ax=axis, shrink=0.7)
    if count <= HEATMAP_NAMES:
        shown = [_plain_text(_short(name)) for name in names]
        axis.set_xticks(range(count), shown, rotation=90, fontsize=7.5)
        axis.set_yticks(range(count), shown, fontsize=7.5)
    else:
        axis.set_xticks([])
        axis.set_yticks([])
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.spines[:].set_visible(False)
    return figure


def svg(figure: Figure, about: str) -> str:
    """A figure as an ``<svg>`` element to put into a page: text stays text, black follows the page's colour.

    Args:
        figure: it is drawn on a transparent ground.
        about: what it shows, for who cannot see it.
    """
    import html
    import io
    import re

    import matplotlib

    file = io.StringIO()
    figure.patch.set_alpha(0.0)
    for axis in figure.axes:
        axis.patch.set_alpha(0.0)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": about}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that our font lacks; the reader's browser has them
        figure.savefig(file, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    view = re.search(r'viewBox="([^"]*)"', head)
    assert view is not None
    prefix = f"f{zlib.crc32(about.encode()):x}-"  # ids are the page's: those of two figures must not meet
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = body.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    body = re.sub(r"#(000000|222222)\b", "currentColor", body)
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    wide = f'style="width:100%;max-width:{1.4 * float(view[1].split()[2]):.0f}px"'
    return f'<svg {space} viewBox="{view[1]}" {wide} role="img" aria-label="{html.escape(about)}">{body}'


def _label_styles(count: int) -> tuple[list[Any], list[str]]:
    from matplotlib import colormaps

    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return [palette[order[i % 20]] for i in range(count)], ["osD^v"[i // 10 % 5] for i in range(count)]


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(_plain_text(text), width)) or " "


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _plain_text(text: str) -> str:
    """A name that matplotlib takes as it is: no mathematics between dollars, and a legend entry with _ in front."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")
