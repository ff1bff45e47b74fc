"""``sadcl eval``: a checkpoint's figures on its validation images, or on a list of pictures."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from sadcl.checkpoint import CheckpointError, load_checkpoint, restore_model, thresholds_of
from sadcl.metrics import MultilabelAccumulator, MultilabelReport
from sadcl.metrics._inputs import Threshold
from sadcl.model import SADCL
from sadcl.train.config import TrainConfig, config_from_dict
from sadcl.train.console import bar
from sadcl.train.data import Pairs, load_validation

__all__ = ["evaluate_checkpoint"]


def evaluate_checkpoint(
    path: str | os.PathLike[str],
    pictures: str | None = None,
    root: str | None = None,
    threshold: float | str = 0.5,
    source: str = "csv",
    label_separator: str | None = None,
) -> tuple[MultilabelReport, str]:
    """Measure a checkpoint.

    Args:
        path: a file of ``sadcl train``.
        pictures: a list of pictures to measure on; default: the validation images of the checkpoint's own config.
        root: where the pictures of that config, or of the list, are now.
        threshold: of the precision and recall figures; ``"tuned"``: the checkpoint's own, one per class.
        source: what kind of list ``pictures`` is: csv, jsonl or coco_json.
        label_separator: what stands between the labels of its cells; default: as in training.

    Returns:
        The report, and what it was measured on in words.
    """
    content = load_checkpoint(path)
    model = restore_model(content)
    limits = thresholds_of(content, threshold) if isinstance(threshold, str) else threshold
    config: TrainConfig = config_from_dict(content["config"])
    data = config.data.validated_on(source, pictures) if pictures else config.data
    data = replace(data, root=root, val_folder=None) if root else data
    data = replace(data, label_separator=label_separator) if label_separator is not None else data
    images, classes, about = load_validation(data, config.seed, tuple(content["classes"]))
    if classes != tuple(content["classes"]):
        raise CheckpointError(f"{path}: its labels are not those of {about}")
    if threshold == "tuned" and not pictures:
        about += "; the thresholds were tuned on these pictures, so their precision and recall are optimistic"
    return _evaluate_pictures(model, images, limits, data.workers), about


@torch.inference_mode()
def _evaluate_pictures(model: SADCL, images: Pairs, threshold: Threshold, workers: int) -> MultilabelReport:
    seen = MultilabelAccumulator(threshold)
    for pictures, labels in bar(DataLoader(images, 64, num_workers=workers), desc="eval", unit="batch"):
        output = model(model.preprocessing(pictures), contrastive=False)
        seen.update(output.logits.sigmoid(), labels)
    return seen.compute()
