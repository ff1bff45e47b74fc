"""A checkpoint's predictions for VOC's evaluation server, which alone knows the labels of the 2012 test set."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from sadcl.checkpoint import CheckpointError, load_checkpoint, restore_model
from sadcl.data.voc import VOC_CLASSES, VocDataset, write_voc_results
from sadcl.train.config import TrainConfig, config_from_dict
from sadcl.train.console import bar

__all__ = ["voc_archive"]


@torch.inference_mode()
def voc_archive(
    checkpoint: str | os.PathLike[str], path: str | os.PathLike[str], root: str | None = None, split: str = "test"
) -> tuple[Path, int, int]:
    """Predict a split of VOC 2012 and write the archive for the evaluation server.

    Args:
        checkpoint: a file of ``sadcl train`` with VOC's 20 labels.
        path: of the archive, ``.tar.gz``.
        root: the folder with ``VOCdevkit``; default: that of the checkpoint's config.
        split: which list of ``ImageSets/Main``.

    Returns:
        The archive, the number of pictures, and the competition it is for: 2 if the backbone started from
        pretrained weights or the run from another checkpoint, else 1.
    """
    content = load_checkpoint(checkpoint)
    classes = tuple(content["classes"])
    if sorted(classes) != sorted(VOC_CLASSES):
        raise CheckpointError(f"{checkpoint}: its labels are not VOC's 20")
    config: TrainConfig = config_from_dict(content["config"])
    root = root or config.data.root
    if not root:
        raise ValueError("root: expected the folder with VOCdevkit, since the checkpoint's config names none")
    images = VocDataset(root, 2012, split, config.data.image_size, classes, empty_images="keep")
    model = restore_model(content)
    batches = DataLoader(images, 64, num_workers=config.data.workers)
    # Logits, not probabilities: near 1 those would tie.
    logits = [
        model(model.preprocessing(pictures), contrastive=False).logits.float()
        for pictures, _ in bar(batches, desc="predict", unit="batch")
    ]
    competition = 2 if config.model.pretrained or config.model.init_from else 1
    scores = torch.cat(logits)
    return (
        write_voc_results(path, images.ids, scores, classes=classes, competition=competition),
        len(images),
        competition,
    )
