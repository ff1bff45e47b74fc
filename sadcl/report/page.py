"""What ``report.html`` shows of a run, section by section."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sadcl.metrics import MultilabelReport, multilabel_report
from sadcl.report.analysis import cooccurrence_confusion, precision_recall, prototype_similarity, similarity_order
from sadcl.report.html import Html, bar, data_uri, escape, figure, page, section, sparkline, table
from sadcl.report.outputs import LOOK_LABELS, Look, StageOutputs, said
from sadcl.report.plots import curve_figures, heatmap_figure, overlay, precision_recall_figure, svg
from sadcl.train.thresholds import tune_thresholds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Shown", "report_page"]

STAGE_NAMES = {
    "step1": "step 1: label attention, classification loss",
    "control": "step 1 continued as long (control)",
    "step2": "step 2: with both contrastive losses and memory bank",
}
CONFUSED_CLASSES = 40  # in the map: those with most mistakes
CONFUSED_PAIRS = 20
LOOK_SIDE = 224  # pixels


@dataclass
class Shown:
    """What a report is made of.

    Attributes:
        name: of the run.
        metrics: the content of metrics.json.
        reports: of every stage, in order.
        outputs: of the last stage's model on the validation pictures.
        looks: pictures with attention.
        scatter: of label embeddings without and with step 2, if there was one.
        config: as YAML.
    """

    name: str
    metrics: dict[str, Any]
    reports: dict[str, MultilabelReport]
    outputs: StageOutputs
    looks: list[Look]
    scatter: Figure | None
    config: str

    @cached_property
    def tuned(self) -> Tensor:
        """Thresholds [C] of the last stage, tuned on what is shown."""
        return tune_thresholds(self.outputs.scores, self.outputs.labels)


def report_page(shown: Shown) -> str:
    """The whole page as text."""
    metrics = shown.metrics
    sections = [
        _attention(shown),
        _curves(shown),
        _stages(shown),
        _classes(shown),
        _precision_recall(shown),
        _confusion(shown),
        _scatter(shown),
        _prototypes(shown),
        _origin(shown),
    ]
    subtitle = f"mAP {metrics['mAP']:.3f}. {metrics['data']}. Validation: {metrics['protocol']}."
    return page(f"Training report: {shown.name}", subtitle, [part for part in sections if part])


def _stages(shown: Shown) -> Html:
    rows = []
    for name, report in shown.reports.items():
        epochs = [row["epoch"] for row in shown.metrics["history"] if row["stage"] == name]
        figures = (report.mAP, report.CF1, report.OF1, report.CP, report.CR, report.OP, report.OR)
        rows.append([STAGE_NAMES.get(name, name), max(epochs, default=0), *figures])
        for size, measured in _other_sizes(shown.metrics):
            figures = tuple(measured[name][key] for key in ("mAP", "CF1", "OF1", "CP", "CR", "OP", "OR"))
            rows.append([f"the same at {size} pixels", max(epochs, default=0), *figures])
    head = ["stage", "epochs", "mAP", "CF1", "OF1", "CP", "CR", "OP", "OR"]
    tuned = multilabel_report(shown.outputs.scores, shown.outputs.labels, shown.tuned)
    last = list(shown.reports.values())[-1]
    return section(
        "stages",
        "Stages",
        table(head, rows, f"On {last.num_images} validation pictures, each stage at its end [{last.protocol}]."),
        f"With a threshold of its own for every label, the last stage has CF1 {tuned.CF1:.3f} and OF1 {tuned.OF1:.3f} "
        "instead; these two are optimistic, since the thresholds were tuned on the same pictures.",
        _speed(shown.metrics["history"]),
    )


def _other_sizes(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(pixels, figures by stage) of what was also measured at another size."""
    return [(key[3:], value) for key, value in metrics.items() if key.startswith("at_") and key[3:].isdigit()]


def _speed(history: list[dict[str, Any]]) -> Html:
    """Images a second and shares of time of every stage's last epoch, where the run measured them."""
    last = {row["stage"]: row["speed"] for row in history if "speed" in row}
    if not last:
        return Html("")
    parts = [key for key in next(iter(last.values())) if key != "images_per_second"]
    rows = [
        [STAGE_NAMES.get(name, name), round(speed["images_per_second"]), *(f"{speed[part]:.0%}" for part in parts)]
        for name, speed in last.items()
    ]
    return table(["stage", "images/s", *parts], rows, "Training speed in the last epoch, and where its time went.")


