"""Feature maps of a frozen backbone, computed once and kept in a file that training reads from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["FeatureDataset", "cached_features"]


class FeatureDataset(Dataset[tuple[Tensor, Tensor]]):
    """Feature maps (float16 in a memory-mapped file, handed out as float32) with their labels.

    Args:
        features: [n, channels, H, W] array.
        labels: [n, C] float32.
    """

    def __init__(self, features: np.ndarray, labels: Tensor) -> None:
        if len(features) != len(labels):
            raise ValueError(f"expected as many feature maps as label rows, got {len(features)} and {len(labels)}")
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(feature map float32 [channels, H, W], labels float32 [C])."""
        return torch.from_numpy(self.features[index].astype(np.float32)), self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A whole batch at once (the DataLoader asks for it)."""
        return [self[index] for index in indices]


def cached_features(
    images: Dataset[tuple[Tensor, Tensor]],
    extract: Callable[[Tensor], Tensor],
    path: Path,
    key: dict[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 1,
    progress: Callable[..., Any] | None = None,
) -> FeatureDataset:
    """Run ``extract`` over all images, once; a file that was made with the same ``key`` is used again.

    Args:
        images: items (uint8 [3, H, W], labels [C]).
        extract: uint8 batch [b, 3, H, W] -> feature maps [b, channels, h, w], without gradient.
        path: file stem; writes ``<path>.<key hash>.npy`` (features) and ``.labels.npy``, both atomically.
        key: everything the features depend on, as JSON values.
        batch_size: images per call of ``extract``.
        workers: processes that draw or decode images.
        progress: wraps the batches, e.g. tqdm.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    features_file = path.with_name(f"{path.name}.{digest}.npy")
    labels_file = path.with_name(f"{path.name}.{digest}.labels.npy")
    if not (features_file.is_file() and labels_file.is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        _extract_all(images, extract, features_file, labels_file, batch_size, workers, progress)
    features = np.load(features_file, mmap_mode="r")
    return FeatureDataset(features, torch.from_numpy(np.load(labels_file)))


def _reserve(path: Path) -> None:
    """Claim the disk space of a sparse file: written through a map, a full disk would end the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    size = f"{path.stat().st_size / 1e6:.0f} MB"
                    raise OSError(error.errno, f"no room for {size} of feature maps", str(path.parent)) from error


def _extract_all(
    images: Dataset[tuple[Tensor, Tensor]],
    extract: Callable[[Tensor], Tensor],
    features_file: Path,
    labels_file: Path,
    batch_size: int,
    workers: int,
    progress: Callable[..., Any] | None,
) -> None:
    batches: Any = DataLoader(images, batch_size, num_workers=workers)
    if progress is not None:
        batches = progress(batches)
    unfinished = features_file.with_suffix(f".{os.getpid()}.part")
    table: np.ndarray | None = None
    labels: list[Tensor] = []
    count = len(images)  # type: ignore[arg-type]
    try:
        done = 0
        for batch, batch_labels in batches:
            maps = extract(batch).to("cpu", torch.float16).numpy()
            if table is None:
                shape = (count, *maps.shape[1:])
                table = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float16, shape=shape)
                _reserve(unfinished)
            table[done : done + len(maps)] = maps
            labels.append(batch_labels)
            done += len(maps)
        assert table is not None
        table.flush()  # type: ignore[attr-defined]
        del table
        unfinished_labels = labels_file.with_suffix(f".{os.getpid()}.part.npy")
        np.save(unfinished_labels, torch.cat(labels).numpy())
        os.replace(unfinished_labels, labels_file)
        os.replace(unfinished, features_file)  # last: a features file says that both are whole
    finally:
        unfinished.unlink(missing_ok=True)
