"""Feature maps of a frozen backbone, computed once and kept in files that training reads from.

A side of the data is a folder of shards: safetensors files of :data:`SHARD_IMAGES` images each, with the maps in
float16 and the labels, and in their metadata what they belong to. A shard is written whole or not at all, so an
extraction that was killed goes on with the first that is missing; files are mapped into memory, so a set may be larger
than it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sadcl.checkpoint import make_folder, write_atomically
from sadcl.head import Maps

__all__ = ["SHARD_IMAGES", "FeatureDataset", "ShardError", "cached_features"]

SHARD_IMAGES = 256


class ShardError(ValueError):
    """A file of feature maps is not what it should be; the message begins with its path."""


class FeatureDataset(Dataset[tuple[Maps, Tensor]]):
    """Feature maps with their labels.

    Args:
        shards: of each shard its maps, tensors [n, channels, H, W] in any floating type, one for every map of an image.
            All but the last hold the same number of images.
        labels: [sum of n, C] float32.

    Items are (map float32 [channels, H, W], or a tuple of them where there are several; labels float32 [C]).
    """

    def __init__(self, shards: Sequence[Sequence[Tensor]], labels: Tensor) -> None:
        counts = [len(shard[0]) for shard in shards]
        if sum(counts) != len(labels) or any(count != counts[0] for count in counts[:-1]):
            raise ValueError(f"expected {len(labels)} feature maps in shards of one size, got shards of {counts}")
        self.shards, self.labels, self.size = shards, labels, counts[0]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Maps, Tensor]:
        """The maps and labels of an image."""
        maps = tuple(part[index % self.size].float() for part in self.shards[index // self.size])
        return (maps if len(maps) > 1 else maps[0]), self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Maps, Tensor]]:
        """A whole batch at once (the DataLoader asks for it)."""
        return [self[index] for index in indices]


def cached_features(
    images: Dataset[tuple[Tensor, Tensor]],
    extract: Callable[[Tensor], Maps],
    path: Path,
    key: dict[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 1,
    progress: Callable[..., Any] | None = None,
) -> FeatureDataset:
    """Run ``extract`` over all images, once; shards that were made with the same ``key`` are used again.

    Args:
        images: items (uint8 [3, H, W], labels [C]).
        extract: uint8 batch [b, 3, H, W] -> feature maps [b, channels, h, w], or several of them, without gradient.
        path: writes the folder ``<path>.<key hash>`` with a file a shard.
        key: everything the features depend on, as JSON values.
        batch_size: images per call of ``extract``.
        workers: processes that draw or decode images.
        progress: wraps the batches, e.g. tqdm.

    Raises:
        ShardError: a shard is cut off, or another's; with ``SADCL_CHECK=1`` in the environment also: it has other bits
            than those that were written.
        ValueError: a file or a link that leads nowhere is in the place of a folder.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = path.with_name(f"{path.name}.{digest}")
    make_folder(folder)
    count: int = len(images)  # type: ignore[arg-type]
    starts = range(0, count, SHARD_IMAGES)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    batches = [
        list(range(first, min(first + batch_size, starts[number] + SHARD_IMAGES, count)))
        for number in missing
        for first in range(starts[number], min(starts[number] + SHARD_IMAGES, count), batch_size)
    ]
    if batches:
        loader: Any = DataLoader(images, batch_sampler=batches, num_workers=workers)
        pieces: list[tuple[Tensor, ...]] = []  # of the shard that is being filled: labels and maps of its batches
        for batch, labels in loader if progress is None else progress(loader):
            maps = extract(batch)
            maps = (maps,) if isinstance(maps, Tensor) else maps
            pieces.append((labels, *(part.to("cpu", torch.float16).contiguous() for part in maps)))
            number = missing[0]
            if sum(len(piece[0]) for piece in pieces) == min(SHARD_IMAGES, count - starts[number]):
                labels, *maps = (torch.cat(parts) for parts in zip(*pieces, strict=True))
                _write(files[number], digest, number, labels, maps)
                pieces = []
                missing.pop(0)
    read = [_read(file, digest, number, min(SHARD_IMAGES, count - starts[number])) for number, file in enumerate(files)]
    return FeatureDataset([maps for _, maps in read], torch.cat([labels for labels, _ in read]))


def _write(file: Path, digest: str, number: int, labels: Tensor, maps: Sequence[Tensor]) -> None:
    from safetensors.torch import save

    content = {"labels": labels, **{f"map{i}": part for i, part in enumerate(maps)}}
    sums = {f"crc32.{name}": str(_checksum(value)) for name, value in content.items()}
    whole = save(content, {"key": digest, "shard": str(number), **sums})
    write_atomically(file, lambda stream: stream.write(whole))


def _read(file: Path, digest: str, number: int, count: int) -> tuple[Tensor, list[Tensor]]:
    """Labels of a shard, in memory, and its maps, mapped."""
    from safetensors import safe_open

    again = "delete it, and the next run makes it again"
    try:
        with safe_open(file, "pt") as content:
            about = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (no mapping)
    except Exception as error:
        raise ShardError(f"{file}: cut off, or no file of feature maps ({error}); {again}") from error
    if about.get("key") != digest or about.get("shard") != str(number):
        of = f"shard {about.get('shard')} of key {about.get('key')}" if "shard" in about else "no shard"
        raise ShardError(f"{file}: expected shard {number} of key {digest}, this is {of}; {again}")
    maps = [tensors[f"map{i}"] for i in range(len(tensors) - 1)]
    if any(len(part) != count for part in tensors.values()):
        raise ShardError(f"{file}: expected {count} images, got {len(tensors['labels'])}; {again}")
    for name, value in tensors.items():
        checked = name == "labels" or os.environ.get("SADCL_CHECK") == "1"  # maps: every byte would be read
        if checked and about.get(f"crc32.{name}") != str(_checksum(value)):
            raise ShardError(f"{file}: {name} has other bits than were written; {again}")
    return tensors["labels"].clone(), maps


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
