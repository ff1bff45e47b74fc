"""One's own pictures from a list: each line is ``path,label;label;...`` (no label at all is allowed)."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sadcl.data.images import ImageFileError, load_rgb

__all__ = ["CsvDataset", "image_tensor"]


class CsvDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pictures listed in a UTF-8 CSV file; relative paths are relative to the file's folder.

    Args:
        path: the list, ``path,label;label`` a line; a first line ``path,labels`` is taken as a header.
        image_size: pictures are resized to this square.
        classes: the label names, in order; default: those that occur, sorted.

    Raises:
        ImageFileError: the list is missing or empty, a line has more than two columns, a picture it names
            does not exist (here), or cannot be decoded (when it is read).
        ValueError: a label that is not among ``classes``.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int, classes: Sequence[str] | None = None) -> None:
        self.image_size = image_size
        self.items: list[tuple[Path, tuple[str, ...]]] = []
        if not os.path.isfile(path):
            raise ImageFileError(path, "no such list of pictures")
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row or (number == 1 and row[0].strip().lower() == "path"):
                    continue
                if len(row) > 2:
                    raise ImageFileError(path, f"line {number}: expected `path,label;label`, got {len(row)} columns")
                names = tuple(name.strip() for name in row[1].split(";") if name.strip()) if len(row) == 2 else ()
                picture = Path(path).parent / row[0].strip()
                if not picture.is_file():
                    raise ImageFileError(picture, f"no such picture file (line {number} of {path})")
                self.items.append((picture, names))
        if not self.items:
            raise ImageFileError(path, "lists no picture")
        seen = sorted({name for _, names in self.items for name in names})
        self.classes = tuple(classes) if classes is not None else tuple(seen)
        self.index = {name: i for i, name in enumerate(self.classes)}
        if unknown := [name for name in seen if name not in self.index]:
            raise ValueError(f"{path}: label {unknown[0]!r} is not one of the classes: {', '.join(self.classes)}")
        if not self.classes:
            raise ValueError(f"{path}: no picture has a label")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture ``index``: (RGB uint8 [3, H, W], labels float32 [C] of 0 and 1)."""
        path, names = self.items[index]
        labels = torch.zeros(len(self.classes))
        labels[[self.index[name] for name in names]] = 1.0
        return image_tensor(path, self.image_size), labels


def image_tensor(path: str | os.PathLike[str], image_size: int) -> Tensor:
    """Decode a picture and resize it to a square: RGB uint8 [3, image_size, image_size]."""
    import numpy as np

    image = load_rgb(path).resize((image_size, image_size), 2)  # 2 = bilinear, antialiased
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
