"""What is left when a run is over: the table, ``metrics.json``, and the pictures."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import sadcl
from sadcl.checkpoint import write_atomically
from sadcl.metrics import MultilabelReport
from sadcl.report.outputs import StageOutputs, looks, said, stage_outputs
from sadcl.report.page import Shown, report_page
from sadcl.report.plots import embeddings_figure, plot_attention, plot_curves, plot_scenes, save_figure
from sadcl.train.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "summary", "table"]

SCATTER_PAIRS = 900
NAMES = {
    "step1": "step 1: SARL, ASL",
    "control": "step 1 continued as long (control)",
    "step2": "step 2: + SSCL + PSCL, memory bank",
}


def summary(run: Run, reports: dict[str, MultilabelReport]) -> dict[str, Any]:
    """The content of ``metrics.json``: every figure with the protocol it was measured under."""
    final = list(reports)[-1]
    return {
        "mAP": reports[final].mAP,
        "of": final,
        "protocol": f"{reports[final].protocol}; {run.images.protocol}; {_chosen(run, final)}",
        "data": run.images.title,
        "stages": {name: report.as_dict() for name, report in reports.items()},
        "classes": list(run.images.classes),
        "history": run.progress.history,
        "loss_weights": {
            "formulation": run.config.loss.formulation,
            "sample": run.loss.sample_weight,
            "prototype": run.loss.prototype_weight,
            "classification": run.loss.classification_weight,
        },
        "config": run.config.as_dict(),
        "versions": {
            "sadcl": sadcl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _chosen(run: Run, stage: str) -> str:
    """Whether validation had a say in which weights are reported."""
    step, ema = run.config.step1 if stage == "step1" else run.config.step2, run.config.ema
    if step.select == "best":
        return "best epoch, chosen on these validation images"
    if ema.decay and ema.keep == "better":
        return "last epoch; trained or averaged weights, chosen on these validation images"
    return "last epoch, not chosen on validation"


def table(run: Run, reports: dict[str, MultilabelReport]) -> str:
    """The steps side by side, for people."""
    lines = ["", f"validation: {run.images.protocol}", f"{'':38}{'epochs':>7}{'mAP':>9}{'CF1':>9}{'OF1':>9}"]
    for name, report in reports.items():
        epochs = run.config.step1.epochs if name == "step1" else run.config.step1.epochs + run.config.step2.epochs
        lines.append(f"{NAMES[name]:38}{epochs:>7}{report.mAP:>9.4f}{report.CF1:>9.4f}{report.OF1:>9.4f}")
    if "control" in reports and "step2" in reports:
        gain = reports["step2"].mAP - reports["control"].mAP
        lines.append(f"step 2 against the control: {gain:+.4f} mAP (one seed and split; their spread is about 0.03)")
    labels = _labels(run)  # -1: not known
    chance = float(((labels == 1).sum(0) / (labels >= 0).sum(0).clamp_min(1)).mean())
    return "\n".join([*lines, f"chance level: {chance:.3f}", ""])


def _labels(run: Run) -> Tensor:
    return torch.cat([labels for _, labels in run.val_batches()])


def draw(run: Run, reports: dict[str, MultilabelReport], metrics: dict[str, Any]) -> None:
    """Write report.html, and scenes.png, curves.png, attention.png and embeddings.png, into the run's folder."""
    classes = list(run.images.classes)
    training = [run.images.train[i] for i in range(min(18, len(run.images.train)))]  # type: ignore[arg-type]
    names = [", ".join(classes[i] for i in (labels == 1).nonzero().flatten()) for _, labels in training]
    plot_scenes(run.folder / "scenes.png", [image for image, _ in training], names, f"training: {run.images.title}")
    plot_curves(run.folder / "curves.png", run.progress.history)
    final = list(reports)[-1]
    outputs = stage_outputs(run, final)
    seen = looks(run, outputs.model)
    scatter = _embeddings(run, outputs) if final == "step2" else None
    if scatter is not None:
        save_figure(scatter, run.folder / "embeddings.png")
    shown = Shown(run.folder.name, metrics, reports, outputs, seen, scatter, run.config.as_yaml())
    if seen:
        heading = "where the model looks for the labels that it says (green: it is there, red: it is not)"
        titles = [", ".join(classes[i] for i in (look.labels == 1).nonzero().flatten()) for look in seen]
        pictures, maps = [look.picture for look in seen], [look.attention for look in seen]
        chosen = [
            [
                (i, f"{classes[i]} {look.probabilities[i]:.2f}", bool(look.labels[i] == 1))
                for i in said(look, shown.tuned)
            ]
            for look in seen
        ]
        plot_attention(run.folder / "attention.png", pictures, titles, maps, chosen, heading)
    page = report_page(shown)
    write_atomically(run.folder / "report.html", lambda file: file.write(page.encode("utf-8", "replace")))


def _embeddings(run: Run, with_them: StageOutputs) -> Figure | None:
    """Label features of the same validation (image, label) pairs without and with the contrastive step."""
    without = "control" if run.config.control else "step1"
    same = ", as many epochs" if run.config.control else ""
    generator = np.random.default_rng(run.config.seed)
    rows = np.sort(generator.permutation(len(with_them.features))[:SCATTER_PAIRS])
    if len(rows) < 10:
        return None
    panels = [
        (f"without the contrastive losses{same}", stage_outputs(run, without).features[rows]),
        ("with them (step 2)", with_them.features[rows]),
    ]
    return embeddings_figure(panels, with_them.pair_classes[rows], run.images.classes, run.config.seed)
