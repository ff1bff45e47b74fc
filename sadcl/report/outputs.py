"""What the model of a finished stage says of the validation pictures, and where it looks in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sadcl.checkpoint import load_checkpoint, restore_model
from sadcl.head import move_maps
from sadcl.model import SADCL
from sadcl.train.run import Run

__all__ = ["Look", "StageOutputs", "attention_maps", "looks", "predictions", "said", "stage_outputs"]

OVERLAY_IMAGES = 8
LOOK_LABELS = 5  # of a picture, at most


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
        output = forward(move_maps(inputs, run.device), contrastive=False)
        image, category = (labels == 1).nonzero(as_tuple=True)
        scores.append(output.logits.float().sigmoid().cpu())
        truth.append(labels)
        vectors.append(output.label_features.float().cpu()[image, category])
        classes.append(category)
    features, pair_classes = torch.cat(vectors).numpy(), torch.cat(classes).numpy()
    return StageOutputs(model, torch.cat(scores), torch.cat(truth), features, pair_classes)


@dataclass
class Look:
    """A validation picture and where the model looks in it: ``picture`` uint8 [3, H, W], ``labels`` and
    ``probabilities`` [C], ``attention`` [C, h, w]."""

    picture: Tensor
    labels: Tensor
    probabilities: Tensor
    attention: Tensor


def looks(run: Run, model: SADCL) -> list[Look]:
    """The first validation pictures with two labels or more: not the best ones."""
    found: list[Look] = []
    for index in range(len(run.images.val)):  # type: ignore[arg-type]
        picture, labels = run.images.val[index]
        if (labels == 1).sum() >= 2:
            found.append(Look(picture, labels, *attention_maps(model, picture)))
        if len(found) == OVERLAY_IMAGES:
            break
    return found


def said(look: Look, thresholds: Tensor, most: int = LOOK_LABELS) -> list[int]:
    """The labels above their thresholds [C], the most probable first: at most so many, at least the first."""
    order = look.probabilities.argsort(descending=True).tolist()
    return [i for i in order if look.probabilities[i] > thresholds[i]][:most] or order[:1]


@torch.inference_mode()
def attention_maps(model: SADCL, image: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [C] and attention [C, h, w] (mean over heads) of one picture uint8 [3, H, W]."""
    device = next(model.parameters()).device
    output = model(model.preprocessing(image[None].to(device)), need_weights=True, contrastive=False)
    assert output.attention is not None
    return output.logits[0].sigmoid().cpu(), output.attention[0].mean(0).cpu()


def predictions(
    probabilities: Tensor, classes: list[str], count: int, truth: Tensor | None = None
) -> list[tuple[int, str, bool | None]]:
    """The ``count`` most probable labels: (index, caption, whether it is there or None if unknown)."""
    best = probabilities.topk(max(1, min(count, len(classes)))).indices.tolist()
    return [(i, f"{classes[i]} {probabilities[i]:.2f}", None if truth is None else bool(truth[i] == 1)) for i in best]
