"""What is left when a run is over: the table, ``metrics.json``, and the pictures."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sadcl.metrics import MultilabelReport
from sadcl.train.checkpoint import load_checkpoint
from sadcl.train.evaluate import attention_maps, predictions, restore_model
from sadcl.train.plots import plot_attention, plot_curves, plot_embeddings, plot_scenes

if TYPE_CHECKING:
    from sadcl.train.run import Run

__all__ = ["draw", "summary", "table"]

SCATTER_PAIRS = 900
OVERLAY_IMAGES = 6
NAMES = {
    "step1": "step 1: SARL, ASL",
    "control": "step 1 continued as long (control)",
    "step2": "step 2: + SSCL + PSCL, memory bank",
}


def summary(run: Run, reports: dict[str, MultilabelReport]) -> dict[str, Any]:
    """The content of ``metrics.json``: every figure with the protocol it was measured under."""
    import sadcl

    final = list(reports)[-1]
    return {
        "mAP": reports[final].mAP,
        "of": final,
        "protocol": f"{reports[final].protocol}; {run.images.protocol}; last epoch, not chosen on validation",
        "data": run.images.title,
        "stages": {name: report.as_dict() for name, report in reports.items()},
        "classes": list(run.images.classes),
        "history": run.history,
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


def table(run: Run, reports: dict[str, MultilabelReport]) -> str:
    """The steps side by side, for people."""
    lines = ["", f"validation: {run.images.protocol}", f"{'':38}{'epochs':>7}{'mAP':>9}{'CF1':>9}{'OF1':>9}"]
    for name, report in reports.items():
        epochs = run.config.step1.epochs if name == "step1" else run.config.step1.epochs + run.config.step2.epochs
        lines.append(f"{NAMES[name]:38}{epochs:>7}{report.mAP:>9.4f}{report.CF1:>9.4f}{report.OF1:>9.4f}")
    if "control" in reports and "step2" in reports:
        gain = reports["step2"].mAP - reports["control"].mAP
        lines.append(f"step 2 against the control: {gain:+.4f} mAP (one seed and split; their spread is about 0.03)")
    chance = sum(label.mean().item() for label in _labels(run).T) / len(run.images.classes)
    return "\n".join([*lines, f"chance level: {chance:.3f}", ""])


def _labels(run: Run) -> Tensor:
    return torch.cat([labels for _, labels in run.val_batches()])


def draw(run: Run) -> None:
    """Write scenes.png, curves.png, attention.png and embeddings.png into the run's folder."""
    classes = list(run.images.classes)
    training = [run.images.train[i] for i in range(min(18, len(run.images.train)))]  # type: ignore[arg-type]
    names = [", ".join(classes[i] for i in labels.nonzero().flatten()) for _, labels in training]
    plot_scenes(run.folder / "scenes.png", [image for image, _ in training], names, f"training: {run.images.title}")
    plot_curves(run.folder / "curves.png", run.history)
    _draw_attention(run, classes)
    if (run.folder / "step2.pt").is_file() and run.config.step2.epochs > 0:
        _draw_embeddings(run, classes)


def _draw_attention(run: Run, classes: list[str]) -> None:
    """The first validation pictures with two labels or more: not the best ones."""
    images, titles, maps, chosen = [], [], [], []
    for index in range(len(run.images.val)):  # type: ignore[arg-type]
        image, labels = run.images.val[index]
        if labels.sum() < 2:
            continue
        probabilities, attention = attention_maps(run.model.eval(), image)
        images.append(image)
        titles.append(", ".join(classes[i] for i in labels.nonzero().flatten()))
        maps.append(attention)
        chosen.append(predictions(probabilities, classes, 4, labels))
        if len(images) == OVERLAY_IMAGES:
            break
    if images:
        heading = "where the model looks for its four most probable labels (green: it is there, red: it is not)"
        plot_attention(run.folder / "attention.png", images, titles, maps, chosen, heading)


def _draw_embeddings(run: Run, classes: list[str]) -> None:
    """Label features of the same validation (image, label) pairs without and with the contrastive step."""
    without = "control" if run.config.control else "step1"
    panels = []
    same = ", as many epochs" if run.config.control else ""
    for name, title in ((without, f"without the contrastive losses{same}"), ("step2", "with them (step 2)")):
        vectors, labels = _active_features(run, name)
        generator = np.random.default_rng(run.config.seed)
        rows = np.sort(generator.permutation(len(vectors))[:SCATTER_PAIRS])
        panels.append((title, vectors[rows]))
    if len(rows) >= 10:
        plot_embeddings(run.folder / "embeddings.png", panels, labels[rows], classes, run.config.seed)


@torch.inference_mode()
def _active_features(run: Run, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Label features h of all active validation pairs [n, E] under a stage's model, and their classes [n]."""
    model = restore_model(load_checkpoint(run.folder / f"{stage}.pt")).to(run.device)
    forward = run.forward_of(model)
    vectors, classes = [], []
    for inputs, labels in run.val_batches():
        features = forward(inputs.to(run.device), contrastive=False).label_features.cpu()
        image, category = (labels == 1).nonzero(as_tuple=True)
        vectors.append(features[image, category])
        classes.append(category)
    return torch.cat(vectors).numpy(), torch.cat(classes).numpy()
