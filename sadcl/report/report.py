"""What is left when a run is over: the table, ``metrics.json``, and the pictures."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sadcl.checkpoint import load_checkpoint, write_atomically
from sadcl.commands.evaluate import attention_maps, predictions, restore_model
from sadcl.metrics import MultilabelReport
from sadcl.model import SADCL
from sadcl.report.plots import embeddings_figure, plot_attention, plot_curves, plot_scenes, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sadcl.train.run import Run

__all__ = ["Look", "StageOutputs", "draw", "stage_outputs", "summary", "table"]

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
        "protocol": f"{reports[final].protocol}; {run.images.protocol}; {_chosen(run, final)}",
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


@dataclass
class StageOutputs:
    """What the model of a finished stage says of the validation pictures.

    Attributes:
        model: in eval mode.
        scores: probabilities [n, C] on the CPU.
        labels: [n, C].
        features: label features h [P, E] of all active (image, label) pairs.
        pair_classes: [P] their classes.
    """

    model: SADCL
    scores: Tensor
    labels: Tensor
    features: np.ndarray
    pair_classes: np.ndarray


@torch.inference_mode()
def stage_outputs(run: Run, stage: str) -> StageOutputs:
    """Run the model that a stage ended with over the validation pictures."""
    model = restore_model(load_checkpoint(run.folder / f"{stage}.pt")).to(run.device)
    forward = run.forward_of(model)
    scores, truth, vectors, classes = [], [], [], []
    for inputs, labels in run.val_batches():
        output = forward(inputs.to(run.device), contrastive=False)
        image, category = (labels == 1).nonzero(as_tuple=True)
        scores.append(output.logits.float().sigmoid().cpu())
        truth.append(labels)
        vectors.append(output.label_features.float().cpu()[image, category])
        classes.append(category)
    features, pair_classes = torch.cat(vectors).numpy(), torch.cat(classes).numpy()
    return StageOutputs(model, torch.cat(scores), torch.cat(truth), features, pair_classes)


def draw(run: Run, reports: dict[str, MultilabelReport], metrics: dict[str, Any]) -> None:
    """Write report.html, and scenes.png, curves.png, attention.png and embeddings.png, into the run's folder."""
    from sadcl.report.page import Shown, report_page

    classes = list(run.images.classes)
    training = [run.images.train[i] for i in range(min(18, len(run.images.train)))]  # type: ignore[arg-type]
    names = [", ".join(classes[i] for i in (labels == 1).nonzero().flatten()) for _, labels in training]
    plot_scenes(run.folder / "scenes.png", [image for image, _ in training], names, f"training: {run.images.title}")
    plot_curves(run.folder / "curves.png", run.history)
    final = list(reports)[-1]
    outputs = stage_outputs(run, final)
    looks = _looks(run, outputs.model)
    if looks:
        heading = "where the model looks for its four most probable labels (green: it is there, red: it is not)"
        titles = [", ".join(classes[i] for i in (look.labels == 1).nonzero().flatten()) for look in looks]
        pictures, maps = [look.picture for look in looks], [look.attention for look in looks]
        chosen = [predictions(look.probabilities, classes, 4, look.labels) for look in looks]
        plot_attention(run.folder / "attention.png", pictures, titles, maps, chosen, heading)
    scatter = _embeddings(run, outputs) if final == "step2" else None
    if scatter is not None:
        save_figure(scatter, run.folder / "embeddings.png")
    page = report_page(Shown(run.folder.name, metrics, reports, outputs, looks, scatter, run.config.as_yaml()))
    write_atomically(run.folder / "report.html", lambda file: file.write(page.encode("utf-8", "replace")))


@dataclass
class Look:
    """A validation picture and where the model looks in it: ``picture`` uint8 [3, H, W], ``labels`` and
    ``probabilities`` [C], ``attention`` [C, h, w]."""

    picture: Tensor
    labels: Tensor
    probabilities: Tensor
    attention: Tensor


def _looks(run: Run, model: SADCL) -> list[Look]:
    """The first validation pictures with two labels or more: not the best ones."""
    looks: list[Look] = []
    for index in range(len(run.images.val)):  # type: ignore[arg-type]
        picture, labels = run.images.val[index]
        if (labels == 1).sum() >= 2:
            looks.append(Look(picture, labels, *attention_maps(model, picture)))
        if len(looks) == OVERLAY_IMAGES:
            break
    return looks


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