def _curves(shown: Shown) -> Html:
    if not shown.metrics["history"]:
        return Html("")
    drawn = curve_figures(shown.metrics["history"])
    figures = "".join(figure(Html(svg(content, title)), title) for title, content in drawn.items())
    return section("curves", "Curves", Html(f'<div class="grid">{figures}</div>'))


def _classes(shown: Shown) -> Html:
    scores, labels = shown.outputs.scores, shown.outputs.labels
    stages = list(shown.reports)
    last = shown.reports[stages[-1]]
    before = shown.reports[stages[-2]] if len(stages) > 1 else None
    tuned = shown.tuned.tolist()
    rows = []
    for i, name in enumerate(shown.metrics["classes"]):
        score, label = scores[:, i], labels[:, i]
        ap = float(last.ap[i])
        row: list[Any] = [name, int((label == 1).sum()), (bar(ap), ap)]
        if before is not None:
            row.append(ap - float(before.ap[i]))
        precision, recall, f1 = _figures(score, label, 0.5)
        curve = sparkline(*precision_recall(score, label), f"precision over recall of {name}")
        rows.append([*row, precision, recall, f1, tuned[i], _figures(score, label, tuned[i])[2], curve])
    compared = [] if before is None else [f"against {stages[-2]}"]
    head = [
        "label",
        "pictures",
        "AP",
        *compared,
        "precision",
        "recall",
        "F1",
        "tuned threshold",
        "F1 there",
        "P over R",
    ]
    caption = "Precision, recall and F1 at 0.5, then F1 at the tuned threshold. A click on a title sorts."
    return section("classes", "Labels", table(head, rows, caption, sortable=True, anchor="per-class"))


def _figures(scores: Tensor, labels: Tensor, threshold: float) -> tuple[float, float, float]:
    """Precision, recall and F1 of one class; NaN where nothing was said or nothing is there."""
    said, true = (scores > threshold) & (labels >= 0), labels == 1
    hit, said_count, true_count = (int(x.sum()) for x in (said & true, said, true))
    ratios = ((hit, said_count), (hit, true_count), (2 * hit, said_count + true_count))
    precision, recall, f1 = (a / b if b else float("nan") for a, b in ratios)
    return precision, recall, f1


def _precision_recall(shown: Shown) -> Html:
    scores, labels, names = shown.outputs.scores, shown.outputs.labels, shown.metrics["classes"]
    ap = list(shown.reports.values())[-1].ap
    ranked = [i for i in ap.argsort(descending=True).tolist() if int((labels[:, i] == 1).sum())]
    if not ranked:
        return Html("")
    picked = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    curves = [("all pairs of picture and label", *precision_recall(scores, labels, 200))]
    for kind, i in picked.items():
        curves.append(
            (f"{kind}: {names[i]} (AP {float(ap[i]):.2f})", *precision_recall(scores[:, i], labels[:, i], 200))
        )
    drawn = figure(
        Html(svg(precision_recall_figure(curves), "precision over recall")),
        "All pairs pooled, and the labels with the best, the median and the worst AP; each label has its curve in the "
        "table above.",
    )
    return section("precision-recall", "Precision and recall", Html(f'<div class="grid">{drawn}</div>'))


