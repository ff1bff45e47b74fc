"""A table of features with several labels a row, split and standardised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sadcl._checks import check_label_values

__all__ = ["SIDES", "Side", "Table", "load_table"]

SIDES = ("train", "val", "test")
_SHARES = (0.5, 0.625)  # where the validation and the test rows begin, without a given split: as yeast's usual one


@dataclass(frozen=True)
class Side:
    """Rows: ``features [n, F]`` float32, ``labels [n, C]`` float32 of 0 and 1 (-1: ignored)."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Table:
    """The rows of a table in the file's order, and how many of them the file says are for what (None: nothing)."""

    name: str
    rows: Side
    sizes: tuple[int, int, int] | None

    def split(self, seed: int, resplit: bool) -> dict[str, Side]:
        """Training, validation and test rows; features with mean 0 and deviation 1 on the training rows."""
        count = len(self.rows.features)
        sizes = self.sizes
        order = torch.arange(count, device="cpu")
        if sizes is None or resplit:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
        if sizes is None:
            first, second = (int(share * count) for share in _SHARES)
            sizes = (first, second - first, count - second)
        features, labels = self.rows.features[order].split(sizes), self.rows.labels[order].split(sizes)
        mean, deviation = features[0].mean(0), features[0].std(0)
        scaled = [(part - mean) / torch.where(deviation > 0, deviation, 1.0) for part in features]
        return {name: Side(x, y) for name, x, y in zip(SIDES, scaled, labels, strict=True)}


def load_table(source: str) -> Table:
    """Read an npz file, or fetch ``openml:NAME[:VERSION]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: arrays are missing, do not fit together, or hold what is no label.
    """
    if source.startswith("openml:"):
        _, name, *version = source.split(":")
        return _checked(f"{name} (OpenML)", *_fetch(name, version), None)
    path = Path(source)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if {"features", "labels"} <= set(arrays):
        return _checked(path.stem, arrays["features"], arrays["labels"], None)
    needed = [f"{side}_{what}" for side in SIDES for what in ("features", "labels")]
    if missing := [name for name in needed if name not in arrays]:
        raise ValueError(
            f"{path}: expected arrays features and labels, or {', '.join(needed)}; {missing[0]} is missing"
        )
    sides = [arrays[name] for name in needed]
    for x, y, side in zip(sides[::2], sides[1::2], SIDES, strict=True):
        if len(x) != len(y):
            raise ValueError(f"{path}: expected as many {side}_labels as {side}_features, got {len(y)} and {len(x)}")
    sizes = (len(sides[0]), len(sides[2]), len(sides[4]))
    return _checked(path.stem, np.concatenate(sides[::2]), np.concatenate(sides[1::2]), sizes)


def _fetch(name: str, version: list[str]) -> tuple[Any, Any]:
    from sklearn.datasets import fetch_openml

    found = fetch_openml(name, version=int(version[0]) if version else "active", as_frame=False)
    return found.data, np.isin(found.target, ("TRUE", "True", "1", 1, True))  # words, in OpenML's multi-label sets


def _checked(name: str, features: Any, labels: Any, sizes: tuple[int, int, int] | None) -> Table:
    x, y = (torch.as_tensor(np.asarray(part, np.float32), device="cpu") for part in (features, labels))
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(f"{name}: expected features [n, F] and labels [n, C], got {list(x.shape)} and {list(y.shape)}")
    if min(sizes or (len(x) // 8,)) < 1:
        raise ValueError(f"{name}: expected rows to train, to validate and to test on, got {sizes or len(x)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name}: expected finite features")
    check_label_values(y)
    return Table(name, Side(x, y), sizes)
