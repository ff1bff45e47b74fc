"""Augmentation of training pictures with torchvision's v2 transforms, the same for any worker and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sadcl.train.config import AugmentConfig

__all__ = ["Augmented", "MultiScaleCrop", "make_transform"]

GRAY = 128  # what RandAugment and cutout leave behind: about 0 once the picture is normalised


class MultiScaleCrop(v2.Transform):
    """Crop a rectangle whose width and height are drawn from fractions of the shorter side, and resize it.

    Width and height are drawn apart, but at most one place of the list apart, so that shapes stay near the square's.

    Args:
        size: side of the square result.
        scales: fractions of the shorter side, each in (0, 1].
    """

    def __init__(self, size: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.size, self.scales = size, sorted(scales, reverse=True)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the rectangle."""
        height, width = F.get_size(flat_inputs[0])
        first = _integer(len(self.scales))
        near = range(max(0, first - 1), min(len(self.scales), first + 2))
        second = near[_integer(len(near))]
        crop_width, crop_height = (max(1, round(min(height, width) * self.scales[i])) for i in (first, second))
        top, left = _integer(height - crop_height + 1), _integer(width - crop_width + 1)
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut it out and resize it."""
        return self._call_kernel(F.resized_crop, inpt, **params, size=[self.size, self.size], antialias=True)


def make_transform(config: AugmentConfig, size: int) -> v2.Transform:
    """Picture (PIL or uint8 tensor, any size) to augmented uint8 tensor ``[3, size, size]``.

    The crop comes first, on the picture as it was decoded; the rest works on the small square.
    """
    steps: list[Any] = []
    if config.crop_scales:
        steps.append(MultiScaleCrop(size, config.crop_scales))
    elif config.crop_min_area:
        steps.append(v2.RandomResizedCrop(size, scale=(config.crop_min_area, 1.0), antialias=True))
    else:
        steps.append(v2.Resize((size, size), antialias=True))
    steps.append(v2.ToImage())
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.rand_augment:
        steps.append(v2.RandAugment(config.rand_augment, config.magnitude, fill=GRAY))
    if config.cutout:
        area = config.cutout**2
        steps.append(v2.RandomErasing(1.0, (area, area), (1.0, 1.0), GRAY))
    return v2.Compose([*steps, v2.ToPureTensor()])


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """A data set whose pictures go through a random transform, seeded by (seed, epoch, index).

    So an item depends neither on the worker that made it, nor on the items before it, nor on where a run was resumed.

    Args:
        images: has ``load(index, at_least)`` -> (picture, labels); its sides are that long if the file's are.
        transform: random by torch's global generator, as torchvision's are; see :func:`make_transform`.
        seed: of the run.
        at_least: pixels that a side should have before the transform; None: as decoded.
    """

    def __init__(self, images: Any, transform: Callable[[Any], Tensor], seed: int, at_least: int | None = None) -> None:
        self.images, self.transform, self.seed, self.at_least = images, transform, seed, at_least
        self._epoch = torch.zeros(
            (), dtype=torch.int64, device="cpu"
        ).share_memory_()  # workers outlive an epoch and must see it

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch (from 0) the next items belong to; workers that are already running see it too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Item ``index`` of the current epoch: (uint8 [3, H, W], labels [C])."""
        picture, labels = self.images.load(index, self.at_least)
        seed = np.random.SeedSequence([self.seed, int(self._epoch), index]).generate_state(1, np.uint64)
        # Not fork_rng and manual_seed: those also reach a GPU's generator, whose dropout would then repeat.
        before = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(int(seed[0]))
            return self.transform(picture), labels
        finally:
            torch.set_rng_state(before)


def _integer(below: int) -> int:
    return int(torch.randint(below, (), device="cpu"))