def _confusion(shown: Shown) -> Html:
    names = shown.metrics["classes"]
    confusion = cooccurrence_confusion(shown.outputs.scores, shown.outputs.labels, shown.tuned)
    wrong = confusion.wrong
    busy = (wrong.sum(0) + wrong.sum(1)).argsort(descending=True, stable=True)[:CONFUSED_CLASSES].sort().values
    part = confusion.rate[busy][:, busy].numpy()
    top = max(0.05, float(np.nanmax(part)) if np.isfinite(part).any() else 0.0)
    drawn = heatmap_figure(
        part, [names[i] for i in busy], 0.0, top, "viridis", "label i is there", "label j is said, but is not there"
    )
    excess = (wrong - confusion.of * confusion.base.nan_to_num()).flatten()
    order = excess.argsort(descending=True, stable=True)[:CONFUSED_PAIRS]
    pairs = [(int(k) // len(names), int(k) % len(names)) for k in order if excess[k] > 0]
    rows = [
        [
            names[i],
            names[j],
            int(wrong[i, j]),
            int(confusion.of[i, j]),
            float(confusion.rate[i, j]),
            float(confusion.base[j]),
        ]
        for i, j in pairs
    ]
    head = ["picture shows", "also said, wrongly", "times", "of", "share", "share over all pictures"]
    return section(
        "confusion",
        "Labels said beside others",
        "Of the pictures that show label i and do not show label j, the share in which j is said all the same "
        "(probability above j's tuned threshold). Far above j's share over all pictures without it, the model takes i, "
        "or what comes with i, for j.",
        figure(
            Html(svg(drawn, "confusion of co-occurring labels")),
            f"The {len(busy)} labels with most mistakes." if len(busy) < len(names) else "All labels.",
        ),
        table(
            head,
            rows,
            "Where mistakes exceed what the share over all pictures would make the most.",
            sortable=True,
            anchor="confused-pairs",
        ),
    )


def _attention(shown: Shown) -> Html:
    if not shown.looks:
        return Html("")
    names = shown.metrics["classes"]
    strips = []
    for look in shown.looks:
        picture = look.picture.permute(1, 2, 0).numpy()
        there, chosen = (look.labels == 1).nonzero().flatten().tolist(), said(look, shown.tuned, LOOK_LABELS)
        truth = ", ".join(names[i] for i in there)
        missed = ", ".join(names[i] for i in there if i not in chosen)
        caption = Html(
            f"there: {escape(truth)}" + (f'<br><span class="no">not said: {escape(missed)}</span>' if missed else "")
        )
        cells = [_thumbnail(picture / 255.0, f"picture with {truth}", caption)]
        for i in chosen:
            right = bool(look.labels[i] == 1)
            mark = f'<span class="{"yes" if right else "no"}">{"✓" if right else "✗"}</span>'
            caption = Html(f"{mark} {escape(names[i])} {float(look.probabilities[i]):.2f}")
            cells.append(_thumbnail(overlay(picture, look.attention[i].numpy()), f"attention of {names[i]}", caption))
        strips.append(Html(f'<div class="strip">{"".join(cells)}</div>'))
    return section(
        "attention",
        "Where the model looks",
        f"The first {len(shown.looks)} validation pictures with two labels or more (not chosen for looks), each with "
        "the attention of the labels that the model says (probability above the label's tuned threshold, at most "
        f"{LOOK_LABELS}, at least the most probable one): ✓ it is there, ✗ it is not.",
        *strips,
    )


def _thumbnail(picture: np.ndarray, about: str, caption: Html) -> Html:
    """A picture [H, W, 3] in 0..1 as a figure of its own, at most LOOK_SIDE pixels wide and high."""
    from PIL import Image

    image = Image.fromarray((picture.clip(0.0, 1.0) * 255).round().astype(np.uint8))
    image.thumbnail((LOOK_SIDE, LOOK_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    size = f'width="{image.width}" height="{image.height}"'
    return figure(Html(f'<img src="{data_uri(file.getvalue())}" alt="{escape(about)}" {size}>'), caption)


def _scatter(shown: Shown) -> Html:
    if shown.scatter is None:
        return Html("")
    caption = (
        "t-SNE of label features of the same validation pairs. Distances between far groups mean little in it; the "
        "silhouette score is measured before it (cosine; higher: labels lie further apart)."
    )
    drawn = Html(svg(shown.scatter, "label embeddings without and with the contrastive losses"))
    return section("embeddings", "Label embeddings", figure(drawn, caption))


def _prototypes(shown: Shown) -> Html:
    similarity = prototype_similarity(shown.outputs.model.head)
    if similarity is None or len(similarity) < 2:
        return Html("")
    order = similarity_order(similarity)
    names = [shown.metrics["classes"][i] for i in order]
    drawn = heatmap_figure(similarity[order][:, order].numpy(), names, float(similarity.min()), 1.0, "viridis")
    above = similarity - 3.0 * torch.eye(len(similarity), device=similarity.device)
    alike = [(int(k) // len(names), int(k) % len(names)) for k in above.flatten().argsort(descending=True)[:20]]
    rows = [
        [shown.metrics["classes"][i], shown.metrics["classes"][j], float(similarity[i, j])] for i, j in alike if i < j
    ]
    return section(
        "prototypes",
        "Prototypes",
        figure(
            Html(svg(drawn, "cosines between projected prototypes")),
            "Cosines between projected prototypes, ordered so that alike ones lie together (average linkage).",
        ),
        table(["label", "label", "cosine"], rows, "The most alike."),
    )


def _origin(shown: Shown) -> Html:
    weights = shown.metrics["loss_weights"]
    rows = [*shown.metrics["versions"].items(), *((f"loss: {key}", value) for key, value in weights.items())]
    config = Html(f"<details><summary>Configuration</summary><pre>{escape(shown.config)}</pre></details>")
    return section("origin", "How this was made", table(["what", "value"], rows), config)
