"""Data for the examples: made from a seed, so that nothing has to be downloaded. Put your own in its place."""

from __future__ import annotations

import torch
from torch import Tensor

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.2, 0.2, 0.95)}
SHAPES = ("square", "frame", "cross")
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def table(rows: int, columns: int = 103, classes: int = 14, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A table like yeast's: features ``[rows, columns]`` and multi-hot labels ``[rows, classes]``, 1 to 8 a row.

    Neighbouring classes occur together; a class bends the features along its own line, to either side, by some amount.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(rows, 1, generator=generator) * classes
    distance = (torch.arange(classes) - centre).abs()
    distance = torch.minimum(distance, classes - distance)
    labels = (torch.rand(rows, classes, generator=generator) < (-distance / 1.8).exp()).float()
    labels[torch.arange(rows), centre[:, 0].long()] = 1
    directions = torch.randn(classes, columns, generator=torch.Generator().manual_seed(1))
    strength = 0.3 + torch.rand(rows, classes, generator=generator)
    strength *= torch.where(torch.rand(rows, classes, generator=generator) < 0.3, -1, 1)
    features = torch.tanh((labels * strength) @ directions / 3)
    return features + 0.6 * torch.randn(rows, columns, generator=generator), labels


def pictures(count: int, size: int = 32, seed: int = 0, allowed: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Pictures of one to three coloured shapes, uint8 ``[count, 3, size, size]``, and labels ``[count, 9]`` (NAMES).

    ``allowed`` lists the classes that may occur; all of them without it.
    """
    generator = torch.Generator().manual_seed(seed)
    images = 0.35 + 0.15 * torch.rand(count, 3, size, size, generator=generator)
    labels = torch.zeros(count, len(NAMES))
    classes = torch.tensor(allowed if allowed is not None else range(len(NAMES)))
    side, cells = size // 3, torch.arange(size // 3)
    edge = torch.minimum(cells, side - 1 - cells)  # 0 at the border
    masks = {"square": torch.ones(side, side), "frame": torch.minimum(edge[:, None], edge[None]) < side / 6}
    masks["cross"] = torch.maximum(edge[:, None], edge[None]) >= side / 2 - 1
    colours = [torch.tensor(colour) for colour in COLOURS.values()]
    for index in range(count):
        places = torch.randperm(9, generator=generator)
        for place in places[: 1 + int(torch.randint(3, (1,), generator=generator))].tolist():
            chosen = int(classes[torch.randint(len(classes), (1,), generator=generator)])
            mask = masks[SHAPES[chosen % 3]].bool()
            y, x = place // 3 * side, place % 3 * side
            part = images[index, :, y : y + side, x : x + side]
            images[index, :, y : y + side, x : x + side] = torch.where(mask, colours[chosen // 3][:, None, None], part)
            labels[index, chosen] = 1
    return (images.clamp(0, 1) * 255).to(torch.uint8), labels
