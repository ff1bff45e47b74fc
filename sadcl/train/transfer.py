"""Starting from another run's weights, with other labels: VOC from COCO, or any set from any other by label name."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from sadcl.checkpoint import CheckpointError, load_checkpoint, restore_model
from sadcl.compat import load_released_checkpoint
from sadcl.data.text import normal
from sadcl.model import SADCL
from sadcl.train.config import TrainConfig

__all__ = ["VOC_FROM_COCO", "class_rows", "init_from"]

# For each of VOC's 20 labels its row among COCO's 80 (both in their usual order), as published.
VOC_FROM_COCO = (4, 1, 14, 8, 39, 5, 2, 15, 56, 19, 60, 16, 17, 3, 0, 58, 18, 57, 6, 62)
CONTRASTIVE = ("head.projection.", "head.prototypes", "head.memory_bank.")  # step 2 makes these anew


def class_rows(ours: Sequence[str], theirs: Sequence[str] | int) -> list[int | None]:
    """For each of our labels the row of theirs, or None where they have none of that name.

    Args:
        ours: our label names.
        theirs: their label names, or how many there are if the names are not known.
    """
    count = theirs if isinstance(theirs, int) else len(theirs)
    voc = len(ours) == 20 and {"aeroplane", "tvmonitor"} <= {name.lower() for name in ours}
    if voc and count == 80:
        return list(VOC_FROM_COCO)
    if isinstance(theirs, int):
        if theirs == len(ours):
            return list(range(theirs))
        raise ValueError(
            f"model.init_from: holds {theirs} labels without names and we have {len(ours)}; expected model.class_map"
        )
    rows = {_plain(name): row for row, name in enumerate(theirs)}
    return [rows.get(_plain(name)) for name in ours]


def init_from(model: SADCL, config: TrainConfig, classes: Sequence[str]) -> str:
    """Put the weights of ``config.model.init_from`` into a step-1 model; labels that are new start as they are.

    Returns:
        What was done, in words.

    Raises:
        CheckpointError: no readable checkpoint.
        ValueError: the weights do not fit the model, or the class map the weights.
    """
    path = config.model.init_from
    assert path
    other, theirs = _read(path, config)
    rows = config.model.class_map
    found = class_rows(classes, theirs) if rows is None else list(rows)
    if len(found) != len(classes) or any(row is not None and not 0 <= row < other.num_classes for row in found):
        raise ValueError(
            f"model.class_map: expected {len(classes)} rows, one a label, each below {other.num_classes}, got {rows}"
        )
    given = {name: value for name, value in other.state_dict().items() if not name.startswith(CONTRASTIVE)}
    state = model.state_dict()
    known = [(ours, row) for ours, row in enumerate(found) if row is not None]
    if not known:
        raise ValueError(f"model.init_from: {path} has none of the labels {', '.join(classes)}; expected a class_map")
    ours, rows_of = (torch.tensor(side, device="cpu") for side in zip(*known, strict=True))
    for name in ("head.queries", "head.classifier.weight", "head.classifier.bias"):
        if given[name].shape[1:] == state[name].shape[1:]:
            mixed = state[name].clone()
            mixed[ours] = given[name][rows_of].to(mixed)
            given[name] = mixed
    wrong = sorted(name for name in state.keys() & given.keys() if state[name].shape != given[name].shape)
    wrong += sorted(state.keys() ^ given.keys())
    if wrong:
        raise ValueError(f"model.init_from: {path} is another network: {', '.join(wrong[:4])} ({len(wrong)} differ)")
    model.load_state_dict(given)
    fresh = [classes[i] for i, row in enumerate(found) if row is None]
    return f"weights of {path}: {len(known)} labels taken over" + (f"; new: {', '.join(fresh)}" if fresh else "")


def _read(path: str, config: TrainConfig) -> tuple[SADCL, Sequence[str] | int]:
    """The model of a checkpoint, ours or a released one, and its label names if it has them."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint (model.init_from)")
    try:
        content = load_checkpoint(path)
    except CheckpointError:
        if config.model.backbone not in ("resnet101", "torchvision:resnet101"):
            raise
        released = load_released_checkpoint(path)
        return released, released.num_classes
    return restore_model(content), content["classes"]


def _plain(name: str) -> str:
    """The same name however it is written: ``Dining table``, ``dining_table`` and ``diningtable`` are one label."""
    return "".join(letter for letter in normal(name).lower() if letter.isalnum())
